"""The dense layer: all ``G + k`` basis functions of every input, then one matrix product. What people use today."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.bsplines import dense_basis
from layers.kan_layer import KANLayer


class KANLinear(KANLayer):
    """A KAN layer as a matrix product over all basis functions: time and memory grow with ``G``.

    Arguments, weights, shapes and errors: :class:`~layers.kan_layer.KANLayer`. Autograd keeps several tensors of shape
    ``(B, I, G + k)`` for the backward pass. The arrangement follows efficient-kan (Blealtan, MIT), the layer that most
    people know; the code is our own, with uniform knots, which saves the divisions by knot differences.
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        dtype = torch.promote_types(x.dtype, self.spline_weight.dtype)
        lead, x = x.shape[:-1], x.reshape(-1, self.in_features)
        basis = dense_basis(x, self.grid_size, self.spline_order, self.grid_range)  # Shape: (B, I, R)
        weight = self.spline_weight.reshape(-1, self.out_features)  # Shape: (I * R, O)
        y = basis.reshape(-1, weight.shape[0]).to(weight.dtype) @ weight
        if self.base_weight is not None:
            y = y + self.activate(x).to(weight.dtype) @ self.base_weight
        return y.to(dtype).reshape(*lead, self.out_features)
