"""Handwriting that ships inside a library, for a machine that cannot fetch MNIST.

scikit-learn carries 1,797 handwritten digits of 8x8 pixels (E. Alpaydin and C. Kaynak, *Optical Recognition of
Handwritten Digits*, UCI Machine Learning Repository, 1998). They are enlarged to MNIST's 28x28 and varied by small
turns, sizes and shifts until there are as many as in MNIST, so that every line of a lesson runs. They are *not* MNIST:
forty times fewer drawings lie behind them, and an accuracy measured here says nothing about MNIST.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 28  # pixels, as in MNIST
BOX = 20  # the digit itself fills 20x20 of them, as in MNIST

# The file names no writers, but its labels repeat one sheet of about 130 digits: they begin again with 0123456789 three
# times over at 0, 130, 256, ... 1415 ... 1667, as if each writer had filled in the same form. Cutting where a sheet
# begins keeps every sheet whole, on one side. The last 382 drawings, three sheets, are the test set.
FIRST_TEST_DRAWING = 1415

TURN = math.radians(8)  # largest rotation, either way
RESIZE = 0.1  # largest change of size, as a fraction
SHIFT = 1.0  # largest shift along each axis, in pixels


def drawings() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images (1797, 8, 8) float32 in [0, 1], 1 = ink, and labels (1797,) int64, in file order.

    Raises ``ImportError`` if scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target, dtype=torch.int64)


def enlarge(images: Tensor) -> Tensor:
    """(N, 8, 8) in [0, 1] to (N, 28, 28) in [0, 1]: the drawing in the middle 20x20, blank paper around it.

    The 8x8 pixels are averages of 4x4 dots of a scanned black and white bitmap. A smooth enlargement alone looks
    out of focus; raising the contrast around one half gives strokes back their edge, with grey only along it.
    """
    large = F.interpolate(images[:, None], size=(BOX, BOX), mode="bicubic", align_corners=False)[:, 0]
    large = ((large - 0.5) * 2.0 + 0.5).clamp(0, 1)
    margin = (SIDE - BOX) // 2
    return F.pad(large, (margin, margin, margin, margin))


def vary(images: Tensor, count: int, generator: torch.Generator, chunk: int = 5000) -> tuple[Tensor, Tensor]:
    """Draws ``count`` varied copies of ``images``, each image used equally often (to within one), in random order.

    Args:
        images: (N, 28, 28) float32 in [0, 1].
        count: how many copies to make, 0 or more.
        generator: the source of every random number; the global one is left alone.
        chunk: copies made at a time, which bounds the memory.

    Returns:
        ``copies``: (count, 28, 28) uint8, 0 = paper. Turned by at most 8 degrees, resized by at most 10 %, shifted by
        at most one pixel, all uniform. ``source``: (count,) int64, the image each copy was made from.
    """
    n = len(images)
    source = torch.arange(count) % n
    source = source[torch.randperm(count, generator=generator)]
    turn, size, dx, dy = torch.rand(4, count, generator=generator) * 2 - 1
    turn, size = turn * TURN, 1 + size * RESIZE
    # grid_sample asks, for each pixel of the copy, where in the original to look: turn and resize the other way about
    # the centre, after undoing the shift. Its unit of length is half an image.
    cos, sin = torch.cos(turn) / size, torch.sin(turn) / size
    dx, dy = dx * (2 * SHIFT / SIDE), dy * (2 * SHIFT / SIDE)
    theta = torch.stack([cos, -sin, sin * dy - cos * dx, sin, cos, -sin * dx - cos * dy], dim=1).view(count, 2, 3)

    copies = torch.empty(count, SIDE, SIDE, dtype=torch.uint8)
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        originals = images[source[part], None]  # Shape: (c, 1, 28, 28)
        where = F.affine_grid(theta[part], list(originals.shape), align_corners=False)  # Shape: (c, 28, 28, 2)
        moved = F.grid_sample(originals, where, mode="bilinear", padding_mode="zeros", align_corners=False)
        copies[part] = (moved[:, 0] * 255).round_().to(torch.uint8)
    return copies, source


def enlarged_digits(train: int = 60_000, test: int = 10_000, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stand-in for MNIST: ``train_images, train_labels, test_images, test_labels``, on the CPU.

    The writers' sheets are divided between training and test *before* anything is copied, so no drawing, in any
    variation, is on both sides. The same arguments give the same data.

    Args:
        train, test: how many images to make of each (MNIST's own numbers by default).
        seed: of the variations, any integer.

    Returns:
        Images (train, 28, 28) and (test, 28, 28) uint8, 0 = paper, 255 = ink; labels (train,) and (test,) int64, 0..9.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    images, labels = drawings()
    images = enlarge(images)
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for part, count in ((slice(0, FIRST_TEST_DRAWING), train), (slice(FIRST_TEST_DRAWING, None), test)):
        copies, source = vary(images[part], count, generator)
        sides += [copies, labels[part][source]]
    return tuple(sides)
