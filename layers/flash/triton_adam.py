"""One step of :class:`layers.lazy_adam.LazyAdam` on a GPU, in Triton."""

import math

import triton
import triton.language as tl
from torch import Tensor

from layers.flash.launch import Launch, ceil_div, dtypes, on_device_of, power_of_2, remembered


@triton.jit(do_not_specialize=["rows"])
def adam_kernel(
    weight, grad, exp_avg, exp_avg_sq, steps,
    rows, columns,
    lr: "fp64", log_beta1: "fp64", log_beta2: "fp64", eps: "fp64",
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows; a row whose gradient is zero throughout is read no further."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = r < rows
    touched = tl.zeros((BM,), tl.int32)
    for first in range(0, columns, BN):
        c = first + tl.arange(0, BN)
        g = tl.load(grad + r[:, None] * columns + c[None, :], mask=here[:, None] & (c < columns)[None, :], other=0.0)
        touched += tl.sum((g != 0).to(tl.int32), axis=1)  # a NaN counts
    CT: tl.constexpr = weight.dtype.element_ty
    # In float64: 1 - 0.999 ** 1 in float32 has four digits.
    t = tl.load(steps)
    beta1, beta2 = tl.exp(tl.full([], log_beta1, tl.float64)), tl.exp(tl.full([], log_beta2, tl.float64))
    first_step = lr / (1 - tl.exp(t * log_beta1))
    root = tl.sqrt(1 - tl.exp(t * log_beta2))
    rate, floor = (first_step * root).to(CT), (eps * root).to(CT)
    b1, b2, n1, n2 = beta1.to(CT), beta2.to(CT), (1 - beta1).to(CT), (1 - beta2).to(CT)
    for first in range(0, columns, BN):
        c = first + tl.arange(0, BN)
        at = r[:, None] * columns + c[None, :]
        mask = (here & (touched > 0))[:, None] & (c < columns)[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0)
        m = b1 * tl.load(exp_avg + at, mask=mask, other=0.0) + n1 * g
        v = b2 * tl.load(exp_avg_sq + at, mask=mask, other=0.0) + n2 * g * g
        w = tl.load(weight + at, mask=mask, other=0.0) - rate * m / (tl.sqrt(v) + floor)
        tl.store(exp_avg + at, m, mask=mask)
        tl.store(exp_avg_sq + at, v, mask=mask)
        tl.store(weight + at, w, mask=mask)


@remembered
def _launch(kinds: tuple, rows: int, columns: int) -> Launch:
    width = min(power_of_2(columns), 512)
    block = max(1024 // width, 1)
    return Launch(adam_kernel, (ceil_div(rows, block),), (), {"BM": block, "BN": width}, 4)


def update(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, lr, betas, eps) -> None:
    """Changes weight and moments, all (rows, columns), in place; ``steps`` () float64, this one counted."""
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    numbers = (*weight.shape, float(lr), *logs, float(eps))
    with on_device_of(weight):
        launch = _launch(dtypes(weight, grad), *weight.shape)
        launch(weight, grad, exp_avg, exp_avg_sq, steps, numbers=numbers)
