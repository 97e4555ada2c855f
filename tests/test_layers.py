"""The three layers: one function and its gradients, one set of weights, one way to answer bad input."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from layers import FlashKAN, KANLinear, Regular_KAN
from layers.bsplines import knots
from layers.kan_layer import KANLayer
from tests.reference64 import Layer64

KINDS = (Regular_KAN, KANLinear, FlashKAN)
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])])
def device(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def three(*args, **kwargs):
    """One layer of each kind with equal weights, in float64."""
    torch.manual_seed(0)
    layers = [kind(*args, **kwargs).double() for kind in KINDS]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    return layers


def inputs(shape, order=3, size=5, device="cpu"):
    """float64, inside and outside (-1, 1), away from the knots, where low degrees have no gradient."""
    rng = torch.Generator().manual_seed(1)
    cell = torch.randint(-order - 1, size + order + 1, shape, generator=rng)
    return (-1 + (cell + torch.rand(shape, generator=rng, dtype=torch.float64) * 0.8 + 0.1) * 2 / size).to(device)


def gelu_tanh(x):
    return nn.functional.gelu(x, approximate="tanh")


# ---------------------------------------------------------------------------------------------------------------------
# One function


@pytest.mark.parametrize("size, order", ((5, 3), (50, 3), (1, 3), (4, 2), (4, 0), (3, 5)))
def test_equal_outputs_and_gradients(size, order, device):
    layers = three(4, 3, size, order, device=device)
    x = inputs((7, 4), order, size, device)
    g = torch.randn(7, 3, dtype=torch.float64, device=device)
    weights = [p.detach().cpu().numpy() for p in layers[0].parameters()]
    exact = Layer64(x.cpu().numpy(), *weights, order)
    needed = {"y": exact.value()} | exact.gradients(g.cpu().numpy())
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        gradients = torch.autograd.grad(y, (leaf, *layer.parameters()), g)
        for name, got in zip(("y", "x", "weight", "base"), (y, *gradients), strict=True):
            error = (got.detach().cpu() - torch.from_numpy(needed[name])).abs().max().item()
            assert error <= 1e-10, f"{type(layer).__name__}: {name} is off by {error:.1e}"


def test_equal_second_gradients():
    """The gradients of a loss that holds a derivative of the layer, as physics-informed losses do."""
    layers = three(4, 3)
    found = []
    for layer in layers:
        x = inputs((7, 4)).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), (x, *layer.parameters())))
    for other in found[1:]:
        for got, needed in zip(other, found[0], strict=True):
            assert needed.abs().max() > 0.1 and (got - needed).abs().max() <= 1e-10


@pytest.mark.parametrize("size", (5, 50, 500))
@pytest.mark.parametrize("order", (2, 3))
def test_equal_on_every_knot(size, order):
    """Where layers may disagree about the interval, they must agree about everything that is continuous there."""
    _, dense, flash = three(1, 3, size, order)
    x = knots(size, order).unsqueeze(-1).requires_grad_()
    assert (flash(x) - dense(x)).abs().max() <= 1e-10
    needed, got = (torch.autograd.grad(layer(x).sum(), x)[0] for layer in (dense, flash))
    assert (got - needed).abs().max() <= 1e-10


@pytest.mark.parametrize("base_activation", (None, nn.GELU, nn.SiLU(), torch.tanh, gelu_tanh, lambda x: x))
@pytest.mark.parametrize("grid_range", ((-1, 1), (0, 3)))
def test_base_activations(base_activation, grid_range):
    layers = three(4, 3, grid_range=grid_range, base_activation=base_activation)
    x = inputs((7, 4)).requires_grad_()
    results = [(layer(x), *torch.autograd.grad(layer(x).sin().sum(), (x, *layer.parameters()))) for layer in layers]
    names = ("y", "x", *(name for name, _ in layers[0].named_parameters()))
    assert len(names) == 3 if base_activation is None else 4
    for layer, result in zip(layers[1:], results[1:], strict=True):
        assert [name for name, _ in layer.named_parameters()] == list(names[2:])
        for name, got, needed in zip(names, result, results[0], strict=True):
            assert (got - needed).abs().max() <= 1e-10, f"{type(layer).__name__}: {name}"


def test_the_base_branch_is_what_was_asked_for(kind):
    layer = kind(4, 3, base_activation=nn.ReLU).double()
    nn.init.zeros_(layer.spline_weight)
    x = inputs((7, 4))
    assert torch.allclose(layer(x), x.relu() @ layer.base_weight, rtol=1e-12)
    without = kind(4, 3, base_activation=None)
    assert without.base_weight is None and list(without.state_dict()) == ["spline_weight", "_extra_state"]
    far = without.double()(torch.full((2, 4), 50.0, dtype=torch.float64))
    assert torch.equal(far, torch.zeros(2, 3, dtype=torch.float64))


def test_an_activation_with_parameters_is_trained(kind):
    layer = kind(4, 3, base_activation=nn.PReLU)
    layer(torch.randn(7, 4)).sum().backward()
    assert layer.base_activation.weight.grad.abs().item() > 0


def test_the_calls_of_the_readme_to_the_letter():
    from layers.FlashKAN import FlashKAN as Flash

    assert Flash is FlashKAN
    x = torch.rand(2, 28 * 28)
    for G in (5, 10):
        assert KANLinear(28 * 28, 10, G)(x).shape == FlashKAN(28 * 28, 10, G)(x).shape == (2, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, dtypes, odd values


@pytest.mark.parametrize("shape", ((4,), (0, 4), (1, 4), (2, 0, 4), (2, 3, 4), (1, 2, 1, 4)))
def test_leading_shapes(kind, shape):
    layer = kind(4, 3).double()
    x = inputs(shape).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape[:-1], 3) and y.dtype == torch.float64
    assert torch.allclose(y, layer(x.reshape(-1, 4)).reshape(y.shape), rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert x.grad.shape == shape and layer.spline_weight.grad.shape == (4, 8, 3)
    if x.numel() == 0:
        assert not layer.spline_weight.grad.any() and not layer.base_weight.grad.any()


def test_non_contiguous_inputs(kind):
    layer = kind(4, 3).double()
    x = inputs((6, 4))
    for odd in (x.t().contiguous().t(), torch.stack([x, x + 1], -1)[..., 0], x[:1].expand(6, 4)):
        assert not odd.is_contiguous()
        a, b = odd.clone().contiguous().requires_grad_(), odd.detach().requires_grad_()
        assert torch.allclose(layer(b), layer(a), rtol=1e-12, atol=1e-12)
        g = torch.randn(3, 6, dtype=torch.float64).t()
        needed = torch.autograd.grad(layer(a), (a, *layer.parameters()), g.contiguous())
        for gradient, needs in zip(torch.autograd.grad(layer(b), (b, *layer.parameters()), g), needed, strict=True):
            assert torch.allclose(gradient, needs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("given", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_the_result_has_the_wider_dtype(kind, given, weights):
    layer = kind(4, 3, dtype=weights)
    x = torch.rand(5, 4).to(given).requires_grad_()
    y = layer(x)
    assert y.dtype == torch.promote_types(given, weights)
    y.sum().backward()
    assert x.grad.dtype == given and x.grad.isfinite().all()
    assert all(p.grad.dtype == weights and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf, 1e38, -1e38))
@pytest.mark.parametrize("base_activation", (nn.SiLU, None))
def test_nan_and_infinity_stay_in_their_row(kind, base_activation, bad):
    layer = kind(4, 3, base_activation=base_activation)
    clean = inputs((5, 4)).float()
    dirty = clean.clone()
    dirty[2, 1] = bad
    others = [0, 1, 3, 4]
    clean.requires_grad_(), dirty.requires_grad_()
    needed, got = layer(clean), layer(dirty)
    assert torch.allclose(got[others], needed[others], atol=1e-5)
    if math.isnan(bad):
        assert got[2].isnan().all()
    elif base_activation is None:
        far = clean.detach().clone()
        far[2, 1] = 99.0  # no spline is left there
        assert torch.allclose(got[2], layer(far)[2], atol=1e-5)
    needed, got = (torch.autograd.grad(y.sum(), x)[0] for y, x in ((needed, clean), (got, dirty)))
    assert torch.allclose(got[others], needed[others], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: exchange, copies, casts


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("base_activation", (nn.SiLU, None))
def test_weights_are_exchanged_exactly(source, target, base_activation):
    a, b = (kind(4, 3, 7, 2, grid_range=(0, 3), base_activation=base_activation) for kind in (source, target))
    assert not torch.equal(a.spline_weight, b.spline_weight)
    assert str(b.load_state_dict(a.state_dict())) == "<All keys matched successfully>"
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other and p.shape == q.shape and torch.equal(p, q)
    assert a.spline_weight.shape == (4, 9, 3)


@pytest.mark.parametrize(
    "other, words",
    (
        ({"grid_range": (0, 1)}, r"grid_range=\(0, 1\).*grid_range=\(-1, 1\)"),
        ({"grid_size": 6, "spline_order": 2}, "spline_order=2.*spline_order=3"),  # as many rows, another meaning
        ({"grid_size": 6}, "size mismatch for spline_weight"),
    ),
)
def test_weights_of_another_grid_are_refused(kind, other, words):
    layer = kind(4, 3)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=words):
        layer.load_state_dict(kind(4, 3, **other).state_dict())
    kept = ("spline_weight", "_extra_state")  # PyTorch copies the other tensors if only a size is wrong
    for name in kept if "size mismatch" in words else before:
        assert torch.equal(layer.state_dict()[name], before[name]), f"{name} was overwritten"


def test_a_layer_inside_a_model_refuses_too(kind):
    model, other = (nn.Sequential(kind(4, 3), kind(3, 2, grid_range=ends)) for ends in ((-1, 1), (0, 1)))
    with pytest.raises((ValueError, RuntimeError), match="grid_range"):
        model.load_state_dict(other.state_dict())


def test_the_refusal_names_the_layer(kind):
    model, other = (nn.Sequential(kind(4, 3), kind(3, 2, spline_order=k)) for k in (3, 2))
    with pytest.raises(RuntimeError, match=rf"1\.{kind.__name__}: .* belong to spline_order=2"):
        model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_a_state_that_was_cast_or_averaged_is_taken(kind, dtype):
    a, b = (kind(4, 3, grid_range=(-1.1, 0.3)) for _ in range(2))
    cast = {name: t.to(dtype) for name, t in a.state_dict().items()}
    b.load_state_dict(cast)
    assert b.grid_range == (-1.1, 0.3)
    assert torch.equal(b.spline_weight, a.spline_weight.to(dtype).float())
    b.load_state_dict({name: torch.stack([t] * 6).mean(0) for name, t in a.state_dict().items()})
    with pytest.raises(RuntimeError, match="grid_range"):
        kind(4, 3, grid_range=(-1.12, 0.3)).load_state_dict(cast)
    with pytest.raises(RuntimeError, match="grid_range"):
        kind(4, 3, grid_range=(-1.1000001, 0.3)).load_state_dict(a.state_dict())


def test_a_default_device_does_not_move_the_saved_grid(kind):
    a, b = kind(4, 3), kind(4, 3)
    with torch.device("meta"):
        b.load_state_dict(a.state_dict())
    assert torch.equal(a.spline_weight, b.spline_weight)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16))
def test_an_activation_with_parameters_follows_device_and_dtype(kind, dtype):
    layer = kind(4, 3, base_activation=nn.PReLU, dtype=dtype)
    x = torch.rand(5, 4)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(x).dtype == torch.promote_types(dtype, torch.float32) and layer(x.to(dtype)).dtype == dtype
    layer.double().reset_parameters()
    assert kind(4, 3, base_activation=nn.PReLU, device="meta").base_activation.weight.is_meta


@pytest.mark.parametrize("base_activation", (nn.SiLU, nn.GELU))
def test_narrow_inputs_meet_wide_weights(base_activation):
    """The base branch is computed in the wider dtype by all three."""
    layers = [kind(4, 3, base_activation=base_activation) for kind in KINDS]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    x = torch.rand(50, 4).bfloat16()
    y = [layer(x) for layer in layers]
    assert torch.allclose(y[0], y[1], atol=1e-6) and torch.allclose(y[0], y[2], atol=1e-6)
    assert torch.allclose(y[0], layers[0](x.float()), atol=1e-6)


def test_copies_answer_the_same(kind, tmp_path):
    layer = kind(4, 3, 7, 2, grid_range=(0, 3), base_activation=nn.GELU)
    x = torch.rand(5, 4) * 3
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    loaded = kind(4, 3, 7, 2, grid_range=(0, 3), base_activation=nn.GELU)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        loaded,
        torch.load(whole, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
        with torch.no_grad():
            other.spline_weight.zero_()
    assert layer.spline_weight.abs().max() > 0  # copies share nothing


@pytest.mark.parametrize("cast", ("bfloat16", "half"))
def test_casts_leave_the_grid_alone(kind, cast):
    """A layer that is cast computes what its rounded weights say, on the same grid: at G = 300 nothing else would do."""
    layer = getattr(kind(4, 3, 300, grid_range=(0, 3)), cast)()
    assert layer.grid_range == (0.0, 3.0)
    dtype = layer.spline_weight.dtype
    assert dtype == layer.base_weight.dtype == getattr(torch, cast)
    x = torch.linspace(0.01, 2.99, 400).reshape(100, 4)
    weights = [p.detach().double() for p in layer.parameters()]
    needed = torch.from_numpy(Layer64(x, *weights, 3, (0, 3)).value())
    assert (layer(x).double() - needed).abs().max() <= 8 * torch.finfo(dtype).eps
    narrow = layer(x.to(dtype))  # the inputs are rounded, and from there on nothing else is
    needed = torch.from_numpy(Layer64(x.to(dtype).double(), *weights, 3, (0, 3)).value())
    assert narrow.dtype == dtype and (narrow.double() - needed).abs().max() <= 16 * torch.finfo(dtype).eps
    assert torch.equal(layer.state_dict()["_extra_state"], torch.tensor([0, 3, 3], dtype=torch.float64))


def test_double_is_exact(kind):
    layer = kind(4, 3, 300, grid_range=(0.1, 0.7)).double()
    x = torch.linspace(0.1, 0.7, 404, dtype=torch.float64).reshape(101, 4)
    needed = torch.from_numpy(Layer64(x, *(p.detach() for p in layer.parameters()), 3, (0.1, 0.7)).value())
    assert (layer(x) - needed).abs().max() <= 1e-12
    back = layer.bfloat16().double()
    assert back.grid_range == (0.1, 0.7)
    needed = torch.from_numpy(Layer64(x, *(p.detach() for p in back.parameters()), 3, (0.1, 0.7)).value())
    assert (back(x) - needed).abs().max() <= 1e-12


def test_the_meta_device(kind):
    """Weights that are only described: how a large model is built before its checkpoint is read."""
    real = kind(4, 3)
    with torch.device("meta"):
        described = kind(4, 3)
    for layer in (kind(4, 3, device="meta"), described):
        assert layer.spline_weight.device.type == layer.base_weight.device.type == "meta"
        y = layer(torch.empty(5, 4, device="meta"))
        assert y.device.type == "meta" and y.shape == (5, 3)
        filled = layer.to_empty(device="cpu")
        filled.load_state_dict(real.state_dict())
        x = torch.rand(5, 4)
        assert torch.equal(filled(x), real(x))
    assert nn.utils.skip_init(kind, 4, 3).spline_weight.shape == (4, 8, 3)


def test_the_default_dtype_is_respected(kind):
    torch.set_default_dtype(torch.float64)
    try:
        layer = kind(4, 3)
        assert layer.spline_weight.dtype == layer.base_weight.dtype == torch.float64
        assert layer(torch.rand(5, 4)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_repr(kind):
    assert kind(4, 3, 7, 2, grid_range=(0, 0.5)).extra_repr() == (
        "in_features=4, out_features=3, grid_size=7, spline_order=2, grid_range=(0, 0.5)"
    )
    assert repr(kind(4, 3)).startswith(f"{kind.__name__}(") and "SiLU()" in repr(kind(4, 3))


# ---------------------------------------------------------------------------------------------------------------------
# The first weights


def test_seeds_repeat_and_differ(kind):
    layers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        layers.append(kind(4, 3))
    assert torch.equal(layers[0].spline_weight, layers[1].spline_weight)
    assert not torch.equal(layers[0].spline_weight, layers[2].spline_weight)
    before = layers[0].spline_weight.clone()
    layers[0].reset_parameters()
    assert not torch.equal(layers[0].spline_weight, before)


# The band. A layer is built to turn inputs uniform on the grid into outputs of variance 1. A second layer sees something
# else, about N(0, 1), of which a third lies beyond (-1, 1); 0.5 .. 2 after four layers asks that no layer loses or gains
# more than a factor of 2 ** (1/4). The estimate itself: SEEDS * WIDTH = 512 nearly independent outputs, each y ** 2 with
# a relative variance of 2, give a standard deviation of sqrt(2 / 512) = 6 % a layer and 12 % after four; so the mean of
# a layer with gain 1 leaves the band by chance once in 10,000 at most, and 0.75 .. 1.25 after one layer is four of them.
SEEDS, WIDTH = 16, 32


def variances(depth, *args, **kwargs):
    """The mean square after 1 .. depth layers, averaged over seeds; inputs are uniform on the grid."""
    lo, hi = kwargs.get("grid_range", (-1, 1))
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        x = torch.rand(64, WIDTH) * (hi - lo) + lo
        stack = [KANLinear(WIDTH, WIDTH, *args, **kwargs) for _ in range(depth)]
        with torch.no_grad():
            found.append([(x := layer(x)).square().mean() for layer in stack])
    return torch.tensor(found).mean(0).tolist()


@pytest.mark.parametrize("size", (3, 5, 10, 50, 100, 500))
def test_unit_variance_at_every_grid_and_depth(size):
    found = variances(4, size)
    assert 0.75 <= found[0] <= 1.25, found
    assert all(0.5 <= variance <= 2 for variance in found), found


@pytest.mark.parametrize(
    "args, kwargs",
    (
        ((5, 0), {}),
        ((5, 1), {}),
        ((20, 5), {}),
        ((10, 3), {"grid_range": (0, 1)}),
        ((10, 3), {"grid_range": (-3, 7)}),
        ((10, 3), {"base_activation": None}),
        ((10, 3), {"base_activation": nn.Tanh}),
    ),
)
def test_unit_variance_of_one_layer(args, kwargs):
    (found,) = variances(1, *args, **kwargs)
    assert 0.75 <= found <= 1.25


def test_the_first_curves_are_as_smooth_on_a_fine_grid(kind):
    """Otherwise a layer at G = 500 starts as noise that changes sign from one interval to the next."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 2001).unsqueeze(-1).double()
    turns = []
    for size in (5, 500):
        layer = kind(1, 20, size).double()
        turns.append((layer(x).detach().diff(dim=0).sign().diff(dim=0) != 0).sum(0).double().mean().item())
    assert turns[1] <= 2 * turns[0] + 2, f"{turns[0]:.1f} turning points at G = 5, {turns[1]:.1f} at G = 500"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "args, kwargs, error, words",
    (
        ((0, 3), {}, ValueError, "in_features must be at least 1, got 0"),
        ((4, -2), {}, ValueError, "out_features must be at least 1, got -2"),
        ((4.0, 3), {}, TypeError, "in_features must be an integer, got 4.0"),
        ((4, "3"), {}, TypeError, "out_features must be an integer, got '3'"),
        ((4, True), {}, TypeError, "out_features must be an integer, got True"),
        ((4, 3, 0), {}, ValueError, "grid_size must be at least 1, got 0"),
        ((4, 3, 5.5), {}, TypeError, "grid_size must be an integer, got 5.5"),
        ((4, 3, 5, -1), {}, ValueError, "spline_order must be at least 0, got -1"),
        ((4, 3, 5, None), {}, TypeError, "spline_order must be an integer, got None"),
        ((4, 3), {"grid_range": (1, 1)}, ValueError, "grid_range must be two finite numbers with low < high"),
        ((4, 3), {"grid_range": (1, -1)}, ValueError, "grid_range must be two finite numbers with low < high"),
        ((4, 3), {"grid_range": (math.nan, 1)}, ValueError, "grid_range must be two finite numbers"),
        ((4, 3), {"grid_range": (0, math.inf)}, ValueError, "grid_range must be two finite numbers"),
        ((4, 3), {"grid_range": 2}, TypeError, "grid_range must be two numbers"),
        ((4, 3), {"base_activation": "silu"}, TypeError, "base_activation must be a module, a function or None"),
        ((4, 3), {"dtype": torch.int64}, TypeError, "dtype must be floating, got torch.int64"),
    ),
)
def test_bad_arguments(kind, args, kwargs, error, words):
    with pytest.raises(error, match=words):
        kind(*args, **kwargs)


