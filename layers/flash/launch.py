"""Launches Triton kernels with little work on the CPU: what decides a kernel's code is looked at once for each shape.

``kernel[grid](...)`` inspects every argument on every call, which takes longer than a small kernel runs. A ``Launch`` is
built once for all calls of one kind, by a cached function of their shapes and dtypes, and only the addresses are new.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # GPU kernels run, slowly, on the CPU
REMEMBERED = 1024  # launches of one kind; a loop over ever new batch sizes must not fill the memory
_NOTHING = contextlib.nullcontext()


class Launch:
    """A kernel with everything but its tensors, for calls whose tensors have the same dtypes and device.

    Args:
        kernel: the function made by ``triton.jit``; its parameters are tensors, then ``numbers``, then the keys of
            ``constants``.
        grid: numbers of programs, one to three.
        numbers: integers and floats.
        constants: values of its ``tl.constexpr`` parameters, in their order.
        warps: warps of a program.
        stages: loads in flight in the loops of matrix products.
        registers: the most that a thread may use; by default the compiler decides.
    """

    __slots__ = ("_rest", "_runners", "constants", "grid", "kernel", "numbers", "options")

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        numbers: tuple,
        constants: dict,
        warps: int,
        stages: int = 1,
        registers: int | None = None,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
        self._rest = tuple(constants.values())
        self._runners: dict[int, object] = {}

    def __call__(self, *tensors: Tensor, numbers: tuple | None = None) -> None:
        """Runs the kernel on the current device and stream; ``numbers`` in place of those given before, if any."""
        numbers = self.numbers if numbers is None else numbers
        if not tensors[0].is_cuda:  # Triton's interpreter
            self.kernel[self.grid](*tensors, *numbers, **self.constants, **self.options)
            return
        addresses = [t.data_ptr() for t in tensors]
        aligned = 0
        for address in addresses:
            aligned = 2 * aligned + (address % 16 == 0)  # Triton loads 16 bytes at a time where it may
        runner = self._runners.get(aligned)
        if runner is not None:
            runner(*addresses, *numbers, *self._rest)
            return
        compiled = self.kernel[self.grid](*tensors, *numbers, **self.constants, **self.options)
        self._runners[aligned] = compiled[(*self.grid, 1, 1)[:3]]


remembered = functools.lru_cache(REMEMBERED)


def on_device_of(x: Tensor):
    """Makes the tensor's device the current one, where Triton launches; costs nothing when it already is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(x)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; a number of today's where Triton's interpreter runs on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; a number of today's where Triton's interpreter runs on a CPU."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def tf32_allowed() -> bool:
    """Whether products in float32 may be made in TF32; ``allow_tf32`` cannot be read where this newer setting is used."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def dtypes(*tensors: Tensor | None) -> tuple:
    """The device and the dtypes of a call, for the cached function that builds its launches."""
    return tensors[0].device, *[None if t is None else t.dtype for t in tensors]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def fewest_parts(programs: int, together: int, most: int, waste: float) -> int:
    """Into how many parts work is cut so that the GPU is busy: ``programs`` for each part, ``together`` at a time.

    The last of these rounds may be nearly empty. Of 1 to ``most`` (at least 1) the fewest parts with which rounds take at
    most ``waste`` times as long as with the best number.
    """
    times = [ceil_div(programs * parts, together) / parts for parts in range(1, max(most, 1) + 1)]
    return next(parts for parts, time in enumerate(times, 1) if time <= waste * min(times))


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def block(count: int, least: int) -> int:
    """How many of ``count`` a program takes where programs lie along the second axis of a grid, which CUDA limits."""
    return max(least, power_of_2(ceil_div(count, 2**16 - 1)))


def divisor(n: int, most: int) -> int:
    """The largest power of two that divides ``n`` and is not above ``most``, one itself."""
    return math.gcd(n, most)


def unit(columns: int) -> int:
    """A power of two that divides ``columns``: a kernel that is told of it loads as many numbers at a time.

    Of a multiple of 16 Triton knows by itself, and then makes slightly faster code: 1.
    """
    return divisor(columns, 8) if columns % 16 else 1
