"""Uniform B-splines in plain PyTorch: knots, the dense basis, the local basis and their derivatives.

Everything here is the mathematics that the layers share, written once and meant to be read.

Words (the whole project uses these letters): ``G`` grid_size, the number of intervals between the ends ``(lo, hi)`` of
``grid_range``; ``k`` spline_order, the degree of the polynomial pieces (3 is cubic); ``R = G + k``, how many basis
functions there are; ``h = (hi - lo) / G``, the knot spacing; ``u = (x - lo) / h``, a position counted in intervals;
``cell = floor(u)``, the interval that holds it; ``f = u - cell``, how far into the interval it lies.

The knots are *extended uniform*: ``k`` more intervals of the same width beyond each end. Every basis function is then a
shift of one cardinal B-spline, basis ``j`` is non-zero on ``lo + (j - k) h <= x < lo + (j + 1) h``, and an ``x`` in
``cell`` touches exactly the ``k + 1`` functions ``cell .. cell + k``. Outside the grid the window slides off the end,
so the sum of the basis falls to zero within ``k`` intervals, with ``k - 1`` continuous derivatives all the way.

Sources: C. de Boor, *A Practical Guide to Splines* (1978), chapters IX and X (recurrence and derivatives); Z. Liu et
al., *KAN: Kolmogorov-Arnold Networks* (arXiv 2404.19756), section 2.2 and equation 2.10 (splines as layers).
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor


def check_grid(grid_size: int, spline_order: int, grid_range: tuple[float, float]) -> tuple[float, float]:
    """Checks the three numbers that describe a grid and returns ``grid_range`` as two Python floats (float64).

    Raises ``TypeError`` or ``ValueError``, naming the argument, unless ``grid_size >= 1`` and ``spline_order >= 0`` are
    integers and ``grid_range`` holds two finite numbers, the first below the second.
    """
    for name, value, least in (("grid_size", grid_size, 1), ("spline_order", spline_order, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    try:
        lo, hi = grid_range
    except (TypeError, ValueError):
        raise TypeError(f"grid_range must be two numbers (low, high), got {grid_range!r}") from None
    if not (isinstance(lo, Real) and isinstance(hi, Real)):
        raise TypeError(f"grid_range must be two numbers (low, high), got {grid_range!r}")
    lo, hi = float(lo), float(hi)
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(f"grid_range must be two finite numbers with low < high, got ({lo}, {hi})")
    return lo, hi


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which bases are evaluated: float64 stays, every other floating type becomes float32.

    bfloat16 steps by 0.004 just below 1, a fifth of the knot spacing at ``G = 100`` on (-1, 1): a position kept in it
    is already lost.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def knots(
    grid_size: int,
    spline_order: int,
    grid_range: tuple[float, float] = (-1, 1),
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """The extended uniform knots ``t_j = lo + (j - k) h``, shape ``(G + 2k + 1,)``, in units of ``x``, increasing.

    Computed in float64 whatever ``dtype`` is asked for. Raises as :func:`check_grid` does.
    """
    lo, hi = check_grid(grid_size, spline_order, grid_range)
    steps = torch.arange(-spline_order, grid_size + spline_order + 1, dtype=torch.float64, device=device)
    # A weighted mean of the two ends hits both of them exactly; lo + j * h would miss hi by a rounding error.
    return (lo + (hi - lo) * (steps / grid_size)).to(dtype)


def locate(
    x: Tensor, grid_size: int, spline_order: int, grid_range: tuple[float, float] = (-1, 1)
) -> tuple[Tensor, Tensor]:
    """Finds the interval that holds each input: ``x = lo + (cell + f) h``.

    Args:
        x: any shape, a floating dtype; NaN and infinities are allowed.
        grid_size, spline_order, grid_range: the grid; see :func:`check_grid`.

    Returns:
        ``cell``: int64, the shape of ``x``, from ``-k - 1`` (left of every basis function) to ``G + k`` (right of every
        one). The grid is closed: ``x == hi`` belongs to cell ``G - 1``. NaN is given cell 0, infinities the far cells.
        ``f``: the position inside the cell, in units of ``h``, float32 or better (:func:`working_dtype`), in [0, 1] up
        to a rounding of ``u``; NaN where ``x`` is NaN. Differentiable in ``x`` with slope ``1 / h``.

    Rounding ``u`` can put a sample that lies next to a knot on the other side of it. For degree 1 and more that would be
    harmless: ``f`` is taken from the same rounded ``u``, and neighbouring polynomial pieces agree there (the kernels
    rely on it). Here the cell is compared with its knots all the same, for degree 0 and for derivatives of order ``k``,
    which jump. At the ends, where the neighbouring piece belongs to no basis function, the comparison with ``hi``
    decides.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    lo, hi = check_grid(grid_size, spline_order, grid_range)
    x = x.to(working_dtype(x.dtype))
    u = (x - lo) * (grid_size / (hi - lo))
    with torch.no_grad():
        floor = torch.floor(u)
        # Compared with the knots themselves, as knots() makes them: a sample on a knot belongs to its right.
        right, here = (lo + (hi - lo) * ((floor.double() + n) / grid_size) for n in (1, 0))
        floor = floor + (x >= right.to(x.dtype)).to(x.dtype) - (x < here.to(x.dtype)).to(x.dtype)
        floor = torch.where(x <= hi, floor.clamp(max=grid_size - 1), floor.clamp(min=grid_size))
        floor = floor.clamp(-spline_order - 1, grid_size + spline_order)
        floor = torch.where(torch.isnan(x), torch.zeros_like(floor), floor)
        # Far outside f means nothing and could be infinite, which would turn the zero weights there into NaN.
        far = (floor == -spline_order - 1) | (floor == grid_size + spline_order)
    f = torch.where(far, torch.zeros_like(u), u - floor)
    return floor.to(torch.int64), f


