"""The rules that every committed notebook keeps, each a function that yields one sentence per breach.

`python -m tests.notebook_rules [NOTEBOOK ...]` applies all of them without running anything.
`python -m tests.notebook_rules --claims` adds the notebooks' claims to tests/claims.json; `--forget` drops lost ones.
"""

import argparse
import ast
import builtins
import hashlib
import io
import json
import math
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from layers.tutorial.checks import messages
from tests import ROOT, committed

CLAIMS = ROOT / "tests" / "claims.json"
LONGEST_CELL, LONGEST_MEDIAN, FEWEST_CLAIM_CELLS = 25, 6, 3
# Magics that cannot fail unseen. `!cmd` and `%pip` can: IPython goes on after a non-zero exit code.
MAGICS = {"matplotlib", "config", "timeit", "time"}
MACHINE_PATH = re.compile(r"/(home|root|Users|work|tmp)/|[A-Z]:\\\\+Users")

Notebook = nbformat.NotebookNode


def read(path: Path) -> Notebook:
    """Read a notebook as nbformat 4."""
    return nbformat.read(path, as_version=4)


def write(notebook: Notebook, path: Path) -> None:
    """Write a notebook in the one layout that the repository uses: a second write changes nothing."""
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def code_cells(notebook: Notebook) -> list[Notebook]:
    """Return the code cells that have a source."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def python(source: str) -> str:
    """Return a cell's source with magics written as the Python calls that IPython makes of them."""
    return TransformerManager().transform_cell(source)


def parsed(source: str) -> ast.Module | None:
    """Return the syntax tree of a cell's source, None where it is no Python."""
    try:
        return ast.parse(python(source))
    except SyntaxError:
        return None


def tags(cell: Notebook) -> list[str]:
    """Return a cell's tags."""
    return cell.metadata.get("tags", [])


# --- stamps -----------------------------------------------------------------------------------------------------------


def code_hash(notebook: Notebook) -> str:
    """SHA-256 of the code cells; the public address is left out, so that setting it leaves every stamp fresh."""
    sources = json.dumps([cell.source for cell in code_cells(notebook)])
    return hashlib.sha256(re.sub(r"https://github\.com/[\w.-]+/[\w.-]+", "ADDRESS", sources).encode()).hexdigest()


def what_runs(source: str) -> str:
    """Return Python source without comments, docstrings and empty lines, which change no output."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines[docstring.lineno - 1 : docstring.end_lineno] = [""] * (docstring.end_lineno - docstring.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def kernels_hash(root: Path = ROOT) -> str:
    """SHA-256 over the names of layers/**/*.py and what runs of them."""
    total = hashlib.sha256()
    for file in sorted((root / "layers").rglob("*.py")):
        parts = file.relative_to(root).as_posix(), what_runs(file.read_text(encoding="utf-8"))
        total.update("".join(f"{part}\0" for part in parts).encode())
    return total.hexdigest()


def kernels_changed(notebook: Notebook, root: Path = ROOT) -> bool:
    """Return whether layers/ changed since the notebook's outputs were made."""
    return notebook.metadata.get("flashkan", {}).get("kernels") != kernels_hash(root)


def fresh_stamp(notebook: Notebook) -> Iterator[str]:
    """The outputs come from these code cells: the stamp holds their hash."""
    stamp = notebook.metadata.get("flashkan", {})
    missing = [key for key in ("code", "kernels", "python", "torch", "device", "date") if not stamp.get(key)]
    if missing:
        yield f"the stamp lacks {', '.join(missing)}: run python -m tests.execute"
    elif stamp["code"] != code_hash(notebook):
        yield "stale stamp, the code cells changed since the outputs were made: run python -m tests.execute"


# --- what a reader finds in the file ----------------------------------------------------------------------------------


