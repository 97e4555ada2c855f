"""The GPU kernels that sort the samples of each feature by cell, in Triton.

The samples that reach a row of the gradient then lie next to each other, and every row is written once, by one program.
Launches: ``gpu_few.py`` and ``gpu_walk.py``.
"""

import torch
import triton
import triton.language as tl

from layers.flash.triton_basis import locate, silu


@triton.jit
def sorted_keys(
    x, i, n, here, samples, features, size, lo, hi, inv_h,
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
    key = sorted_keys(
        x, i, n, n < samples, samples, features, size, lo, hi, inv_h, ORDER, CT, keys.dtype.element_ty, BITS
    )
    tl.store(keys + i * samples + n, key, mask=n < samples)


@triton.jit(do_not_specialize=["samples", "features", "size", "step", "tiles"])
def arrange_kernel(
    x, scale, keys, places, slopes, acts, bounds,
    samples, features, size, step, tiles,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    SLOPES: tl.constexpr, ACTS: tl.constexpr, SORT: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """All that a walk needs of the samples of one feature: keys[i] as ``sort_kernel`` makes them and, behind them,
    places and slopes (see ``_place``); bounds[i]: for each tile of ``step`` rows the first key whose cell reaches it
    (or owns it) and the first beyond. Without SORT only the keys are made, in the order of the samples. With ACTS also
    acts[i, b], SiLU's value times the scale.
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
        tl.store(acts + i * samples + n, act, mask=here)
    if SORT:
        key = sorted_keys(x, i, n, here, samples, features, size, lo, hi, inv_h, ORDER, CT, keys.dtype.element_ty, BITS)
        _place(key, here, n, x, places, slopes, samples, features, i, lo, inv_h, ORDER, DOT_D, CT, SLOPES, BITS)
        cell = tl.where(here, (key >> BITS).to(tl.int32) - (ORDER + 1), size + ORDER + 1)
        for first in range(0, tiles, 4):
            t = first + tl.arange(0, 4)
            reach = tl.where(t == 0, -ORDER - 1, t * step - (ORDER if SCATTER_D >= 0 else 0))
            beyond = tl.where(t == tiles - 1, size + ORDER + 1, (t + 1) * step)
            # Two numbers below 2 ** 16 in one sum.
            both = (cell[:, None] < reach[None, :]).to(tl.int32) + (
                (cell[:, None] < beyond[None, :]).to(tl.int32) << 16
            )
            both = tl.sum(both, axis=0)
            tl.store(bounds + i * 2 * tiles + t, both & 0xFFFF, mask=t < tiles)
            tl.store(bounds + i * 2 * tiles + tiles + t, both >> 16, mask=t < tiles)
    else:
        xv = tl.load(x + n.to(tl.int64) * features + i, mask=here, other=0.0).to(CT)
        cell, _ = locate(xv, lo, hi, inv_h, size, ORDER)
        key = ((cell + ORDER + 1).to(keys.dtype.element_ty) << BITS) | n
    tl.store(keys + i * samples + n, key, mask=here)


@triton.jit(do_not_specialize=["samples", "features"])
def place_kernel(
    x, keys, places, slopes,
    samples, features,
    lo: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """``places`` and ``slopes`` for keys that were sorted elsewhere."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    here = at < samples
    key = tl.load(keys + i * samples + at, mask=here, other=0)
    _place(
        key, here, at, x, places, slopes, samples, features, i, tl.full([], lo, CT), tl.full([], inv_h, CT),
        ORDER, DOT_D, CT, SLOPES, BITS,
    )  # fmt: skip


def sort_warps(block: int) -> int:
    """Warps of a program that sorts ``block`` samples."""
    return min(max(block // 64, 1), 16)


def key_format(samples: int, size: int, order: int) -> tuple[int, torch.dtype]:
    """How many of a key's bits hold the sample, and the dtype of the keys."""
    bits = max(samples - 1, 1).bit_length()
    return bits, torch.int32 if (size + 2 * order + 3).bit_length() + bits < 31 else torch.int64
