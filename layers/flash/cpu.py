"""CPU kernels: two loops over features, compiled by Numba for the machine at hand (no C compiler needed).

Both give each thread a range of features. The weights of one feature are read while they are in the cache, whatever
``G`` is; in ``apply`` every thread adds into its own copy of ``y``, in ``adjoint`` a feature's rows of the gradient
belong to one thread, so nothing is ever added to by two threads at once and a result repeats bit for bit for a given
number of threads. Basis values are computed for all samples of a feature first, in one loop that the compiler turns
into vector instructions. The base branch is an ordinary matrix product and stays with PyTorch.

The formulas are those of ``layers/flash/reference.py``. Compiled code is kept in ``__pycache__``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from layers.bsplines import knots
from layers.flash.reference import compute_dtype, silu

# No assumption about NaN and infinity: they must come through.
FAST = {"contract", "nsz", "arcp", "reassoc"}
EXACT = range(8, 33)  # outputs for which a kernel is compiled for exactly that number: 1.6 times as fast
COPIES_NUMBERS = 2**26  # the threads' copies of y together stay below this many numbers


# Functions of the module, not closures: what a compiled function captures goes into the name under which Numba keeps
# it, and a captured function has another name in every process, so that nothing would ever be found again.
@numba.njit(forceinline=True, fastmath=FAST)
def _window(f, inv_h, v, order, d):
    """The window's basis values, or d-th derivatives, at ``f``, into ``v`` (k + 1)."""
    real = v.dtype.type
    degree = max(order - d, 0)
    v[0] = real(1)
    for n in range(1, degree + 1):
        inverse = real(1.0 / n)
        v[n] = f * v[n - 1] * inverse
        for r in range(n - 1, 0, -1):
            v[r] = ((f + real(n - r)) * v[r - 1] + (real(1 + r) - f) * v[r]) * inverse
        v[0] = (real(1) - f) * v[0] * inverse
    for n in range(degree + 1, order + 1):
        v[n] = real(0)
        for r in range(n, 0, -1):
            v[r] = (v[r - 1] - v[r]) * inv_h
        v[0] = -v[0] * inv_h
    if d > order:
        for r in range(order + 1):
            v[r] = real(0)


@numba.njit(forceinline=True, fastmath=FAST, error_model="numpy")
def _fill(x, scale, lo, hi, inv_h, at_knots, size, cells, values, order, d):
    """The cell and the basis values (or d-th derivatives) of all samples of one feature.

    Where the pieces jump at a knot, ``at_knots`` holds the knots from -k - 1 to G + k + 1, and samples are compared with
    them as in ``layers/bsplines.py``; elsewhere it is empty, since either side of a knot gives one value.
    """
    real = x.dtype.type
    width = order + 1
    v = np.empty(width, x.dtype)
    for b in range(x.shape[0]):
        u = (x[b] - lo) * inv_h
        c = np.floor(u)
        c = min(max(c, real(-order - 1)), real(size + order))
        c = real(0) if x[b] != x[b] else c
        if at_knots.shape[0] > 0:
            n = np.int64(c) + order + 1
            c += real(x[b] >= at_knots[n + 1]) - real(x[b] < at_knots[n])
        c = min(c, real(size - 1)) if x[b] <= hi else max(c, real(size))
        c = real(0) if x[b] != x[b] else c
        cells[b] = np.int32(c)
        _window(u - c, inv_h, v, order, d)
        for r in range(width):
            values[r, b] = v[r]
        if d > 0 or order == 0:
            for r in range(width):  # a constant piece must carry a NaN along as well
                values[r, b] += real(0) * x[b] if x[b] != x[b] else real(0)
    if scale.shape[0] > 0:
        for r in range(width):
            for b in range(x.shape[0]):
                values[r, b] *= scale[b]


