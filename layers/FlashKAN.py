"""The layer with local support: an input touches ``k + 1`` rows of the weights, whatever ``G`` is."""

from __future__ import annotations

from torch import Tensor, nn

from layers.flash import flash_kan
from layers.kan_layer import KANLayer


class FlashKAN(KANLayer):
    """A KAN layer that reads, for each input, only the ``k + 1`` coefficients whose basis functions are not zero there.

    Arguments, weights, shapes and errors: :class:`~layers.kan_layer.KANLayer`. ``spline_weight`` is stored as
    ``(I, G + k, O)``: the window of one input is one contiguous block ``(k + 1, O)``. For the backward pass only ``x``
    is kept, with references to the weights; a ``base_activation`` other than the default ``nn.SiLU`` or ``None`` (the
    function ``F.silu`` is one) keeps what PyTorch needs for it as well. The work is done by
    :func:`layers.flash.flash_kan`. At ``x = -inf`` its SiLU is the limit, 0, where that of PyTorch and so the other
    layers answer NaN.

    Example:
        >>> import torch
        >>> layer = FlashKAN(28 * 28, 10, grid_size=100)
        >>> layer(torch.rand(200, 28 * 28)).shape
        torch.Size([200, 10])
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        # SiLU is computed inside the operator; any other activation is an ordinary matrix product beside it.
        fused = type(self.base_activation) is nn.SiLU
        weight = self.base_weight if fused else None
        y = flash_kan(x, self.spline_weight, weight, self.spline_order, self.grid_range)
        if self.base_weight is not None and not fused:
            y = y + (self.activate(x).to(self.base_weight.dtype) @ self.base_weight).to(y.dtype)
        return y
