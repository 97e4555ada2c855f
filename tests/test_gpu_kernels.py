"""The Triton kernels are right, GPU or not: Triton's interpreter runs them on the CPU."""

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.test_operator import no_cuda


def said_by(*commands: tuple[str, ...], **variables: str) -> tuple[str, ...]:
    """What modules print that run side by side, each in a process of its own."""
    pytest.importorskip("triton", reason="Triton comes with torch on Linux")
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    said, complaints = zip(*[run.communicate() for run in runs], strict=True)
    assert not any(run.returncode for run in runs), "".join(complaints)[-2000:]
    return said


def test_the_kernels_agree_with_float64():
    said = said_by(*[("tests.interpreted", str(half), "2") for half in range(2)], TRITON_INTERPRET="1")
    assert sum(int(text.split(" cases agree")[0]) for text in said) == 142


def test_the_kernels_compile(tmp_path):
    """With the Triton that is installed, for the GPU where all was measured and for the oldest one."""
    old, new = said_by(("tests.compiled", "75"), ("tests.compiled", "90"), TRITON_CACHE_DIR=str(tmp_path))
    assert old.endswith("of 14 kernels compiled\n") and new.endswith("of 17 kernels compiled\n"), old + new


@pytest.mark.gpu
@no_cuda
def test_products_in_parts_of_numbers_of_all_sizes():
    """float16 has a small range; this must not show."""
    from tests.interpreted import error_of_all_sizes

    assert error_of_all_sizes("cuda") < 2e-5


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
