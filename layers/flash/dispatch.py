"""Which code runs: one rule over device, dtype, shape and grid, in one place."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from layers.flash import dense, reference
from layers.flash.launch import INTERPRETED, tf32_allowed

ROUTES = (None, "local", "dense", "reference")


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


class Limits(NamedTuple):
    """Up to how many rows ``R = G + k`` the dense route wins; measured on one H200, see NOTES.md."""

    forward: int  # with 64 outputs
    outputs: int  # so many more outputs, one more row
    most: int
    backward: int  # with up to 128 outputs, a multiple of four
    uneven_backward: int  # with other numbers of outputs up to 128
    wide_backward: int
    samples: int = 0  # with fewer, fewer rows
    backward_samples: int = 0


LIMITS = {
    "bfloat16": Limits(40, 3, 170, 58, 66, 93),
    "float16": Limits(40, 3, 170, 50, 50, 91),  # gradients are brought into its range
    "tf32": Limits(19, 3, 80, 21, 27, 32),
    "parts": Limits(14, 7, 47, 22, 28, 23, 700, 475),  # float32 in two parts, see gpu_parts.py
    "float32": Limits(8, 32, 16, 10, 10, 10),
}
FEATURES = 8  # up to which no product forward is worth its preparation
BASIS_BYTES = 2**30  # of all basis values of a batch; more memory is not worth the time


def dense_wins(samples: int, rows: int, outputs: int, kind: str, backward: bool) -> bool:
    """Whether, on a GPU, all rows and matrix products beat the ``k + 1`` rows of a window.

    The products do ``rows / (k + 1)`` times the work at a much higher rate, which depends on the number format. Where they
    read and split all weights first, that has to be shared by many samples.
    """
    limits = LIMITS[kind]
    most, few = min(limits.forward + (outputs - 64) // limits.outputs, limits.most), limits.samples
    if backward:
        most = limits.wide_backward if outputs > 128 else limits.uneven_backward if outputs % 4 else limits.backward
        few = limits.backward_samples
    return rows <= most * min(1, 2 * samples / (samples + few))


def _dense_wins(x: Tensor, weight: Tensor, backward: bool) -> bool:
    (samples, features), (_, rows, outputs) = x.shape, weight.shape
    if outputs < 64 or samples < 256 or torch.float64 in (x.dtype, weight.dtype):
        return False
    from layers.flash import gpu_parts, gpu_samples

    if backward:
        if gpu_samples.takes_backward(samples, features, rows, outputs):
            return False
    elif features <= FEATURES or gpu_samples.takes_forward(samples, features, outputs):
        return False

    kind, width = "float32", 4
    if weight.dtype != torch.float32:
        kind, width = "float16" if weight.dtype == torch.float16 else "bfloat16", 2
    elif tf32_allowed():
        kind = "tf32"
    elif gpu_parts.multiplies(x, weight):
        kind = "parts"
    return x.numel() * rows * width <= BASIS_BYTES and dense_wins(samples, rows, outputs, kind, backward)


def kernels(x: Tensor, weight: Tensor, order: int, d: int, route: str, backward: bool = False):
    """The module whose ``apply`` and ``adjoint`` take this call; ``d`` is the highest derivative asked for."""
    if route == "reference":
        return reference
    if not (x.is_cuda or INTERPRETED):
        if route == "dense":
            return dense
        own = cpu_kernels() if x.device.type == "cpu" else None  # other devices: plain PyTorch
        return own or reference
    gpu = gpu_kernels()
    if gpu is None or not gpu.covers(weight, order, d):
        return reference
    if route == "auto":
        route = "dense" if x.is_cuda and _dense_wins(x, weight, backward) else "local"
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
