"""Windows of one sample, in Triton, for few outputs: one thread finds a window, those of all outputs share it.

Forward, a program takes one sample and adds up the rows of its windows. Backward, ``dot`` is a gather of the same kind and
``add`` the scatter, by atomics. Formulas and shapes: ``layers/flash/reference.py``. ``CT`` is the dtype of all sums,
float64 or float32, whatever that of the weights. Launches: ``gpu_few.py``.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import value, window


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
def _block(
    b, block, x, scale, grad, windows, samples, features, outputs, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Leaves the windows of one sample and a block of BI features; their features and places, and ``grad``."""
    b = b.to(tl.int64)
    i = block * BI + tl.arange(0, BI)
    here = i < features
    at = b * features + i
    plane = tl.cast(features, tl.int64) * samples
    _leave_windows(x, scale, windows, at, here, plane, size, lo, hi, inv_h, ORDER, D, CT, SCALED, BASE)
    tl.debug_barrier()
    o = tl.arange(0, BO)
    g = tl.load(grad + b * outputs + o, mask=o < outputs, other=0.0).to(CT)
    return i, here, at, plane, o, g


@triton.jit
def dot(
    b, block, x, grad, weight, base, dots, windows,
    samples, features, outputs, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dots[b, i] for one sample and a block of BI features."""
    i, here, at, plane, o, g = _block(
        b, block, x, x, grad, windows, samples, features, outputs, size, lo, hi, inv_h,
        ORDER, D, CT, False, BASE, BI, BO,
    )  # fmt: skip
    mix = _add_rows(
        tl.zeros((BI, BO), CT), _first_rows(windows, at, here, CT), windows, weight, base, i, at, here, o, o < outputs,
        plane, outputs, (size + ORDER) * outputs, ORDER, CT, BASE,
    )  # fmt: skip
    # Rounded before they are added up: a product joined to a sum over threads would be exact in one thread and rounded
    # in the others, which would then hold different sums.
    products = tl.fma(mix, tl.broadcast_to(g[None, :], mix.shape), tl.zeros_like(mix))
    tl.store(dots + at, tl.sum(products, axis=1).to(dots.dtype.element_ty), mask=here)


@triton.jit
def gather(
    pid, x, grad, weight, base, dots, windows,
    samples, features, outputs, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """``dot`` as programs of their own: one for each sample and block of BI features."""
    blocks = tl.cdiv(features, BI)
    dot(
        pid // blocks, pid % blocks, x, grad, weight, base, dots, windows,
        samples, features, outputs, size, lo, hi, inv_h, ORDER, D, CT, BASE, BI, BO,
    )  # fmt: skip


@triton.jit
def add(
    b, block, x, scale, grad, gradient, windows,
    samples, features, outputs, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Adds to the rows of ``gradient`` what one sample gives to those inside the windows of a block of BI features."""
    i, here, at, plane, o, g = _block(
        b, block, x, scale, grad, windows, samples, features, outputs, size, lo, hi, inv_h,
        ORDER, D, CT, SCALED, False, BI, BO,
    )  # fmt: skip
    rows = gradient + i.to(tl.int64) * (size + ORDER) * outputs + _first_rows(windows, at, here, CT) * outputs
    rows = rows[:, None] + o[None, :]
    mask = (o < outputs)[None, :] & here[:, None]
    for r in tl.static_range(ORDER + 1):
        v = tl.load(windows + (r + 1) * plane + at, mask=here, other=0.0)
        tl.atomic_add(rows + r * outputs, v[:, None] * g[None, :], mask=mask, sem="relaxed")
