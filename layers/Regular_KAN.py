"""The definition written out, edge by edge: slow, and the easiest to read."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.bsplines import dense_basis
from layers.kan_layer import KANLayer


class Regular_KAN(KANLayer):
    """A KAN layer computed as the paper writes it: every output adds up one curve of every input.

    Arguments, weights, shapes and errors: :class:`~layers.kan_layer.KANLayer`. A Python loop over ``I * O`` edges makes
    this the layer to read and to compare with, not the one to train. Source: arXiv 2404.19756, equations 2.5 and 2.10.
    """

    def edge(self, x: Tensor, i: int, o: int) -> Tensor:
        """The curve from input ``i`` to output ``o`` at the values ``x`` of that input; same shape as ``x``."""
        basis = dense_basis(x, self.grid_size, self.spline_order, self.grid_range)  # Shape: (*, R)
        curve = (basis.to(self.dtype_of(x)) * self.spline_weight[i, :, o]).sum(-1)
        if self.base_weight is not None:
            curve = curve + self.base_weight[i, o] * self.activate(x)
        return curve

    def dtype_of(self, x: Tensor) -> torch.dtype:
        """The wider of the dtypes of ``x`` and the weights: the dtype of the result."""
        return torch.promote_types(x.dtype, self.spline_weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        outputs = []
        for o in range(self.out_features):
            total = torch.zeros(x.shape[:-1], dtype=self.dtype_of(x), device=x.device)
            for i in range(self.in_features):
                total = total + self.edge(x[..., i], i, o)
            outputs.append(total)
        return torch.stack(outputs, dim=-1)
