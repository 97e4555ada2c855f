"""What is generated around the notebooks: Colab badges, setup cells, navigation, the README's table.

    python -m tests.links                                             # write them
    python -m tests.links --check                                     # say what is out of date, write nothing
    python -m tests.links --address https://github.com/OWNER/NAME     # set the public address, then write

The public address stands in pyproject.toml, [project.urls] Repository; everything else follows from it.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import nbformat

from tests import ROOT
from tests.notebook_rules import Notebook, kernels_changed, read, write

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github"
BEGIN, END = "<!-- notebooks:begin -->", "<!-- notebooks:end -->"
CHANGED = " (layers changed since)"
TIME = re.compile(r"^\*\*Time\*\*: (.+?) on (?:an? )?([^,]*CPU[^,]*), (.+) on (?:an? |one )?(.+?)\.?$", re.M)
HOLDS_ADDRESS = ("pyproject.toml", "README.md", "CITATION.cff", ".github/**/*")

SETUP = """\
# Setup: find the repository here or above; elsewhere (Colab) clone it. Nothing is installed.
import os
import subprocess
import sys
from pathlib import Path

address = os.environ.get("FLASHKAN_REPO", "{address}")
root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "layers/bsplines.py").is_file()), Path("FlashKAN"))
if not (root / "layers").is_dir():
    os.environ["GIT_TERMINAL_PROMPT"] = "0"  # a wrong address fails instead of asking for a password
    git = subprocess.run(["git", "clone", "--depth", "1", address, str(root)], capture_output=True, text=True)
    if git.returncode:
        raise RuntimeError(f"This notebook needs the repository, but cloning {address} failed: {git.stderr.strip()}")
sys.path.insert(0, str(root.resolve()))"""


@dataclass(frozen=True)
class Opening:
    """What a notebook's first cell says: number, title, promise (first sentence), time on a CPU and on a named GPU."""

    number: int
    title: str
    promise: str
    cpu_time: str
    gpu_time: str
    gpu: str


def public_address(root: Path = ROOT) -> str:
    """Return the public address, without a slash at its end."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].rstrip("/")


def notebooks(root: Path = ROOT) -> list[Path]:
    """Return the notebooks under `root` in reading order."""
    return sorted((root / "notebooks").glob("*.ipynb"))


def badge(path: Path, address: str) -> str:
    """Return the Markdown of the notebook's Colab badge."""
    place = address.removeprefix("https://github.com/")
    return f"[![Open In Colab]({BADGE})]({COLAB}/{place}/blob/main/notebooks/{path.name})"


def paragraphs(notebook: Notebook) -> list[str]:
    """Return the first cell's paragraphs without the generated lines."""
    first = notebook.cells[0].source if notebook.cells and notebook.cells[0].cell_type == "markdown" else ""
    generated = ("[![Open In Colab]", "[Previous: ", "[Next: ")
    kept = "\n".join(line for line in first.splitlines() if not line.startswith(generated))
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", kept) if paragraph.strip()]


def opening(path: Path, notebook: Notebook) -> Opening:
    """Read the first cell; raise ValueError with one sentence where it lacks its heading, promise or Time line."""
    said = paragraphs(notebook)
    heading = re.fullmatch(r"# (\d+)\. (.+)", said[0]) if said else None
    if not heading or int(heading[1]) != int(re.match(r"\d*", path.name)[0] or -1):
        raise ValueError(f"{path.name}: the first cell must open with '# N. Title', N being the number of the file")
    time = TIME.search("\n\n".join(said))
    if not time:
        raise ValueError(
            f"{path.name}: the first cell needs '**Time**: … on a laptop CPU, … on an NVIDIA H200' on one line"
        )
    promise = next((p for p in said[1:] if not p.startswith("**Time**")), "")
    if not promise:
        raise ValueError(f"{path.name}: the first cell needs a paragraph that says what the reader will see")
    sentence = re.split(r"(?<=[.!?])\s", " ".join(promise.split()), maxsplit=1)[0]
    return Opening(int(heading[1]), heading[2].strip(), sentence, time[1], time[3], time[4])


def navigation(path: Path, openings: dict[Path, Opening]) -> str:
    """Return the line with the links to the previous and the next notebook."""
    order = list(openings)
    place = order.index(path)
    steps = []
    for word, index in (("Previous", place - 1), ("Next", place + 1)):
        if 0 <= index < len(order):
            there = openings[order[index]]
            steps.append(f"[{word}: {there.number}. {there.title}]({order[index].name})")
    return " · ".join(steps)


