"""The GPU kernels that sort the samples of each feature by cell, in Triton.

The samples that reach a row of the gradient then lie next to each other, so that a program finds all that it needs of them.
Launches: ``gpu_few.py`` and ``gpu_walk.py``.
"""

import torch
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
    key, here, at, x, places, slopes, samples, features, i, lo, inv_h,
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """places[i, at]: where in their cells the samples behind sorted keys lie; slopes[i, at]: SiLU's derivative."""
    n = (key & (2**BITS - 1)).to(tl.int64)
    xv = tl.load(x + n * features + i, mask=here, other=0.0).to(CT)
    f = (xv - lo) * inv_h - ((key >> BITS).to(tl.int32) - (ORDER + 1)).to(CT)
    tl.store(places + i * samples + at, tl.where(tl.abs(f) > 2, 0.0, f), mask=here)
    if SLOPES:
        tl.store(slopes + i * samples + at, silu(xv, DOT_D), mask=here)


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


@triton.jit(do_not_specialize=["samples", "features", "size", "each", "stretches"])
def arrange_kernel(
    x, scale, keys, places, slopes, acts, cuts,
    samples, features, size, each, stretches,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    SLOPES: tl.constexpr, ACTS: tl.constexpr, SORT: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """All that a walk needs of the samples of one feature: keys[i] as ``sort_kernel`` makes them and, behind them,
    places and slopes (see ``_place``); cuts[i]: the first key of each stretch of the walk, and the number of keys. Without
    SORT only the keys are made, in the order of the samples. With ACTS also acts[i, b], SiLU's value times the scale.

    A walk takes a step for each sample and for each cell; a stretch is ``each`` steps. In order, samples and cells are a
    merge path (Green, McColl and Bader 2012): the sample n is step n + (its cell's number).
    """
    i = tl.program_id(0).to(tl.int64)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    n = tl.program_id(1) * NB + tl.arange(0, NB)
    here = n < samples
    if ACTS:
        at = n.to(tl.int64) * features + i
        act = silu(tl.load(x + at, mask=here, other=0.0).to(CT), SCATTER_D)
        if SCALED:
            act *= tl.load(scale + at, mask=here, other=0.0).to(CT)
        tl.store(acts + i * samples + n, act.to(acts.dtype.element_ty), mask=here)
    if SORT:
        key = sorted_keys(x, i, n, here, features, size, lo, hi, inv_h, ORDER, CT, keys.dtype.element_ty, BITS)
        _place(key, here, n, x, places, slopes, samples, features, i, lo, inv_h, ORDER, DOT_D, CT, SLOPES, BITS)
        step = n + (key >> BITS).to(tl.int32)
        for first in range(0, stretches + 1, 4):
            t = first + tl.arange(0, 4)
            before = tl.sum((here[:, None] & (step[:, None] < (t * each)[None, :])).to(tl.int32), axis=0)
            tl.store(cuts + i * (stretches + 1) + t, before, mask=t <= stretches)
    else:
        xv = tl.load(x + n.to(tl.int64) * features + i, mask=here, other=0.0).to(CT)
        cell, _ = locate(xv, lo, hi, inv_h, size, ORDER)
        key = ((cell + ORDER + 1).to(keys.dtype.element_ty) << BITS) | n
    tl.store(keys + i * samples + n, key, mask=here)


@triton.jit(do_not_specialize=["samples", "features", "each", "stretches"])
def place_kernel(
    x, keys, places, slopes, cuts,
    samples, features, each, stretches,
    lo: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What ``arrange_kernel`` leaves to do for keys that were sorted elsewhere."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    here = at < samples
    keys += i * samples
    key = tl.load(keys + at, mask=here, other=0)
    _place(
        key, here, at, x, places, slopes, samples, features, i, tl.full([], lo, CT), tl.full([], inv_h, CT),
        ORDER, DOT_D, CT, SLOPES, BITS,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        for first in range(0, stretches + 1, 16):
            t = first + tl.arange(0, 16)
            low, high = t * 0, t * 0 + samples
            for _ in range(BITS + 1):  # halves what is left of ``samples <= 2 ** BITS``
                middle = (low + high) // 2
                cell = (tl.load(keys + middle, mask=low < high, other=0) >> BITS).to(tl.int32)
                before = (low < high) & (middle + cell < t * each)
                low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
            tl.store(cuts + i * (stretches + 1) + t, low, mask=t <= stretches)


def sort_warps(block: int) -> int:
    """Warps of a program that sorts ``block`` samples."""
    return min(max(block // 64, 1), 16)


def key_format(samples: int, size: int, order: int) -> tuple[int, torch.dtype]:
    """How many of a key's bits hold the sample, and the dtype of the keys."""
    bits = max(samples - 1, 1).bit_length()
    return bits, torch.int32 if (size + 2 * order + 3).bit_length() + bits < 31 else torch.int64
