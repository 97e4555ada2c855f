"""The tools that keep the notebooks honest catch what they name: rules, execution, witness, links, closing()."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat.v4 as v4
import pytest

from tests import ROOT, execute, faults, links, snapshot
from tests import notebook_rules as rules
from tests.notebook_rules import code_cells, read, write

# --- the rules, on samples --------------------------------------------------------------------------------------------

PICTURE = v4.new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})


def sample():
    """A small notebook that keeps every rule."""
    cells = [v4.new_markdown_cell("# 1. A sample\n\nIt shows that one and one are two.")]
    for word in ("one", "two", "three"):
        cells.append(v4.new_markdown_cell(f"A line before. The number **{word}** is *positive*.\n\n- And a list."))
        cells.append(
            v4.new_code_cell(f'x = 1\nassert x > 0, f"The number {word} is positive (it is {{x}})"\nprint(0.5, x)')
        )
        cells[-1].outputs = [v4.new_output("stream", name="stdout", text="0.5 1\n")]
    cells[-1].outputs.append(PICTURE.copy())
    notebook = v4.new_notebook(cells=cells)
    execute.clean(notebook)
    execute.stamp(notebook, 1.0)
    return notebook


def breaches(notebook):
    return "\n".join(breach for rule in rules.RULES for breach in rule(notebook))


def test_a_good_notebook_keeps_every_rule():
    assert breaches(sample()) == ""


def append(notebook, source):
    notebook.cells.append(v4.new_code_cell(source, execution_count=4, id="cell-8"))


BREAKS = {
    "code cells changed": lambda n: n.cells[2].update(source=n.cells[2].source + "\n"),
    "stamp lacks device": lambda n: n.metadata.flashkan.pop("device"),
    "not 1..3": lambda n: n.cells[2].update(execution_count=2),
    "error output ValueError": lambda n: n.cells[2].outputs.append(
        v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    ),
    "UsageError in its output": lambda n: n.cells[2].outputs[0].update(text="UsageError: Line magic function"),
    "raises-exception hides": lambda n: n.cells[2].metadata.update(tags=["raises-exception"]),
    "skip-execution hides": lambda n: n.cells[2].metadata.update(tags=["skip-execution"]),
    "nbmake metadata": lambda n: n.cells[2].metadata.update(nbmake={"mock": {"x": 2}}),
    "allow_errors": lambda n: n.metadata.update(execution={"allow_errors": True}),
    "%pip may fail": lambda n: append(n, "%pip install nothing"),
    "!ls may fail": lambda n: append(n, "files = !ls"),
    "!make may fail": lambda n: append(n, "if True:\n    !make"),
    "%bash may fail": lambda n: append(n, "%%bash\nfalse"),
    "%no_such_magic may fail": lambda n: append(n, "%no_such_magic"),
    "invalid syntax": lambda n: append(n, "x = = 1"),
    "kernel julia": lambda n: n.metadata.kernelspec.update(name="julia"),
    "cell ids": lambda n: n.cells[1].update(id="b7f3"),
    "timing noise": lambda n: n.cells[2].metadata.update(execution={"iopub.status.busy": "2024"}),
    "widget state": lambda n: n.metadata.update(widgets={}),
    "someone's machine": lambda n: n.cells[2].outputs[0].update(text="/home/" + "ada/FlashKAN"),
    "26 lines": lambda n: n.cells[2].update(source="\n".join(["x = 1"] * 26)),
    "median code cell has 7": lambda n: [c.update(source=c.source + "\nx = 1" * 4) for c in code_cells(n)],
    "no picture": lambda n: n.cells[-1].outputs.pop(),
    "no code cell": lambda n: n.update(cells=n.cells[:1]),
    "an empty code cell": lambda n: append(n, " "),
    "a solution with invalid": lambda n: n.cells[1].update(source="```python\nanswer = = 1\n```\n" + n.cells[1].source),
    "a solution uses nn, which": lambda n: n.cells[1].update(
        source="```python\nanswer = nn.Linear(x, abs(x))\n```\n" + n.cells[1].source
    ),
    "no message": lambda n: append(n, "assert True"),
    "'The number three is negative' repeats no": lambda n: append(n, 'assert x, "The number three is negative"'),
    "fewer than 3 cells that assert": lambda n: n.cells[2].update(source="x = 1"),
    "names no claim": lambda n: append(n, 'not_checked("The number four is positive")'),
}


@pytest.mark.parametrize("said", BREAKS)
def test_rules_catch(said):
    notebook = sample()
    BREAKS[said](notebook)
    assert said in breaches(notebook)


def test_what_runs_is_all_but_comments_and_docstrings(tmp_path):
    source = '"""Text."""\n\nX = "a # b"  # why\n\n\ndef f():\n    """More\n    text."""\n    return """kept"""\n'
    assert rules.what_runs(source) == 'X = "a # b"\ndef f():\n    return """kept"""'
    (tmp_path / "layers").mkdir()
    hashes = []
    for changed in (source, source.replace("Text", "Word").replace("why", "how"), source.replace("a # b", "a # c")):
        (tmp_path / "layers" / "f.py").write_text(changed)
        hashes.append(rules.kernels_hash(tmp_path))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "source", ["%matplotlib inline", "%config InlineBackend.figure_format = 'svg'", "%timeit x", "%%time\nx"]
)
def test_harmless_magics_are_allowed(source):
    notebook = sample()
    append(notebook, source)
    assert list(rules.no_silent_commands(notebook)) == []


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Exactly k+1 bases are non-zero", "Exactly k+1 bases are non-zero"),
        ("exactly k+1 bases are non-zero.", "exactly k+1 bases are non-zero"),
        ("Exactly k+1 bases are non-zero (found 4)", "Exactly k+1 bases are non-zero"),
        ("Exactly k+1 bases are non-zero: 4, 5", "Exactly k+1 bases are non-zero"),
        ("The last one: no stop at its end", "The last one: no stop at its end"),
        ("an item of the list", "an item of the list"),
        ("k+1 bases are non-zero", None),  # not from the start of the sentence
        ("Exactly k+1 bases are", None),  # not to its end
        ("Exactly k+1 bases are negative", None),
        ("Two words", None),
    ],
)
def test_pairing(message, sentence):
    prose = "# Head\nFirst, e.g. this. Exactly `k+1` bases\nare **non-zero**. Two words.\n\n"
    prose += "* an item of the list\n\nThe last one: no stop at its end"
    assert rules.paired(message, prose) == sentence


def test_lost_and_unlisted_claims_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "CLAIMS", tmp_path / "claims.json")
    claims = ["The number one is positive", "The number ten is positive"]
    rules.CLAIMS.write_text(json.dumps({"01_sample.ipynb": claims}), encoding="utf-8")
    said = "\n".join(rules.kept_claims(sample(), "01_sample.ipynb"))
    assert "lost a claim listed in tests/claims.json: 'The number ten is positive'" in said
    assert "a claim that is not listed: 'The number two is positive'" in said
    assert "number one" not in said


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("4 of 103", "4 of 103", True),
        ("4 of 103", "5 of 103", False),
        ("error 1.2e-16", "error 3.1e-16", True),
        ("loss 0.1234", "loss 0.12341", True),
        ("loss 0.1234", "loss 0.1334", False),
        ("error 1.2e-16", "error 3.1e-3", False),
        ("tensor([1., 2.])", "tensor([1., 2.])", True),
        ("one word", "another word", False),
        ("nan", "0.5", False),
        ("<f at 0x7fa2>", "<f at 0x11b0>", True),
        (
            "3 claims asserted here, 1 not checked here:",
            "4 claims asserted here: everything above was checked here.",
            True,
        ),
    ],
)
def test_comparison_of_outputs(first, second, same):
    assert rules.same_text(first, second) is same


def test_changed_output_is_reported_unless_tagged():
    old, new = sample(), sample()
    new.cells[2].outputs[0].text = "0.5 2\n"
    assert "code cell 1, stdout" in "".join(rules.different_outputs(old, new))
    old.cells[2].metadata.tags = ["varies"]
    assert list(rules.different_outputs(old, new)) == []


# --- executing --------------------------------------------------------------------------------------------------------


def small(path, *sources):
    write(v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources]), path)
    return path


def test_execute_cleans_and_stamps(tmp_path):
    path = small(tmp_path / "a.ipynb", "import os\nprint(os.listdir())", "%matplotlib inline\n1 + 1")
    execute.execute(path, path)
    notebook = read(path)
    assert [*rules.fresh_stamp(notebook), *rules.numbered(notebook), *rules.clean_metadata(notebook)] == []
    assert notebook.cells[0].outputs[0].text == "['a.ipynb']\n"
    assert notebook.cells[1].outputs[0].data["text/plain"] == "2"
    assert execute.main(["--check", str(path)]) == 0
    notebook.cells[1].source = "1 + 2"
    write(notebook, path)
    assert execute.main(["--check", str(path)]) == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("%no_such_magic", "may fail unseen"),
        ("%timeit -z x", "UsageError"),
        ("!false", "may fail unseen"),
        ("import warnings\nwarnings.warn('a doubt')", "UserWarning: a doubt"),
        ("import os\nos._exit(1)", "Kernel died"),
    ],
)
def test_execute_writes_nothing_when_a_cell_fails(tmp_path, capsys, source, said):
    path = small(tmp_path / "a.ipynb", "x = 1", source)
    before = path.read_bytes()
    assert execute.main([str(path)]) == 1
    assert said in capsys.readouterr().out
    assert path.read_bytes() == before


# --- nbmake, witnessed ------------------------------------------------------------------------------------------------


def nbmake(tree, *arguments):
    """Run the README's command in a copy of the tree that holds only what the test put there."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--nbmake",
        *arguments,
        "notebooks",
        "tests/test_nothing.py",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    """A copy of the tree without notebooks, whose tests/ has one test that passes."""
    tree = snapshot(tmp_path / "tree")
    shutil.rmtree(tree / "notebooks", ignore_errors=True)
    (tree / "notebooks").mkdir()
    (tree / "tests" / "test_nothing.py").write_text("def test_nothing():\n    pass\n", encoding="utf-8")
    return tree


