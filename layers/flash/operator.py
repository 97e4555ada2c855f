"""The operator as PyTorch sees it: two functions, each the other's derivative, and the one that people call.

``apply`` is the layer. ``adjoint`` is everything that its backward pass needs: ``dot`` and ``scatter`` of
``layers/flash/reference.py`` in one pass over the inputs. The gradient of either is written with the two again, so
double backward and beyond cost no more memory than the first.

Both exist three times: as ops in ``torch.library``, opaque to ``torch.compile`` and ``torch.export``, which see the
shapes given here; as ``autograd.Function`` for eager calls, where the way through the op costs more than small kernels
take; and as one that ``torch.func`` can transform, which the op's own autograd does not support.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layers.bsplines import check_grid
from layers.flash import dispatch

NOT_NEEDED = -1  # in place of an order of differentiation


@torch.library.custom_op("flashkan::apply", mutates_args=())
def apply_op(
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    order: int,
    lo: float,
    hi: float,
    d: int,
    route: str,
) -> Tensor:
    return dispatch.apply(x, weight, base, scale, order, lo, hi, d, route)


@torch.library.custom_op("flashkan::adjoint", mutates_args=())
def adjoint_op(
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
    route: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dot`` of order ``dot_d`` (B, I), ``scatter`` of order ``scatter_d`` (I, R, O), (I, O); empty if not needed."""
    return dispatch.adjoint(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d, route)


@apply_op.register_fake
def _(x, weight, base, scale, order, lo, hi, d, route):
    return x.new_empty(x.shape[0], weight.shape[2], dtype=torch.promote_types(x.dtype, weight.dtype))


@adjoint_op.register_fake
def _(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d, route):
    none = x.new_empty(0)
    return (
        none if dot_d == NOT_NEEDED else x.new_empty(x.shape),
        x.new_empty(0) if scatter_d == NOT_NEEDED else weight.new_empty(weight.shape),
        x.new_empty(0) if scatter_d == NOT_NEEDED or base is None else base.new_empty(base.shape),
    )


def _apply_setup(ctx, inputs, output):
    x, weight, base, scale, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, base, scale)


def _apply_backward(ctx, grad, adjoint):
    x, weight, base, scale = ctx.saved_tensors
    order, lo, hi, d, route = ctx.rest
    need_x, need_weight, need_base, need_scale = ctx.needs_input_grad[:4]
    dot_d = d + 1 if need_x else NOT_NEEDED
    scatter_d = d if need_weight or need_base else NOT_NEEDED
    slope, for_weight, for_base = adjoint(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d, route)
    for_x = for_scale = None
    if need_x:
        for_x = slope if scale is None else slope * scale
    if need_scale:
        for_scale = adjoint(grad, x, weight, base, None, order, lo, hi, d, NOT_NEEDED, route)[0]
    for_weight, for_base = for_weight if need_weight else None, for_base if need_base else None
    return for_x, for_weight, for_base, for_scale, *[None] * 5


def _adjoint_setup(ctx, inputs, output):
    grad, x, weight, base, scale, *ctx.rest = inputs
    ctx.save_for_backward(grad, x, weight, base, scale)


def _adjoint_backward(ctx, for_dot, for_scatter, for_base, apply, adjoint):
    grad, x, weight, base, scale = ctx.saved_tensors
    order, lo, hi, dot_d, scatter_d, route = ctx.rest
    need_grad, need_x, need_weight, need_base, need_scale = ctx.needs_input_grad[:5]
    out: list[Tensor | None] = [None] * 5

    def add(n: int, part: Tensor) -> None:
        out[n] = part if out[n] is None else out[n] + part

    def dot(d: int, weight: Tensor, base: Tensor | None) -> Tensor:
        return adjoint(grad, x, weight, base, None, order, lo, hi, d, NOT_NEEDED, route)[0]

    if dot_d != NOT_NEEDED:
        if need_grad:
            add(0, apply(x, weight, base, for_dot, order, lo, hi, dot_d, route))
        if need_x:
            add(1, for_dot * dot(dot_d + 1, weight, base))
        if need_weight or need_base:
            _, v, b = adjoint(grad, x, weight, base, for_dot, order, lo, hi, NOT_NEEDED, dot_d, route)
            out[2], out[3] = (v if need_weight else None), (b if need_base else None)
    if scatter_d != NOT_NEEDED:
        other = for_base if base is not None else None
        if need_grad:
            add(0, apply(x, for_scatter, other, scale, order, lo, hi, scatter_d, route))
        if need_x:
            slope = dot(scatter_d + 1, for_scatter, other)
            add(1, slope if scale is None else slope * scale)
        if need_scale:
            add(4, dot(scatter_d, for_scatter, other))
    out[0] = None if out[0] is None else out[0].to(grad.dtype)
    return *out, *[None] * 6


