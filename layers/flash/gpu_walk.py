"""Launches the kernels of ``triton_walk.py``: the backward pass for many outputs, or more samples than a kernel can sort.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import gpu_parts, triton_sort, triton_walk
from layers.flash.launch import Launch, ceil_div, dtypes, multiprocessors, power_of_2, remembered
from layers.flash.reference import compute_dtype

AT_ONCE = 2048  # samples; above, torch.sort is faster than one program that sorts
MUCH = 2**31  # multiplications for the gradient of the base weights, from which three parts pay
PIECE = 512  # samples that are worth a program of their own in the walk


class Walk(NamedTuple):
    """Rows of a tile, outputs of a program of one warp, into how many pieces a tile's samples are cut, the registers a
    thread may use, and whether weights are read two rows ahead."""

    step: int
    block: int
    pieces: int
    registers: int | None
    far: bool


def walk_shape(samples: int, features: int, rows: int, outputs: int, order: int, wide: bool, processors: int) -> Walk:
    """As many programs as run at the same time, and no more: where registers are the limit, 8 a multiprocessor with 512
    outputs, 16 with 256, 24 with fewer. With many rows, waiting for weights takes longer than computing, and 16 wait
    better.

    More tiles of fewer rows mean that more samples reach two of them; more pieces, gradients that have to be added.
    """
    block = min(power_of_2(outputs), 128 if wide or order > 3 else 256 if rows > 512 else 512)
    together = processors * min(8 * (512 // block), 24)
    slots = max(1, together // (features * ceil_div(outputs, block)))

    def tiles(pieces: int) -> int:
        return max(1, min(slots // pieces, rows // 10))

    def cost(pieces: int) -> float:
        work = samples * (2 + order * tiles(pieces) / rows) * slots / (tiles(pieces) * pieces)
        return work + (10 * pieces * rows if pieces > 1 else 0)

    pieces = min(range(1, max(1, min(slots, samples // PIECE)) + 1), key=cost)
    registers = 128 if block == 256 and order <= 3 and not wide else None
    return Walk(ceil_div(rows, tiles(pieces)), block, pieces, registers, block == 512)


@remembered
def _backward(
    kinds: tuple,
    shape: tuple,
    outputs: int,
    order: int,
    lo: float,
    hi: float,
    dot_d: int,
    scatter_d: int,
    processors: int,
) -> tuple[Launch, Launch, Launch, Walk, int, torch.dtype]:
    """The launches that sort, find places and walk; the walk's shape; a key's bits and dtype."""
    (samples, features, rows), (_, _, x_dtype, weight_dtype, base, scale) = shape, kinds
    wide, size = torch.float64 in (x_dtype, weight_dtype), rows - order
    walk = walk_shape(samples, features, rows, outputs, order, wide, processors)
    tiles, in_kernel = ceil_div(rows, walk.step), samples <= AT_ONCE
    bits, key_dtype = triton_sort.key_format(samples, size, order)
    has_base, inv_h = base is not None, size / (hi - lo)
    shared = {"ORDER": order, "DOT_D": dot_d}
    sums = {"CT": tl.float64 if wide else tl.float32}
    slopes = {"SLOPES": has_base and dot_d >= 0}
    block = power_of_2(samples) if in_kernel else 1024
    constants = shared | {"SCATTER_D": scatter_d} | sums | {"SCALED": scale is not None} | slopes
    constants |= {"ACTS": has_base and scatter_d >= 0, "SORT": in_kernel, "NB": block, "BITS": bits}
    numbers = (samples, features, size, walk.step, tiles, lo, hi, inv_h)
    grid, warps = (features, ceil_div(samples, block)), triton_sort.sort_warps(block) if in_kernel else 4
    arrange = Launch(triton_sort.arrange_kernel, grid, numbers, constants, warps)
    constants = shared | sums | slopes | {"BITS": bits, "BN": 256}
    grid = (features, ceil_div(samples, 256))
    place = Launch(triton_sort.place_kernel, grid, (samples, features, lo, inv_h), constants, 4)
    constants = shared | {"SCATTER_D": scatter_d} | sums | {"SCALED": scale is not None, "BASE": has_base}
    constants |= {"BITS": bits, "BO": walk.block, "WHOLE": outputs % walk.block == 0, "FAR": walk.far}
    numbers = (samples, features, outputs, size, walk.step, tiles, walk.pieces, inv_h)
    grid = (features, tiles * walk.pieces, ceil_div(outputs, walk.block))
    go = Launch(triton_walk.walk_kernel, grid, numbers, constants, 1, registers=walk.registers)
    return arrange, place, go, walk, bits, key_dtype


def _sorted_by_torch(keys: Tensor, tiles: int, step: int, size: int, order: int, scatter_d: int, bits: int):
    """Keys (I, B) in order, and the bounds that ``arrange_kernel`` describes."""
    keys = keys.sort(dim=1).values
    cells = torch.arange(tiles, device=keys.device, dtype=keys.dtype) * step
    reach = cells + (1 if scatter_d >= 0 else order + 1)
    beyond = cells + (step + order + 1)
    reach[:1].fill_(0)  # filled, not assigned: an assignment would copy from the CPU and wait
    beyond[-1:].fill_(size + 2 * order + 2)
    edges = (torch.stack([reach, beyond]) << bits).flatten().expand(keys.shape[0], -1).contiguous()
    return keys, torch.searchsorted(keys, edges, out_int32=True)


def _base_gradient(acts: Tensor, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``acts`` (I, B) times ``grad`` (B, O)."""
    much = x.numel() * grad.shape[1] >= MUCH and x.shape[0] % gpu_parts.WIDTH == 0
    if much and grad.dtype == torch.float32 and gpu_parts.multiplies(x, weight):
        return gpu_parts.product(gpu_parts.split(acts), gpu_parts.split(grad))[0]
    return acts @ grad.to(acts.dtype)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dot`` and ``scatter``; see ``layers/flash/reference.py``. An order of -1 leaves a result out (``None``).

    Contiguous tensors, at least one sample.
    """
    (samples, features), (_, rows, outputs), device = x.shape, weight.shape, x.device
    kinds, shape, sums = dtypes(grad, x, weight, base, scale), (samples, features, rows), compute_dtype(x, weight)
    lo, hi, processors = float(lo), float(hi), multiprocessors(device)
    arrange, place, go, walk, bits, key_dtype = _backward(
        kinds, shape, outputs, order, lo, hi, dot_d, scatter_d, processors
    )
    blocks, tiles = ceil_div(outputs, walk.block), ceil_div(rows, walk.step)
    keys = torch.empty(features, samples, dtype=key_dtype, device=device)
    places = torch.empty(features, samples, dtype=sums, device=device)
    slopes = torch.empty_like(places) if base is not None and dot_d >= 0 else places
    acts = torch.empty_like(places) if base is not None and scatter_d >= 0 else places
    bounds = torch.empty(features, 2, tiles, dtype=torch.int32, device=device)
    scaling = x if scale is None else scale
    arrange(x, scaling, keys, places, slopes, acts, bounds)
    if samples > AT_ONCE:
        keys, bounds = _sorted_by_torch(keys, tiles, walk.step, rows - order, order, scatter_d, bits)
        place(x, keys, places, slopes)
    dots = v = b = None
    if base is not None and scatter_d >= 0:  # before there is a gradient: what this needs is free again then
        b = _base_gradient(acts, grad, x, weight).to(base.dtype)
    if dot_d >= 0:
        dots = torch.empty(blocks, samples, features, dtype=x.dtype if blocks == 1 else sums, device=device)
    if scatter_d >= 0:
        v = torch.empty_like(weight)
        if walk.pieces > 1:
            v = torch.empty(walk.pieces, *weight.shape, dtype=sums, device=device)
    results = (places if t is None else t for t in (dots, v))
    go(grad, scaling, weight, weight if base is None else base, keys, places, slopes, bounds, *results)
    if dot_d >= 0:
        dots = dots[0] if blocks == 1 else dots.sum(0).to(x.dtype)
    if scatter_d >= 0 and walk.pieces > 1:
        v = v.sum(0).to(weight.dtype)
    return dots, v, b