def test_nbmake_runs_are_witnessed(tree):
    small(tree / "notebooks" / "empty.ipynb")
    small(tree / "notebooks" / "magic.ipynb", "x = 1", "%timeit -z x", "y = 1")
    small(tree / "notebooks" / "last.ipynb", "x = 1", "%no_such_magic")
    small(tree / "notebooks" / "command.ipynb", "!false")
    small(tree / "notebooks" / "warning.ipynb", "import warnings\nwarnings.warn('a doubt')")
    good = small(tree / "notebooks" / "good.ipynb", "print(0.5, 3)", "x = 1")
    execute.execute(good, good)
    shutil.copy(good, tree / "notebooks" / "stale.ipynb")
    notebook = read(tree / "notebooks" / "stale.ipynb")
    notebook.cells[0].outputs[0].text = "0.5 4\n"
    write(notebook, tree / "notebooks" / "stale.ipynb")
    done = nbmake(tree)
    assert "6 failed, 2 passed" in done.stdout, done.stdout
    assert "witnessed: 1 of 7 notebooks ran to the end, 2 code cells" in done.stdout
    for said in ("no code cell", "aborted before its end", "!false may fail", ": a doubt", "the file holds"):
        assert said in done.stdout, said


def test_a_notebook_that_nbmake_does_not_collect_is_an_error(tree):
    for name in ("one", "two"):
        small(tree / "notebooks" / f"{name}.ipynb", "x = 1")
    done = nbmake(tree, "--ignore=notebooks/two.ipynb")
    assert done.returncode != 0
    assert "nbmake collected 1 of 2 notebooks, not two.ipynb" in done.stderr


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def book(tree):
    """Two notebooks and a README that python -m tests.links has not seen yet."""
    for number, title in ((1, "One"), (2, "Two")):
        first = f"# {number}. {title}\n\nYou will see it. And more.\n\n"
        first += "**Time**: about 1 minute on a laptop CPU, about 20 s on an NVIDIA H200"
        notebook = v4.new_notebook(cells=[v4.new_markdown_cell(first), v4.new_code_cell("x = 1")])
        write(notebook, tree / "notebooks" / f"0{number}_sample.ipynb")
    (tree / "README.md").write_text(f"# Title\n\n{links.BEGIN}\n{links.END}\n\n[data](data)\n", encoding="utf-8")
    return tree