def _window(f: Tensor, degree: int) -> list[Tensor]:
    """The ``degree + 1`` non-zero cardinal B-splines of one degree at ``f`` (de Boor 1978, X.(4), uniform knots)."""
    values = [torch.ones_like(f) + 0 * f]  # "+ 0 * f" carries a NaN along
    for d in range(1, degree + 1):
        before = values
        values = [(1 - f) * before[0] / d]
        values += [((f + (d - r)) * before[r - 1] + ((1 + r) - f) * before[r]) / d for r in range(1, d)]
        values += [f * before[d - 1] / d]
    return values


def local_basis(
    x: Tensor,
    grid_size: int,
    spline_order: int,
    grid_range: tuple[float, float] = (-1, 1),
    *,
    derivative: int = 0,
) -> tuple[Tensor, Tensor]:
    """The ``k + 1`` basis functions that are not zero at ``x``, or their derivatives: cost independent of ``G``.

    Args:
        x: any shape ``(*)``, floating.
        grid_size, spline_order, grid_range: the grid; see :func:`check_grid`.
        derivative: how many times to differentiate with respect to ``x``; 0 (default) gives the values. The result is
            in units of ``x ** -derivative``; beyond ``k`` it is zero.

    Returns:
        ``cell``, int64, shape ``(*)``: see :func:`locate`.
        ``values``, shape ``(*, k + 1)``, float32 or better: ``values[..., r]`` belongs to basis function ``cell + r``.
        Outside the grid some of these rows do not exist (below 0 or above ``R - 1``); :func:`window_rows` masks them.
        At a knot the derivative is the one from the right, at ``hi`` the one from the left.

    Values come from de Boor's recurrence (1978, X.(4)), derivatives from his X.(12), which for uniform knots reads
    ``B_k'(u) = (B_{k-1}(u) - B_{k-1}(u - 1)) / h``. Both are differentiable by autograd as often as the degree allows.
    """
    if derivative < 0:
        raise ValueError(f"derivative must be at least 0, got {derivative}")
    lo, hi = check_grid(grid_size, spline_order, grid_range)
    cell, f = locate(x, grid_size, spline_order, grid_range)
    if derivative > spline_order:
        return cell, f.new_zeros(*f.shape, spline_order + 1) + 0 * f.unsqueeze(-1)
    values = _window(f, spline_order - derivative)
    for _ in range(derivative):
        values = [
            (values[r - 1] if r > 0 else 0) - (values[r] if r < len(values) else 0) for r in range(len(values) + 1)
        ]
    return cell, torch.stack(values, dim=-1) * (grid_size / (hi - lo)) ** derivative


