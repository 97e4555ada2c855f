"""Kolmogorov-Arnold network layers: the definition, the dense layer in common use, and the one with local support."""

from layers.FlashKAN import FlashKAN
from layers.KANLinear import KANLinear
from layers.Regular_KAN import Regular_KAN

__all__ = ["FlashKAN", "KANLinear", "Regular_KAN"]
