"""What the three layers share: constructor, weights and their first values, checks, printing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor, nn

from layers.bsplines import check_grid, local_basis, window_rows
from layers.smoothness import smoothness

# Of the unit variance at the start the splines carry this share and the base branch the rest. A spline answers inputs
# that left the grid with less, SiLU with more; at 0.9 the two errors cancel when layers are stacked.
SPLINE_SHARE = 0.9
# The first curves are drawn with this many intervals, whatever G is, so that a fine grid does not start as noise.
FIRST_INTERVALS = 5


class KANLayer(nn.Module):
    """A layer of learnable curves, one for every pair of an input and an output.

    ``y[b, o] = sum_i base_weight[i, o] * act(x[b, i]) + sum_i sum_r N_r(x[b, i]) * spline_weight[i, r, o]``

    Args:
        in_features: ``I``, the size of the last dimension of the input, at least 1.
        out_features: ``O``, the size of the last dimension of the output, at least 1.
        grid_size: ``G``, how many intervals the grid has, at least 1; default 5.
        spline_order: ``k``, the degree of the polynomial pieces, at least 0; default 3 (cubic).
        grid_range: the ends ``(lo, hi)`` of the grid, in the units of ``x``; default (-1, 1). Beyond them the splines
            fall to zero within ``k`` intervals and the base branch alone is left.
        base_activation: class, module or function of the base branch; default ``nn.SiLU``. ``None``: no base branch.
        device, dtype: where the weights live and in which floating dtype, as in ``nn.Linear``.

    Parameters:
        spline_weight: shape ``(I, G + k, O)``; ``spline_weight[i, :, o]`` are the coefficients of one curve, from left
            to right.
        base_weight: shape ``(I, O)``, or ``None`` without a base branch.

    ``Regular_KAN``, ``KANLinear`` and ``FlashKAN`` compute this one function and share one ``state_dict``, so
    ``b.load_state_dict(a.state_dict())`` copies a layer into one of another kind exactly. The grid travels along: a
    layer with another ``spline_order`` or ``grid_range`` refuses the weights: a ``RuntimeError`` that names both.

    Shape: ``(*, I) -> (*, O)``, any leading dimensions, none and empty ones included. The result has the wider of the
    dtypes of ``x`` and the weights; bases are evaluated in float32 or better. A NaN makes its own sample NaN only.

    Raises ``TypeError`` or ``ValueError`` naming the argument. Source: KAN, arXiv 2404.19756, equations 2.5 and 2.10.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        *,
        grid_range: tuple[float, float] = (-1, 1),
        base_activation: type[nn.Module] | Callable[[Tensor], Tensor] | None = nn.SiLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        # Plain numbers, not a buffer: .bfloat16() and .double() must not touch the grid.
        self.grid_range = check_grid(grid_size, spline_order, grid_range)
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.grid_size, self.spline_order = int(grid_size), int(spline_order)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        place = {"device": device, "dtype": dtype}
        if inspect.isclass(base_activation):
            base_activation = base_activation()
            if isinstance(base_activation, nn.Module):
                base_activation.to(**place)  # nn.PReLU has a weight
        if base_activation is not None and not callable(base_activation):
            raise TypeError(f"base_activation must be a module, a function or None, got {base_activation!r}")
        self.base_activation = base_activation
        self.spline_weight = nn.Parameter(torch.empty(self.in_features, self.rows, self.out_features, **place))
        if base_activation is None:
            self.register_parameter("base_weight", None)
        else:
            self.base_weight = nn.Parameter(torch.empty(self.in_features, self.out_features, **place))
        self.reset_parameters()

    @property
    def rows(self) -> int:
        """``R = G + k``, the number of coefficients of one curve."""
        return self.grid_size + self.spline_order

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights: smooth random curves, the same kind at every ``G``, with outputs of about unit variance.

        The variance is taken over weights and over inputs uniform on the grid. Curves are drawn on a grid of at most 5
        intervals and their coefficients interpolated linearly to ``G``. The scale follows from the mean square of one
        curve, computed at 1000 points, as in the derivation by He et al. (arXiv 1502.01852) for linear layers.
        """
        lo, hi = self.grid_range
        coarse = min(self.grid_size, FIRST_INTERVALS) + self.spline_order
        # Shape (R, coarse): row r holds the weights with which the coarse coefficients are averaged.
        at = torch.linspace(0, coarse - 1, self.rows, dtype=torch.float64, device="cpu").unsqueeze(-1)
        spread = (1 - (at - torch.arange(coarse, device="cpu")).abs()).clamp(min=0)
        x = lo + (hi - lo) * (torch.arange(1000, dtype=torch.float64, device="cpu") + 0.5) / 1000
        cell, values = local_basis(x, self.grid_size, self.spline_order, self.grid_range)
        rows, exists = window_rows(cell, self.grid_size, self.spline_order)
        curves = ((values * exists).unsqueeze(-1) * spread[rows]).sum(1)  # Shape: (1000, coarse)
        share = 1.0 if self.base_weight is None else SPLINE_SHARE
        scale = (share / (self.in_features * curves.square().sum(1).mean())).sqrt().item()
        weight = self.spline_weight
        drawn = torch.randn(self.in_features, coarse, self.out_features, device=weight.device) * scale
        weight.copy_(torch.matmul(spread.to(drawn), drawn))
        if self.base_weight is not None:
            act = self.activate(x.to(self.base_weight.device, torch.float32))
            mean_square = act.double().square().mean().clamp(min=1e-6)
            self.base_weight.normal_().mul_(((1 - share) / (self.in_features * mean_square)).sqrt())

    def check_input(self, x: Tensor) -> None:
        """Raises one clear error unless ``x`` is a floating tensor of shape ``(*, I)``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must have a floating dtype, got {x.dtype}; convert it with x.float()")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (*, {self.in_features}), got {tuple(x.shape)}")

    def activate(self, x: Tensor) -> Tensor:
        """``base_activation(x)``: in the wider dtype of ``x`` and the weights, or in that of its own weights if any."""
        own = self.base_activation.parameters() if isinstance(self.base_activation, nn.Module) else ()
        wider = torch.promote_types(x.dtype, self.base_weight.dtype)
        return self.base_activation(x.to(next((p.dtype for p in own), wider)))

    def smoothness(self, order: int = 2) -> Tensor:
        """How rough the splines are: the mean over all curves of the mean squared derivative of ``order`` (default 2).

        Up to ``order = spline_order``; beyond it is a penalty on the differences of neighbouring coefficients alone.
        Add ``lam * layer.smoothness()`` to a loss to train smooth curves (P-splines). The whole grid counts as one unit
        of length, and one ``lam`` means the same at every ``G``. See :func:`layers.smoothness.smoothness`.
        """
        return smoothness(self.spline_weight, self.grid_size, order)

    def extra_repr(self) -> str:
        lo, hi = self.grid_range
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, grid_size={self.grid_size}, "
            f"spline_order={self.spline_order}, grid_range=({lo:g}, {hi:g})"
        )

    def get_extra_state(self) -> Tensor:
        """The grid, saved beside the weights as float64 ``[lo, hi, k]``: weights mean nothing on another grid."""
        return torch.tensor([*self.grid_range, self.spline_order], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        lo, hi, order = state.tolist()
        # A state that was cast, or averaged over copies, holds the same numbers but for their rounding.
        rounding = torch.finfo(state.dtype).eps + 1e-14
        same = all(math.isclose(a, b, rel_tol=rounding) for a, b in zip((lo, hi), self.grid_range, strict=True))
        if not same or round(order) != self.spline_order:
            raise ValueError(
                f"the saved weights belong to spline_order={order:.0f}, grid_range=({lo:.9g}, {hi:.9g}); this layer has "
                f"spline_order={self.spline_order}, grid_range=({self.grid_range[0]:.9g}, {self.grid_range[1]:.9g})"
            )

    def _load_from_state_dict(self, state_dict, prefix, local, strict, missing, unexpected, errors) -> None:
        # PyTorch hands over the extra state after the weights; here it decides whether they may be copied at all.
        try:
            if prefix + "_extra_state" in state_dict:
                self.set_extra_state(state_dict[prefix + "_extra_state"])
        except ValueError as error:  # goes into the one RuntimeError that PyTorch raises in the end
            errors.append(f"{prefix}{type(self).__name__}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local, strict, missing, unexpected, errors)
