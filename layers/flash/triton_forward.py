"""The GPU kernels of the forward pass, in Triton: gather the ``k + 1`` rows of each input and add them up.

Cells and basis values are made once, by one thread each; then rows are only loaded and added. With few outputs one
program does both for a sample and all its features; with many, a kernel prepares, and a program of the next owns a tile
of samples and outputs and runs over the features.

Formulas and shapes: ``layers/flash/reference.py``. Launches: ``layers/flash/gpu.py``. ``CT`` is the dtype of all sums,
float64 or float32, whatever the dtype of the weights.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import basis, locate, silu, spread, value


@triton.jit(do_not_specialize=["samples", "features", "size"])
def few_kernel(
    x, scale, weight, base, first_rows, values, y,
    samples, features, outputs, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """y[b, o] for one sample, all its features and all outputs.

    ALL threads first find rows and values of one feature each and leave them in first_rows (B, I) and values
    (k + 2, B, I), the last plane for SiLU; then a feature is shared by the threads of its outputs.
    """
    b = tl.program_id(0).to(tl.int64)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    plane = tl.cast(features, tl.int64) * samples
    for start in range(0, features, ALL):
        i = start + tl.arange(0, ALL)
        here = i < features
        at = b * features + i
        xv = tl.load(x + at, mask=here, other=0.0).to(CT)
        cell, f = locate(xv, lo, hi, inv_h, size, ORDER)
        v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, D)
        act = silu(xv, D)
        if SCALED:
            s = tl.load(scale + at, mask=here, other=0.0).to(CT)
            v0, v1, v2, v3, v4, v5, act = v0 * s, v1 * s, v2 * s, v3 * s, v4 * s, v5 * s, act * s
        first = tl.minimum(tl.maximum(cell, 0), size - 1)
        tl.store(first_rows + at, first, mask=here)
        for r in tl.static_range(ORDER + 1):
            tl.store(values + r * plane + at, spread(first + r - cell, v0, v1, v2, v3, v4, v5, ORDER), mask=here)
        if BASE:
            tl.store(values + (ORDER + 1) * plane + at, act, mask=here)
    tl.debug_barrier()
    o = tl.arange(0, BO)
    inside = (o < outputs)[None, :]
    one_feature = (size + ORDER) * outputs
    acc = tl.zeros((BI, BO), CT)
    for start in range(0, features, BI):
        i = start + tl.arange(0, BI)
        here = i < features
        at = b * features + i
        rows = weight + i.to(tl.int64) * one_feature + tl.load(first_rows + at, mask=here, other=0) * outputs
        rows = rows[:, None] + o[None, :]
        for r in tl.static_range(ORDER + 1):
            v = tl.load(values + r * plane + at, mask=here, other=0.0)
            w = tl.load(rows + r * outputs, mask=inside & here[:, None], other=0.0)
            acc += v[:, None] * w.to(CT)
        if BASE:
            act = tl.load(values + (ORDER + 1) * plane + at, mask=here, other=0.0)
            wb = tl.load(base + i[:, None] * outputs + o[None, :], mask=inside & here[:, None], other=0.0)
            acc += act[:, None] * wb.to(CT)
    tl.store(y + b * outputs + o, tl.sum(acc, axis=0).to(y.dtype.element_ty), mask=o < outputs)


@triton.jit(do_not_specialize=["samples", "features", "size"])
def prepare_kernel(
    x, scale, first_rows, values, acts,
    samples, features, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    BB: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """first_rows (I, B), values (k + 1, I, B) and acts (I, B): rows ``first .. first + k`` exist for every input.

    A window that hangs over an end of the grid is moved inside, its values with it; the free places hold zeros.
    """
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    there = (b < samples)[None, :] & (i < features)[:, None]
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    at = b.to(tl.int64)[None, :] * features + i[:, None]
    xv = tl.load(x + at, mask=there, other=0.0).to(CT)
    cell, f = locate(xv, lo, hi, inv_h, size, ORDER)
    v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, D)
    act = silu(xv, D)
    if SCALED:
        s = tl.load(scale + at, mask=there, other=0.0).to(CT)
        v0, v1, v2, v3, v4, v5, act = v0 * s, v1 * s, v2 * s, v3 * s, v4 * s, v5 * s, act * s
    first = tl.minimum(tl.maximum(cell, 0), size - 1)
    to = i.to(tl.int64)[:, None] * samples + b[None, :]
    tl.store(first_rows + to, first, mask=there)
    for r in tl.static_range(ORDER + 1):
        v = spread(first + r - cell, v0, v1, v2, v3, v4, v5, ORDER)
        tl.store(values + tl.full([], r, tl.int64) * features * samples + to, v, mask=there)
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
    samples, features, outputs, size, step,
    ORDER: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, WHOLE: tl.constexpr, BB: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """y[part, b, o]: the sum over the features ``part * step .. (part + 1) * step``."""
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
