"""The operator's formulas in plain PyTorch: what every kernel must reproduce, and what runs where no kernel fits.

One input ``x[b, i]`` meets a *window*: the ``k + 1`` coefficient rows ``cell .. cell + k`` of its feature, with the
basis values ``N_r``, and the row of ``base_weight`` with ``silu(x)``. Everything the layer needs, its gradient and the
gradient of its gradient included, is one of three sums over windows (``N^(d)`` is the d-th derivative in ``x``):

    apply    y[b, o]     = sum_i s[b, i] * sum_r N_r^(d)(x[b, i]) * W[i, cell + r, o]       (scale s: 1 if not given)
    dot      p[b, i]     = sum_o g[b, o] * sum_r N_r^(d)(x[b, i]) * W[i, cell + r, o]
    scatter  V[i, c, o]  = sum_b s[b, i] * N_{c - cell}^(d)(x[b, i]) * g[b, o]

They are each other's derivatives: differentiating any of them gives the three again, with ``d`` or ``d + 1``. That is
why the operator can be differentiated as often as one likes without a tensor that grows with ``G``.

Shapes: ``x`` and ``s`` (B, I), ``g`` and ``y`` (B, O), ``W`` and ``V`` (I, R, O), base weights (I, O) or None.
Source: KAN, arXiv 2404.19756, equation 2.10; derivatives of B-splines, de Boor 1978, X.(12).
"""

from __future__ import annotations

import torch
from torch import Tensor

from layers.bsplines import local_basis, window_rows

# The widest temporary, in numbers: features are taken in groups that stay below it.
GROUP_NUMBERS = 2**24


def logistic_terms(derivative: int) -> tuple[float, ...]:
    """A polynomial in the logistic function ``s``, constant first: times ``s (1 - s)`` it is the d-th derivative of ``s``.

    ``s' = s (1 - s)``, so differentiating once more is a rule for coefficients. Multiplied out the terms would cancel
    where ``s`` is close to 1. For ``d = 0`` the polynomial is to be multiplied by ``s`` itself.
    """
    terms = (1.0,)
    for _ in range(derivative - 1):
        kept, next_power = [(n + 1) * c for n, c in enumerate(terms)], [(n + 2) * c for n, c in enumerate(terms)]
        terms = tuple(a - b for a, b in zip([*kept, 0.0], [0.0, *next_power], strict=True))
    return terms


def silu_terms(derivative: int) -> tuple[tuple[tuple[float, ...], bool], tuple[tuple[float, ...], bool]]:
    """``logistic_terms`` of this and of the derivative before, which SiLU's derivative is made of.

    With each, whether it is to be multiplied by ``s (1 - s)``, or by ``s`` (the logistic function itself, not derived).
    """
    return (logistic_terms(derivative), derivative > 0), (logistic_terms(derivative - 1), derivative > 1)


def silu(x: Tensor, derivative: int = 0) -> Tensor:
    """The d-th derivative of ``x * s(x)`` with ``s`` the logistic function: ``x s^(d) + d s^(d-1)`` (Leibniz)."""
    s = torch.sigmoid(x)
    slope = s * (1 - s) if derivative > 0 else s
    # The backward pass on a GPU calls this with derivative 0, and every step is a kernel: no product by 1.
    now, before = (
        factor if terms == (1.0,) else factor * sum(c * s**n for n, c in enumerate(terms))
        for terms, factor in ((terms, slope if steep else s) for terms, steep in silu_terms(derivative))
    )
    # x s(x) is 0 * inf at -inf; its limit and all its derivatives vanish there.
    return torch.where(x == -torch.inf, torch.zeros_like(x), x * now) + derivative * before


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype the sums are made in: float64 as soon as one tensor has it, float32 otherwise."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _windows(x: Tensor, grid: tuple, derivative: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (B, I, k+1), safe to index with, and basis values of the same shape, zero where a row does not exist."""
    order, lo, hi, size = grid
    # NaN has no cell; its values are NaN and find a row all the same.
    cell, values = local_basis(x.to(dtype), size, order, (lo, hi), derivative=derivative)
    rows, exists = window_rows(cell, size, order)
    values = torch.where(exists | torch.isnan(values), values, torch.zeros_like(values))
    return rows, values.to(dtype)