def numbered(notebook: Notebook) -> Iterator[str]:
    """The cells ran once, in order, from a fresh kernel: execution counts 1..n."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if not counts:
        yield "no code cell"
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are not 1..{len(counts)}: {counts}"
    if any(cell.cell_type == "code" and not cell.source.strip() for cell in notebook.cells):
        yield "an empty code cell"


def no_errors(notebook: Notebook) -> Iterator[str]:
    """No output is an error, nor the UsageError that IPython prints for an unknown magic."""
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"code cell {number}: error output {output.ename}: {output.evalue}"
            if "UsageError" in json.dumps(output):
                yield f"code cell {number}: UsageError in its output"


def nothing_hides_errors(notebook: Notebook) -> Iterator[str]:
    """No tag or metadata makes a runner skip a cell, swallow an error or replace a value."""
    if notebook.metadata.get("execution", {}).get("allow_errors"):
        yield "metadata.execution.allow_errors hides errors"
    for number, cell in enumerate(notebook.cells, 1):
        for tag in {"raises-exception", "skip-execution"} & set(tags(cell)):
            yield f"cell {number}: the tag {tag} hides what the cell does; use try/except and print the message"
        if "nbmake" in cell.metadata:
            yield f"cell {number}: nbmake metadata changes what the cell computes"


def no_silent_commands(notebook: Notebook) -> Iterator[str]:
    """No `!command`, `%pip` or unknown magic: IPython goes on after they fail."""
    allowed = ", ".join(f"%{magic}" for magic in sorted(MAGICS))
    for number, cell in enumerate(code_cells(notebook), 1):
        if parsed(cell.source) is None:
            yield f"code cell {number}: invalid syntax"
        for call in ast.walk(parsed(cell.source) or ast.Module()):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).startswith("get_ipython().")):
                continue
            method, first = call.func.attr, call.args[0] if call.args else None
            name = (str(first.value).split() or [""])[0] if isinstance(first, ast.Constant) else ""
            if method not in ("run_line_magic", "run_cell_magic") or name not in MAGICS:
                sign = "!" if method in ("system", "getoutput") else "%"
                yield f"code cell {number}: {sign}{name} may fail unseen; write it in Python (allowed: {allowed})"


def clean_metadata(notebook: Notebook) -> Iterator[str]:
    """Kernel python3, cell ids cell-1..n, no timing noise, no widget state: two runs differ only where outputs do."""
    name = notebook.metadata.get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"kernel {name}, not python3"
    if [cell.get("id") for cell in notebook.cells] != [f"cell-{i}" for i in range(1, len(notebook.cells) + 1)]:
        yield "cell ids are not cell-1..n: run python -m tests.execute"
    for number, cell in enumerate(notebook.cells, 1):
        if "execution" in cell.metadata or "timestamp" in json.dumps(cell.metadata):
            yield f"cell {number}: timing noise in its metadata"
    if "widgets" in notebook.metadata or "jupyter.widget" in json.dumps([c.outputs for c in code_cells(notebook)]):
        yield "widget state, which no reader of the file can see; use text progress bars (from tqdm import tqdm)"


def no_machine_paths(notebook: Notebook) -> Iterator[str]:
    """No path of someone's machine in an output or a source."""
    for number, cell in enumerate(notebook.cells, 1):
        found = MACHINE_PATH.search(json.dumps([cell.source, cell.get("outputs", [])]))
        if found:
            yield f"cell {number}: a path of someone's machine ({found.group()}…)"


def readable_cells(notebook: Notebook) -> Iterator[str]:
    """Short cells and at least one picture."""
    lengths = [len(cell.source.strip().splitlines()) for cell in code_cells(notebook)] or [0]
    for number, length in enumerate(lengths, 1):
        if length > LONGEST_CELL:
            yield f"code cell {number}: {length} lines, at most {LONGEST_CELL}"
    if statistics.median(lengths) > LONGEST_MEDIAN:
        yield f"the median code cell has {statistics.median(lengths):g} lines, at most {LONGEST_MEDIAN}"
    kinds = {kind for cell in code_cells(notebook) for output in cell.outputs for kind in output.get("data", {})}
    if not kinds & {"image/png", "image/svg+xml"}:
        yield "no picture"


