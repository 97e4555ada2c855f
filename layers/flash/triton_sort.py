"""What sorts the samples of each feature by cell on a GPU, in Triton, where ``triton_rank.py`` does not.

The samples that reach a row of the gradient then lie next to each other, so that a program finds all that it needs of them.
Few are sorted by the program that needs them (``sorted_keys``). More than shared memory holds are sorted by PyTorch, between
two kernels. Launches: ``gpu_sort.py``.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import locate, silu


@triton.jit
def cell_number(x, lo, hi, inv_h, size, ORDER: tl.constexpr):
    """An input's cell as keys count them: from 0 on, the first of those below the grid whose samples no row meets."""
    cell, _ = locate(x, lo, hi, inv_h, size, ORDER)
    return cell + (ORDER + 1)


@triton.jit
def sorted_keys(
    x, i, n, here, features, size, lo, hi, inv_h,
    ORDER: tl.constexpr, CT: tl.constexpr, KT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The samples ``n`` of feature ``i`` in order of their cells, as ``(cell + k + 1) << BITS | sample``."""
    xv = tl.load(x + n.to(tl.int64) * features + i, mask=here, other=0.0).to(CT)
    key = (cell_number(xv, lo, hi, inv_h, size, ORDER).to(KT) << BITS) | n
    return tl.sort(tl.where(here, key, key * 0 + (2 ** (KT.primitive_bitwidth - 1) - 1)))


@triton.jit
def leave_place(
    xv, cell, here, at, places, slopes, lo, inv_h,
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """places[at]: where in its cell, as a key counts cells, an input lies; slopes[at]: SiLU's derivative."""
    f = (xv - lo) * inv_h - (cell - (ORDER + 1)).to(CT)
    tl.store(places + at, tl.where(tl.abs(f) > 2, 0.0, f), mask=here)
    if SLOPES:
        tl.store(slopes + at, silu(xv, DOT_D), mask=here)


@triton.jit
def activation(x, scale, at, here, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr):
    """SiLU's value, or a derivative's, times the scale."""
    act = silu(x, D)
    if SCALED:
        act *= tl.load(scale + at, mask=here, other=0.0).to(CT)
    return act


@triton.jit(do_not_specialize=["samples", "size"])
def cells_kernel(
    x, scale, cells, turned, acts,
    samples, features, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, ACTS: tl.constexpr,
    TURN: tl.constexpr, CELLS: tl.constexpr, BB: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """What belongs to a sort elsewhere: with CELLS cells (I, B), as keys count them; with TURN ``turned``, x as (I, B); with
    ACTS acts (I, B), SiLU's value times the scale."""
    b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    here = (b < samples)[None, :] & (i < features)[:, None]
    at, to = b[None, :] * features + i[:, None], i.to(tl.int64)[:, None] * samples + b[None, :]
    xv = tl.load(x + at, mask=here, other=0.0)
    if TURN:
        tl.store(turned + to, xv, mask=here)
    if CELLS:
        cell = cell_number(xv.to(CT), lo, hi, inv_h, size, ORDER)
        tl.store(cells + to, cell.to(cells.dtype.element_ty), mask=here)
    if ACTS:
        act = activation(xv.to(CT), scale, at, here, SCATTER_D, CT, SCALED)
        tl.store(acts + to, act.to(acts.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["samples", "each", "stretches"])
def place_kernel(
    turned, cells, ranked, keys, places, slopes, cuts,
    samples, each, stretches,
    lo: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What ``rank_kernel`` leaves, for ``cells`` that were sorted elsewhere; ``ranked`` (I, B): their samples."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    here = at < samples
    cells += i * samples
    cell = tl.load(cells + at, mask=here, other=0).to(tl.int32)
    n = tl.load(ranked + i * samples + at, mask=here, other=0)
    KT: tl.constexpr = keys.dtype.element_ty
    tl.store(keys + i * samples + at, (cell.to(KT) << BITS) | n.to(KT), mask=here)
    xv = tl.load(turned + i * samples + n, mask=here, other=0.0).to(CT)
    lo, inv_h = tl.full([], lo, CT), tl.full([], inv_h, CT)
    leave_place(xv, cell, here, i * samples + at, places, slopes, lo, inv_h, ORDER, DOT_D, CT, SLOPES)
    if tl.program_id(1) == 0:
        for first in range(0, stretches + 1, 16):
            t = first + tl.arange(0, 16)
            low, high = t * 0, t * 0 + samples
            for _ in range(BITS + 1):  # halves what is left of ``samples <= 2 ** BITS``
                middle = (low + high) // 2
                before = middle + tl.load(cells + middle, mask=low < high, other=0).to(tl.int32) < t * each
                before = before & (low < high)
                low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
            tl.store(cuts + i * (stretches + 1) + t, low, mask=t <= stretches)
