"""Launches the kernels of ``triton_dense.py``: the steps of the dense route that a library does not have."""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import triton_dense
from layers.flash.launch import Launch, ceil_div, dtypes, on_device_of, power_of_2, remembered

TILE = {"BM": 128, "BN": 128, "BK": 32}  # samples, places and outputs of our own product


def _wide(*kinds: torch.dtype):
    return tl.float64 if torch.float64 in kinds else tl.float32


@remembered
def _basis(kinds: tuple, inputs: int, rows: int, order: int, lo: float, hi: float, d: int) -> Launch:
    _, x_dtype, weight_dtype, base, scale = kinds
    constants = {"ORDER": order, "D": d, "CT": _wide(x_dtype, weight_dtype), "SCALED": scale is not None}
    constants |= {"ACTS": base is not None, "BN": 64, "BR": min(16, power_of_2(rows))}
    numbers = (inputs, rows - order, lo, hi, (rows - order) / (hi - lo))
    return Launch(triton_dense.basis_kernel, (ceil_div(inputs, 64),), numbers, constants, 4)


def basis(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> tuple[Tensor, Tensor | None]:
    """All basis values (B, I * R) in the dtype of the weights, SiLU's values (B, I) in that of ``base``; scaled."""
    launch = _basis(dtypes(x, weight, base, scale), x.numel(), weight.shape[1], order, float(lo), float(hi), d)
    out = torch.empty(x.shape[0], x.shape[1] * weight.shape[1], dtype=weight.dtype, device=x.device)
    act = None if base is None else torch.empty(x.shape, dtype=base.dtype, device=x.device)
    with on_device_of(x):
        launch(x, x if scale is None else scale.contiguous(), out, out if act is None else act)
    return out, act


TILES_BYTES = 128 * 1024  # shared memory that the tiles of our own product take


@functools.cache
def _room_for_tiles(device: torch.device) -> bool:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= TILES_BYTES


def multiplies(x: Tensor, weight: Tensor, base: Tensor | None, order: int, d: int) -> bool:
    """Whether ``dot`` below takes a call: three TF32 products beat one in float32, if rows are not padded."""
    same = x.dtype == weight.dtype == torch.float32 and (base is None or base.dtype == torch.float32)
    small = weight.shape[1] <= 8 and 1 <= order <= 5 and d <= 2 and order - d >= 1
    return same and small and not torch.backends.cuda.matmul.allow_tf32 and _room_for_tiles(x.device)


@remembered
def _dot(kinds: tuple, shape: tuple, outputs: int, order: int, lo: float, hi: float, d: int, base: bool) -> Launch:
    samples, features, rows = shape
    constants = {"ORDER": order, "D": d, "BASE": base, "PRECISION": "tf32x3"} | TILE | {"RP": power_of_2(rows)}
    grid = (ceil_div(samples, TILE["BM"]), ceil_div(features * constants["RP"], TILE["BN"]))
    numbers = (samples, features, outputs, rows, lo, (rows - order) / (hi - lo))
    return Launch(triton_dense.dot_kernel, grid, numbers, constants, 8, 3)


def dot(
    grad: Tensor, x: Tensor, weight: Tensor, base: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``dot`` of ``layers/flash/reference.py`` (B, I) in float32 from three TF32 products, which are never stored."""
    shape = (*x.shape, weight.shape[1])
    launch = _dot(dtypes(x), shape, weight.shape[2], order, float(lo), float(hi), d, base is not None)
    p, weight = torch.empty_like(x), weight.contiguous()
    with on_device_of(x):
        launch(x, grad, weight, weight if base is None else base.contiguous(), p)
    return p


@remembered
def _contract(kinds: tuple, inputs: int, rows: int, order: int, lo: float, hi: float, d: int) -> Launch:
    _, x_dtype, weight_dtype, through_base = kinds
    constants = {
        "ORDER": order,
        "D": d,
        "CT": _wide(x_dtype, weight_dtype),
        "BASE": through_base is not None,
        "BN": 256,
    }
    numbers = (inputs, rows - order, lo, hi, (rows - order) / (hi - lo))
    return Launch(triton_dense.contract_kernel, (ceil_div(inputs, 256),), numbers, constants, 4)


def contract(x: Tensor, products: Tensor, through_base: Tensor | None, weight: Tensor, order, lo, hi, d) -> Tensor:
    """The entries of ``products`` (B, I * R) inside each window, weighted by the basis and added up: (B, I)."""
    kinds = dtypes(x, weight, through_base)
    launch = _contract(kinds, x.numel(), weight.shape[1], order, float(lo), float(hi), d)
    p = torch.empty_like(x)
    with on_device_of(x):
        launch(x, products, products if through_base is None else through_base, p)
    return p
