"""The GPU kernels for few outputs, in Triton: one program takes all outputs of a sample, or of a feature.

Forward, a program finds the windows of one sample, one thread for each, and then adds their rows up. Backward, ``dot`` is
a gather of the same kind, and the gradient of the weights comes from small matrix products, basis values (rows, samples)
times gradients (samples, outputs): with all samples on a coarse grid (``rows_kernel``), and on a fine one with those that
reach a tile of rows, found by sorting (``columns_kernel``). Programs of different kinds share a launch, so that they run
side by side.

Every row of the gradient is written once, by one program: no atomics, no zero-fill, nothing that changes from run to run.
Formulas and shapes: ``layers/flash/reference.py``. Launches: ``gpu_few.py``. A derivative of -1 leaves that half
out. ``CT`` is the dtype of all sums, float64 or float32, whatever that of the weights.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import cardinal, silu, value, window
from layers.flash.triton_sort import sorted_keys


@triton.jit
def _leave_windows(
    x, scale, windows, at, here, plane, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Finds one window a thread and leaves it in ``windows`` (k + 3, B, I) for the threads that share it: its first row,
    as bits or as a number, its values, SiLU's value."""
    first, w0, w1, w2, w3, w4, w5, act = window(x, scale, at, here, size, lo, hi, inv_h, ORDER, D, CT, SCALED)
    row = first.to(CT, bitcast=True) if CT == tl.float32 else first.to(CT)
    tl.store(windows + at, row, mask=here)
    for r in tl.static_range(ORDER + 1):
        tl.store(windows + (r + 1) * plane + at, value(r, w0, w1, w2, w3, w4, w5), mask=here)
    if BASE:
        tl.store(windows + (ORDER + 2) * plane + at, act, mask=here)


@triton.jit
def _first_rows(windows, at, here, CT: tl.constexpr):
    row = tl.load(windows + at, mask=here, other=0.0)
    return row.to(tl.int32, bitcast=True) if CT == tl.float32 else row.to(tl.int32)


