"""Launches the kernels of ``triton_dense.py``: the steps of the dense route that a library does not have."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import gpu_parts, triton_dense
from layers.flash.launch import Launch, ceil_div, dtypes, on_device_of, remembered


def _wide(*kinds: torch.dtype):
    return tl.float64 if torch.float64 in kinds else tl.float32


def _offset(count: int):
    """The integers that count so many: narrow ones are divided much faster."""
    return tl.int32 if count < 2**31 - 2**16 else tl.int64


@remembered
def _basis(
    kinds: tuple, shape: tuple, order: int, lo: float, hi: float, d: int, leads: tuple, parts: bool, base: bool
) -> Launch:
    (samples, features, rows), (_, x_dtype, weight_dtype, scale) = shape, kinds
    constants = {"ORDER": order, "D": d, "CT": _wide(x_dtype, weight_dtype)}
    constants |= {"SCALED": scale is not None, "PARTS": parts}
    narrow = weight_dtype.itemsize == 2
    unit = next(n for n in (8 if parts or narrow else 4, 4, 2, 1) if n <= rows)  # 16 bytes
    tile = {"BB": 8 if narrow else 4, "BC": 256}
    constants |= {"OFFSET": _offset(features * rows), "UNIT": unit} | tile
    blocks = ceil_div(features * rows, tile["BC"])
    programs = ceil_div(samples, tile["BB"]) * (blocks + (ceil_div(features, tile["BC"]) if base else 0))
    numbers = (samples, features, features * rows, rows - order, blocks, *leads, lo, hi, (rows - order) / (hi - lo))
    return Launch(triton_dense.basis_kernel, (programs,), numbers, constants, 4)


def _fill(x, weight, scale, values, acts, order, lo, hi, d, parts: bool) -> None:
    shape, kinds = (*x.shape, weight.shape[1]), dtypes(x, weight, scale)
    leads = (values.stride(-2), values.stride(-2) if acts is None else acts.stride(-2), values.stride(0))
    launch = _basis(kinds, shape, order, float(lo), float(hi), d, leads, parts, acts is not None)
    with on_device_of(x):
        launch(x, x if scale is None else scale.contiguous(), values, values if acts is None else acts)


def basis(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> tuple[Tensor, Tensor | None]:
    """All basis values (B, I * R) in the dtype of the weights, SiLU's values (B, I) in that of ``base``; scaled."""
    values = torch.empty(x.shape[0], x.shape[1] * weight.shape[1], dtype=weight.dtype, device=x.device)
    acts = None if base is None else torch.empty(x.shape, dtype=base.dtype, device=x.device)
    _fill(x, weight, scale, values, acts, order, lo, hi, d, False)
    return values, acts


def basis_in_parts(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """All basis values and, behind them, SiLU's, if there is a base, in parts: (3, B, I * R + I); see ``gpu_parts``."""
    columns = x.shape[1] * weight.shape[1]
    parts = gpu_parts.empty(x.shape[0], columns + (0 if base is None else x.shape[1]), x.device)
    acts = None if base is None else parts[:, :, columns:]
    _fill(x, weight, scale, parts, acts, order, lo, hi, d, True)
    return parts


@remembered
def _contract(
    kinds: tuple, shape: tuple, order: int, lo: float, hi: float, d: int, leads: tuple, through_base: bool
) -> Launch:
    (samples, features, rows), (_, x_dtype, weight_dtype) = shape, kinds
    constants = {"ORDER": order, "D": d, "CT": _wide(x_dtype, weight_dtype), "BASE": through_base}
    constants |= {"OFFSET": _offset(samples * features), "BN": 256}
    numbers = (samples * features, features, rows - order, *leads, lo, hi, (rows - order) / (hi - lo))
    return Launch(triton_dense.contract_kernel, (ceil_div(samples * features, 256),), numbers, constants, 4)


def contract(x: Tensor, products: Tensor, through_base: Tensor | None, weight: Tensor, order, lo, hi, d) -> Tensor:
    """The entries of ``products`` (B, I * R) inside each window, weighted by the basis and added up: (B, I)."""
    leads = (products.stride(0), 0 if through_base is None else through_base.stride(0))
    launch = _contract(
        dtypes(x, weight), (*x.shape, weight.shape[1]), order, float(lo), float(hi), d, leads, through_base is not None
    )
    p = torch.empty_like(x)
    with on_device_of(x):
        launch(x, products, products if through_base is None else through_base, p)
    return p


def apply_in_parts(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    weight, base = weight.contiguous(), None if base is None else base.contiguous()
    with on_device_of(x):
        values = basis_in_parts(x, weight, base, scale, order, lo, hi, d)
        return gpu_parts.product(values, gpu_parts.split(weight.flatten(0, 1), base))[0]


def adjoint_in_parts(
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
    weight, base = weight.contiguous(), None if base is None else base.contiguous()
    columns = weight.shape[0] * weight.shape[1]
    p = v = b = None
    with on_device_of(x):
        grad = gpu_parts.split(grad.contiguous())
        if dot_d >= 0:
            products, _ = gpu_parts.product(grad, gpu_parts.turn(gpu_parts.split(weight.flatten(0, 1), base)))
            through_base = None if base is None else products[:, columns:]
            p = contract(x, products, through_base, weight, order, lo, hi, dot_d)
            del products, through_base
        if scatter_d >= 0:
            values = basis_in_parts(x, weight, base, scale, order, lo, hi, scatter_d)
            v, b = gpu_parts.product(gpu_parts.turn(values), grad, columns)
            v = v.view(weight.shape)
    return tuple(x.new_empty(0) if t is None else t for t in (p, v, b))
