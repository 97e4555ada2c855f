"""CPU kernels: two loops over features, compiled by Numba for the machine at hand (no C compiler needed).

Features are cut into chunks, and threads take one chunk after another. The weights of one feature are read while they
are in the cache, whatever ``G`` is; in ``apply`` every chunk adds into its own copy of ``y``, in ``adjoint`` a feature's
rows of the gradient belong to one chunk, so nothing is ever added to by two threads at once and a result repeats bit
for bit for a given number of threads. Cells, basis values and activations are computed for all samples of a feature
first, in loops that the compiler turns into vector instructions; rows of outputs are vectors of a known length, see
``layers/flash/vectors.py``.

The base branch is done here too, though it is an ordinary matrix product: PyTorch's threads keep a core busy for some
milliseconds after each parallel operation, waiting for the next, and a kernel that runs meanwhile has to share it (4.4 ms
on two cores instead of 1.7).

The formulas are those of ``layers/flash/reference.py``. Compiled code is kept in ``__pycache__``.
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor

from layers.bsplines import knots
from layers.flash import vectors
from layers.flash.reference import compute_dtype, silu_terms
from layers.flash.vectors import first, fma, load, store, total

# The compiler keeps a loop twice, as vector instructions and one number at a time, and takes the second where two arrays
# lie close together in memory. Both round alike only where the order of operations is left as written and fused
# multiply-adds are asked for by name. No assumption about NaN and infinity: they must come through.
AS_WRITTEN = {"nsz"}
WIDEST = 64  # numbers of a vector; more outputs are taken in blocks
LN2 = math.log(2)
CHUNKS = 4  # for each thread: one that is held up by other work leaves the rest to the others
COPIES_NUMBERS = 2**26  # the chunks' copies of y together stay below this many numbers
FEW_NUMBERS = 2**20  # and with more than this, there is only one for each thread
PIECE = 512  # samples in one sum, or four for each row; longer sums are made of such pieces, which is more exact
ALONE = 2**14  # samples times features times outputs that one thread does before two would have started
# Numba finds what it compiled again as long as this file is the same. Kernels capture this number, as they are made of that
# file too.
VECTORS = zlib.crc32(Path(vectors.__file__).read_bytes())


def compiled(**options):
    """Numba's decorator for a kernel; what it compiles is kept in a folder, where there is one that may be written to."""
    options |= {"nogil": True}

    def decorate(function):
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # the library's folder is read-only, and the user has none
            return numba.njit(**options)(function)

    return decorate


# Functions of the module, not closures: what a compiled function captures goes into the name under which Numba keeps
# it, and a captured function has another name in every process, so that nothing would ever be found again.
@numba.njit(forceinline=True, fastmath=AS_WRITTEN)
def _window(f, inv_h, values, order, d):
    """The window's basis values, or d-th derivatives, at all ``f`` (B,), into ``values`` (k + 1, B)."""
    real, samples, degree = values.dtype.type, f.shape[0], max(order - d, 0)
    values[0] = real(1)
    for n in range(1, degree + 1):
        inverse = real(1.0 / n)
        for b in range(samples):
            values[n, b] = f[b] * values[n - 1, b] * inverse
        for r in range(n - 1, 0, -1):
            for b in range(samples):
                right = (real(1 + r) - f[b]) * values[r, b]
                values[r, b] = fma(f[b] + real(n - r), values[r - 1, b], right) * inverse
        for b in range(samples):
            values[0, b] = (real(1) - f[b]) * values[0, b] * inverse
    for n in range(degree + 1, order + 1):
        values[n] = real(0)
        for r in range(n, 0, -1):
            for b in range(samples):
                values[r, b] = (values[r - 1, b] - values[r, b]) * inv_h
        for b in range(samples):
            values[0, b] = -values[0, b] * inv_h
    if d > order:
        values[: order + 1] = real(0)


