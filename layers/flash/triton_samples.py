"""The GPU kernels for few features and many samples, in Triton: a program takes a block of samples through all features.

Elsewhere a program works on one sample's windows, or walks through one feature's samples; with two features and ten thousand
samples the first are too small and the second too few. Here windows are found where they are used. The gradient of the weights
comes from matrix products, basis values (rows, samples) times gradients (samples, outputs), each of some of the samples, so that
all multiprocessors have work; pieces are added up in order, so that nothing changes from run to run.

Formulas and shapes: ``layers/flash/reference.py``. Launches: ``gpu_samples.py``. A derivative of -1 leaves that half out. ``CT`` is
the dtype of all sums, float64 or float32 forward and float32 backward, whatever that of the weights.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import cardinal, silu, value, window


@triton.jit
def _mixed(
    i, x, scale, weight, base, b, here, o, features, outputs, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Of one feature, for samples ``b`` and outputs ``o``: rows of weights, weighted and added up, and of the base weights."""
    first, w0, w1, w2, w3, w4, w5, act = window(
        x, scale, b.to(tl.int64) * features + i, here, size, lo, hi, inv_h, ORDER, D, CT, SCALED
    )
    mask = here[:, None] & (o < outputs)[None, :]
    rows = weight + tl.cast(i, tl.int64) * (size + ORDER) * outputs
    rows = rows + (first * outputs)[:, None] + o[None, :]
    mix = w0[:, None] * tl.load(rows, mask=mask, other=0.0).to(CT)
    for r in tl.static_range(1, ORDER + 1):
        row = tl.load(rows + r * outputs, mask=mask, other=0.0).to(CT)
        mix += value(r, w0, w1, w2, w3, w4, w5)[:, None] * row
    if BASE:
        row = tl.load(base + tl.cast(i, tl.int64) * outputs + o, mask=o < outputs, other=0.0).to(CT)
        mix += act[:, None] * row[None, :]
    return mix


@triton.jit(do_not_specialize=["samples", "features", "size"])
def samples_kernel(
    x, scale, weight, base, y,
    samples, features, units, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    UNIT: tl.constexpr, BB: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """y[b, o] for BB samples and BO outputs; ``units`` of UNIT outputs."""
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    here = b < samples
    acc = tl.zeros((BB, BO), CT)
    for i in range(features):
        acc += _mixed(
            i, x, scale, weight, base, b, here, o, features, outputs, size, lo, hi, inv_h, ORDER, D, CT, SCALED, BASE
        )
    to = y + b.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=here[:, None] & (o < outputs)[None, :])


@triton.jit
def _dot(
    pid, x, grad, weight, base, dots, samples, features, outputs, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr,
    BB: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dots[b, i] for BB samples and BI features, one after the other."""
    blocks = tl.cdiv(features, BI)
    b = pid // blocks * BB + tl.arange(0, BB)
    here = b < samples
    start = pid % blocks * BI
    for i in range(start, tl.minimum(start + BI, features)):
        total = tl.zeros((BB,), CT)
        for block in range(0, outputs, BO):
            o = block + tl.arange(0, BO)
            at = b.to(tl.int64)[:, None] * outputs + o[None, :]
            g = tl.load(grad + at, mask=here[:, None] & (o < outputs)[None, :], other=0.0).to(CT)
            mix = _mixed(
                i, x, x, weight, base, b, here, o, features, outputs, size, lo, hi, inv_h, ORDER, D, CT, False, BASE
            )
            # Rounded before they are added up, as in ``triton_windows.dot``.
            total += tl.sum(tl.fma(mix, g, tl.zeros_like(mix)), axis=1)
        tl.store(dots + b.to(tl.int64) * features + i, total.to(dots.dtype.element_ty), mask=here)


@triton.jit
def _piece(
    tile, block, start, stop, x, scale, grad, features, outputs, size, lo, inv_h, BASE: tl.constexpr,
    ORDER: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The sum over some samples, for BM rows of the gradient, of those of the base behind them all, and BN outputs."""
    rows, all_rows = size + ORDER, features * (size + ORDER)
    row = tile * BM + tl.arange(0, BM)
    of_base = row >= all_rows
    i = tl.where(of_base, row - all_rows, row // rows)
    ok = i < features
    o = block * BN + tl.arange(0, BN)
    inside = o < outputs
    centre = (row - i * rows).to(tl.float32)[:, None] + 0.5 * (1 - ORDER)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(start, stop, BS):
        b = (first + tl.arange(0, BS)).to(tl.int64)
        here = b < stop
        at = b[None, :] * features + i[:, None]
        mask = ok[:, None] & here[None, :]
        xv = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        a = cardinal((xv - lo) * inv_h - centre, inv_h, ORDER, D)
        if BASE and (tile + 1) * BM > all_rows:
            a = tl.where(of_base[:, None], silu(xv, D), a)
        if SCALED:
            a *= tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + b[:, None] * outputs + o[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(a, g.to(tl.float32), acc, input_precision=PRECISION)
    return acc, row, o, ok[:, None] & inside[None, :]


@triton.jit(do_not_specialize=["samples", "features", "size", "each", "tiles", "products"])
def pieces_kernel(
    x, scale, grad, weight, base, dots, pieces,
    samples, features, units, size, each, tiles, products,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """``products`` programs of ``_piece``, which have ``each`` samples and one of ``tiles`` tiles of rows, then ``_dot``.

    ``pieces`` (pieces, I * R + I, O), without a base (pieces, I * R, O), have what ``add_pieces_kernel`` adds up.
    """
    pid = tl.program_id(0)
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if SCATTER_D >= 0 and pid < products:
        blocks = tl.cdiv(outputs, BN)
        tile, block = pid % tiles, pid // tiles % blocks
        piece = pid // (tiles * blocks)
        acc, row, o, mask = _piece(
            tile, block, piece * each, tl.minimum((piece + 1) * each, samples), x, scale, grad, features, outputs, size,
            lo, inv_h, BASE, ORDER, SCATTER_D, SCALED, PRECISION, BM, BS, BN,
        )  # fmt: skip
        height = features * (size + ORDER + (1 if BASE else 0))
        to = (piece.to(tl.int64) * height + row)[:, None] * outputs + o[None, :]
        tl.store(pieces + to, acc, mask=mask & (row < height)[:, None])
    elif DOT_D >= 0:
        _dot(
            pid - products, x, grad, weight, base, dots, samples, features, outputs, size, lo, hi, inv_h,
            ORDER, DOT_D, CT, BASE, BB, BI, BO,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "base_count", "pieces"])
def add_pieces_kernel(
    parts, gradient, base_gradient, count, base_count, pieces, BP: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Adds up ``pieces`` of as many numbers: ``count`` of the gradient, and behind them those of the base."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = n < count + base_count
    acc = tl.zeros((BP, BN), tl.float32)
    for first in range(0, pieces, BP):
        p = first + tl.arange(0, BP)
        at = p.to(tl.int64)[:, None] * (count + base_count) + n[None, :]
        acc += tl.load(parts + at, mask=(p < pieces)[:, None] & here[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    tl.store(gradient + n, total.to(gradient.dtype.element_ty), mask=n < count)
    tl.store(base_gradient + (n - count), total.to(base_gradient.dtype.element_ty), mask=here & (n >= count))
