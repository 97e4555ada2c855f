"""The GPU kernels, in Triton: gather windows forward; sort samples by cell and walk along the grid backward.

Forward (``prepare_kernel``, then ``few_kernel`` or ``many_kernel``): cells and basis values are made once, by one
thread each; the second kernel only loads rows and adds. With few outputs a program owns a sample and runs over its
features, a tile of them at a time; with many it owns a tile of samples and outputs.

Backward (``sort_kernel``, then ``tile_kernel`` or ``walk_kernel``): the samples of one feature are sorted by cell, with
their basis values behind them. The rows of the gradient are cut into tiles; the samples that reach a tile lie next to
each other in that order. With few outputs a tile is a short sum of small matrix products: basis values (rows, samples)
times gradients (samples, outputs). With many, a program walks through the samples with ``k + 1`` rows in registers:
when the next sample lies in a later cell, the rows that no sample can reach any more are written and the window moves
on. Either way every row is written once: no atomics, no zero-fill, nothing that changes from run to run. The same
loads of ``grad`` give ``dot``.

Formulas and shapes: ``layers/flash/reference.py``. Launches: ``layers/flash/gpu.py``. ``CT`` is the dtype of all sums,
float64 or float32, whatever the dtype of the weights.
"""

import triton
import triton.language as tl


@triton.jit
def _locate(x, lo, hi, inv_h, size, ORDER: tl.constexpr):
    """Cell (int32) and position inside it, as ``layers.bsplines.locate``."""
    u = (x - lo) * inv_h
    c = tl.floor(u)
    c = tl.where(x <= hi, tl.minimum(c, size - 1.0), tl.maximum(c, size * 1.0))
    c = tl.minimum(tl.maximum(c, -1.0 - ORDER), size * 1.0 + ORDER)
    c = tl.where(x != x, 0.0, c)
    f = u - c
    return c.to(tl.int32), tl.where(tl.abs(f) > 2, 0.0, f)  # far outside nothing may overflow


@triton.jit
def _basis(f, inv_h, ORDER: tl.constexpr, D: tl.constexpr):
    """The ``ORDER + 1 <= 6`` basis values, or D-th derivatives (de Boor 1978, X.(4) and X.(12)); unused ones are 0."""
    nil = f * 0
    one = nil + 1
    v0, v1, v2, v3, v4, v5 = one, nil, nil, nil, nil, nil
    if ORDER - D >= 1:
        v0, v1 = one - f, f
    if ORDER - D >= 2:
        v0, v1, v2 = (1 - f) * v0 * 0.5, ((f + 1) * v0 + (2 - f) * v1) * 0.5, f * v1 * 0.5
    if ORDER - D >= 3:
        t: tl.constexpr = 1 / 3
        v0, v1, v2, v3 = (
            (1 - f) * v0 * t,
            ((f + 2) * v0 + (2 - f) * v1) * t,
            ((f + 1) * v1 + (3 - f) * v2) * t,
            f * v2 * t,
        )
    if ORDER - D >= 4:
        v0, v1, v2, v3, v4 = (
            (1 - f) * v0 * 0.25,
            ((f + 3) * v0 + (2 - f) * v1) * 0.25,
            ((f + 2) * v1 + (3 - f) * v2) * 0.25,
            ((f + 1) * v2 + (4 - f) * v3) * 0.25,
            f * v3 * 0.25,
        )
    if ORDER - D >= 5:
        v0, v1, v2, v3, v4, v5 = (
            (1 - f) * v0 * 0.2,
            ((f + 4) * v0 + (2 - f) * v1) * 0.2,
            ((f + 3) * v1 + (3 - f) * v2) * 0.2,
            ((f + 2) * v2 + (4 - f) * v3) * 0.2,
            ((f + 1) * v3 + (5 - f) * v4) * 0.2,
            f * v4 * 0.2,
        )
    if D > ORDER:
        v0 = nil
    for _ in tl.static_range(D if D <= ORDER else 0):
        v0, v1, v2, v3, v4, v5 = (
            -v0 * inv_h,
            (v0 - v1) * inv_h,
            (v1 - v2) * inv_h,
            (v2 - v3) * inv_h,
            (v3 - v4) * inv_h,
            (v4 - v5) * inv_h,
        )
    return v0, v1, v2, v3, v4, v5


