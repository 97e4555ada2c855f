"""The operator behind FlashKAN: reference formulas, CPU and GPU kernels, registration with PyTorch and dispatch."""

from layers.flash.operator import flash_kan

__all__ = ["flash_kan"]
