"""The smoothness penalty: the same number for the same curve at every G, the gradient of autograd, clear errors."""

import math

import pytest
import torch
from scipy.interpolate import BSpline

from layers import FlashKAN, KANLinear, Regular_KAN
from layers import smoothness as module
from layers.bsplines import knots
from layers.smoothness import smoothness


def written_out(weight, size, order):
    return size ** (2 * order) * torch.diff(weight, n=order, dim=1).square().mean()


def places(size, k):
    """Where the bumps peak, the grid being one unit of length: the averages of each bump's inner knots."""
    return (torch.arange(size + k, dtype=torch.float64) - (k - 1) / 2) / size


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 9, 1), (4, 12, 3), (784, 53, 10)])
def test_is_the_scaled_mean_square_of_differences(shape, order):
    weight = torch.randn(shape, dtype=torch.float64)
    expected = written_out(weight, shape[1] - 3, order)
    assert torch.allclose(smoothness(weight, shape[1] - 3, order), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", [Regular_KAN, KANLinear, FlashKAN])
def test_every_layer_has_it(kind):
    layer = kind(5, 3, 7)
    assert torch.equal(layer.smoothness(), smoothness(layer.spline_weight, 7, 2))
    assert torch.equal(layer.smoothness(order=1), smoothness(layer.spline_weight, 7, 1))
    layer.smoothness().backward()
    assert layer.spline_weight.grad.abs().max() > 0 and layer.base_weight.grad is None


@pytest.mark.parametrize("size", [1, 2, 5, 50, 500])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_polynomials_have_the_same_penalty_at_every_size(size, order):
    """Coefficients that are a polynomial of degree m in their places have m-th differences m! h^m, all equal."""
    weight = (places(size, 3) ** order).view(1, -1, 1)
    # Rounding: differences of numbers around 1 are off by about 2^m eps, compared with h^m.
    tolerance = max(1e-12, 2**order * size**order * 1e-15)
    assert math.isclose(smoothness(weight, size, order).item(), math.factorial(order) ** 2, rel_tol=tolerance)


def test_a_smooth_function_has_one_penalty():
    """sin(2 pi t): mean squared second derivative (2 pi)^4 / 2; what is left shrinks at least with 1 / G."""
    exact = (2 * math.pi) ** 4 / 2
    errors = [
        abs(smoothness(torch.sin(2 * math.pi * places(size, 3)).view(1, -1, 1), size).item() / exact - 1)
        for size in (20, 100, 500)
    ]
    assert errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4 and errors[2] < 0.01, errors


@pytest.mark.parametrize("order", [1, 2])
def test_is_the_mean_square_of_scipys_derivative(order):
    size, k = 200, 3
    place = places(size, k)
    weight = torch.sin(3 * place) + place**2
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
    curve = BSpline(knots(size, k, (0, 1)).numpy(), weight.numpy(), k)
    mean_square = torch.tensor(curve.derivative(order)(t.numpy())).square().mean().item()
    assert math.isclose(smoothness(weight.view(1, -1, 1), size, order).item(), mean_square, rel_tol=0.02)


def test_the_range_does_not_matter():
    a, b = FlashKAN(4, 3, 10), FlashKAN(4, 3, 10, grid_range=(0, 17))
    b.spline_weight.data.copy_(a.spline_weight.data)
    assert torch.equal(a.smoothness(), b.smoothness())


def test_constant_and_straight_curves_cost_nothing():
    weight = torch.ones(2, 13, 3, dtype=torch.float64)
    assert smoothness(weight, 10, 1) == 0
    assert smoothness(weight * places(10, 3).view(1, -1, 1), 10, 2) < 1e-20
    assert smoothness(weight * places(10, 3).view(1, -1, 1), 10, 1) > 0.1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_gradients(order):
    weight = torch.randn(3, 8, 2, dtype=torch.float64, requires_grad=True)

    def squared(w):  # its second derivative has a part of each kind
        return smoothness(w, 5, order) ** 2

    assert torch.autograd.gradcheck(lambda w: smoothness(w, 5, order), weight)
    assert torch.autograd.gradgradcheck(squared, weight)


@pytest.mark.parametrize("numbers", [1, 100, 1000, 2**18])
def test_groups_do_not_matter(monkeypatch, numbers):
    monkeypatch.setattr(module, "GROUP_NUMBERS", numbers)
    weight = torch.randn(17, 23, 3, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(smoothness(weight, 20), weight)
    (theirs,) = torch.autograd.grad(written_out(weight, 20, 2), weight)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12 * theirs.abs().max().item())


def test_vmap_over_gradients():  # of an ensemble
    weights = torch.rand(3, 4, 9, 2, dtype=torch.float64)
    slope = torch.func.grad(lambda weight: smoothness(weight, 6))
    got = torch.func.vmap(slope)(weights)
    assert torch.allclose(got, torch.stack([slope(weight) for weight in weights]), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights(dtype):
    weight = torch.randn(6, 103, 4).to(dtype).requires_grad_()
    value = smoothness(weight, 100)
    (gradient,) = torch.autograd.grad(value, weight)
    wide = weight.detach().double().requires_grad_()
    expected = written_out(wide, 100, 2)
    (wanted,) = torch.autograd.grad(expected, wide)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert math.isclose(value.item(), expected.item(), rel_tol=1e-5)
    largest = (gradient.double() - wanted).abs().max() / wanted.abs().max()
    assert largest < (1e-6 if dtype == torch.float32 else 2**-8)


def test_weights_in_any_layout():
    weight = torch.randn(3, 8, 5, dtype=torch.float64).transpose(0, 2).requires_grad_()
    (ours,) = torch.autograd.grad(smoothness(weight, 5), weight)
    (theirs,) = torch.autograd.grad(written_out(weight, 5, 2), weight)
    assert torch.allclose(ours, theirs)


def test_keeps_only_the_weights():
    weight = torch.randn(4, 13, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        smoothness(weight, 10)
    assert kept == [weight.data_ptr()]


@pytest.mark.parametrize(
    ("order", "error", "said"),
    [
        (0, ValueError, "order must be from 1 to G + k - 1 = 12, got 0"),
        (13, ValueError, "order must be from 1 to G + k - 1 = 12, got 13"),
        (1.0, TypeError, "order must be an integer, got 1.0"),
        (True, TypeError, "order must be an integer, got True"),
    ],
)
def test_bad_orders(order, error, said):
    with pytest.raises(error) as raised:
        FlashKAN(2, 2, 10).smoothness(order)
    assert str(raised.value) == said