def window_rows(cell: Tensor, grid_size: int, spline_order: int) -> tuple[Tensor, Tensor]:
    """The coefficient rows of each window, and which of them exist.

    Args:
        cell: int64, shape ``(*)``, from :func:`locate`.

    Returns:
        ``rows``: int64, shape ``(*, k + 1)``, ``cell + r`` moved into ``0 .. R - 1`` so that it is safe to index with.
        ``exists``: bool, the same shape, False where the row had to be moved: its value must count as zero.
    """
    rows = cell.unsqueeze(-1) + torch.arange(spline_order + 1, device=cell.device)
    exists = (rows >= 0) & (rows < grid_size + spline_order)
    return rows.clamp(0, grid_size + spline_order - 1), exists


def dense_basis(
    x: Tensor,
    grid_size: int,
    spline_order: int,
    grid_range: tuple[float, float] = (-1, 1),
    *,
    derivative: int = 0,
) -> Tensor:
    """All ``R = G + k`` basis functions at ``x``, or their derivatives, by the Cox-de Boor recurrence over the grid.

    Args:
        x: any shape ``(*)``, floating.
        grid_size, spline_order, grid_range: the grid; see :func:`check_grid`.
        derivative: how many times to differentiate with respect to ``x``; 0 (default) gives the values.

    Returns:
        Shape ``(*, R)``, float32 or better, in units of ``x ** -derivative``. At most ``k + 1`` entries of a row are
        not zero; between the ends the values of a row sum to 1. Differentiable by autograd.

    This is what layers compute that do not use local support (de Boor 1978, IX.(14); KAN, equation 2.10). It costs
    ``k`` passes over a tensor of ``G + 2k`` numbers for each input. With :func:`local_basis` it shares :func:`locate`.
    """
    if derivative < 0:
        raise ValueError(f"derivative must be at least 0, got {derivative}")
    lo, hi = check_grid(grid_size, spline_order, grid_range)
    cell, f = locate(x, grid_size, spline_order, grid_range)
    degree = max(spline_order - derivative, 0)
    starts = torch.arange(-spline_order, grid_size + spline_order, device=x.device, dtype=f.dtype)
    # 1 / degree! goes in at the start, which saves a division of the whole tensor at every step.
    basis = (cell.to(f.dtype).unsqueeze(-1) == starts).to(f.dtype).div_(float(math.factorial(degree)))
    # t counts intervals from the start of each support; only the rows around the sample's cell have a use for it.
    t = (f + cell.to(f.dtype)).unsqueeze(-1) - starts
    for d in range(1, degree + 1):
        t, left, right = t[..., :-1], basis[..., :-1], basis[..., 1:]
        basis = torch.addcmul((d + 1) * right, t, left - right)  # t * left + ((d + 1) - t) * right
    if degree == 0:
        basis = basis + 0 * t  # carries a NaN along, as the loop does
    for _ in range(min(derivative, spline_order)):
        basis = basis[..., :-1] - basis[..., 1:]
    if derivative > spline_order:
        basis = 0 * basis
    return basis * (grid_size / (hi - lo)) ** derivative if derivative else basis
