"""The README's example runs and prints what the README says."""

import re
import subprocess
import sys

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
