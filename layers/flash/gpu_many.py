"""Launches the kernels of ``triton_many.py``: the forward pass for many outputs.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import triton_many
from layers.flash.launch import Launch, block, ceil_div, dtypes, multiprocessors, power_of_2, remembered, unit
from layers.flash.reference import compute_dtype


def many_tile(
    samples: int, features: int, rows: int, outputs: int, narrow: bool, processors: int
) -> tuple[int, int, int, int]:
    """Forward: samples and outputs of a program's tile, its warps, and into how many parts features are split.

    Tall tiles read a row for more samples, low ones of one warp need no barriers. As many programs as run at once:
    ``narrow`` weights, of two bytes, leave registers for half as many more.
    """
    bb, bo, warps, together = 64, 64, 2, 8
    if narrow:
        bb, warps, together = 32, 1, 12
    elif rows <= 64 or outputs % 2:  # rows of an odd length are loaded number by number
        bb, warps = 32, 1
    elif rows > 256 and samples >= 512 and outputs > 64:
        bb, bo, warps = (128, 64, 4) if rows <= 700 else (256, 32, 4)
    bo = min(power_of_2(outputs), bo)
    programs = ceil_div(samples, bb) * ceil_div(outputs, bo)
    split = max(min(together * processors // (programs * warps), features // 16, 32), 1)
    return bb, bo, warps, ceil_div(features, ceil_div(features, split))  # no part is empty


@remembered
def _forward(
    kinds: tuple, shape: tuple, outputs: int, order: int, lo: float, hi: float, d: int, processors: int
) -> tuple[Launch, Launch, int]:
    """The launch that finds windows, the one that adds rows, and the number of parts to be summed."""
    (samples, features, rows), (_, x_dtype, weight_dtype, base, scale) = shape, kinds
    wide = tl.float64 if torch.float64 in (x_dtype, weight_dtype) else tl.float32
    constants = {"ORDER": order, "D": d, "CT": wide, "SCALED": scale is not None, "BASE": base is not None}
    constants |= {"BB": 32, "BI": block(features, 32)}
    grid = (ceil_div(samples, 32), ceil_div(features, constants["BI"]))
    numbers = (samples, features, rows - order, lo, hi, (rows - order) / (hi - lo))
    prepare = Launch(triton_many.prepare_kernel, grid, numbers, constants, 4)
    narrow = weight_dtype.itemsize == 2
    bb, bo, warps, split = many_tile(samples, features, rows, outputs, narrow, processors)
    step = unit(outputs)
    constants = {"ORDER": order, "CT": wide, "BASE": base is not None, "UNIT": step, "WHOLE": outputs % bo == 0}
    constants |= {"BB": bb, "BO": bo}
    grid = (ceil_div(samples, bb), ceil_div(outputs, bo), split)
    numbers = (samples, features, outputs // step, rows - order, ceil_div(features, split))
    return prepare, Launch(triton_many.many_kernel, grid, numbers, constants, warps), split


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``. Contiguous tensors, at least one sample."""
    (samples, features), (_, rows, outputs), device = x.shape, weight.shape, x.device
    kinds, shape = dtypes(x, weight, base, scale), (samples, features, rows)
    prepare, add, split = _forward(kinds, shape, outputs, order, float(lo), float(hi), d, multiprocessors(device))
    dtype, sums = torch.promote_types(x.dtype, weight.dtype), compute_dtype(x, weight)
    first_rows = torch.empty(samples * features, dtype=torch.int32, device=device)
    values = torch.empty(order + 2, samples * features, dtype=sums, device=device)
    acts = values[order + 1]
    prepare(x, x if scale is None else scale, first_rows, values, acts)
    y = torch.empty(split, samples, outputs, dtype=dtype if split == 1 else sums, device=device)
    add(first_rows, values, acts, weight, weight if base is None else base, y)
    return y[0] if split == 1 else y.sum(0).to(dtype)