def test_links_are_written_once(book):
    assert links.update(book, check=True) == ["notebooks/01_sample.ipynb", "notebooks/02_sample.ipynb", "README.md"]
    assert links.update(book) != [] and links.update(book) == []
    first = read(book / "notebooks" / "01_sample.ipynb").cells
    assert first[0].source.endswith("H200\n\n[Next: 2. Two](02_sample.ipynb)")
    assert first[1].source == links.SETUP.replace("{address}", links.public_address(), 1)
    readme = (book / "README.md").read_text(encoding="utf-8")
    assert (
        "| [1. One](notebooks/01_sample.ipynb) | You will see it. | about 1 minute | about 20 s (NVIDIA H200) |"
        in readme
    )
    assert list(links.broken(book)) == []


def test_one_command_sets_the_address(book):
    links.update(book)
    before = [rules.code_hash(read(path)) for path in links.notebooks(book)]
    links.set_address("https://github.com/ada/fork", book)
    assert links.public_address(book) == "https://github.com/ada/fork"
    links.update(book)
    assert list(links.broken(book)) == []
    assert before == [rules.code_hash(read(path)) for path in links.notebooks(book)], "the address makes no stamp stale"
    for path in [*links.notebooks(book), book / "README.md", book / "pyproject.toml"]:
        text = path.read_text(encoding="utf-8")
        assert "ada/fork" in text and links.public_address().removeprefix("https://github.com/") not in text, path.name
    with pytest.raises(ValueError, match="must look like"):
        links.set_address("ada/fork", book)


