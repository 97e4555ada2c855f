"""Run notebooks from a fresh kernel, clean what changes from run to run, stamp them, and write them if every cell ran.

    python -m tests.execute notebooks/01_*.ipynb     # on a CPU or a GPU; all notebooks if none is named
    python -m tests.execute --out results            # write there, leave the notebooks as they are
    python -m tests.execute --check                  # run nothing: are the stamps those of the code?

It needs nbclient, nbformat and ipykernel; no Jupyter server and no installed kernel. Warnings are errors in the kernel.
"""

import argparse
import datetime
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from tests import committed
from tests.notebook_rules import (
    Notebook,
    code_cells,
    code_hash,
    fresh_stamp,
    kernels_changed,
    kernels_hash,
    no_silent_commands,
    nothing_hides_errors,
    read,
    write,
)

# Every warning is an error, but for these (Python's -W syntax, the message from its start).
WARNINGS = ",".join(
    [
        "error",
        # Python 3.12 warns at each fork of a process that has threads, as a DataLoader's workers are made on Linux.
        "ignore:This process:DeprecationWarning",
        # python-dateutil before 2.9, which jupyter_client imports, under Python 3.12.
        "ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning",
        # PyTorch on a GPU, at the first cuBLAS call of the thread that goes backwards.
        "ignore:Attempting to run cuBLAS:UserWarning",
        # And where a graph is warmed up on a stream of its own, as PyTorch asks for.
        "ignore:The AccumulateGrad node:UserWarning",
        # tornado asks for the event loop, before ipykernel has made one, under Python 3.12.
        "ignore:There is no current event loop:DeprecationWarning",
        # ipykernel 7 warns about its own shutdown handler, and then cannot shut down.
        "ignore:For consistency across implementations:PendingDeprecationWarning",
        # matplotlib-inline warns about its own handler of `%config InlineBackend.figure_format = ...`.
        "ignore:InlineBackend._figure_format_changed:DeprecationWarning",
    ]
)


class NotebookFailed(Exception):
    """A cell raised, or the notebook holds what may fail unseen; the message says which and why."""


class ThisPython(KernelSpecManager):
    """Kernel python3 is the running interpreter, whatever is installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3 (ipykernel)", language="python")


def run(notebook: Notebook, folder: Path, progress: Callable[[str], None] = lambda line: None) -> None:
    """Run every code cell in `folder`, in place; raise NotebookFailed at the first that fails or could fail unseen."""
    silent = [*no_silent_commands(notebook), *nothing_hides_errors(notebook)]
    if silent or not code_cells(notebook):
        raise NotebookFailed("; ".join(silent) or "no code cell")
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # else no inline pictures
    environment["PYTHONWARNINGS"] = WARNINGS
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=ThisPython(), kernel_name="python3"),
        timeout=None,
        coalesce_streams=True,
        on_cell_execute=lambda cell, cell_index: progress(f"cell {cell_index + 1} of {len(notebook.cells)}"),
    )
    try:
        client.execute(cwd=str(folder), env=environment, cleanup_kc=True)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookFailed(re.sub(r"\x1b\[[\d;]*m", "", str(error))) from error


def clean(notebook: Notebook) -> None:
    """Remove what differs between two runs of the same code: ids, timing, widget state, editor settings."""
    tagged = {"tags"}
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in tagged}
        for output in cell.get("outputs", []):
            for kind in [kind for kind in output.get("data", {}) if "jupyter.widget" in kind]:
                del output.data[kind]
            if "metadata" in output:
                output.metadata = {}
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5


def stamp(notebook: Notebook, seconds: float) -> None:
    """Record in the metadata what the outputs were made from, on what and when."""
    notebook.metadata["flashkan"] = {
        "code": code_hash(notebook),
        "kernels": kernels_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
    }


def execute(path: Path, out: Path, progress: Callable[[str], None] = lambda line: None) -> float:
    """Run the notebook `path` in its own folder, write it cleaned and stamped to `out`, return the seconds it took."""
    notebook, start = read(path), time.monotonic()
    run(notebook, path.resolve().parent, progress)
    seconds = time.monotonic() - start
    clean(notebook)
    stamp(notebook, seconds)
    write(notebook, out)
    return seconds


def shown_on_terminal(name: str) -> Callable[[str], None]:
    """Return a function that keeps one line of progress on a terminal, and writes nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda line: None
    return lambda line: print(f"\r{name}: {line} ", end="", file=sys.stderr, flush=True)


def check(path: Path) -> list[str]:
    """Return why the notebook's outputs are not those of its code; changed layers are printed, and are no failure."""
    notebook = read(path)
    if kernels_changed(notebook):
        device = notebook.metadata.get("flashkan", {}).get("device", "no device")
        print(f"{path.name}: layers/ changed since its outputs were made on {device}")
    return list(fresh_stamp(notebook))


def main(arguments: list[str] | None = None) -> int:
    """Run or check the named notebooks; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.execute", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="all committed notebooks unless some are named")
    parser.add_argument("--check", action="store_true", help="run nothing, compare the stamps")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the results to this folder")
    chosen = parser.parse_args(arguments)
    failed = 0
    for path in chosen.notebooks or committed():
        if chosen.check:
            problems = check(path)
            print(f"{path.name}: {'; '.join(problems) or 'fresh'}")
            failed += bool(problems)
            continue
        if chosen.out:
            chosen.out.mkdir(parents=True, exist_ok=True)
        out = chosen.out / path.name if chosen.out else path
        start = time.monotonic()
        try:
            seconds = execute(path, out, shown_on_terminal(path.name))
            print(f"{path.name}: ran to the end in {seconds:.0f} s, written to {out}", flush=True)
        except NotebookFailed as error:
            print(f"{path.name}: FAILED after {time.monotonic() - start:.0f} s, nothing written\n{error}", flush=True)
            failed += 1
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