def _one_at_a_time(op, batch_size: int, in_dims: tuple, args: tuple):
    """A vmap rule that is always right: run ``op`` for every entry and stack."""
    results = []
    for n in range(batch_size):
        picked = [a if dim is None else a.select(dim, n) for a, dim in zip(args, in_dims, strict=True)]
        results.append(op(*picked))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _apply_rule(op, info, in_dims, args):
    x, weight, base, scale, *rest = args
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:4]) or scale is not None:
        return _one_at_a_time(op, info.batch_size, in_dims, args)
    x = x.movedim(in_dims[0], 0)  # shared weights: the extra dimension is a larger batch
    return op(x.flatten(0, 1), weight, base, None, *rest).unflatten(0, x.shape[:2]), 0


apply_op.register_autograd(lambda ctx, grad: _apply_backward(ctx, grad, adjoint_op), setup_context=_apply_setup)
adjoint_op.register_autograd(
    lambda ctx, *grads: _adjoint_backward(ctx, *grads, apply_op, adjoint_op), setup_context=_adjoint_setup
)
apply_op.register_vmap(lambda info, in_dims, *args: _apply_rule(apply_op, info, in_dims, args))
adjoint_op.register_vmap(lambda info, in_dims, *args: _one_at_a_time(adjoint_op, info.batch_size, in_dims, args))