def test_dead_links_are_found(book):
    links.update(book)
    (book / "README.md").write_text(
        "[gone](data/gone.csv) and [a badge](" + links.COLAB + "/x/y/blob/main/z.ipynb)", encoding="utf-8"
    )
    (book / "notebooks" / "02_sample.ipynb").rename(book / "notebooks" / "03_sample.ipynb")
    said = "\n".join(links.broken(book))
    for dead in (
        "data/gone.csv",
        "z.ipynb",
        "01_sample.ipynb: the link 02_sample.ipynb",
        "03_sample.ipynb: its first cell has no Colab badge",
    ):
        assert dead in said, said


# --- layers.tutorial --------------------------------------------------------------------------------------------------


def test_closing_counts_claims(tmp_path):
    start = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom layers.tutorial import closing, not_checked"
    claims = "x = 1\nif x:\n    assert x, f'One is true ({x})'\nassert x, 'One is not zero'\nclosing()"
    missed = "if x > 1:\n    assert x, 'A GPU is fast'\nelse:\n    not_checked('A GPU is fast')\nclosing()"
    path = small(tmp_path / "a.ipynb", start, claims, missed)
    execute.execute(path, path)
    text = [cell.outputs[0].text for cell in read(path).cells[1:]]
    assert text[0] == "2 claims asserted here: everything above was checked here.\n"
    assert re.search(r"^2 claims asserted here, 1 not checked here:\n  not checked here: A GPU is fast$", text[1], re.M)


# --- tests.faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_every_fault_still_fits_the_code(fault, tmp_path):
    """The long run, `python -m tests.faults`, is CI's; here each change must find its place."""
    fault.change(snapshot(tmp_path / "tree"))


def test_the_table_of_faults_is_complete():
    assert faults.TABLE.read_text(encoding="utf-8") == faults.table(), "run python -m tests.faults --table"
    named = " ".join(fault.name for fault in faults.FAULTS)
    for word in "accumulation sign cell row zero-fill stamp magic number MNIST badge".split():
        assert word in named


def test_a_fault_that_finds_no_place_says_so(tmp_path):
    (tmp_path / "a.py").write_text("x = 1", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold 'y' once, found 0"):
        faults.replace("a.py", "y", "z")(tmp_path)