def bound(tree: ast.AST) -> set[str]:
    """Return the names that a piece of Python gives a value: assigned, imported, defined, or a parameter."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            found.add(node.asname or node.name.split(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def complete_solutions(notebook: Notebook) -> Iterator[str]:
    """Solutions of exercises, which no run executes, are Python and use only names that the notebook has."""
    known = set(dir(builtins)).union(*(bound(parsed(cell.source) or ast.Module()) for cell in code_cells(notebook)))
    for number, cell in enumerate(notebook.cells, 1):
        for source in re.findall(r"```python\n(.*?)```", cell.source, re.S) if cell.cell_type == "markdown" else ():
            tree = parsed(source)
            if tree is None:
                yield f"cell {number}: a solution with invalid syntax"
                continue
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            if missing := sorted(used - known - bound(tree)):
                yield f"cell {number}: a solution uses {', '.join(missing)}, which the notebook does not have"


# --- claims -----------------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Return text without Markdown signs, case and surplus space: what two spellings of one sentence share."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", re.sub(r"[*_`$\\]", "", text)).strip().casefold()


def blocks(markdown: str) -> list[str]:
    """Split Markdown into normalised paragraphs, headings and list items."""
    apart = re.sub(r"^(#+ .*)$", r"\n\1\n", markdown, flags=re.M)
    apart = re.sub(r"^\s*(?:[-*+>]|\d+\.|#+)\s+", "\n\n", apart, flags=re.M)
    return [normalised(block) for block in re.split(r"\n\s*\n", apart)]


def paired(message: str, markdown: str) -> str | None:
    """Return the sentence of `markdown` that an assert's message opens with, or None.

    The sentence comes whole, from one end of a sentence (or of a paragraph) to the next; after it the message may go on
    with ` (`, `: `, `; ` or `, ` and measured values.
    """
    ends = [len(message)] + [match.start() for match in re.finditer(r" \(|[:;,] ", message)][::-1]
    for end in ends:
        sentence = message[:end].strip().rstrip(".!?:;,(").strip()
        if len(sentence.split()) >= 3:
            whole = r"(?:^|[.!?][)\"”]* )" + re.escape(normalised(sentence)) + r"(?:[.!?]|$)"
            if any(re.search(whole, block) for block in blocks(markdown)):
                return sentence
    return None


def walk_claims(notebook: Notebook) -> Iterator[tuple[int, str, str | None]]:
    """Yield (number of the code cell, message, its sentence in the markdown above or None) for each assert."""
    above, number = "", 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            above = cell.source
        elif cell.cell_type == "code" and cell.source.strip():
            number += 1
            for message in messages(python(cell.source)):
                yield number, message or "", paired(message, above) if message else None


def claims(notebook: Notebook) -> list[str]:
    """Return the sentences that the notebook asserts, in order, each once."""
    return list(dict.fromkeys(sentence for _, _, sentence in walk_claims(notebook) if sentence))


def paired_claims(notebook: Notebook) -> Iterator[str]:
    """Each assert repeats a sentence of the markdown right above it, and each `not_checked` a claim of the notebook."""
    found = list(walk_claims(notebook))
    for number, message, sentence in found:
        if sentence is None:
            said = (
                f"{message!r} repeats no sentence of the markdown above it"
                if message
                else "no message (a string literal)"
            )
            yield f"code cell {number}: assert with {said}"
    if len({number for number, _, _ in found}) < FEWEST_CLAIM_CELLS:
        yield f"fewer than {FEWEST_CLAIM_CELLS} cells that assert"
    asserted = {normalised(sentence) for sentence in claims(notebook)}
    for number, cell in enumerate(code_cells(notebook), 1):
        for call in ast.walk(parsed(cell.source) or ast.Module()):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "not_checked":
                said = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
                if not isinstance(said, str) or normalised(said).rstrip(".!?") not in asserted:
                    yield f"code cell {number}: not_checked({said!r}) names no claim that this notebook asserts"


def kept_claims(notebook: Notebook, name: str) -> Iterator[str]:
    """Every claim listed in tests/claims.json is still made, and every claim made is listed."""
    listed = json.loads(CLAIMS.read_text(encoding="utf-8")).get(name, []) if CLAIMS.exists() else []
    made = claims(notebook)
    for claim in listed:
        if normalised(claim) not in map(normalised, made):
            yield f"lost a claim listed in tests/claims.json: {claim!r}"
    for claim in made:
        if normalised(claim) not in map(normalised, listed):
            yield f"a claim that is not listed: {claim!r}; run python -m tests.notebook_rules --claims"


def list_claims(forget: bool = False) -> None:
    """Add the claims of all notebooks to tests/claims.json; with `forget`, drop those no longer made."""
    listed = json.loads(CLAIMS.read_text(encoding="utf-8")) if CLAIMS.exists() and not forget else {}
    for path in committed():
        made = claims(read(path))
        lost = [claim for claim in listed.get(path.name, []) if normalised(claim) not in map(normalised, made)]
        listed[path.name] = made + lost
    CLAIMS.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- a fresh run against the committed outputs ------------------------------------------------------------------------


def texts(cell: Notebook) -> dict[str, str]:
    """Return the text of a cell's outputs: one entry for each stream and each kind of text shown (plain, HTML, …)."""
    found: dict[str, str] = {}
    for output in cell.outputs:
        shown = {kind: text + "\n" for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
        for name, text in ({output.name: output.text} if output.output_type == "stream" else shown).items():
            found[name] = found.get(name, "") + text
    return found


def same_text(first: str, second: str) -> bool:
    """Compare words and integers exactly, numbers with a decimal point or an exponent within 0.1 %.

    Two numbers below 1e-6 count as equal; object addresses and lines that say "checked here" do not count.
    """
    number = r"([-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?)"
    split = []
    for text in (first, second):
        lines = [
            line.rstrip() for line in re.sub(r"0x[0-9a-f]+", "0x", text).splitlines() if "checked here" not in line
        ]
        split.append(re.split(number, "\n".join(lines).strip()))
    if len(split[0]) != len(split[1]):
        return False
    for index, (a, b) in enumerate(zip(*split, strict=True)):
        decimal = index % 2 == 1 and re.search(r"[.e]", a + b)
        if decimal and not (math.isclose(float(a), float(b), rel_tol=1e-3) or max(abs(float(a)), abs(float(b))) < 1e-6):
            return False
        if not decimal and a != b:
            return False
    return True


def different_outputs(committed: Notebook, fresh: Notebook) -> Iterator[str]:
    """A fresh run prints what the file holds, in every code cell without the tag `varies`."""
    for number, (old, new) in enumerate(zip(code_cells(committed), code_cells(fresh), strict=True), 1):
        was, now = texts(old), texts(new)
        for name in [] if "varies" in tags(old) else sorted(was.keys() | now.keys()):
            if not same_text(was.get(name, ""), now.get(name, "")):
                yield (
                    f"code cell {number}, {name}: the file holds\n{was.get(name, '')}\nand a fresh run gave\n"
                    f"{now.get(name, '')}\n(tag the cell `varies` if this depends on the machine)"
                )


RULES = (
    fresh_stamp,
    numbered,
    no_errors,
    nothing_hides_errors,
    no_silent_commands,
    clean_metadata,
    no_machine_paths,
    readable_cells,
    complete_solutions,
    paired_claims,
)


def breaches(path: Path) -> list[str]:
    """Return every breach of every rule in one notebook."""
    notebook = read(path)
    found = [breach for rule in RULES for breach in rule(notebook)]
    return found + (list(kept_claims(notebook, path.name)) if path in committed() else [])


def main(arguments: list[str] | None = None) -> int:
    """Print the breaches and return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.notebook_rules", description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all committed notebooks unless some are named")
    parser.add_argument("--claims", action="store_true", help="add the notebooks' claims to tests/claims.json first")
    parser.add_argument("--forget", action="store_true", help="with --claims: drop the claims that are gone")
    chosen = parser.parse_args(arguments)
    if chosen.claims:
        list_claims(chosen.forget)
    paths = [path.resolve() for path in chosen.notebooks] or committed()
    found = [f"{path.name}: {breach}" for path in paths for breach in breaches(path)]
    print("\n".join(found) or f"{len(paths)} notebooks keep every rule")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