class Apply(torch.autograd.Function):
    """``apply`` for eager calls. Without ``setup_context``, whose way into PyTorch takes as long as a kernel."""

    @staticmethod
    def forward(ctx, *inputs):
        _apply_setup(ctx, inputs, None)
        return dispatch.apply(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return _apply_backward(ctx, grad, _eager(grad)[1])


class Adjoint(torch.autograd.Function):
    """``adjoint`` for eager calls."""

    @staticmethod
    def forward(ctx, *inputs):
        _adjoint_setup(ctx, inputs, None)
        return dispatch.adjoint(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        return _adjoint_backward(ctx, *grads, *_eager(*grads))


class TransformedApply(torch.autograd.Function):
    """``apply`` inside ``torch.func``'s transforms."""

    forward = staticmethod(dispatch.apply)
    setup_context = staticmethod(_apply_setup)

    @staticmethod
    def backward(ctx, grad):
        return _apply_backward(ctx, grad, TransformedAdjoint.apply)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _apply_rule(TransformedApply.apply, info, in_dims, args)


class TransformedAdjoint(torch.autograd.Function):
    """``adjoint`` inside ``torch.func``'s transforms."""

    forward = staticmethod(dispatch.adjoint)
    setup_context = staticmethod(_adjoint_setup)

    @staticmethod
    def backward(ctx, *grads):
        return _adjoint_backward(ctx, *grads, TransformedApply.apply, TransformedAdjoint.apply)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_at_a_time(TransformedAdjoint.apply, info.batch_size, in_dims, args)


def _eager(*grads: Tensor | None):
    """How a backward pass calls ``apply`` and ``adjoint``: recorded only where it will be differentiated again."""
    if torch._C._are_functorch_transforms_active():
        return TransformedApply.apply, TransformedAdjoint.apply
    if any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
        return apply_op, adjoint_op  # is_grads_batched=True: PyTorch runs an op for every entry
    return (Apply.apply, Adjoint.apply) if torch.is_grad_enabled() else (dispatch.apply, dispatch.adjoint)


def _traced(*tensors: Tensor | None) -> bool:
    """Whether something records this call: a compiler, an export or a mode that works with tensors without data."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or tensors[0].is_meta
        or any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def flash_kan(
    x: Tensor,
    spline_weight: Tensor,
    base_weight: Tensor | None = None,
    spline_order: int = 3,
    grid_range: tuple[float, float] = (-1, 1),
    *,
    route: str | None = None,
) -> Tensor:
    """A KAN layer with local support as a function: ``silu(x) @ base_weight`` and a B-spline for every edge.

    Args:
        x: shape ``(*, I)``, floating, in the units of ``grid_range``.
        spline_weight: shape ``(I, G + k, O)``, floating; ``G`` is read off it.
        base_weight: shape ``(I, O)`` or ``None`` (default) for splines alone.
        spline_order: ``k >= 0``, default 3.
        grid_range: the two ends of the grid, default (-1, 1).
        route: ``"local"`` (gather ``k + 1`` rows), ``"dense"`` (all rows and one matrix product), ``"reference"``
            (plain PyTorch), or ``None`` (default): the first on a CPU, and on a GPU the one of the first two that takes
            the GPU less time, by the measured rule in ``layers/flash/dispatch.py``. (Where the GPU waits for the host,
            because calls are small or the host is slow, ``"local"`` may be the faster: it launches fewer kernels.) On a
            GPU in float32 each factor of that product is kept to 23 bits; numbers below 2**-26 of the largest on their
            row or column lose some, and are off by up to 2**-50 of it.

    Returns:
        Shape ``(*, O)``, in the wider dtype of ``x`` and ``spline_weight``. Under autocast the weights are taken in the
        autocast dtype and ``x`` is left alone: a position in bfloat16 would lose its place on a fine grid.

    Differentiable in ``x`` and the weights to any order, works under ``torch.compile``, ``torch.export``,
    ``torch.func.grad`` and ``vmap``; forward-mode AD (``jvp``) is refused by PyTorch with an error. At a knot, where
    values of degree 0 and derivatives of order ``k`` jump, the one-sided value from the right is used; on a GPU, for a
    sample within a rounding of a knot, it may be the one from the left. The results are the same from run to run, except
    on a GPU for up to 16 outputs and more than 256 rows, at least twice as many as samples: there the gradient of the
    weights may be added up by atomics (high degrees, odd numbers of outputs, very fine grids), unless
    ``torch.use_deterministic_algorithms(True)`` is set. Raises ``TypeError`` or ``ValueError`` naming the argument.
    Source: KAN, arXiv 2404.19756, equation 2.10.
    """
    for name, tensor in (("x", x), ("spline_weight", spline_weight), ("base_weight", base_weight)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be where x is, on {x.device}, got {tensor.device}")
    lo, hi = check_grid(1, spline_order, grid_range)
    if spline_weight.ndim != 3 or spline_weight.shape[1] <= spline_order or 0 in spline_weight.shape:
        raise ValueError(
            f"spline_weight must have shape (I, G + k, O) with I, G, O >= 1 and k = {spline_order}, "
            f"got {tuple(spline_weight.shape)}"
        )
    features, _, outputs = spline_weight.shape
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(f"x must have shape (*, {features}), got {tuple(x.shape)}")
    if base_weight is not None and base_weight.shape != (features, outputs):
        raise ValueError(f"base_weight must have shape ({features}, {outputs}), got {tuple(base_weight.shape)}")
    if route not in dispatch.ROUTES:
        raise ValueError(f"route must be one of {dispatch.ROUTES}, got {route!r}")
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        if spline_weight.dtype == torch.float32:
            spline_weight = spline_weight.to(narrow)
        if base_weight is not None and base_weight.dtype == torch.float32:
            base_weight = base_weight.to(narrow)
    flat = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), features)
    run = Apply.apply
    if _traced(x, spline_weight, base_weight):
        run = apply_op
    elif torch._C._are_functorch_transforms_active():
        run = TransformedApply.apply
    y = run(flat, spline_weight, base_weight, None, spline_order, lo, hi, 0, route or "auto")
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], outputs)
