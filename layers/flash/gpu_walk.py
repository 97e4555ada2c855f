"""Launches the kernels of ``triton_walk.py``: the backward pass for many outputs, or many samples.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import gpu_sort, triton_walk
from layers.flash.launch import (
    INTERPRETED,
    Launch,
    ceil_div,
    divisor,
    dtypes,
    fewest_parts,
    multiprocessors,
    power_of_2,
    remembered,
    unit,
)
from layers.flash.reference import compute_dtype

NARROW_GRAD = 700  # rows from which a gradient in bfloat16 is worth the conversion, as the walk waits for memory
FETCHED = 0 if INTERPRETED or torch.version.hip else 3  # rows ahead that are brought to the cache, in PTX
STEPS = 32  # samples and cells that are worth a program of their own while fewer run than could
LONG = 200  # samples and cells that are worth one where cutting fills the last round of programs
# Two samples of a cell at a time, by the outputs of a program: from so many samples for each row of the gradient on, with
# weights of two bytes, and how many programs run on a multiprocessor then.
TWO_FROM, NARROW_TWO_FROM = {32: 0, 64: 3, 128: 0}, {32: 3, 64: 3, 128: 8}
TWO_TOGETHER = {32: 24, 64: 20, 128: 12}
WASTE = 1.15  # accepted: times as long as with the best number of stretches, by rounds, as each begins with a window
LONGEST = 4096  # samples, the most that one takes: longer sums are less exact than sums of their pieces


class Walk(NamedTuple):
    """Outputs of a program of one warp, into how many stretches a feature's walk is cut and how many steps each has, the
    registers a thread may use, whether weights are read two rows ahead, and whether samples are taken two at a time."""

    block: int
    stretches: int
    each: int
    registers: int | None
    far: bool
    two: bool


def takes_two(samples: int, rows: int, outputs: int, order: int, narrow: bool, wide: bool) -> bool:
    """Whether a program takes two samples of a cell at a time; see ``walk_shape``."""
    least = (NARROW_TWO_FROM if narrow else TWO_FROM).get(power_of_2(outputs))
    return least is not None and samples >= least * rows and outputs % 4 == 0 and order <= 3 and not wide


def walk_shape(
    samples: int, features: int, rows: int, outputs: int, order: int, narrow: bool, wide: bool, processors: int
) -> Walk:
    """As many programs as run at the same time, or rounds that are full: where registers are the limit, 8 a multiprocessor
    with 512 outputs, 16 with 256, 24 with fewer. ``narrow``: weights of two bytes; ``wide``: sums in float64.
    """
    block = min(power_of_2(outputs), 128 if wide or order > 3 else 512)
    two = takes_two(samples, rows, outputs, order, narrow, wide)
    together = processors * (TWO_TOGETHER[block] if two else min(8 * (512 // block), 24))
    steps = samples + rows + order + 2  # cells that samples outside are sorted into lie on both sides of the rows
    programs, most = features * ceil_div(outputs, block), math.isqrt(steps)  # carries are added one after the other
    one_round = min(together // programs, steps // STEPS, most)
    full_rounds = fewest_parts(programs, together, min(steps // LONG, most), WASTE)
    stretches = max(one_round, full_rounds, ceil_div(samples, LONGEST))
    # With 256 outputs twice as many programs run so. With 512 as many, but in bfloat16 2 % faster (float16: not timed).
    registers = {64: 96 if two else None, 128: 168 if two else None, 256: 128, 512: 240 if narrow else None}.get(block)
    registers = registers if order <= 3 and not wide else None
    return Walk(block, stretches, ceil_div(steps, stretches), registers, block == 512, two)


class Launches(NamedTuple):
    """Of a backward pass: those that sort; the walk; one that adds the carries of its stretches. And shape and dtype of these
    carries, if there are any: for weights of two bytes they are wider, and behind them lie as many first rows."""

    sort: gpu_sort.Sort
    walk: Launch
    carry: Launch
    carries: tuple[tuple[int, ...], torch.dtype] | None


@remembered
def _backward(
    kinds: tuple,
    shape: tuple,
    outputs: int,
    order: int,
    lo: float,
    hi: float,
    dot_d: int,
    scatter_d: int,
    processors: int,
) -> tuple[Launches, Walk]:
    """The launches, and the walk's shape."""
    (samples, features, rows), (_, _, x_dtype, weight_dtype, base, scale) = shape, kinds
    wide, size, step = torch.float64 in (x_dtype, weight_dtype), rows - order, unit(outputs)
    narrow = weight_dtype.itemsize == 2
    walk = walk_shape(samples, features, rows, outputs, order, narrow, wide, processors)
    cut, cut_up = (walk.each, walk.stretches), walk.stretches > 1 and scatter_d >= 0
    has_base, scaled, inv_h = base is not None, scale is not None, size / (hi - lo)
    sums = {"CT": tl.float64 if wide else tl.float32}
    slopes, acts, grid = has_base and dot_d >= 0, has_base and scatter_d >= 0, (lo, hi, inv_h)
    sort = gpu_sort.sort(
        (samples, features, size), order, grid, wide, cut, dot_d, scatter_d, scaled, True, slopes, acts
    )
    constants = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d} | sums | {"SCALED": scaled, "BASE": has_base}
    constants |= {"BITS": sort.bits, "UNIT": step, "BO": walk.block, "WHOLE": outputs % walk.block == 0}
    neighbours = divisor(outputs, 16 // weight_dtype.itemsize)
    apart = {"APART": cut_up and narrow}
    constants |= apart | {"FAR": walk.far, "FETCH": FETCHED, "FOLD": neighbours if walk.block >= 256 else 0}
    constants |= {"TWO": walk.two}
    numbers = (samples, features, outputs // step, size, *cut, inv_h)
    grid = (features, walk.stretches, ceil_div(outputs, walk.block))
    go = Launch(triton_walk.walk_kernel, grid, numbers, constants, 1, registers=walk.registers)
    constants = {"ORDER": order} | sums | {"UNIT": step} | apart | {"BO": min(walk.block, 256)}
    grid = (features, walk.stretches - 1, ceil_div(outputs, constants["BO"]) * (order + 1))
    carry = Launch(triton_walk.carry_kernel, grid, (features, outputs // step, size, *cut), constants, 2)
    many, dtype = (2, torch.float64 if wide else torch.float32) if apart["APART"] else (1, weight_dtype)
    carries = ((many * (walk.stretches - 1), features, order + 1, outputs), dtype) if cut_up else None
    return Launches(sort, go, carry, carries), walk


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dot`` and ``scatter``; see ``layers/flash/reference.py``. An order of -1 leaves a result out (``None``).

    Contiguous tensors, at least one sample.
    """
    (samples, features), (_, rows, outputs), device = x.shape, weight.shape, x.device
    shape, sums = (samples, features, rows), compute_dtype(x, weight)
    lo, hi, processors = float(lo), float(hi), multiprocessors(device)
    if weight.dtype == torch.bfloat16 and sums == torch.float32 and rows > NARROW_GRAD:
        grad = grad.to(weight.dtype)
    kinds = dtypes(grad, x, weight, base, scale)
    launches, walk = _backward(kinds, shape, outputs, order, lo, hi, dot_d, scatter_d, processors)
    blocks = ceil_div(outputs, walk.block)
    places = torch.empty(features, samples, dtype=sums, device=device)
    slopes = torch.empty_like(places) if base is not None and dot_d >= 0 else places
    acts = places
    if base is not None and scatter_d >= 0:
        narrow = base.dtype == torch.bfloat16 and sums == torch.float32  # not float16, whose range is small
        acts = torch.empty_like(places, dtype=base.dtype if narrow else sums)
    cuts = torch.empty(features, walk.stretches + 1, dtype=torch.int32, device=device)
    scaling = x if scale is None else scale
    keys = gpu_sort.run(launches.sort, x, rows - order, order, scaling, places, slopes, acts, cuts)
    dots = v = b = carries = None
    if base is not None and scatter_d >= 0:  # before there is a gradient: what this needs is free again then
        b = (acts @ grad.to(acts.dtype)).to(base.dtype)
    if dot_d >= 0:
        dots = torch.empty(blocks, samples, features, dtype=x.dtype if blocks == 1 else sums, device=device)
    if scatter_d >= 0:
        v = torch.empty_like(weight)
    if launches.carries is not None:
        carries = v.new_empty(launches.carries[0], dtype=launches.carries[1])
    results = (places if t is None else t for t in (dots, v, v if carries is None else carries))
    base = weight if base is None else base
    launches.walk(grad, scaling, weight, base, keys, places, slopes, cuts, *results)
    if dot_d >= 0:
        dots = dots[0] if blocks == 1 else dots.sum(0).to(x.dtype)
    if carries is not None:
        launches.carry(cuts, carries, v)
    return dots, v, b
