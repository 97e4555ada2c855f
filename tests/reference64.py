"""The layer, its gradients and the gradients of its gradients in float64, from the formulas, with SciPy and NumPy alone.

What every layer, route and kernel is compared with. It shares no code with ``layers/``: SciPy's ``BSpline`` evaluates
the basis and its derivatives, and every result is one sum over dense arrays of shape (B, I, R), whatever that costs.

    y[b, o] = sum_i base[i, o] s(x[b, i]) + sum_i sum_j N_j(x[b, i]) W[i, j, o],      s(x) = x / (1 + exp(-x))

Letters as in ``layers/bsplines.py``: B, I, O, G, k, R = G + k, h. ``g`` (B, O) is the gradient that arrives at ``y``.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import BSpline
from scipy.special import expit


def knot_positions(grid_size: int, low: int, high: int, grid_range: tuple[float, float]) -> np.ndarray:
    """The grid points number ``low .. high`` (both included) of the uniform grid that has number 0 at ``lo``."""
    lo, hi = grid_range
    return lo + (hi - lo) * (np.arange(low, high + 1) / grid_size)


def basis(
    x: np.ndarray, grid_size: int, spline_order: int, grid_range: tuple[float, float] = (-1, 1), derivative: int = 0
) -> np.ndarray:
    """All R basis functions (or their derivatives) at ``x``, shape ``(*x.shape, R)``.

    Between the ends SciPy's spline on the layer's own knots answers, so that ``hi`` takes the piece on its left. Outside
    the same functions are put on a grid with ``k + 1`` more intervals at each side, and beyond that all of them are 0.
    """
    x = np.asarray(x, dtype=np.float64)
    lo, hi = grid_range
    rows = grid_size + spline_order
    flat = x.reshape(-1)
    out = np.zeros((flat.size, rows))
    out[np.isnan(flat)] = np.nan
    if derivative > spline_order:
        return out.reshape(*x.shape, rows)
    inside = (flat >= lo) & (flat <= hi)
    inner = BSpline(
        knot_positions(grid_size, -spline_order, grid_size + spline_order, grid_range), np.eye(rows), spline_order
    )
    out[inside] = inner(flat[inside], derivative)
    wide = knot_positions(grid_size, -2 * spline_order - 1, grid_size + 2 * spline_order + 1, grid_range)
    padded = np.zeros((rows + 2 * (spline_order + 1), rows))
    padded[spline_order + 1 : -spline_order - 1] = np.eye(rows)
    near = ~inside & (flat > wide[spline_order]) & (flat < wide[-spline_order - 1])
    out[near] = BSpline(wide, padded, spline_order)(flat[near], derivative)
    return out.reshape(*x.shape, rows)


def silu(x: np.ndarray, derivative: int = 0) -> np.ndarray:
    """``s(x) = x / (1 + exp(-x))`` or its first, second, third or fourth derivative, written out."""
    p = expit(x)
    q = p * (1 - p)  # p'
    return (
        lambda: x * p,
        lambda: p + x * q,
        lambda: 2 * q + x * q * (1 - 2 * p),
        lambda: 3 * q * (1 - 2 * p) + x * q * (1 - 6 * q),
        lambda: 4 * q * (1 - 6 * q) + x * q * (1 - 2 * p) * (1 - 12 * q),
    )[derivative]()


class Layer64:
    """One layer at one batch.

    Args:
        x: (B, I). weight: (I, R, O). base: (I, O) or None. spline_order, grid_range: the grid; G is read off ``weight``.
        absolute: every term of every sum is replaced by its absolute value, and to each basis function its slope times
            the distance from ``lo`` is added. The results times eps then bound what one rounding of each factor
            and one rounding of the position ``x - lo`` can do: the unit in which errors are counted.
    """

    def __init__(self, x, weight, base, spline_order, grid_range=(-1, 1), *, absolute=False):
        self.order, self.range, self.absolute = spline_order, grid_range, absolute
        self.x = np.asarray(x, dtype=np.float64)
        self.weight = self._sign(np.asarray(weight, dtype=np.float64))
        self.base = None if base is None else self._sign(np.asarray(base, dtype=np.float64))
        self._known: dict[int, np.ndarray] = {}

    def _sign(self, a):
        return np.abs(a) if self.absolute else a

    def _plain_basis(self, d: int) -> np.ndarray:
        if d not in self._known:
            size = self.weight.shape[1] - self.order
            self._known[d] = basis(self.x, size, self.order, self.range, d)
        return self._known[d]

    def n(self, d: int) -> np.ndarray:
        """The d-th derivative of the basis functions, (B, I, R)."""
        values = self._plain_basis(d)
        if not self.absolute:
            return values
        return np.abs(values) + np.abs(self.x - self.range[0])[..., None] * np.abs(self._plain_basis(d + 1))

    def s(self, d: int) -> np.ndarray:
        """The d-th derivative of SiLU, (B, I)."""
        values = silu(self.x, d)
        return np.abs(values) + np.abs(self.x * silu(self.x, d + 1)) if self.absolute else values

    # The three sums. Every derivative of the layer is made of them.

    def apply(self, d, weight, base, scale=None) -> np.ndarray:
        """sum_i scale[b, i] (base[i, o] s^(d) + sum_j N_j^(d) W[i, j, o]), (B, O)."""
        one = np.ones_like(self.x) if scale is None else scale
        y = np.einsum("bij,bi->bij", self.n(d), one).reshape(len(self.x), weight[..., 0].size) @ weight.reshape(
            -1, weight.shape[2]
        )
        return y if base is None else y + (one * self.s(d)) @ base

    def dot(self, d, g, weight, base) -> np.ndarray:
        """sum_o g[b, o] (base[i, o] s^(d) + sum_j N_j^(d) W[i, j, o]), (B, I)."""
        rows, outputs = weight.shape[1:]
        along = (g @ weight.reshape(-1, outputs).T).reshape(*self.x.shape, rows)
        p = (self.n(d) * along).sum(-1)
        return p if base is None else p + self.s(d) * (g @ base.T)

    def scatter(self, d, g, scale=None) -> tuple[np.ndarray, np.ndarray | None]:
        """sum_b scale[b, i] N_j^(d) g[b, o], (I, R, O), and sum_b scale[b, i] s^(d) g[b, o], (I, O)."""
        one = np.ones_like(self.x) if scale is None else scale
        scaled = np.einsum("bij,bi->bij", self.n(d), one)
        v = (scaled.reshape(len(self.x), self.weight[..., 0].size).T @ g).reshape(self.weight.shape)
        return v, None if self.base is None else (one * self.s(d)).T @ g

    def value(self) -> np.ndarray:
        """y, (B, O)."""
        return self.apply(0, self.weight, self.base)

    def gradients(self, g) -> dict[str, np.ndarray]:
        """The gradients of ``sum(g * y)`` with respect to x, weight and base."""
        g = self._sign(np.asarray(g, dtype=np.float64))
        for_weight, for_base = self.scatter(0, g)
        return {"x": self.dot(1, g, self.weight, self.base), "weight": for_weight} | (
            {} if for_base is None else {"base": for_base}
        )

    def second_gradients(self, g, a, v, c) -> dict[str, np.ndarray]:
        """The gradients of ``sum(a * y_x) + sum(v * y_weight) + sum(c * y_base)`` with respect to g, x, weight, base.

        ``y_x`` and so on are what :meth:`gradients` returns; a is (B, I), v (I, R, O) and c (I, O), or None without a
        base.
        """
        g, a, v = (self._sign(np.asarray(t, dtype=np.float64)) for t in (g, a, v))
        c = None if self.base is None else self._sign(np.asarray(c, dtype=np.float64))
        for_weight, for_base = self.scatter(1, g, a)
        return {
            "g": self.apply(1, self.weight, self.base, a) + self.apply(0, v, c),
            "x": a * self.dot(2, g, self.weight, self.base) + self.dot(1, g, v, c),
            "weight": for_weight,
        } | ({} if for_base is None else {"base": for_base})