def refresh(path: Path, notebook: Notebook, openings: dict[Path, Opening], address: str) -> None:
    """Write badge, navigation and setup cell into a notebook, in place; outputs and stamp stay as they are."""
    heading, *rest = paragraphs(notebook)
    parts = [heading, badge(path, address), *rest, navigation(path, openings)]
    notebook.cells[0].source = "\n\n".join(part for part in parts if part)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    source = SETUP.replace("{address}", address, 1)
    if code and code[0].source.startswith(SETUP.splitlines()[0]):
        code[0].source = source
    else:
        notebook.cells.insert(1, nbformat.v4.new_code_cell(source))


def table(root: Path, openings: dict[Path, Opening], address: str) -> str:
    """Return the README's table of notebooks."""
    rows = [
        "| Notebook | What you will see | On a laptop CPU | On a GPU | Outputs made on | |",
        "|---|---|---|---|---|---|",
    ]
    for path, said in openings.items():
        notebook = read(path)
        stamp = notebook.metadata.get("flashkan", {})
        made = f"{stamp.get('device', 'not run')}, {stamp.get('date', '')}" + CHANGED * kernels_changed(notebook, root)
        name = f"[{said.number}. {said.title}](notebooks/{path.name})"
        times = f"{said.cpu_time} | {said.gpu_time} ({said.gpu})"
        rows.append(f"| {name} | {said.promise} | {times} | {made} | {badge(path, address)} |")
    return "\n".join(rows)


def with_table(readme: str, rows: str) -> str:
    """Return the README with its table of notebooks replaced; raise ValueError where the markers are missing."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END} around its table of notebooks")
    before, after = readme.split(BEGIN)[0], readme.split(END, 1)[1]
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def update(root: Path = ROOT, check: bool = False) -> list[str]:
    """Write all that is generated (or nothing, with `check`) and return the names of the files out of date."""
    address, stale = public_address(root), []
    openings = {path: opening(path, read(path)) for path in notebooks(root)}
    for path in openings:
        notebook, before = read(path), read(path)
        refresh(path, notebook, openings, address)
        if notebook != before:
            stale.append(f"notebooks/{path.name}")
            if not check:
                write(notebook, path)
    readme = root / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = with_table(old, table(root, openings, address))
    # Whoever changes a layer without a GPU at hand is not held up by the remark that the layers changed.
    if new.replace(CHANGED, "") != old.replace(CHANGED, "") or (new != old and not check):
        stale.append("README.md")
        if not check:
            readme.write_text(new, encoding="utf-8")
    return stale


def set_address(new: str, root: Path = ROOT) -> None:
    """Replace the public address in pyproject.toml and the texts that name it; notebooks follow by `update`."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", new):
        raise ValueError(f"--address must look like https://github.com/OWNER/NAME, got {new!r}")
    old = public_address(root)
    for pattern in HOLDS_ADDRESS:
        for file in root.glob(pattern):
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                for before, after in (
                    (old, new),
                    (old.replace("https://github.com", COLAB), new.replace("https://github.com", COLAB)),
                ):
                    text = re.sub(re.escape(before) + r"(?![\w-])", after, text)
                file.write_text(text, encoding="utf-8")


def broken(root: Path = ROOT) -> Iterator[str]:
    """Yield a sentence for every badge and relative link, in the README and the notebooks, that leads to no file."""
    here = f"{COLAB}/{public_address(root).removeprefix('https://github.com/')}/blob/main/"
    texts = [(root / "README.md", (root / "README.md").read_text(encoding="utf-8"))]
    for path in notebooks(root):
        cells = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
        texts.append((path, "\n\n".join(cells)))
        if not cells or f"({here}notebooks/{path.name})" not in cells[0]:
            yield f"{path.name}: its first cell has no Colab badge that opens it"
    for file, text in texts:
        for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
            if target.startswith(f"{COLAB}/"):
                if not target.startswith(here) or not (root / target.removeprefix(here)).is_file():
                    yield f"{file.name}: the badge {target} leads to no file of this repository"
            elif not re.match(r"[a-z]+:|#", target) and not (file.parent / unquote(target.split("#")[0])).exists():
                yield f"{file.name}: the link {target} leads to no file"


def main(arguments: list[str] | None = None) -> int:
    """Write or check what is generated; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.links", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--address", metavar="URL", help="set the public address first")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.address:
            set_address(chosen.address.rstrip("/"))
        stale = update(check=chosen.check)
    except ValueError as error:
        print(error)
        return 1
    dead = list(broken())
    print(
        "\n".join([f"{name}: {'out of date' if chosen.check else 'written'}" for name in stale] + dead)
        or "all up to date"
    )
    return bool(dead or (chosen.check and stale))


if __name__ == "__main__":
    sys.exit(main())
