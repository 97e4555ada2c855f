"""The P-spline penalty: how rough the curves of a layer are, with its gradient written by hand.

The curve ``f(x) = sum_r c_r N_r(x)`` on uniform knots has the m-th derivative ``sum_r (D^m c)_r N_r^{k-m}(x) / h^m``:
differences of neighbouring coefficients are the coefficients of the derivative (de Boor 1978, X.(15)). Therefore
P. Eilers and B. Marx (*Flexible smoothing with B-splines and penalties*, 1996) penalise ``sum_r (D^m c)_r^2``.

That sum depends on the grid: for one and the same smooth curve a difference is about ``h^m f^(m)``, and there are
``G + k - m`` of them. The *mean* of the squared differences divided by ``h^2m`` does not: it is the mean square of the
m-th derivative over the grid. ``h = 1 / G`` counts the whole grid as one unit of length, so the ends of ``grid_range``
do not matter either. For a polynomial of degree ``m`` this is exact at every ``G``.

The penalty is a quadratic form in the weights, so its gradient is linear in them and symmetric. On a CPU the features
are taken in groups that fit into the cache: the weights are then read from memory once, not once for each difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral

import torch
from torch import Tensor

GROUP_NUMBERS = 2**18  # one megabyte in float32


def smoothness(weight: Tensor, grid_size: int, order: int = 2) -> Tensor:
    """The mean over all curves of the mean squared derivative of ``order``, the whole grid being one unit of length.

    Args:
        weight: shape ``(I, R, O)``, the coefficients of ``I * O`` curves, from left to right along dimension 1.
        grid_size: ``G``, the number of intervals.
        order: ``m``, which derivative, from 1 to ``R - 1``; default 2, the curvature.

    Returns:
        ``G^2m * mean((D^m c)^2)`` over all differences of all curves: 0-dimensional, at least 0, float32 or better.
        Differentiable in ``weight`` to any order; for the backward pass nothing is kept but ``weight`` itself.

    Raises ``TypeError`` or ``ValueError`` naming the argument. Source: Eilers and Marx 1996, equation 8, rescaled.
    """
    if isinstance(order, bool) or not isinstance(order, Integral):
        raise TypeError(f"order must be an integer, got {order!r}")
    if not 1 <= order < weight.shape[1]:
        raise ValueError(f"order must be from 1 to G + k - 1 = {weight.shape[1] - 1}, got {order}")
    differences = weight.shape[0] * (weight.shape[1] - order) * weight.shape[2]
    return _SumOfSquares.apply(weight, int(order), float(grid_size) ** (2 * order) / differences)


def _groups(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same features of all tensors, a group at a time; all at once on a GPU."""
    features = max(1, len(weight) if weight.is_cuda else GROUP_NUMBERS // weight[:1].numel())
    return zip(*(t.split(features) for t in (weight, *others)), strict=True)


def _differences(part: Tensor, order: int) -> Tensor:
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    for _ in range(order):
        part = part[:, 1:] - part[:, :-1]
    return part


def _transposed(d: Tensor, into: Tensor) -> Tensor:
    """The transpose of one difference: (I, n, O) is written to ``into`` (I, n + 1, O)."""
    into[:, :1] = -d[:, :1]
    into[:, 1:-1] = d[:, :-1] - d[:, 1:]
    into[:, -1:] = d[:, -1:]
    return into


class _SumOfSquares(torch.autograd.Function):
    """``scale * |D c|^2``, where ``D`` takes the differences of ``order``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, order: int, scale: float) -> Tensor:
        parts = [_differences(part, order).flatten() for (part,) in _groups(weight)]
        return scale * torch.stack([torch.dot(part, part) for part in parts]).sum()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, ctx.order, ctx.scale = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Gradient.apply(*ctx.saved_tensors, 2 * ctx.scale * grad, ctx.order), None, None


class _Gradient(torch.autograd.Function):
    """``factor * D^T D c``: linear in ``c`` and in the 0-dimensional ``factor``, and its own transpose."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, factor: Tensor, order: int) -> Tensor:
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for part, into in _groups(weight, out):
            d = _differences(part, order).mul_(factor)
            for _ in range(order - 1):
                d = _transposed(d, d.new_empty(d.shape[0], d.shape[1] + 1, d.shape[2]))
            _transposed(d, into)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, factor, ctx.order = inputs
        ctx.save_for_backward(weight, factor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, factor = ctx.saved_tensors
        one = torch.ones_like(factor)
        to_factor = (grad * _Gradient.apply(weight, one, ctx.order)).sum() if ctx.needs_input_grad[1] else None
        return _Gradient.apply(grad, factor, ctx.order), to_factor, None
