"""The GPU kernels that sort the samples of each feature by cell, in Triton.

The samples that reach a row of the gradient then lie next to each other, so that a program finds all that it needs of them.
Launches: ``gpu_sort.py``.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import locate, silu


@triton.jit
def sorted_keys(
    x, i, n, here, features, size, lo, hi, inv_h,
    ORDER: tl.constexpr, CT: tl.constexpr, KT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The samples ``n`` of feature ``i`` in order of their cells, as ``(cell + k + 1) << BITS | sample``."""
    xv = tl.load(x + n.to(tl.int64) * features + i, mask=here, other=0.0).to(CT)
    cell, _ = locate(xv, lo, hi, inv_h, size, ORDER)
    key = ((cell + ORDER + 1).to(KT) << BITS) | n
    return tl.sort(tl.where(here, key, key * 0 + (2 ** (KT.primitive_bitwidth - 1) - 1)))


@triton.jit
def _place(
    xv, cell, here, at, places, slopes, lo, inv_h,
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """places[at]: where in its cell, as a key counts cells, an input lies; slopes[at]: SiLU's derivative."""
    f = (xv - lo) * inv_h - (cell - (ORDER + 1)).to(CT)
    tl.store(places + at, tl.where(tl.abs(f) > 2, 0.0, f), mask=here)
    if SLOPES:
        tl.store(slopes + at, silu(xv, DOT_D), mask=here)


@triton.jit(do_not_specialize=["samples", "features", "size"])
def sort_kernel(
    x, keys,
    samples, features, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, CT: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """keys[i]: see ``sorted_keys``; one program sorts all samples of a feature."""
    i = tl.program_id(0).to(tl.int64)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    n = tl.arange(0, NB)
    key = sorted_keys(x, i, n, n < samples, features, size, lo, hi, inv_h, ORDER, CT, keys.dtype.element_ty, BITS)
    tl.store(keys + i * samples + n, key, mask=n < samples)


@triton.jit
def _act(x, scale, at, here, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr):
    """SiLU's value, or a derivative's, times the scale."""
    act = silu(tl.load(x + at, mask=here, other=0.0).to(CT), D)
    if SCALED:
        act *= tl.load(scale + at, mask=here, other=0.0).to(CT)
    return act


@triton.jit(do_not_specialize=["samples", "features", "size", "each", "stretches"])
def arrange_kernel(
    x, scale, keys, places, slopes, acts, cuts,
    samples, features, size, each, stretches,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    SLOPES: tl.constexpr, ACTS: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """All that a walk needs of the samples of one feature: keys[i] as ``sort_kernel`` makes them and, behind them,
    places and slopes (see ``_place``); cuts[i]: the first key of each stretch of the walk, and the number of keys. With
    ACTS also acts[i, b], SiLU's value times the scale.

    A walk takes a step for each sample and for each cell; a stretch is ``each`` steps. In order, samples and cells are a
    merge path (Green, McColl and Bader 2012): the sample n is step n + (its cell's number).
    """
    i = tl.program_id(0).to(tl.int64)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    n = tl.arange(0, NB)
    here = n < samples
    at = i * samples + n
    if ACTS:
        act = _act(x, scale, n.to(tl.int64) * features + i, here, SCATTER_D, CT, SCALED)
        tl.store(acts + at, act.to(acts.dtype.element_ty), mask=here)
    key = sorted_keys(x, i, n, here, features, size, lo, hi, inv_h, ORDER, CT, keys.dtype.element_ty, BITS)
    tl.store(keys + at, key, mask=here)
    cell = (key >> BITS).to(tl.int32)
    xv = tl.load(x + (key & (2**BITS - 1)).to(tl.int64) * features + i, mask=here, other=0.0).to(CT)
    _place(xv, cell, here, at, places, slopes, lo, inv_h, ORDER, DOT_D, CT, SLOPES)
    step = n + cell
    for first in range(0, stretches + 1, 4):
        t = first + tl.arange(0, 4)
        before = tl.sum((here[:, None] & (step[:, None] < (t * each)[None, :])).to(tl.int32), axis=0)
        tl.store(cuts + i * (stretches + 1) + t, before, mask=t <= stretches)


@triton.jit(do_not_specialize=["samples", "size"])
def cells_kernel(
    x, scale, cells, turned, acts,
    samples, features, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, ACTS: tl.constexpr,
    TURN: tl.constexpr, BB: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """What can be sorted elsewhere, of more samples than a program sorts: cells (I, B), as keys count them; with TURN
    ``turned``, x as (I, B); with ACTS acts (I, B) as in ``arrange_kernel``."""
    b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    here = (b < samples)[None, :] & (i < features)[:, None]
    at, to = b[None, :] * features + i[:, None], i.to(tl.int64)[:, None] * samples + b[None, :]
    xv = tl.load(x + at, mask=here, other=0.0)
    cell, _ = locate(xv.to(CT), lo, hi, inv_h, size, ORDER)
    if TURN:
        tl.store(turned + to, xv, mask=here)
    tl.store(cells + to, (cell + ORDER + 1).to(cells.dtype.element_ty), mask=here)
    if ACTS:
        act = _act(x, scale, at, here, SCATTER_D, CT, SCALED)
        tl.store(acts + to, act.to(acts.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["samples", "each", "stretches"])
def place_kernel(
    turned, cells, ranked, keys, places, slopes, cuts,
    samples, each, stretches,
    lo: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What ``arrange_kernel`` leaves, for ``cells`` that were sorted elsewhere; ``ranked`` (I, B): their samples."""
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
    _place(xv, cell, here, i * samples + at, places, slopes, lo, inv_h, ORDER, DOT_D, CT, SLOPES)
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
