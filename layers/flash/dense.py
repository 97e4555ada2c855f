"""The dense route: all ``G + k`` basis values and one matrix product, for small ``G`` and many outputs.

A matrix product uses the chip so well that it wins there although it multiplies mostly zeros. Nothing of size
``B * I * R`` outlives a call: the basis is made again in the backward pass. In float32 on a GPU the products are those of
``gpu_parts.py``, else a library's. A product needs factors of one dtype, which is that of the spline weights, or float64
if ``x`` has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layers.bsplines import dense_basis
from layers.flash.reference import compute_dtype, silu


def _on_gpu():
    from layers.flash import gpu_dense  # Triton exists where a GPU does

    return gpu_dense


def _in_parts(x: Tensor, weight: Tensor) -> bool:
    if not x.is_cuda or x.numel() == 0:
        return False
    from layers.flash import gpu_parts

    return gpu_parts.multiplies(x, weight)


def _of_one_dtype(x: Tensor, weight: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if x.dtype == torch.float64 else weight.dtype
    return weight.to(dtype), None if base is None else base.to(dtype)


def _basis(x, weight, base, scale, order, lo, hi, d) -> tuple[Tensor, Tensor | None]:
    """All basis values (B, I * R) and SiLU's values (B, I), in the dtype of the weights; scaled."""
    if x.is_cuda:
        return _on_gpu().basis(x, weight, base, scale, order, lo, hi, d)
    dtype = compute_dtype(x, weight)
    basis = dense_basis(x.to(dtype), weight.shape[1] - order, order, (lo, hi), derivative=d)
    act = None if base is None else silu(x.to(dtype), d)
    if scale is not None:
        basis = basis * scale.unsqueeze(-1)
        act = None if act is None else act * scale.to(dtype)
    return basis.flatten(1).to(weight.dtype), None if act is None else act.to(weight.dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, more: Tensor | None = None) -> Tensor:
    """``a @ b``, added to ``more``. On a GPU sums in float32 stay so if that is the ``dtype`` asked for; else as ``a``."""
    narrow = a.dtype in (torch.float16, torch.bfloat16)
    if narrow and dtype == torch.float32 and a.is_cuda and not torch.version.hip:
        return torch.mm(a, b, out_dtype=dtype) if more is None else torch.addmm(more, a, b, out_dtype=dtype)
    return a @ b if more is None else more.addmm_(a, b)


def _narrowed(grad: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``grad`` in float16 and what has to be multiplied by the results (1,): for ``dot``, and for ``scatter``.

    float16 ends at 65,504 and holds nothing below 6e-8, where a gradient in float32 may well be. It is divided by its
    largest number, and by more where sums over very many samples could overflow.
    """
    if grad.is_cuda:
        return _on_gpu().narrowed(grad)
    largest = torch.linalg.vector_norm(grad, torch.inf).view(1)
    factor = torch.nan_to_num(largest * max(1, len(grad) / 2**15) + 1e-30, nan=1.0, posinf=1.0)
    narrow = torch.div(grad, factor, out=torch.empty_like(grad, dtype=torch.float16)), factor
    return narrow, narrow


def _multiply(results: Tensor, factor: Tensor) -> Tensor:
    return _on_gpu().multiply(results, factor) if results.is_cuda else results.mul_(factor)


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    x, dtype = x.contiguous(), torch.promote_types(x.dtype, weight.dtype)
    weight, base = _of_one_dtype(x, weight, base)
    if _in_parts(x, weight):
        return _on_gpu().apply_in_parts(x, weight, base, scale, order, lo, hi, d)
    basis, act = _basis(x, weight, base, scale, order, lo, hi, d)
    y = _product(basis, weight.flatten(0, 1), dtype)
    return (y if act is None else _product(act, base, dtype, y)).to(dtype)


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
    x, dtype, base_dtype = x.contiguous(), weight.dtype, None if base is None else base.dtype
    weight, base = _of_one_dtype(x, weight, base)
    grad, layer = grad.contiguous(), (x, weight, base, scale, order, lo, hi)
    if weight.dtype != torch.float16 or grad.dtype == torch.float16 or grad.numel() == 0:
        run = _on_gpu().adjoint_in_parts if _in_parts(x, weight) else _adjoint
        p, v, b = run(grad.to(weight.dtype), *layer, dot_d, scatter_d)
    else:
        p, v, b = x.new_empty(0), x.new_empty(0), x.new_empty(0)
        for_dot, for_scatter = _narrowed(grad)
        if dot_d >= 0:
            p = _multiply(_adjoint(for_dot[0], *layer, dot_d, -1)[0], for_dot[1])
        if scatter_d >= 0:
            _, v, b = (_multiply(t, for_scatter[1]) for t in _adjoint(for_scatter[0], *layer, -1, scatter_d))
    if scatter_d >= 0:
        v, b = v.to(dtype), b if base is None else b.to(base_dtype)
    return p, v, b


def _adjoint(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d) -> tuple[Tensor, Tensor, Tensor]:
    """By the library's products; weights and ``grad`` of one dtype."""
    dtype = compute_dtype(x, weight)
    p, v, b = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if dot_d >= 0:
        products = grad @ weight.flatten(0, 1).t()  # Shape: (B, I * R)
        through_base = None if base is None else grad @ base.t()
        p = _contract(x, products, through_base, weight, order, lo, hi, dot_d, dtype)
        del products
    if scatter_d >= 0:
        basis, act = _basis(x, weight, base, scale, order, lo, hi, scatter_d)
        v = (basis.t() @ grad).view(weight.shape)
        if act is not None:
            b = act.t() @ grad
    return p, v, b


def _contract(x, products, through_base, weight, order, lo, hi, d, dtype) -> Tensor:
    """The entries of ``products`` (B, I * R) inside each window, weighted by the basis and added up: (B, I)."""
    if x.is_cuda:
        return _on_gpu().contract(x, products, through_base, weight, order, lo, hi, d)
    basis = dense_basis(x.to(dtype), weight.shape[1] - order, order, (lo, hi), derivative=d)
    p = (basis * products.view(*x.shape, weight.shape[1])).sum(-1)
    if through_base is not None:
        p = p + silu(x.to(dtype), d) * through_base
    return p.to(x.dtype)
