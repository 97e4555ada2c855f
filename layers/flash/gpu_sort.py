"""Launches the kernels of ``triton_sort.py``: the samples of each feature in order of their cells.

Few samples are sorted by one program a feature. More are sorted by PyTorch, cell numbers alone, in as few bytes as hold
them: a radix sort goes through all samples once for each byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layers.flash import triton_sort
from layers.flash.launch import Launch, block, ceil_div, power_of_2

AT_ONCE = 1024  # samples; above, PyTorch's sort is faster than one program that sorts


def key_format(samples: int, size: int, order: int) -> tuple[int, torch.dtype]:
    """How many of a key's bits hold the sample, and the dtype of the keys."""
    bits = max(samples - 1, 1).bit_length()
    return bits, torch.int32 if (size + 2 * order + 3).bit_length() + bits < 31 else torch.int64


def _cell_dtype(size: int, order: int) -> torch.dtype:
    last = size + 2 * order + 2
    return torch.uint8 if last < 2**8 else torch.int16 if last < 2**15 else torch.int32


def _warps(samples: int) -> int:
    """Of a program that sorts so many samples."""
    return min(max(samples // 64, 1), 16)


def _cells(shape: tuple, order: int, grid: tuple, values: dict, turn: bool) -> Launch:
    samples, features, _ = shape
    constants = {"ORDER": order} | values | {"TURN": turn, "BB": 32, "BI": block(features, 32)}
    programs = ceil_div(samples, constants["BB"]), ceil_div(features, constants["BI"])
    return Launch(triton_sort.cells_kernel, programs, (*shape, *grid), constants, 4)


def for_keys(shape: tuple, order: int, bits: int, grid: tuple, wide) -> Launch:
    """The launch behind ``keys``. ``shape``: (B, I, G); ``grid``: lo, hi, G / (hi - lo); ``wide``: the dtype of sums."""
    samples, features, _ = shape
    if samples > AT_ONCE:
        return _cells(shape, order, grid, {"SCATTER_D": 0, "CT": wide, "SCALED": False, "ACTS": False}, False)
    constants = {"ORDER": order, "CT": wide, "NB": power_of_2(samples), "BITS": bits}
    return Launch(triton_sort.sort_kernel, (features,), (*shape, *grid), constants, _warps(constants["NB"]))


def for_walk(
    shape: tuple, order: int, bits: int, grid: tuple, cut: tuple, scatter_d: int, scaled: bool, acts: bool, places: dict
) -> tuple[Launch, ...]:
    """The launch that sorts for a walk, or those before and after PyTorch sorts; see ``for_keys``.

    ``cut``: how many steps a stretch has, and how many stretches; ``places``: constants of what finds places.
    """
    (samples, features, _), (lo, _, inv_h) = shape, grid
    values = {"SCATTER_D": scatter_d, "CT": places["CT"], "SCALED": scaled}
    if samples > AT_ONCE:
        constants = {"ORDER": order} | places | {"BITS": bits, "BN": block(samples, 256)}
        programs = features, ceil_div(samples, constants["BN"])
        place = Launch(triton_sort.place_kernel, programs, (samples, *cut, lo, inv_h), constants, 4)
        return _cells(shape, order, grid, values | {"ACTS": acts}, True), place
    constants = {"ORDER": order, "DOT_D": places["DOT_D"]} | values | {"SLOPES": places["SLOPES"], "ACTS": acts}
    constants |= {"NB": power_of_2(samples), "BITS": bits}
    warps = _warps(constants["NB"])
    return (Launch(triton_sort.arrange_kernel, (features,), (*shape, *cut, *grid), constants, warps),)


def sorted_cells(
    launch: Launch, x: Tensor, scale: Tensor, turned: Tensor, acts: Tensor, size: int, order: int
) -> tuple[Tensor, Tensor]:
    """The cells (I, B) of each feature in order, and the samples in that order.

    A launch for a walk fills ``turned`` (I, B) with ``x`` turned around, and ``acts``.
    """
    cells = torch.empty(x.shape[1], x.shape[0], dtype=_cell_dtype(size, order), device=x.device)
    launch(x, scale, cells, turned, acts)
    return cells.sort(dim=1, stable=True)


def keys(launch: Launch, x: Tensor, size: int, order: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Sorted keys (I, B), see ``triton_sort.sorted_keys``; for the last two, ``key_format``."""
    if x.shape[0] > AT_ONCE:
        cells, ranked = sorted_cells(launch, x, x, x, x, size, order)
        return cells.to(dtype).bitwise_left_shift_(bits).bitwise_or_(ranked.to(dtype))
    out = torch.empty(x.shape[1], x.shape[0], dtype=dtype, device=x.device)
    launch(x, out)
    return out