@triton.jit
def _add_rows(
    acc, row, windows, weight, base, i, at, here, o, inside, plane, outputs, one_feature,
    ORDER: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Adds to acc[i, o] the rows of the windows that ``_leave_windows`` left, and the base weights."""
    rows = weight + i.to(tl.int64) * one_feature + row * outputs
    rows = rows[:, None] + o[None, :]
    mask = inside[None, :] & here[:, None]
    for r in tl.static_range(ORDER + 1):
        v = tl.load(windows + (r + 1) * plane + at, mask=here, other=0.0)
        acc += v[:, None] * tl.load(rows + r * outputs, mask=mask, other=0.0).to(CT)
    if BASE:
        act = tl.load(windows + (ORDER + 2) * plane + at, mask=here, other=0.0)
        acc += act[:, None] * tl.load(base + i[:, None] * outputs + o[None, :], mask=mask, other=0.0).to(CT)
    return acc


@triton.jit(do_not_specialize=["samples", "features", "size"])
def few_kernel(
    x, scale, weight, base, windows, y,
    samples, features, units, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    UNIT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """y[b, o] for one sample, all its features and all outputs."""
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    b = tl.program_id(0).to(tl.int64)
    sample = b * features
    plane = tl.cast(features, tl.int64) * samples
    for start in range(0, features, ALL):
        i = start + tl.arange(0, ALL)
        _leave_windows(
            x, scale, windows, sample + i, i < features, plane, size, lo, hi, inv_h, ORDER, D, CT, SCALED, BASE
        )
    tl.debug_barrier()
    o = tl.arange(0, BO)
    one_feature = (size + ORDER) * outputs
    acc = tl.zeros((BI, BO), CT)
    i = tl.arange(0, BI)
    row = _first_rows(windows, sample + i, i < features, CT)
    for start in range(0, features, BI):
        i = start + tl.arange(0, BI)
        ahead = _first_rows(windows, sample + BI + i, BI + i < features, CT)  # on its way while rows are added
        acc = _add_rows(
            acc, row, windows, weight, base, i, sample + i, i < features, o, o < outputs, plane, outputs, one_feature,
            ORDER, CT, BASE,
        )  # fmt: skip
        row = ahead
    tl.store(y + b * outputs + o, tl.sum(acc, axis=0).to(y.dtype.element_ty), mask=o < outputs)


@triton.jit
def _dot(
    pid, x, grad, weight, base, dots, windows,
    samples, features, outputs, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dots[b, i] for one sample and BI features."""
    parts = tl.cdiv(features, BI)
    b = (pid // parts).to(tl.int64)
    i = (pid % parts) * BI + tl.arange(0, BI)
    here = i < features
    at = b * features + i
    plane = tl.cast(features, tl.int64) * samples
    _leave_windows(x, x, windows, at, here, plane, size, lo, hi, inv_h, ORDER, D, CT, False, BASE)
    tl.debug_barrier()
    o = tl.arange(0, BO)
    g = tl.load(grad + b * outputs + o, mask=o < outputs, other=0.0).to(CT)
    mix = _add_rows(
        tl.zeros((BI, BO), CT), _first_rows(windows, at, here, CT), windows, weight, base, i, at, here, o, o < outputs,
        plane, outputs, (size + ORDER) * outputs, ORDER, CT, BASE,
    )  # fmt: skip
    tl.store(dots + at, tl.sum(mix * g[None, :], axis=1).to(dots.dtype.element_ty), mask=here)


@triton.jit
def _transposed(x, b, i, here, ok, features):
    at = b.to(tl.int64)[None, :] * features + i[:, None]
    return tl.load(x + at, mask=ok[:, None] & here[None, :], other=0.0).to(tl.float32)


@triton.jit
def _grads(grad, b, o, here, outputs):
    """grad[b, o] as float32; few samples and few outputs, so that offsets fit into 32 bits."""
    at = b[:, None] * outputs + o[None, :]
    return tl.load(grad + at, mask=here[:, None] & (o < outputs)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _base(
    pid, x, scale, grad, base_gradient, samples, features, outputs,
    D: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """base_gradient[i, o] for BM features and all outputs: the sum over samples of ``silu(x) * grad``."""
    i = pid * BM + tl.arange(0, BM)
    o = tl.arange(0, BN)
    ok = i < features
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, samples, BS):
        b = first + tl.arange(0, BS)
        here = b < samples
        act = silu(_transposed(x, b, i, here, ok, features), D)
        if SCALED:
            act *= _transposed(scale, b, i, here, ok, features)
        acc = tl.dot(act, _grads(grad, b, o, here, outputs), acc, input_precision=PRECISION)
    to = i.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(base_gradient + to, acc.to(base_gradient.dtype.element_ty), mask=ok[:, None] & (o < outputs)[None, :])


@triton.jit(do_not_specialize=["samples", "features", "size", "bases", "row_programs"])
def rows_kernel(
    x, scale, grad, weight, base, windows, dots, gradient, base_gradient,
    samples, features, units, size, bases, row_programs,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    BO: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A coarse grid: ``bases`` programs of ``_base``, then BM of all I * R rows each, then ``_dot``."""
    pid = tl.program_id(0)
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if SCATTER_D >= 0 and pid < bases:
        _base(
            pid, x, scale, grad, base_gradient, samples, features, outputs,
            SCATTER_D, SCALED, PRECISION, BM, BS, BN,
        )  # fmt: skip
    elif SCATTER_D >= 0 and pid < bases + row_programs:
        row = (pid - bases) * BM + tl.arange(0, BM)
        i = row // (size + ORDER)
        ok = i < features
        o = tl.arange(0, BN)
        centre = (row - i * (size + ORDER)).to(tl.float32)[:, None] + 0.5 * (1 - ORDER)
        acc = tl.zeros((BM, BN), tl.float32)
        for first in range(0, samples, BS):
            b = first + tl.arange(0, BS)
            here = b < samples
            u = (_transposed(x, b, i, here, ok, features) - lo) * inv_h
            a = cardinal(u - centre, inv_h, ORDER, SCATTER_D)
            if SCALED:
                a *= _transposed(scale, b, i, here, ok, features)
            acc = tl.dot(a, _grads(grad, b, o, here, outputs), acc, input_precision=PRECISION)
        to = row.to(tl.int64)[:, None] * outputs + o[None, :]
        tl.store(gradient + to, acc.to(gradient.dtype.element_ty), mask=ok[:, None] & (o < outputs)[None, :])
    elif DOT_D >= 0:
        _dot(
            pid - bases - row_programs, x, grad, weight, base, dots, windows,
            samples, features, outputs, size, lo, hi, inv_h, ORDER, DOT_D, CT, BASE, BI, BO,
        )  # fmt: skip


@triton.jit
def _bounds(
    key, keys, tile, samples,
    ORDER: tl.constexpr, KT: tl.constexpr, SORT: tl.constexpr, CB: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The first of a feature's sorted samples that reaches a tile, and the first beyond.

    Those in cells from k below the tile to its last row reach it: counted in ``key``, which holds them all, or CB at a
    time in ``keys``. Two counts, below 2 ** 16, in one sum.
    """
    reach = tl.full([], tile * BM + 1, KT) << BITS
    beyond = tl.full([], tile * BM + BM + ORDER + 1, KT) << BITS
    if SORT:
        counts = (key < reach).to(tl.int32) + ((key < beyond).to(tl.int32) << 16)
    else:
        counts = tl.zeros((CB,), tl.int32)
        for part in range(0, samples, CB):
            at = part + tl.arange(0, CB)
            some = tl.load(keys + at, mask=at < samples, other=2 ** (KT.primitive_bitwidth - 1) - 1)
            counts += (some < reach).to(tl.int32) + ((some < beyond).to(tl.int32) << 16)
    both = tl.sum(counts, axis=0)
    return both & 0xFFFF, both >> 16


@triton.jit
def _fetch(one, found, x, scale, grad, i, o, features, outputs, SCALED: tl.constexpr, BITS: tl.constexpr):
    """Position, scale and gradients of the samples behind some keys."""
    b = (one & (2**BITS - 1)).to(tl.int32)
    at = b.to(tl.int64) * features + i
    xv = tl.load(x + at, mask=found, other=0.0).to(tl.float32)
    factor = xv
    if SCALED:
        factor = tl.load(scale + at, mask=found, other=0.0).to(tl.float32)
    return xv, factor, _grads(grad, b, o, found, outputs)


@triton.jit
def _values(
    one, xv, factor, row, lo, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Basis values (rows, samples), times the scale."""
    cell = (one >> BITS).to(tl.int32) - (ORDER + 1)
    f = (xv - lo) * inv_h - cell.to(tl.float32)
    f = tl.where(tl.abs(f) > 2, 0.0, f)
    # The difference of whole numbers first: it is exact, whatever G is.
    t = (cell[None, :] - row[:, None]).to(tl.float32) + (f - 0.5 * (1 - ORDER))[None, :]
    a = cardinal(t, inv_h, ORDER, D)
    return a * factor[None, :] if SCALED else a


@triton.jit
def _column(
    pid, x, scale, grad, keys, gradient, samples, features, outputs, size, tiles, groups, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, SORT: tl.constexpr,
    NB: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of one feature: one of the ``groups`` into which its tiles of BM rows are divided, all outputs.

    With SORT each program sorts the feature's samples, into keys[pid]; without, keys[i] are sorted already.
    """
    KT: tl.constexpr = keys.dtype.element_ty
    CB: tl.constexpr = min(NB, 256)
    i = (pid // groups).to(tl.int64)
    each = tl.cdiv(tiles, groups)
    start = (pid % groups) * each
    key = 0
    if SORT:
        n = tl.arange(0, NB)
        here = n < samples
        keys += pid.to(tl.int64) * samples
        key = sorted_keys(x, i, n, here, samples, features, size, lo, hi, inv_h, ORDER, CT, KT, BITS)
        tl.store(keys + n, key, mask=here)
        tl.debug_barrier()
    else:
        keys += i * samples
    r = tl.arange(0, BM)
    o = tl.arange(0, BN)
    s = tl.arange(0, BS)
    rows = size + ORDER
    gradient += i * rows * outputs
    # The first samples of a tile are fetched while the tile before is worked on: many tiles have no others.
    first, end = _bounds(key, keys, start, samples, ORDER, KT, SORT, CB, BITS, BM)
    one = tl.load(keys + first + s, mask=first + s < end, other=0)
    xv, factor, g = _fetch(one, first + s < end, x, scale, grad, i, o, features, outputs, SCALED, BITS)
    for tile in range(start, tl.minimum(start + each, tiles)):
        row = tile * BM + r
        next_first, next_end = _bounds(key, keys, tile + 1, samples, ORDER, KT, SORT, CB, BITS, BM)
        next_one = tl.load(keys + next_first + s, mask=next_first + s < next_end, other=0)
        a = _values(one, xv, factor, row, lo, inv_h, ORDER, D, SCALED, BITS)
        acc = tl.dot(a, g, input_precision=PRECISION)
        for j in range(first + BS, end, BS):
            found = j + s < end
            one = tl.load(keys + j + s, mask=found, other=0)
            xv, factor, g = _fetch(one, found, x, scale, grad, i, o, features, outputs, SCALED, BITS)
            a = _values(one, xv, factor, row, lo, inv_h, ORDER, D, SCALED, BITS)
            acc = tl.dot(a, g, acc, input_precision=PRECISION)
        first, end, one = next_first, next_end, next_one
        xv, factor, g = _fetch(one, first + s < end, x, scale, grad, i, o, features, outputs, SCALED, BITS)
        to = gradient + tile * BM * outputs + (r[:, None] * outputs + o[None, :])
        tl.store(to, acc.to(gradient.dtype.element_ty), mask=(row < rows)[:, None] & (o < outputs)[None, :])


@triton.jit(do_not_specialize=["samples", "features", "size", "tiles", "groups", "columns", "bases"])
def columns_kernel(
    x, scale, grad, weight, base, keys, windows, dots, gradient, base_gradient,
    samples, features, units, size, tiles, groups, columns, bases,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    BO: tl.constexpr, SORT: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    BASE_BM: tl.constexpr, BASE_BS: tl.constexpr,
):  # fmt: skip
    """A fine grid: ``columns`` programs of ``_column``, then ``bases`` of ``_base``, then those of ``_dot``."""
    pid = tl.program_id(0)
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if pid < columns:
        _column(
            pid, x, scale, grad, keys, gradient, samples, features, outputs, size, tiles, groups, lo, hi, inv_h,
            ORDER, SCATTER_D, CT, SCALED, SORT, NB, BITS, PRECISION, BM, BS, BN,
        )  # fmt: skip
    elif BASE and pid < columns + bases:
        _base(
            pid - columns, x, scale, grad, base_gradient, samples, features, outputs,
            SCATTER_D, SCALED, PRECISION, BASE_BM, BASE_BS, BN,
        )  # fmt: skip
    elif DOT_D >= 0:
        _dot(
            pid - columns - bases, x, grad, weight, base, dots, windows,
            samples, features, outputs, size, lo, hi, inv_h, ORDER, DOT_D, CT, BASE, BI, BO,
        )  # fmt: skip
