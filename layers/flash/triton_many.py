"""The forward kernels for many outputs, in Triton: windows are found by one kernel, and a program of the next owns a tile
of samples and outputs and only loads rows and adds them up, one feature after the other.

Formulas and shapes: ``layers/flash/reference.py``. Launches: ``gpu_many.py``. ``CT`` is the dtype of all sums,
float64 or float32, whatever the dtype of the weights.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import value, window


@triton.jit(do_not_specialize=["samples", "features", "size"])
def prepare_kernel(
    x, scale, first_rows, values, acts,
    samples, features, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    BB: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """first_rows (I, B), values (k + 1, I, B) and acts (I, B): the windows of all inputs, see ``window``."""
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    there = (b < samples)[None, :] & (i < features)[:, None]
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    at = b.to(tl.int64)[None, :] * features + i[:, None]
    first, w0, w1, w2, w3, w4, w5, act = window(x, scale, at, there, size, lo, hi, inv_h, ORDER, D, CT, SCALED)
    to = i.to(tl.int64)[:, None] * samples + b[None, :]
    tl.store(first_rows + to, first, mask=there)
    for r in tl.static_range(ORDER + 1):
        plane = tl.full([], r, tl.int64) * features * samples
        tl.store(values + plane + to, value(r, w0, w1, w2, w3, w4, w5), mask=there)
    if BASE:
        tl.store(acts + to, act, mask=there)


@triton.jit
def _prepared(first_rows, values, acts, at, here, plane, ORDER: tl.constexpr, BASE: tl.constexpr):
    row = tl.load(first_rows + at, mask=here, other=0)
    v0 = tl.load(values + at, mask=here, other=0.0)
    v1, v2, v3, v4, v5, act = v0, v0, v0, v0, v0, v0
    if ORDER >= 1:
        v1 = tl.load(values + plane + at, mask=here, other=0.0)
    if ORDER >= 2:
        v2 = tl.load(values + 2 * plane + at, mask=here, other=0.0)
    if ORDER >= 3:
        v3 = tl.load(values + 3 * plane + at, mask=here, other=0.0)
    if ORDER >= 4:
        v4 = tl.load(values + 4 * plane + at, mask=here, other=0.0)
    if ORDER >= 5:
        v5 = tl.load(values + 5 * plane + at, mask=here, other=0.0)
    if BASE:
        act = tl.load(acts + at, mask=here, other=0.0)
    return row, v0, v1, v2, v3, v4, v5, act


@triton.jit(do_not_specialize=["samples", "features", "size", "step"])
def many_kernel(
    first_rows, values, acts, weight, base, y,
    samples, features, units, size, step,
    ORDER: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    BB: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """y[part, b, o]: the sum over the features ``part * step .. (part + 1) * step``; ``units`` of UNIT outputs."""
    outputs = units * UNIT
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    part = tl.program_id(2)
    start = part * step
    stop = tl.minimum(start + step, features)
    here = b < samples
    inside = o < outputs
    plane = tl.cast(features, tl.int64) * samples
    one_feature = (size + ORDER) * outputs
    acc = tl.zeros((BB, BO), CT)
    # One feature ahead: its rows' numbers and values are on their way while weights are added.
    row, v0, v1, v2, v3, v4, v5, act = _prepared(
        first_rows, values, acts, tl.cast(start, tl.int64) * samples + b, here, plane, ORDER, BASE
    )
    for i in range(start, stop):
        ahead = tl.cast(tl.minimum(i + 1, stop - 1), tl.int64) * samples + b
        row_, v0_, v1_, v2_, v3_, v4_, v5_, act_ = _prepared(first_rows, values, acts, ahead, here, plane, ORDER, BASE)
        w = weight + tl.cast(i, tl.int64) * one_feature
        w = w + (row * outputs)[:, None] + o[None, :]
        for r in tl.static_range(ORDER + 1):
            if WHOLE:
                part_of_y = tl.load(w + r * outputs).to(CT)
            else:
                part_of_y = tl.load(w + r * outputs, mask=inside[None, :], other=0.0).to(CT)
            acc += value(r, v0, v1, v2, v3, v4, v5)[:, None] * part_of_y
        if BASE:
            wb = tl.load(base + tl.cast(i, tl.int64) * outputs + o, mask=inside, other=0.0).to(CT)
            acc += act[:, None] * wb[None, :]
        row, v0, v1, v2, v3, v4, v5, act = row_, v0_, v1_, v2_, v3_, v4_, v5_, act_
    at = (part.to(tl.int64) * samples + b.to(tl.int64))[:, None] * outputs + o[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=here[:, None] & inside[None, :])
