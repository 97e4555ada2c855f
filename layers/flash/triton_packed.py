"""All basis values in two bytes each, in Triton: windows are packed into 64 bits and shifted to where they belong.

Of the ``G + k`` values of an input all but ``k + 1`` are 0. Made place by place, most of the work is for these zeros; here a
window is found once for each input, and eight places at a time take some shifts. Launches: ``gpu_dense.py``.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import window


@triton.jit
def _bits(v, NT: tl.constexpr, AT: tl.constexpr):
    return v.to(NT).to(tl.uint16, bitcast=True).to(tl.uint64) << 16 * AT


@triton.jit
def _pack(v0, v1, v2, v3, NT: tl.constexpr):
    """Four values in format NT, of two bytes, the first in the lowest bits."""
    return _bits(v0, NT, 0) | _bits(v1, NT, 1) | _bits(v2, NT, 2) | _bits(v3, NT, 3)


@triton.jit
def _shifted(packed, place):
    """A window that begins at ``place``, negative too: the number of the first four places it reaches, counted in fours,
    what it puts there, and what in the next four."""
    by = (place & 3) * 16
    return place >> 2, packed << by, (packed >> 16) >> (48 - by)  # in two steps: a shift by 64 has no meaning


@triton.jit
def _eight(packed, place, packed_after, place_after):
    """Eight places as two integers, of two windows that share none; the second does not begin before the first place."""
    at, low, high = _shifted(packed, place)
    after, low_after, high_after = _shifted(packed_after, place_after)
    one = tl.where(at == 0, low, tl.where(at == -1, high, 0)) | tl.where(after == 0, low_after, 0)
    two = tl.where(at == 1, low, tl.where(at == 0, high, 0))
    return tl.join(one, two | tl.where(after == 1, low_after, tl.where(after == 0, high_after, 0)))


@triton.jit(do_not_specialize=["samples", "size", "reciprocal"])
def packed_kernel(
    x, scale, values, acts, room,
    samples, features, size, reciprocal,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    INPUTS: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """values (B, I * R), all ``G + k`` values of each input, and acts (B, I), SiLU's; times the scale.

    A program takes INPUTS features of one sample. ORDER <= 3, R >= 8, and I * R is a multiple of 8. ``room`` (3 * B * I
    integers of 32 bits) takes the windows and, behind them all, their first places. ``reciprocal``: 2**32 / R, rounded
    up. LEAVES: when what is written leaves the cache, "" or, soon, ".cs".
    """
    NT: tl.constexpr = values.dtype.element_ty
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    rows = size + ORDER
    start = tl.program_id(0) // samples * INPUTS
    at = (tl.program_id(0) % samples).to(tl.int64) * features + start
    n = tl.arange(0, INPUTS)
    here = start + n < features
    first, v0, v1, v2, v3, _4, _5, act = window(x, scale, at + n, here, size, lo, hi, inv_h, ORDER, D, CT, SCALED)
    if BASE:
        tl.store(acts + at + n, act.to(acts.dtype.element_ty), mask=here)
    if ORDER < 3:  # what a smaller window does not use
        v3 = tl.zeros_like(v3)
    if ORDER < 2:
        v2 = tl.zeros_like(v2)
    if ORDER < 1:
        v1 = tl.zeros_like(v1)
    packed = room.to(tl.pointer_type(tl.uint64)) + at
    places = room + 2 * tl.cast(samples, tl.int64) * features + at
    tl.store(packed + n, _pack(v0, v1, v2, v3, NT), mask=here)
    tl.store(places + n, first + n * rows, mask=here)
    tl.debug_barrier()
    values = (values + at * rows).to(tl.pointer_type(tl.uint64))
    inputs = tl.minimum(INPUTS, features - start)
    units = inputs * rows // 8
    for u in range(0, units, INPUTS):
        unit = u + n
        there = unit < units
        i = tl.umulhi(unit * 8, reciprocal)  # the input in whose row a unit begins; it may reach into the next row
        after = i + 1 < inputs
        eight = _eight(
            tl.load(packed + i, mask=there, other=0),
            tl.load(places + i, mask=there, other=0) - unit * 8,
            tl.load(packed + i + 1, mask=after, other=0),
            tl.load(places + i + 1, mask=after, other=2**30) - unit * 8,
        )
        to = unit[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(values + to, eight, mask=there[:, None], cache_modifier=LEAVES)
