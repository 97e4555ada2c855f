"""layers/bsplines.py against SciPy's BSpline: values, derivatives, the ends, every knot, and float32 at fine grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from layers.bsplines import check_grid, dense_basis, knots, local_basis, locate, window_rows, working_dtype
from tests import reference64

SIZES = (1, 2, 5, 50, 500)
ORDERS = range(6)
RANGES = ((-1, 1), (0, 1), (-3, 7), (0.1, 0.7), (-1e-3, 1e-3), (-100, 100))
EPS32 = torch.finfo(torch.float32).eps


def spread(x, grid_size, spline_order, grid_range=(-1, 1), derivative=0):
    """The local basis put into its place among all R functions, shape ``(*, R)``."""
    cell, values = local_basis(x, grid_size, spline_order, grid_range, derivative=derivative)
    rows, exists = window_rows(cell, grid_size, spline_order)
    out = torch.zeros(*x.shape, grid_size + spline_order, dtype=values.dtype)
    return out.scatter_add(-1, rows, values * exists)


def points(grid_size, spline_order, grid_range=(-1, 1), *, on_knots=True):
    """float64: both ends and their neighbours, far away, random inside and outside, and every knot if asked for."""
    lo, hi = grid_range
    h = (hi - lo) / grid_size
    rng = np.random.default_rng(grid_size * 10 + spline_order)
    parts = [
        [lo, hi, np.nextafter(lo, math.inf), np.nextafter(hi, -math.inf)],
        [lo - 1e6 * (hi - lo), hi + 1e6 * (hi - lo)],
        rng.uniform(lo, hi, 200),
        rng.uniform(lo - (spline_order + 2) * h, lo, 50),
        rng.uniform(hi, hi + (spline_order + 2) * h, 50),
    ]
    if on_knots:
        knot = reference64.knot_positions(grid_size, -spline_order - 1, grid_size + spline_order + 1, grid_range)
        parts += [knot, np.nextafter(knot, -math.inf), np.nextafter(knot, math.inf)]
    return torch.from_numpy(np.concatenate(parts))


@pytest.mark.parametrize("derivative", (0, 1, 2, 3))
@pytest.mark.parametrize("spline_order", ORDERS)
@pytest.mark.parametrize("grid_size", SIZES)
def test_equals_scipy(grid_size, spline_order, derivative):
    # The k-th derivative jumps at the knots: there only the ends are asked for, where one side alone exists.
    x = points(grid_size, spline_order, on_knots=derivative < spline_order)
    expected = torch.from_numpy(reference64.basis(x.numpy(), grid_size, spline_order, derivative=derivative))
    tolerance = 1e-12 * (grid_size / 2) ** derivative  # derivatives come in units of h ** -derivative
    for name, got in (
        ("local_basis", spread(x, grid_size, spline_order, derivative=derivative)),
        ("dense_basis", dense_basis(x, grid_size, spline_order, derivative=derivative)),
    ):
        assert got.shape == expected.shape and got.dtype == torch.float64
        error = (got - expected).abs().max().item()
        assert error <= tolerance, f"{name}: off by {error:.1e} of at most {tolerance:.0e}"


@pytest.mark.parametrize("grid_range", RANGES)
@pytest.mark.parametrize("spline_order", (0, 1, 3))
def test_equals_scipy_on_other_ranges(spline_order, grid_range):
    x = points(20, spline_order, grid_range, on_knots=spline_order > 0)
    expected = torch.from_numpy(reference64.basis(x.numpy(), 20, spline_order, grid_range))
    assert (spread(x, 20, spline_order, grid_range) - expected).abs().max() <= 1e-12
    assert (dense_basis(x, 20, spline_order, grid_range) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("grid_size", (*SIZES, 2000))
def test_a_knot_belongs_to_the_interval_on_its_right(grid_size):
    """And ``hi`` to the one on its left: what decides the value at spline_order 0 and the k-th derivative at any k."""
    expected = torch.arange(grid_size + 1).clamp(max=grid_size - 1)
    for grid_range in RANGES:
        cell, f = locate(knots(grid_size, 0, grid_range), grid_size, 0, grid_range)
        wrong = (cell != expected).sum().item()
        assert wrong == 0, f"{grid_range}: {wrong} of {grid_size + 1} knots lie in the interval on their left"
        assert (f[:-1].abs() < 1e-9).all() and f[-1] == pytest.approx(1)


@pytest.mark.parametrize("spline_order", ORDERS)
@pytest.mark.parametrize("grid_size", SIZES)
def test_local_equals_dense(grid_size, spline_order):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 8 * EPS32 * max(grid_size, 4))):
        x = points(grid_size, spline_order).to(dtype)
        for derivative in (0, 1, 2, spline_order + 1):
            local = spread(x, grid_size, spline_order, derivative=derivative)
            dense = dense_basis(x, grid_size, spline_order, derivative=derivative)
            assert local.dtype == dense.dtype == dtype
            assert (local - dense).abs().max() <= tolerance * (grid_size / 2) ** derivative


def test_a_degree_whose_factorial_has_more_than_64_bits():
    x = torch.rand(100, dtype=torch.float64) * 2 - 1
    values = dense_basis(x, 5, 21)
    assert torch.allclose(values, spread(x, 5, 21), rtol=0, atol=1e-12)
    assert torch.allclose(values.sum(-1), torch.ones_like(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("function", (spread, dense_basis))
@pytest.mark.parametrize("spline_order", ORDERS)
def test_autograd_gives_the_derivatives(function, spline_order):
    x = points(7, spline_order, (0, 1), on_knots=False).requires_grad_()
    weights = torch.linspace(-1, 1, 7 + spline_order, dtype=torch.float64) ** 3
    slope = function(x, 7, spline_order, (0, 1)) @ weights
    for derivative in (1, 2, 3):
        if not slope.requires_grad:  # a constant: autograd knows that nothing is left to differentiate
            assert derivative > spline_order
            break
        (slope,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        expected = function(x.detach(), 7, spline_order, (0, 1), derivative=derivative) @ weights
        assert (slope - expected).abs().max() <= 1e-12 * 7**derivative
        assert spline_order < derivative or slope.abs().max() > 1  # nothing would pass with all of them zero


@pytest.mark.parametrize("function", (spread, dense_basis))
def test_derivatives_beyond_the_degree_are_zero_and_nan_stays(function):
    x = torch.tensor([-2.0, 0.3, 1.0, math.nan])
    for spline_order in ORDERS:
        values = function(x, 5, spline_order, derivative=spline_order + 1)
        assert values.shape == (4, 5 + spline_order)
        assert (values[:3] == 0).all()


def neighbours_of_knots(grid_size, grid_range):
    """float32: all knots, the numbers next to them, and random ones, between the float32 ends."""
    lo, hi = torch.tensor(grid_range, dtype=torch.float32)
    knot = knots(grid_size, 0, grid_range, dtype=torch.float32)
    ends = torch.full_like(knot, math.inf)
    rng = torch.Generator().manual_seed(grid_size)
    x = torch.cat(
        [
            knot,
            torch.nextafter(knot, ends),
            torch.nextafter(knot, -ends),
            lo + (hi - lo) * torch.rand(200, generator=rng),
        ]
    )
    return x[(x >= lo) & (x <= hi)]


def test_partition_of_unity_up_to_a_grid_of_2000():
    for grid_size in (*range(1, 300), *range(300, 2001, 10), 511, 1001, 1024, 1999):
        x = neighbours_of_knots(grid_size, (-1, 1))
        cell, values = local_basis(x, grid_size, 3)
        assert values.dtype == torch.float32
        # No sample between the ends may lose a row, so that the sum over the window needs no mask.
        assert cell.min() == 0 and cell.max() == grid_size - 1, f"G = {grid_size}: cells {cell.min()}..{cell.max()}"
        error = (values.double().sum(-1) - 1).abs().max().item()
        assert error <= 1e-6, f"G = {grid_size}: the basis sums to 1 within {error:.1e} only"


@pytest.mark.parametrize("grid_range", RANGES)
@pytest.mark.parametrize("spline_order", ORDERS)
def test_partition_of_unity(spline_order, grid_range):
    for grid_size in (1, 2, 3, 5, 7, 10, 49, 50, 64, 100, 127, 500, 511, 1000, 1999, 2000):
        x = neighbours_of_knots(grid_size, grid_range)
        total = spread(x[:: max(1, grid_size // 200)], grid_size, spline_order, grid_range).double().sum(-1)
        assert (total - 1).abs().max() <= 1e-6, f"local_basis at G = {grid_size}"
        cell, values = local_basis(x, grid_size, spline_order, grid_range)
        _, exists = window_rows(cell, grid_size, spline_order)
        assert exists.all() and (values.double().sum(-1) - 1).abs().max() <= 1e-6, f"local_basis at G = {grid_size}"
        total = dense_basis(x[:: max(1, grid_size // 50)], grid_size, spline_order, grid_range).double().sum(-1)
        assert (total - 1).abs().max() <= 1e-6, f"dense_basis at G = {grid_size}"


@pytest.mark.parametrize("spline_order", (1, 2, 3, 5))
@pytest.mark.parametrize("grid_size", (5, 50, 500, 2000))
def test_float32_is_off_by_the_rounding_of_the_position_and_no_more(grid_size, spline_order):
    x = torch.cat([neighbours_of_knots(grid_size, (-1, 1))[:: max(1, grid_size // 50)], torch.tensor([-1.2, 1.2])])
    exact = torch.from_numpy(reference64.basis(x.numpy(), grid_size, spline_order))
    # u is as large as G and is rounded twice; a basis function rises by at most 1 where u grows by 1.
    tolerance = 2 * EPS32 * (grid_size + 8)
    assert (spread(x, grid_size, spline_order).double() - exact).abs().max() <= tolerance
    assert (dense_basis(x, grid_size, spline_order).double() - exact).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("grid_size", (1, 5, 50, 500))
def test_locate(grid_size, dtype):
    k, (lo, hi) = 3, (-1, 1)
    x = points(grid_size, k).to(dtype)
    cell, f = locate(x, grid_size, k)
    assert cell.dtype == torch.int64 and f.dtype == dtype and cell.shape == f.shape == x.shape
    assert cell.min() == -k - 1 and cell.max() == grid_size + k
    near = (cell > -k - 1) & (cell < grid_size + k)
    rounding = 4 * torch.finfo(dtype).eps * (grid_size + k)
    assert (f[near] >= -rounding).all() and (f[near] <= 1 + rounding).all()
    back = lo + (cell + f.double()) * (hi - lo) / grid_size
    assert (back - x.double())[near].abs().max() <= rounding * (hi - lo) / grid_size
    assert (cell[x == lo] == 0).all() and (cell[x == hi] == grid_size - 1).all()
    assert (cell[x < lo] < 0).all() and (cell[x > hi] >= grid_size).all()


def test_locate_is_differentiable():
    x = torch.rand(20, dtype=torch.float64, requires_grad=True)
    _, f = locate(x, 12, 3, (0, 3))
    (slope,) = torch.autograd.grad(f.sum(), x)
    assert torch.equal(slope, torch.full_like(x, 4.0))


@pytest.mark.parametrize("derivative", (0, 1))
@pytest.mark.parametrize("spline_order", ORDERS)
def test_nan_and_infinity(spline_order, derivative):
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.25])
    cell, values = local_basis(x, 6, spline_order, derivative=derivative)
    assert cell.tolist()[:5] == [0, 6 + spline_order, -spline_order - 1, 6 + spline_order, -spline_order - 1]
    rows, _ = window_rows(cell, 6, spline_order)
    assert rows.min() >= 0 and rows.max() < 6 + spline_order
    assert values[0].isnan().all() and values[1:].isfinite().all()
    dense = dense_basis(x, 6, spline_order, derivative=derivative)
    assert dense[0].isnan().all()
    assert (dense[3:5] == 0).all() and dense[5].isfinite().all()
    local = spread(x[1:], 6, spline_order, derivative=derivative)
    assert (local[:4] == 0).all()


def test_window_rows():
    rows, exists = window_rows(torch.tensor([[-4, -1], [0, 4], [5, 8]]), 5, 3)
    assert rows.shape == exists.shape == (3, 2, 4)
    assert exists.tolist() == [
        [[False] * 4, [False, True, True, True]],
        [[True] * 4, [True] * 4],
        [[True, True, True, False], [False] * 4],
    ]
    assert rows[1].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows.min() >= 0 and rows.max() <= 7


@pytest.mark.parametrize("grid_range", RANGES)
def test_knots(grid_range):
    lo, hi = grid_range
    t = knots(7, 3, grid_range)
    assert t.shape == (7 + 2 * 3 + 1,) and t.dtype == torch.float64
    assert t[3] == lo and t[-4] == hi
    assert torch.allclose(t.diff(), torch.full((13,), (hi - lo) / 7, dtype=torch.float64), rtol=1e-12)
    assert torch.equal(t, torch.from_numpy(reference64.knot_positions(7, -3, 10, grid_range)))
    assert torch.equal(knots(7, 3, grid_range, dtype=torch.float32), t.float())


@pytest.mark.parametrize("shape", ((), (0,), (3,), (2, 0, 3), (2, 3, 4)))
def test_shapes(shape):
    x = torch.rand(shape)
    cell, values = local_basis(x, 5, 2)
    assert cell.shape == shape and values.shape == (*shape, 3)
    assert dense_basis(x, 5, 2).shape == (*shape, 7)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_inputs_are_evaluated_in_float32(dtype):
    x = torch.linspace(-1, 1, 201).to(dtype)
    assert working_dtype(dtype) == torch.float32 and working_dtype(torch.float64) == torch.float64
    for function in (spread, dense_basis):
        assert function(x, 100, 3).dtype == torch.float32
        assert torch.equal(function(x, 100, 3), function(x.float(), 100, 3))


@pytest.mark.parametrize(
    "size, order, ends, error, words",
    (
        (0, 3, (-1, 1), ValueError, "grid_size must be at least 1, got 0"),
        (-5, 3, (-1, 1), ValueError, "grid_size must be at least 1, got -5"),
        (5.0, 3, (-1, 1), TypeError, "grid_size must be an integer, got 5.0"),
        (True, 3, (-1, 1), TypeError, "grid_size must be an integer, got True"),
        ("5", 3, (-1, 1), TypeError, "grid_size must be an integer, got '5'"),
        (5, -1, (-1, 1), ValueError, "spline_order must be at least 0, got -1"),
        (5, 2.5, (-1, 1), TypeError, "spline_order must be an integer, got 2.5"),
        (5, None, (-1, 1), TypeError, "spline_order must be an integer, got None"),
        (5, 3, (1, 1), ValueError, "grid_range must .* low < high, got"),
        (5, 3, (1, -1), ValueError, "grid_range must .* low < high, got"),
        (5, 3, (math.nan, 1), ValueError, "grid_range must be two finite numbers"),
        (5, 3, (-1, math.nan), ValueError, "grid_range must be two finite numbers"),
        (5, 3, (-math.inf, 1), ValueError, "grid_range must be two finite numbers"),
        (5, 3, (-1, 0, 1), TypeError, "grid_range must be two numbers"),
        (5, 3, 1.0, TypeError, "grid_range must be two numbers"),
        (5, 3, ("a", "b"), TypeError, "grid_range must be two numbers"),
        (5, 3, None, TypeError, "grid_range must be two numbers"),
    ),
)
def test_bad_grids(size, order, ends, error, words):
    x = torch.rand(3)
    for call in (
        lambda: check_grid(size, order, ends),
        lambda: knots(size, order, ends),
        lambda: locate(x, size, order, ends),
        lambda: local_basis(x, size, order, ends),
        lambda: dense_basis(x, size, order, ends),
    ):
        with pytest.raises(error, match=words):
            call()


def test_bad_inputs():
    for function in (local_basis, dense_basis):
        with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch.int64"):
            function(torch.arange(3), 5, 3)
        with pytest.raises(ValueError, match="derivative must be at least 0, got -1"):
            function(torch.rand(3), 5, 3, derivative=-1)


def test_check_grid_takes_numpy_and_torch_numbers():
    assert check_grid(np.int64(5), np.int32(3), (np.float32(-1), 1)) == (-1.0, 1.0)
    assert check_grid(5, 3, [0, 2]) == (0.0, 2.0)