@numba.njit(forceinline=True, fastmath=AS_WRITTEN, error_model="numpy")
def _locate(x, lo, hi, inv_h, at_knots, size, cells, f, order):
    """The cell of every sample of one feature and the position in it, as :func:`layers.bsplines.locate`.

    Where the pieces jump at a knot, ``at_knots`` holds the knots from -k - 1 to G + k + 1, and samples are compared with
    them as it is done there; elsewhere it is empty, since either side of a knot gives one value.
    """
    real = x.dtype.type
    for b in range(x.shape[0]):
        u = (x[b] - lo) * inv_h
        c = np.floor(u)
        if at_knots.shape[0] > 0:
            near = min(max(c, real(-order - 1)), real(size + order))
            n = np.int64(near if x[b] == x[b] else real(0)) + order + 1
            c += real(x[b] >= at_knots[n + 1]) - real(x[b] < at_knots[n])
        highest = real(size - 1) if x[b] <= hi else real(size + order)
        lowest = real(-order - 1) if x[b] <= hi else real(size)
        c = highest if c > highest else c
        c = c if c > lowest else lowest
        c = c if x[b] == x[b] else real(0)
        cells[b] = np.int32(c)
        f[b] = u - c


@numba.njit(forceinline=True, fastmath=AS_WRITTEN)
def _overhang(cells, size):
    """How many windows reach beyond an end of the grid."""
    n = 0
    for b in range(cells.shape[0]):
        n += np.int64(cells[b] < 0) | np.int64(cells[b] >= size)
    return n


@numba.njit(forceinline=True, fastmath=AS_WRITTEN, error_model="numpy")
def _basis(x, f, scale, inv_h, values, order, d):
    """Basis values (or d-th derivatives) of all samples of one feature, times ``scale`` unless it is empty."""
    real = x.dtype.type
    _window(f, inv_h, values, order, d)
    for r in range(order + 1):
        if d > 0 or order == 0:  # a constant piece must carry a NaN along as well
            for b in range(x.shape[0]):
                values[r, b] += real(0) if x[b] == x[b] else x[b]
        if scale.shape[0] > 0:
            for b in range(x.shape[0]):
                values[r, b] *= scale[b]


@numba.njit(forceinline=True, fastmath=AS_WRITTEN)
def _exp(x):
    """``e^x`` for float32 from -87 to 88, to a rounding or two: ``2^n e^r`` with a Taylor polynomial for ``e^r``.

    In a loop it becomes vector instructions, where the library's function takes one number at a time.
    """
    n = np.floor(x * np.float32(1 / LN2) + np.float32(0.5))
    r = np.float32(fma(np.float64(n), -LN2, np.float64(x)))  # |r| <= log(2) / 2: the term left out is below 1e-8
    p = np.float32(1 / 5040)
    for inverse in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = fma(p, r, np.float32(inverse))
    return p * np.int32((np.int32(n) + 127) << 23).view(np.float32)  # the exponent's bits of 2^n


@numba.njit(forceinline=True, fastmath=AS_WRITTEN, error_model="numpy")
def _logistic(x, s):
    real = x.dtype.type
    for b in range(x.shape[0]):
        if real is np.float32:
            near = min(max(-x[b], real(-87)), real(88))
            e = _exp(near if x[b] == x[b] else real(0))
            s[b] = real(1) / (real(1) + e) if x[b] > real(-88) else real(0)
        else:
            s[b] = real(1) / (real(1) + np.exp(-x[b]))


@numba.njit(forceinline=True, fastmath=AS_WRITTEN, error_model="numpy")
def _silu(x, s, scale, out, terms, d):
    """The d-th derivative of SiLU from ``s``, the logistic function of ``x``; ``terms``: ``silu_terms(d)``."""
    real = x.dtype.type
    (now, steep), (before, steep_before) = terms
    for b in range(x.shape[0]):
        p, q, power = real(0), real(0), real(1)
        for n in range(len(now)):
            p = fma(real(now[n]), power, p)
            if n < len(before):
                q = fma(real(before[n]), power, q)
            power *= s[b]
        slope = s[b] * (real(1) - s[b])
        p *= slope if steep else s[b]
        q *= slope if steep_before else s[b]
        out[b] = fma(real(d), q, real(0) if x[b] == -np.inf else x[b] * p)
    if scale.shape[0] > 0:
        for b in range(x.shape[0]):
            out[b] *= scale[b]