@pytest.mark.parametrize(
    "x, error, words",
    (
        (torch.rand(5, 3), ValueError, r"x must have shape \(\*, 4\), got \(5, 3\)"),
        (torch.rand(4, 5), ValueError, r"x must have shape \(\*, 4\), got \(4, 5\)"),
        (torch.tensor(1.0), ValueError, r"x must have shape \(\*, 4\), got \(\)"),
        (torch.ones(5, 4, dtype=torch.int64), TypeError, "x must have a floating dtype, got torch.int64"),
        (torch.ones(5, 4, dtype=torch.uint8), TypeError, "x must have a floating dtype, got torch.uint8"),
        (torch.ones(5, 4, dtype=torch.bool), TypeError, "x must have a floating dtype, got torch.bool"),
        (torch.ones(5, 4, dtype=torch.complex64), TypeError, "x must have a floating dtype, got torch.complex64"),
        ([[0.0] * 4], TypeError, "x must be a tensor, got list"),
    ),
)
def test_bad_inputs(kind, x, error, words):
    with pytest.raises(error, match=words):
        kind(4, 3)(x)


def test_arguments_after_spline_order_are_named(kind):
    with pytest.raises(TypeError):
        kind(4, 3, 5, 3, (-1, 1))


def test_docstrings():
    for cls in (*KINDS, KANLayer):
        assert cls.__doc__ and "arXiv" in cls.__doc__ + KANLayer.__doc__
