"""The GPU route: which Triton kernels take a call, those of ``gpu_samples.py``, of ``gpu_few.py``, or of ``gpu_many.py`` and
``gpu_walk.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layers.flash import gpu_few, gpu_many, gpu_samples, gpu_sums, gpu_walk
from layers.flash.launch import on_device_of
from layers.flash.reference import compute_dtype

MAX_ORDER = 5
MAX_DERIVATIVE = 2
FEW_OUTPUTS = 32  # up to which one program takes all outputs of a sample
# Few outputs, and yet the backward pass is a walk: from so many outputs, samples, and samples times rows on; on fine grids,
# where it takes samples two at a time, from so many samples on.
WALK_OUTPUTS, WALK_SAMPLES, WALK_WORK, WALK_TWO = 17, 500, 50_000, 400
# With more samples than gpu_few.LONG, too, but for sums in shared memory and for coarse grids of so many rows in all,
# which keep the GPU busy.
FEW_WORK = 4096


def covers(weight: Tensor, order: int, d: int) -> bool:
    """Whether these kernels take a call: offsets inside one feature are 32 bits wide."""
    return order <= MAX_ORDER and d <= MAX_DERIVATIVE and weight.shape[1] * weight.shape[2] < 2**31


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    outputs = weight.shape[2]
    if x.shape[0] == 0:
        return x.new_zeros(0, outputs, dtype=torch.promote_types(x.dtype, weight.dtype))
    run = gpu_few.apply if outputs <= FEW_OUTPUTS else gpu_many.apply
    if gpu_samples.takes_forward(*x.shape, outputs):
        run = gpu_samples.apply
    with on_device_of(x):
        return run(*_contiguous(x, weight, base, scale), order, lo, hi, d)


def _few(x: Tensor, weight: Tensor, order: int) -> bool:
    """Whether the backward pass is made of sums or products for few outputs, in float32, and not a walk."""
    samples, (features, rows, outputs) = x.shape[0], weight.shape
    if outputs > FEW_OUTPUTS or compute_dtype(x, weight) != torch.float32:
        return False
    if samples > gpu_few.LONG:
        if rows > gpu_few.FEW_ROWS:
            return gpu_sums.shape(samples, rows, outputs, order) is not None
        return features * rows >= FEW_WORK and x.numel() < 2**31
    if outputs < WALK_OUTPUTS:
        return True
    if rows > gpu_few.FEW_ROWS and gpu_walk.takes_two(samples, rows, outputs, order, weight.dtype.itemsize == 2, False):
        return samples < WALK_TWO
    return samples < WALK_SAMPLES or samples * rows < WALK_WORK


def adjoint(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    order: int,
    lo: float,
    hi: float,
    dot_d: int,
    scatter_d: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dot`` and ``scatter``; see ``layers/flash/reference.py``. An order of -1 leaves a result out (empty)."""
    if x.shape[0] == 0:
        results = (
            torch.empty_like(x) if dot_d >= 0 else None,
            torch.zeros_like(weight) if scatter_d >= 0 else None,
            torch.zeros_like(base) if scatter_d >= 0 and base is not None else None,
        )
    else:
        run = gpu_walk.adjoint
        if order - scatter_d >= 1:  # products do not look for cells: nothing may jump
            if compute_dtype(x, weight) == torch.float32 and gpu_samples.takes_backward(*x.shape, *weight.shape[1:]):
                run = gpu_samples.adjoint
            elif _few(x, weight, order):
                run = gpu_few.adjoint
        with on_device_of(x):
            results = run(*_contiguous(grad, x, weight, base, scale), order, lo, hi, dot_d, scatter_d)
    # Each an empty tensor of its own: PyTorch forbids an op whose results are one another.
    return tuple(x.new_empty(0) if t is None else t for t in results)
