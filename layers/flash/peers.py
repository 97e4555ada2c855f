"""KAN layers of other projects, where they are installed, for :mod:`layers.flash.benchmark` to time beside FlashKAN.

    pip install inkan==0.5.2 torchcurves==0.3.3
    pip install git+https://github.com/ZiyaoLi/fast-kan@1f88094
    pip install --force-reinstall --no-deps git+https://github.com/Blealtan/efficient-kan@c26e27a

In this order: fast-kan brings a package ``efficient_kan`` of its own, which the last line replaces. Each comes as its project
publishes it, but for the slow fit of efficient-kan's first weights, with its own base branch, norm or bias if it has one,
``G + 3`` functions for an input, and a grid from -1 to 1; EmbeddingBag is ours. They compute other functions than
:class:`FlashKAN`, so each is checked against itself in float64. FusionKAN, which needs a CUDA compiler, is not among them.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EmbeddingBag(nn.Module):
    """Degree 1 by an operator that PyTorch has: a window is two rows of weights, a bag holds those of one sample.

    (B, I) to (B, O), with a base branch; inputs outside (-1, 1) are moved to the end that they are beyond.
    """

    def __init__(self, features: int, outputs: int, size: int) -> None:
        super().__init__()
        self.grid_size = size
        self.spline_weight = nn.Parameter(torch.randn(features * (size + 1), outputs) * 0.1)
        self.base_weight = nn.Parameter(torch.randn(outputs, features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        u = (x.clamp(-1, 1) + 1) * (self.grid_size / 2)
        cell = u.detach().floor().clamp(max=self.grid_size - 1)
        share = u - cell
        row = cell.long() + torch.arange(x.shape[1], device=x.device) * (self.grid_size + 1)  # Shape: (B, I)
        rows, values = torch.cat([row, row + 1], 1), torch.cat([1 - share, share], 1)
        y = F.embedding_bag(rows, self.spline_weight, per_sample_weights=values, mode="sum")
        return y + F.linear(F.silu(x), self.base_weight)


def _efficient_kan(features: int, outputs: int, size: int) -> nn.Module:
    from efficient_kan import KANLinear as Published

    class KANLinear(Published):
        def reset_parameters(self) -> None:  # its own solves a system for each input, which takes minutes here
            for weight in self.parameters():
                nn.init.normal_(weight, std=0.1)

    return KANLinear(features, outputs, grid_size=size)


def _fast_kan(features: int, outputs: int, size: int) -> nn.Module:
    from fastkan import FastKANLayer

    return FastKANLayer(features, outputs, -1.0, 1.0, num_grids=size + 3)


def _inkan(features: int, outputs: int, size: int, **how: str) -> nn.Module:
    from inkan import KANLayer

    return KANLayer(features, outputs, grid_size=size, **how)


def _inkan_dense(features: int, outputs: int, size: int) -> nn.Module:
    return _inkan(features, outputs, size, basis_mode="dense", contraction="dense")


def _torchcurves(features: int, outputs: int, size: int) -> nn.Module:
    from torchcurves.modules import BSplineCurve, Sum

    return nn.Sequential(BSplineCurve(features, outputs, knots_config=size + 3), Sum())


# The name in the file: what must be installed, and what makes the layer.
_PEERS = {
    "efficient-kan": ("efficient_kan", _efficient_kan),
    "fast-kan": ("fastkan", _fast_kan),
    "inkan": ("inkan", _inkan),  # compiles its basis functions itself
    "inkan dense": ("inkan", _inkan_dense),
    "torchcurves": ("torchcurves", _torchcurves),
    "embedding_bag": ("torch", EmbeddingBag),
}
NAMES = tuple(_PEERS)
COMPILED = ("efficient-kan", "fast-kan")  # are timed under ``torch.compile``, too
DEGREES = {"embedding_bag": 1}  # all others are cubic, or meant in place of cubic ones


def missing(name: str) -> str:
    """The package that this layer needs and that is not installed, or an empty string."""
    package = _PEERS[name][0]
    return "" if importlib.util.find_spec(package) else package


def build(name: str, features: int, outputs: int, size: int, device: str = "cpu") -> nn.Module:
    """A layer by its name, with float32 weights on ``device``; ``ModuleNotFoundError`` if its package is missing."""
    layer = _PEERS[name][1](features, outputs, size).to(device)
    layer.grid_size = size  # which says how exact float32 can be
    return layer
