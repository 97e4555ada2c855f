"""Break the code in known ways, in a copy, and require the checks to notice.

    python -m tests.faults                # all of them, a few minutes on two cores
    python -m tests.faults sign badge     # those whose name holds one of these words

A fault is caught when the check that must notice it passes on the tree as it is, fails on the broken one, and says why.
tests/FAULTS.md holds the table; `python -m tests.faults --table` writes it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat.v4 as v4

from tests import ROOT, snapshot
from tests.links import COLAB, notebooks
from tests.notebook_rules import claims, code_cells, normalised, read, tags, write

TABLE = ROOT / "tests" / "FAULTS.md"
PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Fault:
    """A way to break the tree: `change` does it, `check` (arguments of python) must then fail and print `says`."""

    name: str
    meaning: str
    change: Callable[[Path], None]
    check: tuple[str, ...]
    says: str
    control: bool = True  # run the check on the tree as it is first


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Return a change that replaces the one place in `file` that reads `old`."""

    def change(tree: Path) -> None:
        text = (tree / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{file} must hold {old!r} once, found {text.count(old)}; mend tests/faults.py")
        (tree / file).write_text(text.replace(old, new), encoding="utf-8")

    return change


def in_first_notebook(edit: Callable) -> Callable[[Path], None]:
    """Return a change that lets `edit` alter notebook 01."""

    def change(tree: Path) -> None:
        path = notebooks(tree)[0]
        notebook = read(path)
        before = str(notebook)
        edit(notebook)
        if str(notebook) == before:
            raise ValueError(f"{edit.__name__} finds nothing to change in {path.name}; mend tests/faults.py")
        write(notebook, path)

    return change


def edit_a_cell(notebook) -> None:
    code_cells(notebook)[-1].source += "  # a later thought"


def add_a_magic(notebook) -> None:
    notebook.cells.insert(3, v4.new_code_cell("%no_such_magic"))


def wrong_digit(match: re.Match) -> str:
    return str((int(match[0]) + 1) % 10)


def misquote_in_prose(notebook) -> None:
    """Change the last digit of the first claim that has one, in the prose alone."""
    claim = next(claim for claim in claims(notebook) if re.search(r"\d", claim))
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and normalised(claim) in normalised(cell.source):
            word = re.findall(r"\S*\d\S*", claim)[-1].strip("`*$.,;:()")
            cell.source = cell.source.replace(word, re.sub(r"\d(?=\D*$)", wrong_digit, word))
            return


def misquote_in_an_output(notebook) -> None:
    """Change the first digit of the first number that a cell prints, where its text is compared."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "varies" not in tags(cell) and re.search(r"\d", output.get("text", "")):
                output.text = re.sub(r"\d", wrong_digit, output.text, count=1)
                return


def kill_the_badge(notebook) -> None:
    notebook.cells[0].source = re.sub(rf"({COLAB}\S+/)\w+\.ipynb", r"\1moved.ipynb", notebook.cells[0].source)


def remove_a_file(tree: Path) -> None:
    raw = tree / "data" / "MNIST" / "raw"
    for file in raw.glob("t10k-labels*"):
        file.unlink()


FAULTS = (
    Fault(
        "dropped accumulation",
        "samples that share a coefficient overwrite each other's gradient",
        replace(
            "layers/flash/reference.py",
            "flat.index_add_(0, (features * weight.shape[1] + rows[..., r]).flatten(), parts.flatten(0, 1))",
            "flat[(features * weight.shape[1] + rows[..., r]).flatten()] += parts.flatten(0, 1)",
        ),
        (*PYTEST, "tests/test_operator.py", "-k", "test_values_and_gradients and reference and one and cell"),
        "d/dweight: off by",
    ),
    Fault(
        "flipped sign",
        "the derivative of a B-spline adds its two neighbours' terms the wrong way round",
        replace(
            "layers/bsplines.py",
            "(values[r - 1] if r > 0 else 0) - (values[r] if r < len(values) else 0)",
            "(values[r] if r < len(values) else 0) - (values[r - 1] if r > 0 else 0)",
        ),
        (*PYTEST, "tests/test_bsplines.py", "-k", "test_equals_scipy and 5-3-"),
        "test_equals_scipy",
    ),
    Fault(
        "shifted last cell",
        "inputs in the last interval are put one cell too low",
        replace("layers/bsplines.py", "floor.clamp(max=grid_size - 1)", "floor.clamp(max=grid_size - 2)"),
        (*PYTEST, "tests/test_bsplines.py", "-k", "test_equals_scipy or test_locate"),
        "FAILED tests/test_bsplines.py",
    ),
    Fault(
        "forgotten window row",
        "the gradient of x adds k rows of the window instead of k + 1",
        replace(
            "layers/flash/reference.py",
            'torch.einsum("bio,bo->bi", group[features, rows[..., r]], grad) for r in range(order + 1)',
            'torch.einsum("bio,bo->bi", group[features, rows[..., r]], grad) for r in range(order)',
        ),
        (*PYTEST, "tests/test_operator.py", "-k", "test_values_and_gradients and reference and one and cell"),
        "d/dx: off by",
    ),
    Fault(
        "skipped zero-fill",
        "the CPU kernel adds the gradient of the weights to whatever the memory held",
        replace("layers/flash/cpu.py", "local[:] = real(0)", "pass"),
        (*PYTEST, "tests/test_operator.py", "-k", "test_bit_identical and local and 1023x3x3"),
        "d/dweight: off by",
    ),
    Fault(
        "stale stamp",
        "a code cell is edited after the notebook ran",
        in_first_notebook(edit_a_cell),
        ("-m", "tests.execute", "--check"),
        "stale stamp",
    ),
    Fault(
        "failing magic",
        "a notebook holds a magic that does not exist, which nbmake takes for the end of the notebook",
        in_first_notebook(add_a_magic),
        ("-m", "tests.notebook_rules"),
        "%no_such_magic may fail unseen",
    ),
    Fault(
        "wrong number in prose",
        "a sentence names another number than the assert below it",
        in_first_notebook(misquote_in_prose),
        ("-m", "tests.notebook_rules"),
        "repeats no sentence of the markdown above it",
    ),
    Fault(
        "wrong number in an output",
        "a committed output holds another number than the code prints",
        in_first_notebook(misquote_in_an_output),
        (*PYTEST, "--nbmake", "tests/__init__.py", "{first}"),
        "and a fresh run gave",
        control=False,  # the test command of the README is its control, and takes a while
    ),
    Fault(
        "missing MNIST file",
        "one of the four files is not there",
        remove_a_file,
        ("-c", "from data import load_mnist; load_mnist(download=False)"),
        "t10k-labels-idx1-ubyte is missing",
    ),
    Fault(
        "dead badge",
        "a Colab badge names a notebook that does not exist",
        in_first_notebook(kill_the_badge),
        ("-m", "tests.links", "--check"),
        "moved.ipynb leads to no file of this repository",
    ),
)


def shown(check: tuple[str, ...]) -> str:
    """Return the command as a reader would type it."""
    hidden = ("-q", "-x", "-p", "no:cacheprovider")
    words = [f'"{word}"' if " " in word else word for word in check if word not in hidden]
    return "python " + " ".join(words).replace("{first}", "notebooks/01_*.ipynb")


def table() -> str:
    """Return the Markdown of tests/FAULTS.md."""
    head = """\
# Seeded faults

`python -m tests.faults` makes each of them in a copy of the tree. The command beside it passes before; it must fail
after and say why. This file is written by `python -m tests.faults --table`.

| Fault | What breaks | What notices |
|---|---|---|
"""
    return head + "".join(f"| {fault.name} | {fault.meaning} | `{shown(fault.check)}` |\n" for fault in FAULTS)


def passes(tree: Path, check: tuple[str, ...]) -> tuple[bool, str]:
    """Run a check in `tree`; return whether it passed, and what it printed."""
    command = [sys.executable, *(word.replace("{first}", str(notebooks(tree)[0])) for word in check)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def try_fault(fault: Fault, tree: Path, before: dict[tuple[str, ...], bool]) -> str:
    """Return "caught", or what went wrong. `before` remembers which checks passed on the tree as it is."""
    if not fault.control:
        before[fault.check] = True
    if fault.check not in before:
        before[fault.check], said = passes(tree, fault.check)
        if not before[fault.check]:
            print(said[-3000:])
    if not before[fault.check]:
        return "NOT CHECKED: the check fails on the tree as it is"
    kept = tree.with_name("kept")
    shutil.copytree(tree, kept, symlinks=True)
    try:
        fault.change(tree)
        passed, said = passes(tree, fault.check)
    finally:
        shutil.rmtree(tree)
        kept.rename(tree)
    if passed:
        return "MISSED: the check passes"
    return (
        "caught" if fault.says in said else f"MISSED: the check fails, but does not say {fault.says!r}:\n{said[-3000:]}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Try the faults, print the table, return 1 unless all are caught."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only faults whose name holds one of these words")
    parser.add_argument("--table", action="store_true", help="write tests/FAULTS.md and stop")
    chosen = parser.parse_args(arguments)
    if chosen.table:
        TABLE.write_text(table(), encoding="utf-8")
        return 0
    results, before = [], {}
    with tempfile.TemporaryDirectory() as folder:
        tree = snapshot(Path(folder) / "tree")
        raw = ROOT / "data" / "MNIST" / "raw"
        if raw.is_dir():  # links, so that one can be removed from the copy alone
            (tree / "data" / "MNIST" / "raw").mkdir(parents=True)
            for file in raw.iterdir():
                (tree / "data" / "MNIST" / "raw" / file.name).symlink_to(file)
        for fault in FAULTS:
            if not chosen.words or any(word in fault.name for word in chosen.words):
                start = time.monotonic()
                results.append(try_fault(fault, tree, before))
                print(f"{fault.name:28} {time.monotonic() - start:5.1f} s   {results[-1]}", flush=True)
    print(f"{results.count('caught')} of {len(results)} faults caught")
    return results.count("caught") != len(results)


if __name__ == "__main__":
    sys.exit(main())
