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
    assert "144 cases agree" in run.stdout


def test_no_part_of_a_sum_over_features_is_empty():
    """A program without features would read beyond the windows of the last one."""
    pytest.importorskip("triton")
    from layers.flash.gpu_many import many_tile

    for features in range(1, 1200):
        for samples, outputs, rows in ((1, 33, 8), (300, 64, 50), (1024, 512, 1003), (5, 700, 300)):
            split = many_tile(samples, features, rows, outputs, False, 132)[3]
            step = -(-features // split)
            assert (split - 1) * step < features <= split * step, (features, samples, outputs, rows)


@pytest.mark.parametrize(
    "setting, allowed",
    (
        ("cuda.matmul.allow_tf32 = True", True),
        ("cuda.matmul.fp32_precision = 'tf32'", True),
        ("fp32_precision = 'tf32'", True),
        ("cuda.matmul.fp32_precision = 'ieee'", False),
        ("cudnn.allow_tf32 = True", False),
    ),
)
def test_tf32_is_seen_in_the_old_setting_and_in_the_new(setting, allowed):
    """In a process of its own: PyTorch raises an error once both have been used."""
    program = (
        f"import torch; from layers.flash.launch import tf32_allowed; torch.backends.{setting}; print(tf32_allowed())"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(allowed)