@triton.jit
def _silu(x, D: tl.constexpr):
    """``x * s(x)`` or its first or second derivative, ``s`` the logistic function."""
    s = 1 / (1 + tl.exp(-x))
    xs = tl.where(x == float("-inf"), 0.0, x)
    if D == 0:
        out = xs * s
    elif D == 1:
        out = s + xs * s * (1 - s)
    else:
        out = s * (1 - s) * (2 + xs * (1 - 2 * s))
    return out


@triton.jit
def _spread(at, v0, v1, v2, v3, v4, v5, ORDER: tl.constexpr):
    """Puts the value of window row ``at`` (0..ORDER) in its place and 0 elsewhere; shapes broadcast."""
    out = tl.where(at == 0, v0, 0.0)
    if ORDER >= 1:
        out = tl.where(at == 1, v1, out)
    if ORDER >= 2:
        out = tl.where(at == 2, v2, out)
    if ORDER >= 3:
        out = tl.where(at == 3, v3, out)
    if ORDER >= 4:
        out = tl.where(at == 4, v4, out)
    if ORDER >= 5:
        out = tl.where(at == 5, v5, out)
    return out


@triton.jit
def _value(r: tl.constexpr, v0, v1, v2, v3, v4, v5):
    if r == 0:
        out = v0
    elif r == 1:
        out = v1
    elif r == 2:
        out = v2
    elif r == 3:
        out = v3
    elif r == 4:
        out = v4
    else:
        out = v5
    return out


