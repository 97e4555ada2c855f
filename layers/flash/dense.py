"""The dense route: all ``G + k`` basis values and one matrix product, for small ``G`` and many outputs.

A library's matrix product uses the chip so well that it wins there although it multiplies mostly zeros. Nothing of
size ``B * I * R`` outlives a call: the basis is made again in the backward pass.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from layers.bsplines import dense_basis
from layers.flash.reference import compute_dtype, silu


def _basis(x: Tensor, weight: Tensor, scale: Tensor | None, order: int, lo: float, hi: float, d: int) -> Tensor:
    """All basis values, times the scale, shape (B, I * R), in the dtype of the weights."""
    size = weight.shape[1] - order
    if not x.is_cuda:
        basis = dense_basis(x.to(compute_dtype(x, weight)), size, order, (lo, hi), derivative=d)
        if scale is not None:
            basis = basis * scale.unsqueeze(-1)
        return basis.flatten(1).to(weight.dtype)
    from layers.flash import gpu, triton_dense  # Triton exists where a GPU does

    size, numbers, wide = gpu.common(x, weight, order, lo, hi)
    basis = torch.empty(x.shape[0], x.shape[1] * weight.shape[1], dtype=weight.dtype, device=x.device)
    constants = {"ORDER": order, "D": d, "CT": wide, "SCALED": scale is not None}
    constants |= {"BN": 64, "BR": min(16, gpu.power_of_2(weight.shape[1]))}
    key = (x.device.index, x.dtype, weight.dtype, x.shape, weight.shape, order, d, scale is not None)
    scale = x if scale is None else scale.contiguous()
    with gpu.on_device_of(x):
        args = (x, scale, basis, x.numel(), size, *numbers)
        gpu.launch(triton_dense.basis_kernel, key, (gpu.ceil_div(x.numel(), 64),), args, constants, 4)
    return basis


def _act(x: Tensor, scale: Tensor | None, dtype: torch.dtype, d: int) -> Tensor:
    act = torch.nn.functional.silu(x) if d == 0 and x.dtype == dtype else silu(x.to(dtype), d)
    return act if scale is None else act * scale.to(dtype)


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    x = x.contiguous()
    y = _basis(x, weight, scale, order, lo, hi, d) @ weight.flatten(0, 1)
    if base is not None:
        y = y.addmm_(_act(x, scale, compute_dtype(x, weight), d).to(base.dtype), base)
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
    x, dtype = x.contiguous(), compute_dtype(x, weight)
    grad = grad.to(weight.dtype).contiguous()
    p, v, b = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if dot_d >= 0 and _on_tensor_cores(x, weight, base, order, dot_d):
        p = _dot(grad, x, weight, base, order, lo, hi, dot_d)
    elif dot_d >= 0:
        products = grad @ weight.flatten(0, 1).t()  # Shape: (B, I * R)
        through_base = None if base is None else grad @ base.t()
        p = _contract(x, products, through_base, weight, order, lo, hi, dot_d, dtype)
        del products
    if scatter_d >= 0:
        v = (_basis(x, weight, scale, order, lo, hi, scatter_d).t() @ grad).view(weight.shape)
        if base is not None:
            b = _act(x, scale, dtype, scatter_d).to(base.dtype).t() @ grad
    return p, v, b


TILES_BYTES = 128 * 1024  # shared memory that the tiles of our own product take


@functools.cache
def _room_for_tiles(device: torch.device) -> bool:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= TILES_BYTES


def _on_tensor_cores(x: Tensor, weight: Tensor, base: Tensor | None, order: int, d: int) -> bool:
    """Whether ``dot`` goes through our own product: three TF32 products beat one in float32, if rows are not padded."""
    same = x.dtype == weight.dtype == torch.float32 and (base is None or base.dtype == torch.float32)
    small = weight.shape[1] <= 8 and 1 <= order <= 5 and d <= 2 and order - d >= 1
    return x.is_cuda and same and small and not torch.backends.cuda.matmul.allow_tf32 and _room_for_tiles(x.device)


def _dot(grad, x, weight, base, order, lo, hi, d) -> Tensor:
    from layers.flash import gpu, triton_dense

    (samples, features), (_, rows, outputs) = x.shape, weight.shape
    key = (x.device.index, x.shape, weight.shape, order, d, base is None)
    constants = {
        "ORDER": order,
        "D": d,
        "BASE": base is not None,
        "PRECISION": "tf32x3",
        "BM": 128,
        "BN": 128,
        "BK": 32,
    }
    constants["RP"] = gpu.power_of_2(rows)
    p = torch.empty_like(x)
    grid = (gpu.ceil_div(samples, 128), gpu.ceil_div(features * constants["RP"], 128))
    weight = weight.contiguous()
    args = (x, grad, weight, weight if base is None else base.contiguous(), p, samples, features, outputs, rows)
    with gpu.on_device_of(x):
        args += (float(lo), (rows - order) / (hi - lo))
        gpu.launch(triton_dense.dot_kernel, key, grid, args, constants, 8, 3)
    return p


def _contract(x, products, through_base, weight, order, lo, hi, d, dtype) -> Tensor:
    """The entries of ``products`` (B, I * R) inside each window, weighted by the basis and added up: (B, I)."""
    size = weight.shape[1] - order
    if not x.is_cuda:
        basis = dense_basis(x.to(dtype), size, order, (lo, hi), derivative=d)
        p = (basis * products.view(*x.shape, weight.shape[1])).sum(-1)
        if through_base is not None:
            p = p + silu(x.to(dtype), d) * through_base
        return p.to(x.dtype)
    from layers.flash import gpu, triton_dense

    _, numbers, wide = gpu.common(x, weight, order, lo, hi)
    p = torch.empty_like(x)
    constants = {"ORDER": order, "D": d, "CT": wide, "BASE": through_base is not None, "BN": 256}
    key = (x.device.index, x.dtype, weight.dtype, x.shape, weight.shape, order, d, through_base is not None)
    through_base = products if through_base is None else through_base
    with gpu.on_device_of(x):
        args = (x, products, through_base, p, x.numel(), size, *numbers)
        gpu.launch(triton_dense.contract_kernel, key, (gpu.ceil_div(x.numel(), 256),), args, constants, 4)
    return p
