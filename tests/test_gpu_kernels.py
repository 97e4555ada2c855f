"""The Triton kernels are right, GPU or not: Triton's interpreter runs them on the CPU."""

import os
import subprocess
import sys

import pytest

from tests import ROOT


def test_the_kernels_agree_with_float64():
    pytest.importorskip("triton", reason="Triton comes with torch on Linux")
    run = subprocess.run(
        [sys.executable, "-m", "tests.interpreted"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "76 cases agree" in run.stdout
