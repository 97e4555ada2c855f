"""The committed notebooks keep every rule, their links lead somewhere, their setup cells find or clone the tree."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import nbformat.v4 as v4
import pytest

from tests import ROOT, committed, execute, links, snapshot
from tests import notebook_rules as rules
from tests.notebook_rules import code_cells, read

every_notebook = pytest.mark.parametrize("path", committed(), ids=lambda path: path.name)


def test_the_four_chapters_exist():
    names = [path.name[:2] for path in committed()]
    assert names[:4] == ["01", "02", "03", "04"], f"notebooks found: {names}"


@every_notebook
@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_rule(path, rule):
    assert list(rule(read(path))) == [], f"{path.name} breaks the rule: {rule.__doc__}"


@every_notebook
def test_no_claim_is_lost(path):
    assert list(rules.kept_claims(read(path), path.name)) == []


def test_claims_are_of_existing_notebooks():
    listed = json.loads(rules.CLAIMS.read_text(encoding="utf-8"))
    assert set(listed) == {path.name for path in committed()}


@every_notebook
@pytest.mark.filterwarnings("always:.*layers changed:UserWarning")
def test_layers_are_those_of_the_outputs(path):
    """A warning, never a failure: whoever has no GPU cannot make a GPU's outputs again."""
    notebook = read(path)
    if rules.kernels_changed(notebook):
        device = notebook.metadata.get("flashkan", {}).get("device", "an unknown device")
        warnings.warn(f"{path.name}: layers changed since its outputs were made on {device}", stacklevel=1)


def test_generated_parts_are_up_to_date():
    assert links.update(check=True) == [], "run python -m tests.links"


def test_every_link_and_badge_leads_to_a_file():
    assert list(links.broken()) == []


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A clone address on this disk that serves the working tree as it is now."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    tree = snapshot(tmp_path_factory.mktemp("published") / "FlashKAN")
    author = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "--no-gpg-sign", "-m", "snapshot"]):
        subprocess.run(["git", *command], cwd=tree, check=True, capture_output=True)
    return tree.as_uri()


@every_notebook
def test_runs_in_an_empty_folder(path, tmp_path, published, monkeypatch):
    """From a clone of this tree each finds what it imports.

    The chapter that trains runs to its end, for there is no MNIST; unless there is none here either, and nbmake did that.
    """
    notebook = read(path)
    cells = code_cells(notebook)
    assert cells[0].source == links.SETUP.replace("{address}", links.public_address(), 1), "run python -m tests.links"
    if path.name[:2] != "04" or not (ROOT / "data" / "MNIST").is_dir():
        notebook.cells = cells[:2]
    notebook.cells.append(v4.new_code_cell("import layers, data\nprint(layers.__file__)\nprint(data.__file__)"))
    monkeypatch.setenv("FLASHKAN_REPO", published)
    execute.run(notebook, tmp_path)
    found = notebook.cells[-1].outputs[-1].text.split()
    assert found == [str(tmp_path / "FlashKAN" / name / "__init__.py") for name in ("layers", "data")]


def run_setup(folder, address):
    """Run the setup cell alone in `folder`, with `address` to clone from; return what it printed of `layers`."""
    environment = {**os.environ, "FLASHKAN_REPO": address}
    environment.pop("PYTHONPATH", None)
    program = links.SETUP + "\nimport layers.tutorial\nprint(layers.tutorial.__file__)"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)


def test_setup_cell_uses_the_clone_it_made(tmp_path, published):
    for address in (published, "no address"):
        done = run_setup(tmp_path, address)
        assert done.stdout.strip() == str(tmp_path / "FlashKAN/layers/tutorial/__init__.py"), done.stderr


def test_setup_cell_fails_in_one_sentence(tmp_path):
    done = run_setup(tmp_path, (tmp_path / "nowhere").as_uri())
    assert done.returncode != 0
    assert "RuntimeError: This notebook needs the repository, but cloning file://" in done.stderr


def test_setup_cell_finds_the_repository_from_its_folders(tmp_path):
    tree = snapshot(tmp_path / "elsewhere")
    for folder in (tree, tree / "notebooks"):
        done = run_setup(folder, "no address")
        assert done.stdout.strip() == str(tree / "layers/tutorial/__init__.py"), done.stderr