@numba.njit(forceinline=True)
def _turned(x, first, last):
    """Columns ``first`` to ``last`` of ``x`` (B, I) as rows; empty rows if ``x`` is empty, as a ``scale`` not given."""
    out = np.empty((last - first, x.shape[0]), x.dtype)
    for b in range(x.shape[0]):
        for i in range(first, last):
            out[i - first, b] = x[b, i]
    return out


@numba.njit(forceinline=True)
def _lines(n, real):
    """``n`` numbers that begin where a line of the cache does: vectors of 64 bytes then lie in one, not in two."""
    out = np.empty(n + 16, real)
    skip = (-out.ctypes.data % 64) // out.itemsize
    return out[skip : skip + n]


@numba.njit(forceinline=True)
def _to_lines(w, out, rows, outputs, row, lanes):
    """Copies rows of ``outputs`` numbers to where each begins ``row`` numbers after the one before."""
    lanes = numba.literally(lanes)
    for r in range(rows):
        for o in range(0, row, lanes):
            store(load(w, r * outputs + o, lanes), out, r * row + o)


@numba.njit(forceinline=True)
def _from_lines(lines, out, at, rows, outputs, row, lanes):
    """The way back, to ``out`` from ``at`` on. ``lanes`` is ``outputs`` at most: a row's last vector ends where the row does."""
    lanes = numba.literally(lanes)
    for r in range(rows):
        for o in range(0, outputs - lanes, lanes):
            store(load(lines, r * row + o, lanes), out, at + r * outputs + o)
        store(load(lines, r * row + outputs - lanes, lanes), out, at + (r + 1) * outputs - lanes)


def lanes_of(outputs: int) -> int:
    """How many outputs the innermost loops take at a time; rows are filled up to a multiple of it.

    A power of two, since a vector of 40 numbers is taken apart into single ones, and the next one, so that what is read
    behind the last row of a feature is less than the next feature has.
    """
    return min(1 << (outputs - 1).bit_length(), WIDEST)


@lru_cache
def _apply(order: int, d: int, lanes: int, single: bool, base: bool, real):
    """Compiles ``apply`` for one degree, derivative and length of vectors; ``single``: one holds all outputs.

    Rows of ``y`` and ``base_rows`` are filled up to whole vectors, and rows of the weights are read that far: what
    follows one goes to where nobody looks. So that the last row may be read too, the weights of the last feature come
    once more in ``last_weight``, with room behind them.

    Windows that reach beyond an end come in a loop of their own, after the others: the common case then keeps all it
    needs in registers. A vector that crosses a line of the cache takes two loads: where samples outnumber rows, those of
    a feature are copied to where none does.
    """
    width, whole_line, made_of = order + 1, lanes * real(0).itemsize >= 64, VECTORS
    terms = silu_terms(d)

    @compiled(fastmath=AS_WRITTEN, error_model="numpy")
    def run(chunk, chunks, x, scale, weight, last_weight, base_rows, copies, lo, hi, inv_h, at_knots, outputs, row):
        _ = made_of
        samples, features = x.shape
        rows = weight.shape[0] // (features * outputs)
        size = rows - order
        if single:
            row = lanes
        first_feature, last_feature = chunk * features // chunks, (chunk + 1) * features // chunks
        y = copies[chunk]
        y[:] = real(0)
        columns, scales = _turned(x, first_feature, last_feature), _turned(scale, first_feature, last_feature)
        cells, f = np.empty(samples, np.int32), np.empty(samples, real)
        values = np.empty((width, samples), real)
        act, logistic = np.empty(samples, real), np.empty(samples, real)
        near = rows <= samples and outputs < row and whole_line
        near_weight = _lines(rows * row if near else 0, real)
        for i in range(first_feature, last_feature):
            column = columns[i - first_feature]
            s = scales[i - first_feature]
            _locate(column, lo, hi, inv_h, at_knots, size, cells, f, order)
            _basis(column, f, s, inv_h, values, order, d)
            w, stride = last_weight if i == features - 1 else weight[i * rows * outputs :], outputs
            if near:
                _to_lines(w, near_weight, rows, outputs, row, lanes)
                w, stride = near_weight, row
            if base:
                _logistic(column, logistic)
                _silu(column, logistic, s, act, terms, d)
            overhang = _overhang(cells, size)
            for o in range(0, row, lanes):
                base_row = load(base_rows, i * row + o, lanes) if base else load(y, o, lanes)
                for b in range(samples):
                    c, at = np.int64(cells[b]), b * row + o
                    part = load(y, at, lanes)
                    if base:
                        part = fma(act[b], base_row, part)
                    if c >= 0 and c < size:
                        window = c * stride + o
                        for r in range(width):
                            part = fma(values[r, b], load(w, window + r * stride, lanes), part)
                    store(part, y, at)
                if overhang > 0:
                    for b in range(samples):
                        c, at = np.int64(cells[b]), b * row + o
                        if c < 0 or c >= size:
                            part = load(y, at, lanes)
                            for r in range(max(-c, 0), min(rows - c, width)):
                                part = fma(values[r, b], load(w, (c + r) * stride + o, lanes), part)
                            store(part, y, at)

    return run


