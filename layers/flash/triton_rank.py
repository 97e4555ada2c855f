"""The GPU kernel that sorts the samples of each feature by cell, in Triton: it counts them, in shared memory.

The place of a sample is the number of samples in cells before its own, and of those before it in its own. Each warp owns
a row of counts, one for each cell, and goes through its part of the samples, 32 that follow each other at a time: once to
count them and, when the counts of all warps are added up, once more to put them where they belong. So the order is that of a
stable sort, the same from run to run. What more samples or cells would need is in ``triton_sort.py``. Launches: ``gpu_sort.py``.
"""

import triton
import triton.language as tl

from layers.flash.triton_shared import alike, get, memory, put, threads
from layers.flash.triton_sort import activation, cell_number, leave_place


@triton.jit
def _counted(counts, cell, here, INTERPRETED: tl.constexpr):
    """Adds 32 samples of each warp to its ``counts``; how many each of them found there, and before it in the warp."""
    before = get(counts, 4 * cell, here, tl.int32, INTERPRETED)
    earlier, together = alike(tl.where(here, cell, -1), INTERPRETED)
    put(counts, 4 * cell, before + together, here & (earlier == 0), INTERPRETED)
    return before + earlier


@triton.jit
def _add_up(room, cells, wide, CELLS: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """In place of each count the number of samples in cells before, or in the same cell and with a warp before."""
    cell = tl.arange(0, CELLS)
    here = cell < cells
    before = tl.zeros((CELLS,), tl.int32)
    for warp in tl.static_range(WARPS):
        before += get(room, 4 * (warp * wide + cell), here, tl.int32, INTERPRETED)
    before = tl.cumsum(before, 0) - before
    for warp in tl.static_range(WARPS):
        count = get(room, 4 * (warp * wide + cell), here, tl.int32, INTERPRETED)
        put(room, 4 * (warp * wide + cell), before, here, INTERPRETED)
        before += count


@triton.jit
def _input(column, kept, n, step, here, KEPT: tl.constexpr, CT: tl.constexpr, INTERPRETED: tl.constexpr):
    if KEPT:
        return get(kept, 4 * n, here, tl.float32, INTERPRETED)
    else:
        return tl.load(column + n.to(tl.int64) * step, mask=here, other=0.0).to(CT)


@triton.jit(do_not_specialize=["samples", "features", "size", "each", "stretches", "cells", "step"])
def rank_kernel(
    x, scale, keys, places, slopes, acts, cuts, spare,
    samples, features, size, each, stretches, cells, step,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    PLACES: tl.constexpr, SLOPES: tl.constexpr, ACTS: tl.constexpr, BITS: tl.constexpr, KEPT: tl.constexpr,
    CELLS: tl.constexpr, WARPS: tl.constexpr, BYTES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """keys[i]: the samples of feature ``i`` in order of their cells, as ``(cell + k + 1) << BITS | sample``. With PLACES also,
    behind each key, places and slopes (see ``leave_place``), and cuts[i]: the first key of each stretch of the walk, and
    the number of keys. With ACTS also acts[i, b], SiLU's value times the scale.

    A walk takes a step for each sample and for each cell; a stretch is ``each`` steps. In order, samples and cells are a
    merge path (Green, McColl and Bader 2012): the sample n is step n + (its cell's number).

    Inputs lie ``step`` apart, 1 where ``x`` is (I, B). KEPT: they, in float32, are read once and kept in shared memory, behind
    counts (WARPS, cells) and keys. ``CELLS >= max(cells, 32 * WARPS)``, a power of two.
    """
    i = tl.program_id(0).to(tl.int64)
    THREADS: tl.constexpr = 32 * WARPS
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    room = memory(spare, BYTES, INTERPRETED)
    WORD: tl.constexpr = 1 if INTERPRETED else 4  # of an address
    t = threads(WARPS, INTERPRETED)
    wide = cells | 1  # odd: threads that read one cell's counts meet different banks
    ordered = room + WORD * WARPS * wide
    kept = ordered + WORD * samples
    column = x + i * tl.where(step == 1, samples, 1)
    for first in range(0, WARPS * wide, THREADS):
        put(room, 4 * (first + t), t * 0, first + t < WARPS * wide, INTERPRETED)
    tl.debug_barrier()
    counts = room + WORD * (t // 32) * wide
    turns = tl.cdiv(samples, THREADS)
    start = t // 32 * turns * 32 + t % 32
    ahead = tl.load(column + start.to(tl.int64) * step, mask=start < samples, other=0.0)  # while others are counted
    for turn in range(turns):
        n = start + 32 * turn
        here, xv = n < samples, ahead.to(CT)
        ahead = tl.load(column + (n + 32).to(tl.int64) * step, mask=n + 32 < samples, other=0.0)
        _counted(counts, cell_number(xv, lo, hi, inv_h, size, ORDER), here, INTERPRETED)
        if KEPT:
            put(kept, 4 * n, xv, here, INTERPRETED)
        if ACTS:
            act = activation(xv, scale, n.to(tl.int64) * features + i, here, SCATTER_D, CT, SCALED)
            tl.store(acts + i * samples + n, act.to(acts.dtype.element_ty), mask=here)
    tl.debug_barrier()
    _add_up(room, cells, wide, CELLS, WARPS, INTERPRETED)
    tl.debug_barrier()
    for turn in range(turns):
        n = start + 32 * turn
        here = n < samples
        cell = cell_number(_input(column, kept, n, step, here, KEPT, CT, INTERPRETED), lo, hi, inv_h, size, ORDER)
        rank = _counted(counts, cell, here, INTERPRETED)
        put(ordered, 4 * rank, (cell << BITS) | n, here, INTERPRETED)
    tl.debug_barrier()
    for first in range(0, samples, THREADS):
        here, at = first + t < samples, i * samples + first + t
        key = get(ordered, 4 * (first + t), here, tl.int32, INTERPRETED)
        tl.store(keys + at, key, mask=here)
        if PLACES:
            xv = _input(column, kept, key & (2**BITS - 1), step, here, KEPT, CT, INTERPRETED)
            leave_place(xv, key >> BITS, here, at, places, slopes, lo, inv_h, ORDER, DOT_D, CT, SLOPES)
    if PLACES:
        for first in range(0, stretches + 1, THREADS):
            stretch = first + t
            low, high = t * 0, t * 0 + samples
            for _ in range(BITS + 1):  # halves what is left of ``samples <= 2 ** BITS``
                middle = (low + high) // 2
                cell = get(ordered, 4 * middle, low < high, tl.int32, INTERPRETED) >> BITS
                before = (low < high) & (middle + cell < stretch * each)
                low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
            tl.store(cuts + i * (stretches + 1) + stretch, low, mask=stretch <= stretches)