@lru_cache
def _apply(order: int, d: int, outputs: int, real):
    """Compiles ``apply`` for one degree, derivative and number of outputs (0: any)."""
    width = order + 1

    @numba.njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
    def run(thread, threads, x, scale, weight, copies, lo, hi, inv_h, at_knots):
        features, samples = x.shape
        number = weight.shape[2] if outputs == 0 else outputs
        size = weight.shape[1] - order
        y = copies[thread]
        y[:] = real(0)
        cells = np.empty(samples, np.int32)
        values = np.empty((width, samples), real)
        for i in range(thread * features // threads, (thread + 1) * features // threads):
            s = scale[i] if scale.shape[0] > 0 else scale[:0].ravel()
            _fill(x[i], s, lo, hi, inv_h, at_knots, size, cells, values, order, d)
            w = weight[i].reshape(-1)
            for b in range(samples):
                c = np.int64(cells[b])
                if c >= 0 and c < size:
                    for o in range(number):
                        total = y[b, o]
                        for r in range(width):
                            total += values[r, b] * w[(c + r) * number + o]
                        y[b, o] = total
                else:
                    for r in range(max(-c, 0), min(size + order - c, width)):
                        for o in range(number):
                            y[b, o] += values[r, b] * w[(c + r) * number + o]

    return run


@lru_cache
def _adjoint(order: int, dot_d: int, scatter_d: int, outputs: int, real):
    """Compiles ``dot`` and ``scatter`` together; an order of -1 leaves that half out."""
    width = order + 1
    slope_d, value_d = max(dot_d, 0), max(scatter_d, 0)

    @numba.njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
    def run(thread, threads, grad, x, scale, weight, dots, gradient, lo, hi, inv_h, at_knots):
        features, samples = x.shape
        number = weight.shape[2] if outputs == 0 else outputs
        size = weight.shape[1] - order
        cells = np.empty(samples, np.int32)
        slopes = np.empty((width, samples), real)
        values = np.empty((width, samples), real)
        for i in range(thread * features // threads, (thread + 1) * features // threads):
            w = weight[i].reshape(-1)
            if dot_d >= 0:
                _fill(x[i], scale[:0].ravel(), lo, hi, inv_h, at_knots, size, cells, slopes, order, slope_d)
            if scatter_d >= 0:
                s = scale[i] if scale.shape[0] > 0 else scale[:0].ravel()
                _fill(x[i], s, lo, hi, inv_h, at_knots, size, cells, values, order, value_d)
                v = gradient[i].reshape(-1)
                v[:] = real(0)
            for b in range(samples):
                c = np.int64(cells[b])
                first, last = max(-c, 0), min(size + order - c, width)
                whole = first == 0 and last == width
                if dot_d >= 0:
                    total = real(0)
                    if whole:
                        for o in range(number):
                            part = real(0)
                            for r in range(width):
                                part += slopes[r, b] * w[(c + r) * number + o]
                            total += grad[b, o] * part
                    else:
                        for r in range(first, last):
                            for o in range(number):
                                total += grad[b, o] * slopes[r, b] * w[(c + r) * number + o]
                    dots[i, b] = total
                if scatter_d >= 0:
                    for r in range(first, last):
                        for o in range(number):
                            v[(c + r) * number + o] += values[r, b] * grad[b, o]

    return run


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="flashkan")


def _run_on_all(run, threads: int, *args) -> None:
    """Calls ``run(thread, threads, *args)`` for every thread; the compiled code runs without the interpreter's lock.

    A pool of Python threads instead of Numba's own: it compiles in a quarter of the time and may be entered from
    several threads at once.
    """
    if threads == 1:
        run(0, 1, *args)
    else:
        parts = [_pool(threads - 1).submit(run, thread, threads, *args) for thread in range(1, threads)]
        run(0, threads, *args)
        for part in parts:
            part.result()


def _columns(t: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """``t`` (B, I) as a contiguous (I, B) array; (0, 0) for None."""
    t = torch.empty(0, 0) if t is None else t.detach()
    return t.to(dtype).t().contiguous().numpy()


def _array(t: Tensor, dtype: torch.dtype) -> np.ndarray:
    return t.detach().to(dtype).contiguous().numpy()


def _grid(x: Tensor, weight: Tensor, order: int, lo: float, hi: float, d: int):
    dtype = compute_dtype(x, weight)
    real = np.float64 if dtype == torch.float64 else np.float32
    exact = weight.shape[2] if weight.shape[2] in EXACT else 0
    size = weight.shape[1] - order
    at_knots = np.empty(0, real)
    if d >= order:
        inner = knots(size, order, (lo, hi), dtype=dtype).numpy()
        at_knots = np.concatenate([[np.nan], inner, [np.nan]], dtype=real)  # nothing is changed beyond the last ones
    return dtype, real, exact, (real(lo), real(hi), real(size / (hi - lo)), at_knots)


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    dtype, real, exact, numbers = _grid(x, weight, order, lo, hi, d)
    threads = max(1, min(torch.get_num_threads(), x.shape[1]))
    step = max(1, COPIES_NUMBERS // (threads * weight.shape[2]))
    if x.shape[0] > step:
        starts = range(0, x.shape[0], step)
        parts = [slice(b, b + step) for b in starts]
        return torch.cat(
            [apply(x[p], weight, base, None if scale is None else scale[p], order, lo, hi, d) for p in parts]
        )
    copies = torch.empty(threads, x.shape[0], weight.shape[2], dtype=dtype)
    arrays = _columns(x, dtype), _columns(scale, dtype), _array(weight, dtype), copies.numpy()
    _run_on_all(_apply(order, d, exact, real), threads, *arrays, *numbers)
    y = copies.sum(0)
    if base is not None:
        act = silu(x.to(dtype), d)
        y.addmm_(act if scale is None else act * scale.to(dtype), base.to(dtype))
    return y.to(torch.promote_types(x.dtype, weight.dtype))


def adjoint(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    order: int,
    lo: float,
    hi: float,
    dot_d: int,
    scatter_d: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dot`` and ``scatter``; see ``layers/flash/reference.py``. An order of -1 leaves a result out (empty)."""
    dtype, real, exact, numbers = _grid(x, weight, order, lo, hi, max(dot_d, scatter_d))
    none = x.new_empty(0)
    dots = torch.empty(x.shape[1] if dot_d >= 0 else 0, x.shape[0], dtype=dtype)
    total = torch.empty(weight.shape if scatter_d >= 0 else (0, 0, 0), dtype=dtype)
    grad = grad.to(dtype)
    arrays = _array(grad, dtype), _columns(x, dtype), _columns(scale, dtype), _array(weight, dtype)
    threads = max(1, min(torch.get_num_threads(), x.shape[1]))
    run = _adjoint(order, dot_d, scatter_d, exact, real)
    _run_on_all(run, threads, *arrays, dots.numpy(), total.numpy(), *numbers)
    p, v, b = none, none.clone(), none.clone()
    if dot_d >= 0:
        p = dots.t()
        if base is not None:
            p = p.addcmul(silu(x.to(dtype), dot_d), grad @ base.to(dtype).t())
        p = p.to(x.dtype).contiguous()
    if scatter_d >= 0:
        v = total.to(weight.dtype)
        if base is not None:
            act = silu(x.to(dtype), scatter_d)
            b = ((act if scale is None else act * scale.to(dtype)).t() @ grad).to(base.dtype)
    return p, v, b
