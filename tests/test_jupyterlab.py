"""What a reader sees: notebook 01 in JupyterLab in a headless Chromium, Run All from the menu, every picture drawn.

The notebook is a copy without outputs in a copy of the tree. The screenshot stays in the test's temporary folder, or in
the folder that FLASHKAN_SCREENSHOTS names.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests import committed, snapshot
from tests.notebook_rules import code_cells, no_errors, read, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MINUTES = 4  # for one notebook on a busy two-core machine

pytestmark = pytest.mark.browser


def pictures(notebook):
    """Count the pictures among a notebook's outputs."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum(bool({"image/png", "image/svg+xml"} & set(output.get("data", {}))) for output in outputs)


@pytest.fixture
def lab(tmp_path):
    """JupyterLab serving a copy of the tree, with settings of its own; yields (address, root of the copy)."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    pytest.importorskip("playwright", reason="playwright is not installed")
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
    root = snapshot(tmp_path / "tree", data=True)
    settings = tmp_path / "settings" / "@jupyterlab"
    for extension, values in {
        "notebook-extension/tracker": {"windowingMode": "none"},  # keep all cells in the page, to count them
        "apputils-extension/notification": {"fetchNews": "false"},
    }.items():
        file = settings / f"{extension}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "PYTHONWARNINGS")}
    environment |= {
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
    }
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", f"--notebook-dir={root}"]
    options += ["--IdentityProvider.token=", "--ServerApp.ip=127.0.0.1"]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "jupyterlab.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], cwd=root, env=environment, stdout=out, stderr=out
        )
        try:
            wait_for(address, server, log)
            yield address, root
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_for(address, server, log):
    """Return when the server answers; fail with its log when it does not."""
    for _ in range(240):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


def photograph(page, name, folder):
    """Save a picture of the whole notebook, as far down as Chromium can draw."""
    folder = Path(os.environ.get("FLASHKAN_SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    height = page.evaluate("document.querySelector('.jp-NotebookPanel .jp-WindowedPanel-outer').scrollHeight")
    page.set_viewport_size({"width": 1200, "height": min(height + 200, 16_000)})
    page.evaluate("document.querySelector('.jp-NotebookPanel .jp-WindowedPanel-outer').scrollTop = 0")
    page.wait_for_timeout(1000)
    page.screenshot(path=str(folder / f"{name}.png"))


def test_run_all_in_jupyterlab(lab, tmp_path):
    from playwright.sync_api import sync_playwright

    address, root = lab
    path = root / "notebooks" / committed()[0].name
    notebook = read(path)
    expected, count = pictures(notebook), len(code_cells(notebook))
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    write(notebook, path)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(MINUTES * 60_000)
        page.goto(f"{address}/lab/tree/notebooks/{path.name}?reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # the status bar: the kernel has started
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.innerText.trim())"
        # Over when cells have numbers and none is waiting: after an error the rest have neither.
        over = f"(p => p.some(x => /\\d/.test(x)) && !p.some(x => x.includes('*')))({prompts})"
        try:
            page.wait_for_function(over)
            page.wait_for_timeout(1000)  # let the last pictures be drawn
        finally:
            photograph(page, path.stem, tmp_path)
        seen = page.evaluate(prompts)
        widths = page.evaluate("[...document.querySelectorAll('.jp-OutputArea-output img')].map(i => i.naturalWidth)")
        formulas = page.locator("mjx-merror").count()
        before = path.stat().st_mtime_ns
        page.keyboard.press("Control+s")
        for _ in range(300):  # half a minute to save
            if path.stat().st_mtime_ns != before:
                break
            page.wait_for_timeout(100)
        browser.close()

    assert list(no_errors(read(path))) == [], "an error output in JupyterLab"
    assert seen == [f"[{number}]:" for number in range(1, count + 1)], "not every cell ran once, in order"
    assert len(widths) == expected and expected > 0, f"{len(widths)} pictures drawn, {expected} in the committed file"
    assert all(widths), "a picture is broken"
    assert formulas == 0, "a formula that MathJax cannot read"
