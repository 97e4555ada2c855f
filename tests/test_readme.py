"""The README's example runs and prints what the README says."""

import csv
import re
import subprocess
import sys
import tomllib

from tests import ROOT


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_the_example_prints_what_it_says():
    (example,), (printed,) = blocks("python"), blocks("text")
    assert len(example.splitlines()) <= 10
    run = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == printed


def test_files_that_the_readme_names_exist():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / "README.md").read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing, f"README.md points to missing files: {missing}"


def test_what_the_layers_need_is_part_of_what_the_notebooks_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert project["dependencies"] and set(project["dependencies"]) <= lines


def test_its_times_are_those_of_the_files():
    doors = re.findall(r"^- \*\*I have (.+?)(?=^- |^$)", (ROOT / "README.md").read_text(), re.M | re.S)
    files = ("cpu", "eager", []), ("nvidia_h200", "graph", ["KANLinear compiled"])
    for door, (file, mode, others) in zip(doors, files, strict=True):
        with (ROOT / "data" / "timings" / f"{file}.csv").open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        said = [
            float(n) * {"µs": 1, "ms": 1e3, "s": 1e6}[unit] for n, unit in re.findall(r"([\d.]+) (µs|ms|s)\b", door)
        ]
        wanted = [(layer, G) for layer in ["FlashKAN", "KANLinear", *others] for G in ("5", "500")]
        assert len(said) == len(wanted), f"{door}: {said}"
        for number, (layer, G) in zip(said, wanted, strict=True):
            is_it = {"layer": layer, "G": G, "B": "200", "O": "10", "pass": "forward+backward", "mode": mode}
            is_it |= {"dtype": "float32", "tf32": "False"}
            (row,) = (row for row in rows if is_it.items() <= row.items())
            measured = float(row["median_us"])
            assert abs(number / measured - 1) < 0.03, (
                f"{layer} at G = {G}: README {number} µs, {file}.csv {measured} µs"
            )