@lru_cache
def _adjoint(order: int, dot_d: int, scatter_d: int, lanes: int, single: bool, base: bool, real):
    """Compiles ``dot`` and ``scatter`` together; an order of -1 leaves that half out. For the rest see ``_apply``.

    The rows of ``grad`` and ``base_rows`` are filled up with zeros.
    """
    width, whole_line, made_of = order + 1, lanes * real(0).itemsize >= 64, VECTORS
    slope_d, value_d = max(dot_d, 0), max(scatter_d, 0)
    inside = max(lanes // 2, 1) if single else lanes  # numbers of a vector that no row is shorter than
    slope_terms, value_terms = silu_terms(slope_d), silu_terms(value_d)

    @compiled(fastmath=AS_WRITTEN, error_model="numpy")
    def run(
        chunk, chunks, grad, x, scale, weight, last_weight, base_rows, dots, gradient, base_gradient,
        lo, hi, inv_h, at_knots, outputs, row,
    ):  # fmt: skip
        _ = made_of
        samples, features = x.shape
        rows = weight.shape[0] // (features * outputs)
        size = rows - order
        if single:
            row = lanes
        first_feature, last_feature = chunk * features // chunks, (chunk + 1) * features // chunks
        columns, scales = _turned(x, first_feature, last_feature), _turned(scale, first_feature, last_feature)
        cells, f = np.empty(samples, np.int32), np.empty(samples, real)
        values = np.empty((width, samples), real)
        act, logistic = np.empty(samples, real), np.empty(samples, real)
        local, flat_gradient = _lines(rows * row if scatter_d >= 0 else 0, real), gradient.reshape(-1)
        piece = max(PIECE, 4 * rows)
        near = dot_d >= 0 and rows <= samples and outputs < row and whole_line
        near_weight = _lines(rows * row if near else 0, real)
        nothing, local_base = np.zeros(lanes, real), np.empty(row, real)
        for i in range(first_feature, last_feature):
            column = columns[i - first_feature]
            none = column[:0]
            w, stride = last_weight if i == features - 1 else weight[i * rows * outputs :], outputs
            if near:
                _to_lines(w, near_weight, rows, outputs, row, lanes)
                w, stride = near_weight, row
            if base:
                _logistic(column, logistic)
            _locate(column, lo, hi, inv_h, at_knots, size, cells, f, order)
            overhang = _overhang(cells, size)
            if scatter_d >= 0:
                s = scales[i - first_feature]
                _basis(column, f, s, inv_h, values, order, value_d)
                if base:
                    _silu(column, logistic, s, act, value_terms, value_d)
                for start in range(0, max(samples, 1), piece):  # without samples, zeros
                    stop = min(start + piece, samples)
                    local[:] = real(0)
                    for o in range(0, row, lanes):
                        sums = load(nothing, 0, lanes)
                        for b in range(start, stop):
                            c, g = np.int64(cells[b]), load(grad, b * row + o, lanes)
                            if base:
                                sums = fma(act[b], g, sums)
                            if c >= 0 and c < size:
                                window = c * row + o
                                for r in range(width):
                                    at = window + r * row
                                    store(fma(values[r, b], g, load(local, at, lanes)), local, at)
                        if overhang > 0:
                            for b in range(start, stop):
                                c, g = np.int64(cells[b]), load(grad, b * row + o, lanes)
                                if c < 0 or c >= size:
                                    for r in range(max(-c, 0), min(rows - c, width)):
                                        at = (c + r) * row + o
                                        store(fma(values[r, b], g, load(local, at, lanes)), local, at)
                        store(sums, local_base, o)
                    if start == 0:
                        _from_lines(local, flat_gradient, i * rows * outputs, rows, outputs, row, inside)
                        if base:
                            base_gradient[i] = local_base[:outputs]
                    else:
                        gradient[i] += local.reshape(rows, row)[:, :outputs]
                        if base:
                            base_gradient[i] += local_base[:outputs]
            if dot_d >= 0:
                _basis(column, f, none, inv_h, values, order, slope_d)
                if base:
                    _silu(column, logistic, none, act, slope_terms, slope_d)
                base_row = load(base_rows, i * row, lanes) if base else load(nothing, 0, lanes)
                for b in range(samples):
                    c, sums = np.int64(cells[b]), load(nothing, 0, lanes)
                    for o in range(0, row, lanes):
                        part = load(nothing, 0, lanes)
                        if base:
                            part = fma(act[b], base_row if single else load(base_rows, i * row + o, lanes), part)
                        if c >= 0 and c < size:
                            window = c * stride + o
                            for r in range(width):
                                part = fma(values[r, b], load(w, window + r * stride, lanes), part)
                        sums = fma(load(grad, b * row + o, lanes), first(part, outputs - o), sums)
                    columns[i - first_feature, b] = total(sums)  # the column is not needed any more
                if overhang > 0:
                    for b in range(samples):
                        c, sums = np.int64(cells[b]), load(nothing, 0, lanes)
                        if c < 0 or c >= size:
                            for o in range(0, row, lanes):
                                part = load(nothing, 0, lanes)
                                if base:
                                    part = fma(act[b], load(base_rows, i * row + o, lanes), part)
                                for r in range(max(-c, 0), min(rows - c, width)):
                                    part = fma(values[r, b], load(w, (c + r) * stride + o, lanes), part)
                                sums = fma(load(grad, b * row + o, lanes), first(part, outputs - o), sums)
                            columns[i - first_feature, b] = total(sums)
        if dot_d >= 0:
            for b in range(samples):
                for i in range(first_feature, last_feature):
                    dots[b, i] = columns[i - first_feature, b]

    return run


@compiled()
def _sum(copies, y, row):
    """The sum over copies (n, B * row) into ``y`` (B, O)."""
    for b in range(y.shape[0]):
        for o in range(y.shape[1]):
            y[b, o] = copies[0, b * row + o]
        for n in range(1, copies.shape[0]):
            for o in range(y.shape[1]):
                y[b, o] += copies[n, b * row + o]


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="flashkan")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _run_on_all(run, threads: int, chunks: int, *args) -> None:
    """Calls ``run(chunk, chunks, *args)`` for every chunk; the compiled code runs without the interpreter's lock.

    A pool of Python threads instead of Numba's own: it compiles in a quarter of the time and may be entered from
    several threads at once.
    """
    waiting = itertools.count()

    def work() -> None:
        while (chunk := next(waiting)) < chunks:
            run(chunk, chunks, *args)

    helpers = [_pool(threads - 1).submit(work) for _ in range(threads - 1)] if threads > 1 else []
    work()
    for helper in helpers:
        helper.result()


