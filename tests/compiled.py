"""Compiles the GPU kernels for a GPU that need not be there: ``python -m tests.compiled 75 80 90`` (compute capabilities).

Triton brings its assembler with it. The launches are those that small calls make; nothing runs. For tests, and to see what
a new version of Triton makes of the kernels.
"""

import functools
import re
import sys
from collections.abc import Iterator
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from layers.flash import gpu, gpu_dense, gpu_parts, gpu_tiles, triton_adam
from layers.flash.launch import Launch

CALLS = [  # B, I, O, G, the dtype of the weights, and what they meet
    (200, 300, 10, 5, torch.float32),  # few outputs, a coarse grid
    (200, 80, 10, 50, torch.float32),  # a fine one, sums in shared memory
    (100, 80, 7, 50, torch.bfloat16),
    (200, 80, 13, 50, torch.bfloat16),  # too wide for these: sorted along
    (300, 80, 13, 50, torch.float32),  # sorted before
    (100, 64, 13, 500, torch.float32),  # atomics
    (2100, 512, 10, 5, torch.float32),  # sums in pieces
    (256, 64, 64, 300, torch.float32),  # the walk
    (256, 64, 64, 20, torch.float32),  # … two samples at a time
    (1024, 64, 100, 50, torch.bfloat16),
    (512, 64, 512, 300, torch.bfloat16),
    (7000, 20, 64, 20, torch.float32),  # inputs are brought together before they are sorted
    (12000, 20, 64, 20, torch.float32),  # more samples than a program sorts
    (1536, 64, 512, 20, torch.float32),  # tiles that have to do with fewer registers
    (1536, 64, 512, 450, torch.bfloat16),
    (3000, 2, 10, 5, torch.float32),  # few features: blocks of samples
    (300, 3, 200, 40, torch.bfloat16),
    (40_000, 3, 33, 5, torch.float32),  # … by one warp
    (3000, 64, 32, 100, torch.float32),  # few outputs, one warp a sample
]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes for a program


def tiles_for(capability: int) -> list[gpu_tiles.Tile]:
    """Those of the products in parts, which not every GPU makes."""
    if divmod(capability, 10) not in gpu_parts.FASTER:
        return []
    tiles = gpu_tiles.SMALL, gpu_tiles.LARGE, gpu_tiles.NARROW
    return [tile for tile in tiles if tile.shared_memory() <= SHARED_MEMORY[capability]]


def plan_for(tile: gpu_tiles.Tile, sizes: tuple, _) -> gpu_tiles.Plan:
    return gpu_tiles.Plan(tile, (1,) * len(sizes), 0.0)


def launches(tiles: list[gpu_tiles.Tile]) -> Iterator[tuple[Launch, tuple, tuple]]:
    """Every launch of these calls, forward and backward, its tensors and numbers; the dense route with each tile."""
    made = []

    def note(launch, *tensors, numbers=None):
        made.append((launch, tensors, launch.numbers if numbers is None else numbers))

    ends = 3, -1.0, 1.0
    with mock.patch.object(Launch, "__call__", note):
        for samples, features, outputs, size, dtype in CALLS:
            x, grad = torch.zeros(samples, features), torch.zeros(samples, outputs)
            weight, base = (torch.zeros(*s, dtype=dtype) for s in ((features, size + 3, outputs), (features, outputs)))
            gpu.apply(x, weight, base, None, *ends, 0)
            gpu.adjoint(grad, x, weight, base, None, *ends, 1, 0)
        x, grad, weight, base = torch.zeros(256, 32), torch.zeros(256, 96), torch.zeros(32, 8, 96), torch.zeros(32, 96)
        gpu_dense.basis(x, weight, base, None, *ends, 0)
        for size, dtype in ((21, torch.float16), (120, torch.bfloat16)):
            gpu_dense.basis(x, torch.zeros(32, size + 3, 96, dtype=dtype), base.to(dtype), None, *ends, 0)
        gpu_dense.contract(x, torch.zeros(256, 32 * 8), None, weight, *ends, 1)
        gpu_dense.multiply(*gpu_dense.narrowed(grad)[0])
        for tile in tiles:
            planned = mock.patch.object(gpu_tiles, "planned", functools.partial(plan_for, tile))
            gpu_parts._products.cache_clear()
            with planned:
                gpu_dense.apply_in_parts(x, weight, base, None, *ends, 0)
                gpu_dense.adjoint_in_parts(grad, x, weight, base, None, *ends, 1, 0)
        one = torch.zeros(8, 33)
        triton_adam.update(one, one, one, one, torch.zeros((), dtype=torch.float64), 0.1, (0.9, 0.999), 1e-8)
    seen = set()
    for launch, tensors, numbers in made:
        how = *launch.constants.values(), *launch.options.values()
        kind = (launch.kernel.fn.__name__, *how, *[t.dtype for t in tensors])
        if kind not in seen:
            seen.add(kind)
            yield launch, tensors, numbers


def compile_for(launch: Launch, tensors: tuple, numbers: tuple, capability: int):
    """What ``launch.kernel[...]`` would compile on a GPU of this compute capability, 90 for 9.0."""
    kernel, signature, constants, hints = launch.kernel, {}, {}, {}
    values = (*tensors, *numbers, *launch.constants.values())
    for place, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        kind, divisible = parameter.annotation, isinstance(value, torch.Tensor)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            kind, constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kind = triton.runtime.jit.mangle_type(value)
        elif isinstance(value, int):
            kind, divisible = "i32", value % 16 == 0 and not parameter.do_not_specialize
        signature[parameter.name] = kind or "fp32"
        if divisible:
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def uneven_sums(ptx: str) -> list[str]:
    """Where threads that exchange numbers to add them up get different sums: a thread joins the product that is its own
    to the sum, without rounding it, and gives others the rounded one.
    """
    received = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    return [line for line, added in re.findall(r"(fma\.rn\.f32\s.*, (%\w+));", ptx) if added in received]


def main(*capabilities: int) -> None:
    for capability in capabilities:
        kernels = [compile_for(*made, capability) for made in launches(tiles_for(capability))]
        names = {kernel.name for kernel in kernels}
        uneven = {kernel.name: found for kernel in kernels if (found := uneven_sums(kernel.asm["ptx"]))}
        if uneven:
            sys.exit(f"{capability}: threads that share a sum would hold different ones: {uneven}")
        print(f"{capability}: {len(kernels)} programs of {len(names)} kernels compiled")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
