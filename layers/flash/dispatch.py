"""Which code runs: one rule over device, dtype, shape and grid, in one place."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor

from layers.flash import reference

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


def kernels(x: Tensor, weight: Tensor, order: int, d: int, route: str):
    """The module whose ``apply`` and ``adjoint`` take this call; ``d`` is the highest derivative asked for."""
    if route == "reference":
        return reference
    if x.device.type == "cpu":
        return cpu_kernels() or reference
    return reference


def apply(x, weight, base, scale, order, lo, hi, d, route) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    return kernels(x, weight, order, d, route).apply(x, weight, base, scale, order, lo, hi, d)


def adjoint(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d, route) -> tuple[Tensor, Tensor, Tensor]:
    """``dot``, ``scatter`` and its base part; an order of -1 leaves a result out (empty)."""
    module = kernels(x, weight, order, max(dot_d, scatter_d), route)
    return module.adjoint(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d)
