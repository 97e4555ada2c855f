"""Which code runs: one rule over device, dtype, shape and grid, in one place."""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from layers.flash import dense, reference

ROUTES = (None, "local", "dense", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # GPU kernels run, slowly, on the CPU


@functools.cache
def cpu_kernels():
    """The Numba kernels, or ``None`` with one warning where Numba is not installed."""
    try:
        from layers.flash import cpu
    except ImportError as error:
        warnings.warn(f"FlashKAN runs on plain PyTorch: Numba can't be imported ({error})", stacklevel=2)
        return None
    return cpu


@functools.cache
def gpu_kernels():
    """The Triton kernels, or ``None`` with one warning where Triton is not installed."""
    try:
        from layers.flash import gpu
    except ImportError as error:
        warnings.warn(f"FlashKAN runs on plain PyTorch: Triton can't be imported ({error})", stacklevel=2)
        return None
    return gpu


def dense_wins(
    samples: int, features: int, rows: int, outputs: int, dtype: torch.dtype, tf32: bool, backward: bool
) -> bool:
    """Whether, on a GPU, all rows and matrix products beat the ``k + 1`` rows of a window; measured, see NOTES.md.

    The products do ``rows / (k + 1)`` times the work at a much higher rate, which depends on the number format. The
    backward pass has two of them and turns to the local route earlier.
    """
    if outputs < 64 or samples < 256:
        return False
    if dtype in (torch.bfloat16, torch.float16):
        return rows <= 64
    if dtype == torch.float32 and tf32:
        return rows <= (40 if backward else 64)
    return dtype == torch.float32 and rows <= (10 if backward else 16)


def kernels(x: Tensor, weight: Tensor, order: int, d: int, route: str, backward: bool = False):
    """The module whose ``apply`` and ``adjoint`` take this call; ``d`` is the highest derivative asked for."""
    if route == "reference":
        return reference
    on_gpu = x.is_cuda or INTERPRETED
    if not on_gpu:
        return dense if route == "dense" else cpu_kernels() or reference
    gpu = gpu_kernels()
    if gpu is None or not gpu.covers(weight, order, d):
        return reference
    if route == "auto":
        tf32 = torch.backends.cuda.matmul.allow_tf32
        wins = x.is_cuda and dense_wins(*x.shape, weight.shape[1], weight.shape[2], weight.dtype, tf32, backward)
        route = "dense" if wins else "local"
    return dense if route == "dense" else gpu


def _autocast(x: Tensor) -> bool:
    """Whether autocast would narrow the sums inside; the weights have been narrowed before."""
    return torch.is_autocast_enabled(x.device.type)


def apply(x, weight, base, scale, order, lo, hi, d, route) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    run = kernels(x, weight, order, d, route).apply
    if not _autocast(x):
        return run(x, weight, base, scale, order, lo, hi, d)
    with torch.autocast(x.device.type, enabled=False):
        return run(x, weight, base, scale, order, lo, hi, d)


def adjoint(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d, route) -> tuple[Tensor, Tensor, Tensor]:
    """``dot``, ``scatter`` and its base part; an order of -1 leaves a result out (empty)."""
    module = kernels(x, weight, order, max(dot_d, scatter_d), route, backward=True)
    if not _autocast(x):
        return module.adjoint(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d)
    with torch.autocast(x.device.type, enabled=False):
        return module.adjoint(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d)