@triton.jit(do_not_specialize=["samples", "features", "size"])
def prepare_kernel(
    x, scale, first_rows, values, acts,
    samples, features, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    BY_SAMPLE: tl.constexpr, BB: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """first_rows (I, B), values (k + 1, I, B) and acts (I, B): rows ``first .. first + k`` exist for every input.

    BY_SAMPLE: the same as (B, I), (k + 1, B, I), (B, I).

    A window that hangs over an end of the grid is moved inside, its values with it; the free places hold zeros.
    """
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    there = (b < samples)[None, :] & (i < features)[:, None]
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    at = b.to(tl.int64)[None, :] * features + i[:, None]
    xv = tl.load(x + at, mask=there, other=0.0).to(CT)
    cell, f = _locate(xv, lo, hi, inv_h, size, ORDER)
    v0, v1, v2, v3, v4, v5 = _basis(f, inv_h, ORDER, D)
    act = _silu(xv, D)
    if SCALED:
        s = tl.load(scale + at, mask=there, other=0.0).to(CT)
        v0, v1, v2, v3, v4, v5, act = v0 * s, v1 * s, v2 * s, v3 * s, v4 * s, v5 * s, act * s
    first = tl.minimum(tl.maximum(cell, 0), size - 1)
    to = at if BY_SAMPLE else i.to(tl.int64)[:, None] * samples + b[None, :]
    tl.store(first_rows + to, first, mask=there)
    for r in tl.static_range(ORDER + 1):
        v = _spread(first + r - cell, v0, v1, v2, v3, v4, v5, ORDER)
        tl.store(values + tl.full([], r, tl.int64) * features * samples + to, v, mask=there)
    if BASE:
        tl.store(acts + to, act, mask=there)


@triton.jit(do_not_specialize=["samples", "features", "size"])
def few_kernel(
    first_rows, values, acts, weight, base, y,
    samples, features, outputs, size,
    ORDER: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """y[b, o] for one sample, all its features and all outputs; arrays of ``prepare_kernel`` with BY_SAMPLE."""
    b = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BO)
    inside = (o < outputs)[None, :]
    plane = tl.cast(features, tl.int64) * samples
    one_feature = (size + ORDER) * outputs
    acc = tl.zeros((BI, BO), CT)
    for first in range(0, features, BI):
        i = first + tl.arange(0, BI)
        here = i < features
        at = b * features + i
        rows = weight + i.to(tl.int64) * one_feature + tl.load(first_rows + at, mask=here, other=0) * outputs
        rows = rows[:, None] + o[None, :]
        for r in tl.static_range(ORDER + 1):
            v = tl.load(values + r * plane + at, mask=here, other=0.0)
            w = tl.load(rows + r * outputs, mask=inside & here[:, None], other=0.0)
            acc += v[:, None] * w.to(CT)
        if BASE:
            act = tl.load(acts + at, mask=here, other=0.0)
            wb = tl.load(base + i[:, None] * outputs + o[None, :], mask=inside & here[:, None], other=0.0)
            acc += act[:, None] * wb.to(CT)
    tl.store(y + b * outputs + o, tl.sum(acc, axis=0).to(y.dtype.element_ty), mask=o < outputs)


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
            acc += _value(r, v0, v1, v2, v3, v4, v5)[:, None] * part_of_y
        if BASE:
            wb = tl.load(base + tl.cast(i, tl.int64) * outputs + o, mask=inside, other=0.0).to(CT)
            acc += act[:, None] * wb[None, :]
        row, v0, v1, v2, v3, v4, v5, act = row_, v0_, v1_, v2_, v3_, v4_, v5_, act_
    at = (part.to(tl.int64) * samples + b.to(tl.int64))[:, None] * outputs + o[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def _order(
    key, here, at, x, scale, order, samples, features, i, lo, inv_h,
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """order[i, at, :]: what the backward pass needs of the samples behind sorted keys, 2 (k + 1) numbers each.

    ``v_0 .. v_k`` (times the scale), ``d_1 .. d_k``, the slope of SiLU; ``d_0`` follows: they add up to 0 (or 1).
    """
    n = (key & (2**BITS - 1)).to(tl.int64)
    cell = (key >> BITS).to(tl.int32) - (ORDER + 1)
    xv = tl.load(x + n * features + i, mask=here, other=0.0).to(CT)
    f = (xv - lo) * inv_h - cell.to(CT)
    f = tl.where(tl.abs(f) > 2, 0.0, f)
    to = order + (i * samples + at) * (2 * ORDER + 2)
    if SCATTER_D >= 0:
        v0, v1, v2, v3, v4, v5 = _basis(f, inv_h, ORDER, SCATTER_D)
        if SCALED:
            s = tl.load(scale + n * features + i, mask=here, other=0.0).to(CT)
            v0, v1, v2, v3, v4, v5 = v0 * s, v1 * s, v2 * s, v3 * s, v4 * s, v5 * s
        for r in tl.static_range(ORDER + 1):
            tl.store(to + r, _value(r, v0, v1, v2, v3, v4, v5), mask=here)
    if DOT_D >= 0:
        v0, v1, v2, v3, v4, v5 = _basis(f, inv_h, ORDER, DOT_D)
        for r in tl.static_range(1, ORDER + 1):
            tl.store(to + ORDER + r, _value(r, v0, v1, v2, v3, v4, v5), mask=here)
        if BASE:
            tl.store(to + 2 * ORDER + 1, _silu(xv, DOT_D), mask=here)


@triton.jit(do_not_specialize=["samples", "features", "size", "step", "tiles"])
def sort_kernel(
    x, scale, grad, keys, order, bounds, base_gradient,
    samples, features, outputs, size, step, tiles,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, BASE_GRADIENT: tl.constexpr, SORT: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr,
    BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """keys[i]: the samples of feature ``i`` in order of their cells, as ``(cell + k + 1) << BITS | sample``.

    And behind them ``order`` (see ``_order``) and bounds[i]: for each tile of ``step`` rows the first key whose cell
    reaches it (or owns it) and the first beyond. Without SORT only the keys are made, in the order of the samples.
    With BASE_GRADIENT also base_gradient[i, o], the sum over samples of ``silu(x) * grad``.
    """
    i = tl.program_id(0).to(tl.int64)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    n = tl.program_id(1) * NB + tl.arange(0, NB)
    here = n < samples
    xv = tl.load(x + n.to(tl.int64) * features + i, mask=here, other=0.0).to(CT)
    cell, _ = _locate(xv, lo, hi, inv_h, size, ORDER)
    key = ((cell + ORDER + 1).to(keys.dtype.element_ty) << BITS) | n
    if SORT:
        key = tl.sort(tl.where(here, key, key * 0 + (2 ** (keys.dtype.element_ty.primitive_bitwidth - 1) - 1)))
        _order(
            key, here, n, x, scale, order, samples, features, i, lo, inv_h,
            ORDER, DOT_D, SCATTER_D, CT, SCALED, BASE, BITS,
        )  # fmt: skip
        cell = tl.where(here, cell, size + ORDER + 1)
        for first in range(0, tiles, 16):
            t = first + tl.arange(0, 16)
            reach = tl.where(t == 0, -ORDER - 1, t * step - (ORDER if SCATTER_D >= 0 else 0))
            beyond = tl.where(t == tiles - 1, size + ORDER + 1, (t + 1) * step)
            before = tl.sum((cell[:, None] < reach[None, :]).to(tl.int32), axis=0)
            until = tl.sum((cell[:, None] < beyond[None, :]).to(tl.int32), axis=0)
            tl.store(bounds + i * 2 * tiles + t, before, mask=t < tiles)
            tl.store(bounds + i * 2 * tiles + tiles + t, until, mask=t < tiles)
    tl.store(keys + i * samples + n, key, mask=here)
    if BASE_GRADIENT:
        o = tl.arange(0, BO)
        acc = tl.zeros((BC, BO), CT)
        for first in range(0, samples, BC):
            m = first + tl.arange(0, BC)
            there = m < samples
            at = m.to(tl.int64) * features + i
            s = _silu(tl.load(x + at, mask=there, other=0.0).to(CT), SCATTER_D)
            if SCALED:
                s *= tl.load(scale + at, mask=there, other=0.0).to(CT)
            at = m.to(tl.int64)[:, None] * outputs + o[None, :]
            g = tl.load(grad + at, mask=there[:, None] & (o < outputs)[None, :], other=0.0)
            acc += s[:, None] * g.to(CT)
        total = tl.sum(acc, axis=0)
        tl.store(base_gradient + i * outputs + o, total.to(base_gradient.dtype.element_ty), mask=o < outputs)


@triton.jit(do_not_specialize=["samples", "features"])
def order_kernel(
    x, scale, keys, order,
    samples, features,
    lo: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``order`` for keys that were sorted elsewhere."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    here = at < samples
    key = tl.load(keys + i * samples + at, mask=here, other=0)
    _order(
        key, here, at, x, scale, order, samples, features, i, tl.full([], lo, CT), tl.full([], inv_h, CT),
        ORDER, DOT_D, SCATTER_D, CT, SCALED, BASE, BITS,
    )  # fmt: skip


@triton.jit
def _product(a, b, CT: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b``; tensor cores have no float64 small enough, so that one is spelled out."""
    if CT == tl.float64:
        out = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        out = tl.dot(a, b, input_precision=PRECISION)
    return out


@triton.jit
def _entry(order, n, here, ORDER: tl.constexpr, r: tl.constexpr):
    return tl.load(order + n * (2 * ORDER + 2) + r, mask=here, other=0.0)


@triton.jit(do_not_specialize=["samples", "features", "size", "tiles"])
def tile_kernel(
    grad, weight, base, keys, order, bounds, dots, gradient,
    samples, features, outputs, size, tiles,
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr, TR: tl.constexpr, BS: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One feature, one tile of ``TR - ORDER`` rows of its gradient, one block of outputs; see the module's text.

    The tile's frame has ``ORDER`` rows more, so that the windows of its own cells lie inside. ``dots`` has a leading
    dimension for the blocks of outputs. A derivative of -1 leaves that half out.
    """
    i = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    block = tl.program_id(2)
    o = block * BO + tl.arange(0, BO)
    inside = o < outputs
    rows = size + ORDER
    first = tile * (TR - ORDER)
    stop = tl.minimum(first + TR - ORDER, rows)
    start = tl.load(bounds + i * 2 * tiles + tile)
    end = tl.load(bounds + i * 2 * tiles + tiles + tile)
    keys += i * samples
    order += i * samples * (2 * ORDER + 2)
    r = first + tl.arange(0, TR)
    at_rows = i * rows * outputs + r[:, None] * outputs + o[None, :]
    if DOT_D >= 0:
        w = tl.load(weight + at_rows, mask=(r < rows)[:, None] & inside[None, :], other=0.0).to(CT)
        if BASE:
            wb = tl.load(base + i * outputs + o, mask=inside, other=0.0).to(CT)
    acc = tl.zeros((TR, BO), CT)
    for j in range(start, end, BS):
        at = j + tl.arange(0, BS)
        here = at < end
        key = tl.load(keys + at, mask=here, other=0)
        n = (key & (2**BITS - 1)).to(tl.int64)
        cell = (key >> BITS).to(tl.int32) - (ORDER + 1)
        g = tl.load(grad + n[:, None] * outputs + o[None, :], mask=here[:, None] & inside[None, :], other=0.0).to(CT)
        if SCATTER_D >= 0:
            where = r[:, None] - cell[None, :]
            a = tl.zeros((TR, BS), CT)
            for q in tl.static_range(ORDER + 1):
                a = tl.where(where == q, _entry(order, at, here, ORDER, q)[None, :], a)
            acc += _product(a, g, CT, PRECISION)
        if DOT_D >= 0:
            where = r[None, :] - cell[:, None]
            a = tl.zeros((BS, TR), CT)
            total = tl.zeros((BS,), CT)
            for q in tl.static_range(1, ORDER + 1):
                d = _entry(order, at, here, ORDER, ORDER + q)
                total += d
                a = tl.where(where == q, d[:, None], a)
            a = tl.where(where == 0, ((1.0 if DOT_D == 0 else 0.0) - total)[:, None], a)
            p = tl.sum(a * _product(g, tl.trans(w), CT, PRECISION), axis=1)
            if BASE:
                p += _entry(order, at, here, ORDER, 2 * ORDER + 1) * tl.sum(g * wb[None, :], axis=1)
            to = dots + (block.to(tl.int64) * samples + n) * features + i
            tl.store(to, p.to(dots.dtype.element_ty), mask=here & ((cell >= first) | (tile == 0)))
    if SCATTER_D >= 0:
        tl.store(gradient + at_rows, acc.to(gradient.dtype.element_ty), mask=(r < stop)[:, None] & inside[None, :])


@triton.jit
def _row(weight, row, o, rows, outputs, CT: tl.constexpr):
    return tl.load(weight + row * outputs + o, mask=(o < outputs) & (row >= 0) & (row < rows), other=0.0).to(CT)


@triton.jit(do_not_specialize=["samples", "features", "size", "step", "tiles"])
def walk_kernel(
    grad, weight, base, keys, order, bounds, dots, gradient,
    samples, features, outputs, size, step, tiles,
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr,
    BITS: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One feature, one tile of ``step`` rows of its gradient, one block of outputs, sample by sample.

    ``dots`` has a leading dimension for the blocks of outputs. A derivative of -1 leaves that half out.
    """
    i = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    block = tl.program_id(2)
    o = block * BO + tl.arange(0, BO)
    inside = o < outputs
    rows = size + ORDER
    first = tile * step
    stop = tl.minimum(first + step, rows)
    weight += i * rows * outputs
    gradient += i * rows * outputs
    keys += i * samples
    order += i * samples * (2 * ORDER + 2)
    dots += block.to(tl.int64) * samples * features + i
    j = tl.load(bounds + i * 2 * tiles + tile)
    end = tl.load(bounds + i * 2 * tiles + tiles + tile)
    own_from = tl.where(tile == 0, -ORDER - 1, first)
    MASK: tl.constexpr = 2**BITS - 1

    nil = tl.zeros((BO,), CT)
    a0, a1, a2, a3, a4, a5 = nil, nil, nil, nil, nil, nil
    w0, w1, w2, w3, w4, w5 = nil, nil, nil, nil, nil, nil
    wb = nil
    if BASE and DOT_D >= 0:
        wb = tl.load(base + i * outputs + o, mask=inside, other=0.0).to(CT)
    c = first - ORDER  # a0 belongs to row c
    window = -ORDER - 2  # the cell whose weights w0.. hold
    # Keys two samples ahead and gradients one: they are on their way while a sample is worked on.
    key = tl.load(keys + j, mask=j < end, other=0)
    g = tl.load(grad + (key & MASK).to(tl.int64) * outputs + o, mask=inside, other=0.0).to(CT)
    key_next = tl.load(keys + j + 1, mask=j + 1 < end, other=0)
    while j < end:
        g_next = tl.load(grad + (key_next & MASK).to(tl.int64) * outputs + o, mask=inside, other=0.0).to(CT)
        key_after = tl.load(keys + j + 2, mask=j + 2 < end, other=0)
        cell = (key >> BITS).to(tl.int32) - (ORDER + 1)
        at = tl.cast(j, tl.int64)
        if SCATTER_D >= 0:
            while c < tl.minimum(cell, stop):
                tl.store(gradient + c * outputs + o, a0.to(gradient.dtype.element_ty), mask=inside & (c >= first))
                a0, a1, a2, a3, a4, a5 = a1, a2, a3, a4, a5, nil
                c += 1
        if DOT_D >= 0:
            if cell >= own_from:
                if window != cell:
                    window = cell
                    w0 = _row(weight, cell, o, rows, outputs, CT)
                    if ORDER >= 1:
                        w1 = _row(weight, cell + 1, o, rows, outputs, CT)
                    if ORDER >= 2:
                        w2 = _row(weight, cell + 2, o, rows, outputs, CT)
                    if ORDER >= 3:
                        w3 = _row(weight, cell + 3, o, rows, outputs, CT)
                    if ORDER >= 4:
                        w4 = _row(weight, cell + 4, o, rows, outputs, CT)
                    if ORDER >= 5:
                        w5 = _row(weight, cell + 5, o, rows, outputs, CT)
                d0 = tl.full([], 1.0 if DOT_D == 0 else 0.0, CT)
                mix = nil
                if ORDER >= 1:
                    d = _entry(order, at, True, ORDER, ORDER + 1)
                    mix += d * w1
                    d0 -= d
                if ORDER >= 2:
                    d = _entry(order, at, True, ORDER, ORDER + 2)
                    mix += d * w2
                    d0 -= d
                if ORDER >= 3:
                    d = _entry(order, at, True, ORDER, ORDER + 3)
                    mix += d * w3
                    d0 -= d
                if ORDER >= 4:
                    d = _entry(order, at, True, ORDER, ORDER + 4)
                    mix += d * w4
                    d0 -= d
                if ORDER >= 5:
                    d = _entry(order, at, True, ORDER, ORDER + 5)
                    mix += d * w5
                    d0 -= d
                mix += d0 * w0
                if BASE:
                    mix += _entry(order, at, True, ORDER, 2 * ORDER + 1) * wb
                to = dots + (key & MASK).to(tl.int64) * features
                tl.store(to, tl.sum(mix * g, axis=0).to(dots.dtype.element_ty))
        if SCATTER_D >= 0:
            # c == cell now, except left of all rows.
            if cell == c:
                a0 += _entry(order, at, True, ORDER, 0) * g
                if ORDER >= 1:
                    a1 += _entry(order, at, True, ORDER, 1) * g
                if ORDER >= 2:
                    a2 += _entry(order, at, True, ORDER, 2) * g
                if ORDER >= 3:
                    a3 += _entry(order, at, True, ORDER, 3) * g
                if ORDER >= 4:
                    a4 += _entry(order, at, True, ORDER, 4) * g
                if ORDER >= 5:
                    a5 += _entry(order, at, True, ORDER, 5) * g
        j += 1
        g, key, key_next = g_next, key_next, key_after
    if SCATTER_D >= 0:
        while c < stop:
            tl.store(gradient + c * outputs + o, a0.to(gradient.dtype.element_ty), mask=inside & (c >= first))
            a0, a1, a2, a3, a4, a5 = a1, a2, a3, a4, a5, nil
            c += 1


@triton.jit(do_not_specialize=["numbers", "size"])
def basis_kernel(
    x, scale, basis, numbers, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """basis[n, r], all ``G + k`` values for each of the B * I inputs, times the scale."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    here = n < numbers
    xv = tl.load(x + n, mask=here, other=0.0).to(CT)
    cell, f = _locate(xv, lo, hi, inv_h, size, ORDER)
    v0, v1, v2, v3, v4, v5 = _basis(f, inv_h, ORDER, D)
    if SCALED:
        s = tl.load(scale + n, mask=here, other=0.0).to(CT)
        v0, v1, v2, v3, v4, v5 = v0 * s, v1 * s, v2 * s, v3 * s, v4 * s, v5 * s
    rows = size + ORDER
    for first in range(0, rows, BR):
        at = (first + r)[None, :] - cell[:, None]
        out = _spread(at, v0[:, None], v1[:, None], v2[:, None], v3[:, None], v4[:, None], v5[:, None], ORDER)
        to = n[:, None] * rows + (first + r)[None, :]
        tl.store(basis + to, out.to(basis.dtype.element_ty), mask=here[:, None] & (first + r < rows)[None, :])


@triton.jit
def _pick(products, v, row, here, rows, CT: tl.constexpr):
    there = here & (row >= 0) & (row < rows)
    return tl.where(there, v, 0.0) * tl.load(products + row, mask=there, other=0.0).to(CT)


@triton.jit(do_not_specialize=["numbers", "size"])
def contract_kernel(
    x, products, through_base, dots, numbers, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dots[n]: the ``k + 1`` entries of products[n, :] (B * I, R) inside the window, weighted by the basis."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    here = n < numbers
    xv = tl.load(x + n, mask=here, other=0.0).to(CT)
    cell, f = _locate(xv, lo, hi, inv_h, size, ORDER)
    v0, v1, v2, v3, v4, v5 = _basis(f, inv_h, ORDER, D)
    rows = size + ORDER
    products += n * rows
    total = _pick(products, v0, cell, here, rows, CT)
    if ORDER >= 1:
        total += _pick(products, v1, cell + 1, here, rows, CT)
    if ORDER >= 2:
        total += _pick(products, v2, cell + 2, here, rows, CT)
    if ORDER >= 3:
        total += _pick(products, v3, cell + 3, here, rows, CT)
    if ORDER >= 4:
        total += _pick(products, v4, cell + 4, here, rows, CT)
    if ORDER >= 5:
        total += _pick(products, v5, cell + 5, here, rows, CT)
    if BASE:
        total += _silu(xv, D) * tl.load(through_base + n, mask=here, other=0.0).to(CT)
    tl.store(dots + n, total.to(dots.dtype.element_ty), mask=here)
