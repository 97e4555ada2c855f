"""What nbmake does not see: that it found every notebook, and that each ran to its end with the outputs on record.

nbmake calls a notebook green when an unknown magic aborts it, when a `!command` in it fails and when it has no cells.
Here every run is witnessed instead. pytest reads this file when tests/ is on its command line, or when nothing is, so
`pytest --nbmake notebooks tests` is witnessed and `pytest --nbmake notebooks` alone is not.
"""

import functools
import os
from pathlib import Path
from unittest import mock

import nbclient
import nbmake.nb_run
import pytest
from nbmake.nb_result import NotebookError

from tests import NOTEBOOKS, ROOT, committed
from tests.execute import WARNINGS
from tests.notebook_rules import Notebook, code_cells, different_outputs, no_silent_commands, nothing_hides_errors, read

witnessed: dict[Path, int] = {}  # notebook: code cells that ran in it


class Witness(nbclient.NotebookClient):
    """Marks a notebook in which no cell stopped the run; nbmake alone takes some stops for success."""

    def execute(self, **options):
        done = super().execute(**options)
        self.nb.metadata["ran_to_end"] = True
        return done


def unseen(before: Notebook, after: Notebook) -> str | None:
    """Return why a run that nbmake calls green is not, or None. `before` is the file, `after` the run of it."""
    cells = code_cells(after)
    if not cells:
        return "the notebook has no code cell"
    if not after.metadata.get("ran_to_end"):
        return "the notebook was aborted before its end (an unknown magic?)"
    for number, cell in enumerate(cells, 1):
        if "iopub.execute_input" not in cell.metadata.get("execution", {}):
            return f"code cell {number} was not executed"
    return next(
        iter([*no_silent_commands(after), *nothing_hides_errors(before), *different_outputs(before, after)]), None
    )


def witness(run):
    """Wrap nbmake's NotebookRun.execute, so that what it misses becomes an error in its own report."""

    @functools.wraps(run)
    def execute(self):
        before = read(self.filename)
        # The kernel inherits this; pytest's -W and filterwarnings do not reach it.
        with mock.patch.dict(os.environ, PYTHONWARNINGS=WARNINGS):
            result = run(self)
        problem = None if result.error else unseen(before, result.nb)
        if problem:
            result.error = NotebookError(
                summary=problem, trace=f"{Path(self.filename).name}: {problem}", failing_cell_index=0
            )
        if not result.error:
            witnessed[Path(self.filename)] = len(code_cells(result.nb))
        return result

    return execute


def pytest_configure(config):
    if config.option.nbmake:
        nbmake.nb_run.NotebookClient = Witness
        nbmake.nb_run.NotebookRun.execute = witness(nbmake.nb_run.NotebookRun.execute)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Stop where the whole of notebooks/ was asked for and nbmake did not collect each file in it."""
    asked = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
    if config.option.nbmake and asked & {ROOT, NOTEBOOKS}:
        collected = {item.path for item in items if getattr(item, "nbmake", False)}
        missed = sorted(path.name for path in set(committed()) - collected)
        if missed:
            raise pytest.UsageError(
                f"nbmake collected {len(collected)} of {len(committed())} notebooks, not {', '.join(missed)}"
            )


def pytest_terminal_summary(terminalreporter, config):
    if config.option.nbmake:
        said = f"{len(witnessed)} of {len(committed())} notebooks ran to the end, {sum(witnessed.values())} code cells"
        terminalreporter.write_line(f"witnessed: {said}")