def grid_of(weight: Tensor, order: int, lo: float, hi: float) -> tuple[int, float, float, int]:
    """``(k, lo, hi, G)``, with ``G`` read off the rows of ``weight`` (I, G + k, O)."""
    return order, lo, hi, weight.shape[1] - order


def _groups(x: Tensor, outputs: int):
    step = max(1, GROUP_NUMBERS // max(1, x.shape[0] * outputs))
    return (slice(i, min(i + step, x.shape[1])) for i in range(0, x.shape[1], step))


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O), see the module's text. The result has the wider dtype of ``x`` and ``weight``."""
    dtype = compute_dtype(x, weight)
    size, outputs = weight.shape[1], weight.shape[2]
    y = torch.zeros(x.shape[0], outputs, dtype=dtype, device=x.device)
    for i in _groups(x, outputs):
        rows, values = _windows(x[:, i], grid_of(weight, order, lo, hi), d, dtype)
        if scale is not None:
            values = values * scale[:, i].to(dtype).unsqueeze(-1)
        features = torch.arange(rows.shape[1], device=x.device).unsqueeze(-1)
        table = weight[i].reshape(-1, outputs).to(dtype)
        y += torch.nn.functional.embedding_bag(
            (features * size + rows).flatten(1), table, per_sample_weights=values.flatten(1), mode="sum"
        )
    if base is not None:
        act = silu(x.to(dtype), d)
        y += (act if scale is None else act * scale.to(dtype)) @ base.to(dtype)
    return y.to(torch.promote_types(x.dtype, weight.dtype))


def dot(
    grad: Tensor, x: Tensor, weight: Tensor, base: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``p`` (B, I), see the module's text, in the dtype of ``x``."""
    dtype = compute_dtype(x, weight)
    grad = grad.to(dtype)
    p = torch.empty(x.shape, dtype=dtype, device=x.device)
    for i in _groups(x, weight.shape[2]):
        rows, values = _windows(x[:, i], grid_of(weight, order, lo, hi), d, dtype)
        group = weight[i].to(dtype)
        features = torch.arange(group.shape[0], device=x.device)
        p[:, i] = sum(
            values[..., r] * torch.einsum("bio,bo->bi", group[features, rows[..., r]], grad) for r in range(order + 1)
        )
    if base is not None:
        p += silu(x.to(dtype), d) * (grad @ base.to(dtype).t())
    return p.to(x.dtype)


def scatter(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    order: int,
    lo: float,
    hi: float,
    d: int,
) -> tuple[Tensor, Tensor | None]:
    """``V`` (I, R, O) and its base counterpart (I, O) or None, in the dtypes of ``weight`` and ``base``.

    The weights are asked for their shapes and dtypes alone. Samples that share a row are all added up.
    """
    dtype = compute_dtype(x, weight)
    grad = grad.to(dtype)
    total = torch.zeros(weight.shape, dtype=dtype, device=x.device)
    for i in _groups(x, weight.shape[2]):
        rows, values = _windows(x[:, i], grid_of(weight, order, lo, hi), d, dtype)
        if scale is not None:
            values = values * scale[:, i].to(dtype).unsqueeze(-1)
        features = torch.arange(rows.shape[1], device=x.device)
        flat = total[i].view(-1, weight.shape[2])
        for r in range(order + 1):
            parts = values[..., r].unsqueeze(-1) * grad.unsqueeze(1)  # Shape: (B, I, O)
            flat.index_add_(0, (features * weight.shape[1] + rows[..., r]).flatten(), parts.flatten(0, 1))
    if base is None:
        return total.to(weight.dtype), None
    act = silu(x.to(dtype), d)
    act = act if scale is None else act * scale.to(dtype)
    return total.to(weight.dtype), (act.t() @ grad).to(base.dtype)


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
    """``dot`` of order ``dot_d`` and ``scatter`` of order ``scatter_d`` together; -1 leaves one out (empty tensors)."""
    p, v, b = x.new_empty(0), x.new_empty(0), None
    if dot_d >= 0:
        p = dot(grad, x, weight, base, order, lo, hi, dot_d)
    if scatter_d >= 0:
        v, b = scatter(grad, x, weight, base, scale, order, lo, hi, scatter_d)
    return p, v, x.new_empty(0) if b is None else b
