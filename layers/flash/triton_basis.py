"""What the GPU kernels compute for one input, in Triton: its cell, its basis values, SiLU.

Formulas: ``layers/bsplines.py``. Everything works on tensors of any shape, in float32 or float64.
"""

import triton
import triton.language as tl


@triton.jit
def locate(x, lo, hi, inv_h, size, ORDER: tl.constexpr):
    """Cell (int32) and position inside it, as ``layers.bsplines.locate``."""
    u = (x - lo) * inv_h
    c = tl.floor(u)
    c = tl.where(x <= hi, tl.minimum(c, size - 1.0), tl.maximum(c, size * 1.0))
    c = tl.minimum(tl.maximum(c, -1.0 - ORDER), size * 1.0 + ORDER)
    c = tl.where(x != x, 0.0, c)
    f = u - c
    return c.to(tl.int32), tl.where(tl.abs(f) > 2, 0.0, f)  # far outside nothing may overflow


@triton.jit
def basis(f, inv_h, ORDER: tl.constexpr, D: tl.constexpr):
    """The ``ORDER + 1 <= 6`` basis values, or D-th derivatives (de Boor 1978, X.(4) and X.(12)); unused ones are 0."""
    nil = f * 0
    one = nil + 1
    v0, v1, v2, v3, v4, v5 = one, nil, nil, nil, nil, nil
    # Up to degree 3 the recurrence is worked out, with no difference of like numbers: half the operations.
    if ORDER - D >= 1:
        v0, v1 = one - f, f
    if ORDER - D >= 2:
        v0, v1, v2 = v0 * v0 * 0.5, v0 * v1 + 0.5, v1 * v1 * 0.5
    if ORDER - D >= 3:
        t: tl.constexpr = 1 / 3
        s: tl.constexpr = 2 / 3
        v0, v1, v2, v3 = (1 - f) * v0 * t, s - (2 - f) * v2, s - (f + 1) * v0, f * v2 * t
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
def _plus(z):
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _power(z, N: tl.constexpr):
    if N == 1:
        out = z
    elif N == 2:
        out = z * z
    elif N == 3:
        out = z * z * z
    elif N == 4:
        out = (z * z) * (z * z)
    else:
        out = (z * z) * (z * z) * z
    return out


@triton.jit
def cardinal(t, inv_h, ORDER: tl.constexpr, D: tl.constexpr):
    """The D-th derivative, 0 to 2, of the B-spline of degree ORDER centred at 0, at ``t`` in spacings.

    Sums of truncated powers (Schoenberg 1946), from the right end inwards; in the middle, where large ones cancel, the
    polynomial itself. Needs ``ORDER - D >= 1``: what jumps at a knot needs to know the cell.
    """
    N: tl.constexpr = ORDER - D
    s = tl.abs(t)
    w = s * s
    if ORDER == 1:
        v = _plus(1.0 - s)
        middle = v
    elif ORDER == 2:
        v = _power(_plus(1.5 - s), N)
        middle = 0.75 - w if D == 0 else 2.0 * s
    elif ORDER == 3:
        v = _power(_plus(2.0 - s), N)
        middle = (2 / 3) - w * (1.0 - 0.5 * s) if D == 0 else s * (2.0 - 1.5 * s) if D == 1 else 3.0 * s - 2.0
    elif ORDER == 4:
        v = _power(_plus(2.5 - s), N) - 5.0 * _power(_plus(1.5 - s), N)
        middle = (115 / 192) - w * (0.625 - 0.25 * w) if D == 0 else s * (1.25 - w) if D == 1 else 3.0 * w - 1.25
    else:
        v = _power(_plus(3.0 - s), N) - 6.0 * _power(_plus(2.0 - s), N)
        if D == 0:
            middle = 0.55 - w * (0.5 - w * (0.25 - (1 / 12) * s))
        elif D == 1:
            middle = s * (1.0 - w * (1.0 - (5 / 12) * s))
        else:
            middle = w * (3.0 - (5 / 3) * s) - 1.0
    if N == 2:
        v = v * 0.5
    elif N == 3:
        v = v * (1 / 6)
    elif N == 4:
        v = v * (1 / 24)
    elif N == 5:
        v = v * (1 / 120)
    v = tl.where(s < (0.5 if ORDER % 2 == 0 else 1.0), middle, v)
    if D == 1:
        v = tl.where(t >= 0, -v, v) * inv_h
    elif D == 2:
        v = v * (inv_h * inv_h)
    return v


@triton.jit
def silu(x, D: tl.constexpr):
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
def spread(at, v0, v1, v2, v3, v4, v5, ORDER: tl.constexpr):
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
def value(r: tl.constexpr, v0, v1, v2, v3, v4, v5):
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


@triton.jit
def window(
    x, scale, at, here, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The window of the input at ``x + at``: its first row, the ``ORDER + 1 <= 6`` values, and SiLU's; times the scale.

    A window that hangs over an end of the grid is moved inside, its values with it; the free places hold zeros.
    """
    xv = tl.load(x + at, mask=here, other=0.0).to(CT)
    cell, f = locate(xv, lo, hi, inv_h, size, ORDER)
    v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, D)
    act = silu(xv, D)
    if SCALED:
        s = tl.load(scale + at, mask=here, other=0.0).to(CT)
        v0, v1, v2, v3, v4, v5, act = v0 * s, v1 * s, v2 * s, v3 * s, v4 * s, v5 * s, act * s
    first = tl.minimum(tl.maximum(cell, 0), size - 1)
    moved = first - cell
    w0 = spread(moved, v0, v1, v2, v3, v4, v5, ORDER)
    w1, w2, w3, w4, w5 = w0, w0, w0, w0, w0
    if ORDER >= 1:
        w1 = spread(moved + 1, v0, v1, v2, v3, v4, v5, ORDER)
    if ORDER >= 2:
        w2 = spread(moved + 2, v0, v1, v2, v3, v4, v5, ORDER)
    if ORDER >= 3:
        w3 = spread(moved + 3, v0, v1, v2, v3, v4, v5, ORDER)
    if ORDER >= 4:
        w4 = spread(moved + 4, v0, v1, v2, v3, v4, v5, ORDER)
    if ORDER >= 5:
        w5 = spread(moved + 5, v0, v1, v2, v3, v4, v5, ORDER)
    return first, w0, w1, w2, w3, w4, w5, act
