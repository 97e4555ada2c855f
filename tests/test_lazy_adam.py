"""LazyAdam: Adam where there is a gradient, rest where there is none."""

import copy

import pytest
import torch

from layers import FlashKAN
from layers.flash import dispatch
from layers.lazy_adam import LazyAdam
from tests.test_operator import no_cuda

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])]


def copies(shape, device, dtype):
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=dtype, device=device)
    return torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())


@pytest.fixture(params=["kernel", "pytorch"])
def way(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(dispatch, "cpu_kernels", lambda: None)
        monkeypatch.setattr(dispatch, "gpu_kernels", lambda: None)
    return request.param


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(5, 9, 3), (40, 33), (7,), (3, 1030)])
def test_with_a_gradient_everywhere_it_is_adam(shape, dtype, tolerance, device, way):
    lazy, plain = copies(shape, device, dtype)
    numbers = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-6}
    one, other = LazyAdam([lazy], **numbers), torch.optim.Adam([plain], **numbers)
    for _ in range(6):
        lazy.grad = torch.randn_like(lazy)
        plain.grad = lazy.grad.clone()
        one.step()
        other.step()
    assert (lazy - plain).abs().max() < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_a_gradient_rest(device, way):
    weight, before = copies((6, 20, 4), device, torch.float32)
    adam = LazyAdam([weight], lr=0.1)
    weight.grad = torch.randn_like(weight)
    adam.step()
    after_one, moment = weight.detach().clone(), adam.state[weight]["exp_avg"].clone()
    assert (after_one != before).all()
    weight.grad = torch.zeros_like(weight)
    weight.grad[2, 5, 3] = 1.0  # one number touches its row
    adam.step()
    moved = (weight != after_one).any(-1).nonzero().tolist()
    assert moved == [[2, 5]]
    assert (adam.state[weight]["exp_avg"] != moment).any(-1).nonzero().tolist() == [[2, 5]]


def test_a_nan_in_the_gradient_is_seen(way):
    weight, _ = copies((4, 3), "cpu", torch.float32)
    weight.grad = torch.zeros_like(weight)
    weight.grad[1, 1] = torch.nan
    LazyAdam([weight]).step()
    assert weight.isnan().nonzero().tolist() == [[1, 1]]


def test_it_trains_and_its_state_can_be_saved():
    torch.manual_seed(0)
    x = torch.rand(64, 6) * 2 - 1
    target = x.sin().sum(1, keepdim=True)
    layer = FlashKAN(6, 1, 200)
    adam = LazyAdam(layer.parameters(), lr=0.02)

    def closure():
        adam.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        return loss

    losses = [adam.step(closure).item() for _ in range(60)]
    assert losses[-1] < losses[0] / 20
    other = LazyAdam(layer.parameters(), lr=0.5)
    other.load_state_dict(adam.state_dict())
    assert other.param_groups[0]["lr"] == 0.02
    assert torch.equal(other.state[layer.spline_weight]["exp_avg"], adam.state[layer.spline_weight]["exp_avg"])
    assert other.state[layer.spline_weight]["step"] == 60


def test_a_loaded_state_lies_where_the_weights_are():
    saved, moved = copies((4, 3), "cpu", torch.float32)
    saved.grad = torch.ones_like(saved)
    adam = LazyAdam([saved])
    adam.step()
    other = LazyAdam([torch.nn.Parameter(moved.detach().to("meta"))])
    other.load_state_dict(adam.state_dict())
    assert {kept.device.type for kept in other.state[other.param_groups[0]["params"][0]].values()} == {"meta"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", (False, True))
def test_the_state_of_an_adam_can_be_loaded(device, fused, way):
    """Whose step count is a float32, for a plain one on the CPU."""
    lazy, plain = copies((5, 9), device, torch.float32)
    plain.grad = torch.ones_like(plain)
    adam, first = torch.optim.Adam([plain], fused=fused), LazyAdam([torch.nn.Parameter(lazy.detach().clone())])
    first.param_groups[0]["params"][0].grad = torch.ones_like(lazy)
    first.step()  # a kernel is known before
    adam.step()
    with torch.no_grad():
        lazy.copy_(plain)
    other = LazyAdam([lazy])
    other.load_state_dict(copy.deepcopy(adam.state_dict()))  # PyTorch would share the moments
    assert other.state[lazy]["step"].dtype == torch.float64 and other.state[lazy]["step"].device == lazy.device
    for _ in range(2):
        lazy.grad = torch.rand_like(lazy) + 0.1
        plain.grad = lazy.grad.clone()
        other.step()
        adam.step()
    assert (lazy - plain).abs().max() < 1e-5


@pytest.mark.parametrize("option", ("weight_decay", "amsgrad", "maximize"))
def test_the_state_of_another_algorithm_is_refused(option):
    weight, _ = copies((5, 9), "cpu", torch.float32)
    weight.grad = torch.ones_like(weight)
    adam, other = torch.optim.Adam([weight], **{option: 0.1 if option == "weight_decay" else True}), LazyAdam([weight])
    adam.step()
    with pytest.raises(ValueError, match=f"LazyAdam has no {option}"):
        other.load_state_dict(adam.state_dict())
    assert not other.state and other.param_groups[0]["lr"] == 1e-3


def test_narrow_weights_are_refused():
    weight, narrow = (torch.nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float16))
    adam = LazyAdam([weight])
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.float16"):
        adam.add_param_group({"params": [narrow]})
    assert len(adam.param_groups) == 1


@pytest.mark.gpu
@no_cuda
def test_a_captured_step_counts_on():
    weight, plain = copies((30, 8), "cuda", torch.float32)
    weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(weight)
    adam, other = LazyAdam([weight]), LazyAdam([plain])
    adam.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adam.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        other.step()
    assert torch.allclose(weight, plain, atol=1e-6)


@pytest.mark.parametrize(
    "numbers, name",
    [
        ({"lr": -1}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, 1)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": -1}, "eps"),
    ],
)
def test_bad_numbers_are_named(numbers, name):
    with pytest.raises(ValueError, match=name):
        LazyAdam([torch.nn.Parameter(torch.zeros(2))], **numbers)
