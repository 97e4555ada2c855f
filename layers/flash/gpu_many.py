"""Launches the kernels of ``triton_many.py``: the forward pass for many outputs.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import triton_many
from layers.flash.launch import (
    Launch,
    block,
    ceil_div,
    dtypes,
    fewest_parts,
    multiprocessors,
    power_of_2,
    remembered,
    unit,
)
from layers.flash.reference import compute_dtype

MANY_ROWS = 400  # from which rows come from L2 rather than L1, and other tiles are the fastest
REGISTERS = 168  # of a thread, so that 12 warps fit into the 65536 of a multiprocessor, which deals them out by 8
WASTE = 1.03  # accepted: times as long as with the best number of parts, by rounds of programs
FULL = 0.9  # of the GPU, from which a tile that is faster itself is worth more than one that fills it
PARTS_BYTES = 2**26  # of what all parts give, before they are added up


class Tile(NamedTuple):
    """Of a program of the forward pass: its samples, outputs and warps, how many of these a multiprocessor runs, and the
    registers a thread may use."""

    samples: int
    outputs: int
    warps: int
    together: int
    registers: int | None = None


def tiles(samples: int, rows: int, outputs: int, order: int, narrow: bool, wide: bool) -> Iterator[Tile]:
    """What is the fastest if it fills the GPU, then what is taken anyway.

    Tall tiles read a row for more samples, low ones of one warp need no barriers. 12 warps on a multiprocessor hide more
    than 8, where a thread's sums and a row on its way fit into its registers: those of ``narrow`` weights, of two bytes,
    do, those of ``wide`` sums, in float64, do not.
    """
    tall = samples >= 512 and outputs > 64
    fits = samples >= 1024 and outputs > 64 and outputs % 64 == 0 and order in (2, 3) and not wide
    if fits and narrow and rows > MANY_ROWS:
        yield Tile(64, 64, 2, 12, REGISTERS)
    elif fits and not narrow and rows <= MANY_ROWS:
        yield Tile(128, 64, 4, 12, REGISTERS)
    width = min(power_of_2(outputs), 64)
    if narrow:
        yield Tile(32, width, 1, 12)
    elif rows <= 64 or outputs % 2:  # rows of an odd length are loaded number by number
        yield Tile(32, width, 1, 8)
    elif rows <= 256 or not tall:
        yield Tile(64, width, 2, 8)
    else:
        yield Tile(128, 64, 4, 8) if rows <= 700 else Tile(256, 32, 4, 8)


def fit(
    samples: int, features: int, rows: int, outputs: int, order: int, narrow: bool, wide: bool, processors: int
) -> tuple[Tile, int]:
    """The tile, and into how many parts features are split."""
    most = min(features // 16, 32, PARTS_BYTES // ((8 if wide else 4) * samples * outputs))
    for tile in tiles(samples, rows, outputs, order, narrow, wide):
        programs = ceil_div(samples, tile.samples) * ceil_div(outputs, tile.outputs)
        together = tile.together * processors // tile.warps
        parts = fewest_parts(programs, together, most, WASTE)
        if programs * parts >= FULL * together * ceil_div(programs * parts, together):
            break
    return tile, ceil_div(features, ceil_div(features, parts))  # no part is empty


@remembered
def _forward(
    kinds: tuple, shape: tuple, outputs: int, order: int, lo: float, hi: float, d: int, processors: int
) -> tuple[Launch, Launch, int]:
    """The launch that finds windows, the one that adds rows, and the number of parts to be summed."""
    (samples, features, rows), (_, x_dtype, weight_dtype, base, scale) = shape, kinds
    wide = torch.float64 in (x_dtype, weight_dtype)
    sums = {"CT": tl.float64 if wide else tl.float32}
    constants = {"ORDER": order, "D": d} | sums | {"SCALED": scale is not None, "BASE": base is not None}
    constants |= {"BB": 32, "BI": block(features, 32)}
    grid = (ceil_div(samples, 32), ceil_div(features, constants["BI"]))
    numbers = (samples, features, rows - order, lo, hi, (rows - order) / (hi - lo))
    prepare = Launch(triton_many.prepare_kernel, grid, numbers, constants, 4)
    narrow = weight_dtype.itemsize == 2
    tile, parts = fit(samples, features, rows, outputs, order, narrow, wide, processors)
    step = unit(outputs)
    constants = {"ORDER": order} | sums | {"BASE": base is not None, "UNIT": step, "WHOLE": outputs % tile.outputs == 0}
    constants |= {"BB": tile.samples, "BO": tile.outputs}
    grid = (ceil_div(samples, tile.samples), ceil_div(outputs, tile.outputs), parts)
    numbers = (samples, features, outputs // step, rows - order, ceil_div(features, parts))
    add = Launch(triton_many.many_kernel, grid, numbers, constants, tile.warps, registers=tile.registers)
    return prepare, add, parts


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
