"""The stand-in for MNIST: the right size and look, the same every time, and no drawing on both sides."""

from __future__ import annotations

import pytest
import torch

from data import digits

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def everything():
    return digits.enlarged_digits()


def test_it_has_mnists_shapes_and_types(everything):
    train_images, train_labels, test_images, test_labels = everything
    assert train_images.shape == (60_000, 28, 28) and test_images.shape == (10_000, 28, 28)
    assert train_labels.shape == (60_000,) and test_labels.shape == (10_000,)
    assert train_images.dtype == test_images.dtype == torch.uint8
    assert train_labels.dtype == test_labels.dtype == torch.int64
    for labels in (train_labels, test_labels):
        share = labels.bincount() / len(labels)
        assert len(share) == 10 and share.min() > 0.08 and share.max() < 0.12


def test_it_looks_like_ink_on_blank_paper(everything):
    for images in (everything[0], everything[2]):
        assert images.max() == 255 and images.min() == 0
        assert images[:, [0, 0, -1, -1], [0, -1, 0, -1]].max() == 0, "the corners are paper"
        # MNIST: 81 % of the pixels are paper, the mean grey is 33.
        assert 0.6 < (images == 0).float().mean() < 0.9
        assert 20 < images.float().mean() < 60
        assert (images.flatten(1).amax(1) > 200).all(), "every image holds a digit"


def test_the_same_arguments_give_the_same_data_and_leave_the_global_generator_alone(everything):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = digits.enlarged_digits()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(everything, again, strict=True))
    other = digits.enlarged_digits(seed=1)
    assert not torch.equal(everything[0], other[0])


def test_the_cut_lies_where_a_writers_sheet_begins():
    _, labels = digits.drawings()
    assert labels[digits.FIRST_TEST_DRAWING :][:30].tolist() == list(range(10)) * 3
    assert 300 < len(labels) - digits.FIRST_TEST_DRAWING < 600


def test_no_drawing_is_on_both_sides(monkeypatch):
    images, labels = digits.drawings()
    marked = torch.zeros_like(images)
    marked[: digits.FIRST_TEST_DRAWING] = 1  # all ink on one side of the cut, none on the other
    monkeypatch.setattr(digits, "drawings", lambda: (marked, labels))
    train_images, _, test_images, _ = digits.enlarged_digits(3000, 800)
    assert (train_images.flatten(1).amax(1) == 255).all()
    assert test_images.max() == 0
    # Nor is any test drawing, as it stands in the file, a copy of a training one.
    sides = images[: digits.FIRST_TEST_DRAWING], images[digits.FIRST_TEST_DRAWING :]
    train, test = ({tuple(image.flatten().tolist()) for image in side} for side in sides)
    assert not train & test


def test_every_label_stays_with_its_drawing(monkeypatch):
    _, labels = digits.drawings()
    grey = 0.3 + 0.04 * labels.float()  # one grey per label, where the contrast is not yet clipped
    monkeypatch.setattr(digits, "drawings", lambda: (grey[:, None, None].expand(-1, 8, 8), labels))
    for images, names in (lambda a, b, c, d: ((a, b), (c, d)))(*digits.enlarged_digits(2000, 700)):
        darkest = images.flatten(1).amax(1) / 255
        assert ((darkest - (0.1 + 0.08 * names)).abs() < 0.01).all()  # the greys of two labels lie 0.08 apart


def test_every_drawing_is_used_equally_often():
    images = torch.rand(7, 28, 28)
    copies, source = digits.vary(images, 50, torch.Generator().manual_seed(0), chunk=8)
    assert copies.shape == (50, 28, 28)
    assert sorted(source.bincount().tolist()) == [7] * 6 + [8]
    assert not torch.equal(source, source.sort().values), "in random order"
    again, _ = digits.vary(images, 50, torch.Generator().manual_seed(0), chunk=50)
    assert torch.equal(copies, again), "the chunks are about memory alone"


def test_the_variations_are_small_and_not_all_alike():
    dot = torch.zeros(1, 28, 28)
    dot[0, 13:15, 13:15] = 1  # in the very centre, where turning and resizing move nothing
    copies, _ = digits.vary(dot, 400, torch.Generator().manual_seed(0))
    ink = copies.double() / copies.double().sum((1, 2), keepdim=True)
    place = torch.arange(28, dtype=torch.float64) - 13.5
    for axis in (1, 2):
        offset = ink.sum(3 - axis) @ place
        # The shift itself, and a margin for a small dot drawn on whole pixels and greys rounded to 1/255.
        assert offset.abs().max() < digits.SHIFT + 0.1
        assert offset.min() < -0.9 * digits.SHIFT and offset.max() > 0.9 * digits.SHIFT


def test_enlarging_keeps_the_picture():
    images, _ = digits.drawings()
    large = digits.enlarge(images)
    assert large.shape == (1797, 28, 28) and large.min() == 0 and large.max() == 1
    assert (
        large[:, :4].max() == 0
        and large[:, -4:].max() == 0
        and large[..., :4].max() == 0
        and large[..., -4:].max() == 0
    )
    # Shrunk again, it is the drawing it was made from, more than any other.
    small = torch.nn.functional.adaptive_avg_pool2d(large[:, None, 4:-4, 4:-4], 8).flatten(1)
    nearest = torch.cdist(small - small.mean(), images.flatten(1) - images.mean()).argmin(1)
    assert (nearest == torch.arange(1797)).float().mean() > 0.95
