"""Launches a Triton kernel with less work on the CPU: the compiled kernel is looked up by what decides its code.

``kernel[grid](...)`` inspects every argument on every call, which takes longer than a small kernel runs. Here the key
is made of the constants, the tensors' dtypes and alignments and the one integer that kernels are specialised on.
"""

from __future__ import annotations

import torch
from torch import Tensor

_compiled: dict[tuple, object] = {}
_LARGE = 2**31 - 1


def _kind(argument):
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument > _LARGE if isinstance(argument, int) else None


def launch(kernel, grid: tuple[int, int, int], args: tuple, constants: dict, warps: int, outputs: int) -> None:
    """Runs ``kernel`` on the current device and stream.

    Args:
        kernel: the function made by ``triton.jit``; its parameters are ``args``, then the keys of ``constants``.
        grid: three numbers of programs.
        args: tensors, integers and floats; integers other than ``outputs`` must not be specialised on.
        constants: values of its ``tl.constexpr`` parameters, in their order.
        warps: warps of a program.
        outputs: the integer that Triton specialises on (whether it is 1, whether 16 divides it).
    """
    on_gpu = args[0].is_cuda
    key = (
        kernel,
        warps,
        args[0].device.index,
        outputs == 1,
        outputs % 16 == 0,
        *constants.values(),
        *[_kind(a) for a in args],
    )
    compiled = _compiled.get(key) if on_gpu else None
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **constants, num_warps=warps)
    else:
        compiled[grid](*args, *constants.values())


def on_device_of(x: Tensor):
    """Makes the tensor's device the current one, where Triton launches; costs nothing when it already is."""
    return torch.cuda.device_of(x)