class _Call:
    """What both kernels are given: numbers, arrays, how many threads and chunks."""

    def __init__(self, x, weight, base, scale, order: int, lo: float, hi: float, d: int) -> None:
        self.dtype = compute_dtype(x, weight)
        real = self.real = np.float64 if self.dtype == torch.float64 else np.float32
        (features, rows, outputs), size = weight.shape, weight.shape[1] - order
        self.lanes = lanes_of(outputs)
        self.row = -(-outputs // self.lanes) * self.lanes
        self.x, self.scale = self.array(x), self.array(x.new_empty(0, 0) if scale is None else scale)
        wide = weight.detach().to(self.dtype).contiguous().view(-1)
        room = wide.new_zeros(self.row - outputs)
        self.weights = wide.numpy(), torch.cat([wide[(features - 1) * rows * outputs :], room]).numpy()
        self.base = self.rows(x.new_empty(0, outputs) if base is None else base)
        at_knots = np.empty(0, real)
        if d >= order:
            inner = knots(size, order, (lo, hi), dtype=self.dtype, device="cpu").numpy()
            at_knots = np.concatenate([[np.nan], inner, [np.nan]], dtype=real)  # nothing is changed beyond the last
        self.numbers = real(lo), real(hi), real(size / (hi - lo)), at_knots, outputs, self.row
        threads = torch.get_num_threads() if x.numel() * outputs > ALONE else 1
        self.threads = max(1, min(threads, features))

    def array(self, t: Tensor) -> np.ndarray:
        return t.detach().to(self.dtype).contiguous().numpy()

    def rows(self, t: Tensor) -> np.ndarray:
        """``t`` (n, O), its rows filled up with zeros to whole vectors, as one array."""
        return (
            torch.nn.functional.pad(t.detach().to(self.dtype), (0, self.row - t.shape[1])).contiguous().view(-1).numpy()
        )

    def chunks(self, numbers_each: int) -> int:
        many = CHUNKS * self.threads if self.threads > 1 else 1
        fits = many * numbers_each <= FEW_NUMBERS
        return min(many, self.x.shape[1]) if fits else self.threads


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    call = _Call(x, weight, base, scale, order, lo, hi, d)
    outputs = weight.shape[2]
    step = max(1, COPIES_NUMBERS // (call.threads * call.row))
    if x.shape[0] > step:
        parts = [slice(b, b + step) for b in range(0, x.shape[0], step)]
        return torch.cat(
            [apply(x[p], weight, base, None if scale is None else scale[p], order, lo, hi, d) for p in parts]
        )
    chunks = call.chunks(x.shape[0] * call.row)
    copies = x.new_empty(chunks, x.shape[0] * call.row, dtype=call.dtype).numpy()  # PyTorch begins at a cache line
    run = _apply(order, d, call.lanes, call.row == call.lanes, base is not None, call.real)
    _run_on_all(run, call.threads, chunks, call.x, call.scale, *call.weights, call.base, copies, *call.numbers)
    y = x.new_empty(x.shape[0], outputs, dtype=call.dtype)
    _sum(copies, y.numpy(), call.row)
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
    call = _Call(x, weight, base, scale, order, lo, hi, max(dot_d, scatter_d))
    with_dot, with_scatter = dot_d >= 0, scatter_d >= 0
    p = x.new_empty(x.shape if with_dot else (0, 0), dtype=call.dtype)
    v = x.new_empty(weight.shape if with_scatter else (0, 0, 0), dtype=call.dtype)
    b = x.new_empty(base.shape if with_scatter and base is not None else (0, 0), dtype=call.dtype)
    run = _adjoint(order, dot_d, scatter_d, call.lanes, call.row == call.lanes, base is not None, call.real)
    arrays = call.rows(grad), call.x, call.scale, *call.weights, call.base, p.numpy(), v.numpy(), b.numpy()
    _run_on_all(run, call.threads, call.chunks(0), *arrays, *call.numbers)
    none = x.new_empty(0)
    return (
        p.to(x.dtype) if with_dot else none,
        v.to(weight.dtype) if with_scatter else none.clone(),
        b.to(base.dtype) if with_scatter and base is not None else none.clone(),
    )
