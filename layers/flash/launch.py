"""Launches a Triton kernel with less work on the CPU: the compiled kernel is looked up by what decides its code.

``kernel[grid](...)`` inspects every argument on every call, which takes longer than a small kernel runs. Here the caller
names what its launch depends on, and only the addresses are looked at again.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_runners: dict[tuple, object] = {}
_MOST = 4096  # launches remembered; a loop over ever new batch sizes must not fill the memory
_NOTHING = contextlib.nullcontext()


def launch(
    kernel,
    key: tuple,
    grid: tuple[int, ...],
    args: tuple,
    constants: dict,
    warps: int,
    stages: int = 1,
    registers: int | None = None,
) -> None:
    """Runs ``kernel`` on the current device and stream.

    Args:
        kernel: the function made by ``triton.jit``; its parameters are ``args``, then the keys of ``constants``.
        key: hashable; determines everything below but the addresses: device, dtypes, integers, constants, warps.
        grid: numbers of programs, one to three.
        args: tensors, integers and floats.
        constants: values of its ``tl.constexpr`` parameters, in their order.
        warps: warps of a program.
        stages: loads in flight in the loops of matrix products.
        registers: the most that a thread may use; by default the compiler decides.
    """
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    if not args[0].is_cuda:  # Triton's interpreter
        kernel[grid](*args, **constants, **options)
        return
    plain, aligned = [], 1
    for arg in args:
        if isinstance(arg, Tensor):
            arg = arg.data_ptr()
            aligned = 2 * aligned + (arg % 16 == 0)  # Triton loads 16 bytes at a time where it may
        plain.append(arg)
    key = (kernel.__name__, aligned, key)
    runner = _runners.get(key)
    if runner is not None:
        runner(*plain, *constants.values())
        return
    if len(_runners) >= _MOST:
        _runners.clear()
    compiled = kernel[grid](*args, **constants, **options)
    _runners[key] = compiled[(*grid, 1, 1)[:3]]


def on_device_of(x: Tensor):
    """Makes the tensor's device the current one, where Triton launches; costs nothing when it already is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(x)
