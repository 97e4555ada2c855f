"""The stopwatches and the benchmark: marks in order, an epoch that trains, a gate that stops wrong layers, whole rows."""

import csv
import sys
import time

import pytest
import torch
from torch import nn

from layers import FlashKAN
from layers.flash import benchmark
from layers.tutorial import timing, timing_plots


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return (torch.rand(64, 8) * 2 - 1).requires_grad_()


def test_marks_are_quantiles_in_microseconds():
    times = timing.summary([n * 1e-6 for n in range(11)])
    assert (times.low, times.median, times.high) == pytest.approx((2, 5, 8))
    with pytest.raises(ValueError, match="seconds must hold at least one measurement"):
        timing.summary([])


def test_eager_warms_up_then_repeats():
    calls = []
    timing.eager(lambda: calls.append(0), "cpu", repeats=5, warm_up=2)
    assert len(calls) == 7
    with pytest.raises(ValueError, match="repeats must be an integer of at least 1, got 0"):
        timing.eager(lambda: None, "cpu", repeats=0)


def test_calls_are_timed_in_turn():
    called = []
    calls = {"short": lambda: called.append("short"), ("long", 2): lambda: called.append("long") or time.sleep(0.002)}
    times = timing.in_turn(calls, "cpu", rounds=3)
    assert called == ["short", "long"] * 4, "once to warm up, then round by round"
    assert list(times) == list(calls) and times["long", 2].low >= 2000 > times["short"].low
    with pytest.raises(ValueError, match="seconds must hold at least one measurement"):
        timing.in_turn(calls, "cpu", rounds=0)


def test_epoch_takes_every_drawing_once_and_trains():
    torch.manual_seed(0)
    model, images, labels = nn.Linear(6, 3), torch.randn(40, 6), torch.arange(40) % 3
    epoch, seen = timing.Epoch(model, images, labels, batch=8), []
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    before = nn.functional.cross_entropy(model(images), labels)
    seen.clear()
    assert epoch.run(epochs=1) > 0
    assert torch.equal(torch.cat(seen).sort(0).values, images.sort(0).values)
    assert not torch.equal(torch.cat(seen), images), "the order is a new one"
    epoch.run(epochs=20)
    assert nn.functional.cross_entropy(model(images), labels) < before
    with pytest.raises(ValueError, match="graph=True needs images on a CUDA device, got cpu"):
        timing.Epoch(model, images, labels, batch=8, graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replayed_epochs_are_the_epochs_step_by_step():
    images, labels = torch.rand(400, 16, device="cuda") * 2 - 1, torch.arange(400, device="cuda") % 10
    ends = []
    for graph in (False, True):
        torch.manual_seed(0)
        layer = FlashKAN(16, 10, 20, device="cuda")
        timing.Epoch(layer, images, labels, batch=100, graph=graph).run(epochs=3)
        ends.append(layer.spline_weight.detach())
    # Twelve steps of 1e-3: a step too many or too few would be off by about 1e-3.
    assert torch.allclose(*ends, atol=1e-4)


def test_loader_epoch_trains_and_times_its_parts():
    torch.manual_seed(0)
    model, images = nn.Linear(784, 10), torch.randint(0, 256, (30, 28, 28), dtype=torch.uint8)
    before = model.weight.detach().clone()
    parts = timing.loader_epoch(model, images, torch.arange(30) % 10, steps=2, batch=10)
    assert tuple(parts) == timing.PARTS and min(parts.values()) > 0
    assert not torch.equal(model.weight, before)
    with pytest.raises(ValueError, match="steps must be an integer from 1 to 3, got 4"):
        timing.loader_epoch(model, images, torch.arange(30) % 10, steps=4, batch=10)


def test_counts_of_the_local_layer_do_not_depend_on_the_grid():
    few, many = (timing.counted("FlashKAN", (200, 784, 10), size) for size in (10, 1000))
    assert few["forward"][1] == many["forward"][1] == 2 * 200 * 784 * 10 * 5
    assert many["Adam"][0] == 28 * 784 * 10 * 1004
    few, many = (timing.counted("KANLinear", (200, 784, 10), size) for size in (6, 96))
    assert many["forward"][1] == 10 * few["forward"][1]


@pytest.mark.parametrize(
    "name", ("nn.Linear", "MLP", "FlashKAN", "FlashKAN local", "FlashKAN dense", "KANLinear", "embedding_bag")
)
def test_the_gate_lets_right_layers_pass(name, inputs):
    layer = benchmark.build(name, 8, 4, 20)
    assert benchmark.check(layer, inputs) < 1e-5


class Wrong(FlashKAN):
    """The right values with a gradient a hundredth too large."""

    def forward(self, x):
        y = super().forward(x)
        return y * 1.01 - y.detach() * 0.01


def test_the_gate_stops_a_wrong_gradient(inputs):
    with pytest.raises(AssertionError, match="x is off by 1"):
        benchmark.check(Wrong(8, 4, 20), inputs)


class Forgetful(FlashKAN):
    """Right values and gradients of the first samples; the weights hear of no other."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y[:20], (y - super().forward(x.detach()))[20:] + super().forward(x)[20:].detach()])


def test_the_gate_looks_at_samples_that_share_weights():
    with pytest.raises(AssertionError, match="weight is off by"):
        benchmark.check(Forgetful(784, 10, 1000), (torch.rand(40, 784) * 2 - 1).requires_grad_())


def test_embedding_bag_is_a_layer_of_degree_1(inputs):
    """The same function as FlashKAN of degree 1 from end to end of the grid, once weights are put where each has them."""
    bag, flash = benchmark.build("embedding_bag", 8, 4, 20), FlashKAN(8, 4, 20, spline_order=1)
    with torch.no_grad():
        flash.spline_weight.copy_(bag.spline_weight.view(8, 21, 4))
        flash.base_weight.copy_(bag.base_weight.t())
    torch.testing.assert_close(bag(inputs), flash(inputs), atol=1e-5, rtol=0)


PUBLISHED = """
import torch


class FastKANLayer(torch.nn.Linear):
    def __init__(self, features, outputs, low, high, num_grids):
        super().__init__(features, outputs)
        self.grid = torch.nn.Parameter(torch.linspace(low, high, num_grids), requires_grad=False)
"""


def test_layers_of_other_projects_are_measured_where_they_are_installed(tmp_path, monkeypatch, capsys):
    plan = [benchmark.Job(name, "8-4", 5) for name in ("fast-kan", "inkan")]
    monkeypatch.setattr(benchmark, "jobs", lambda device, quick: plan)
    monkeypatch.setattr(benchmark.peers, "missing", lambda name: "" if name == "fast-kan" else name)
    (tmp_path / "fastkan.py").write_text(PUBLISHED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "fastkan", None)  # what was imported before comes back after this test
    del sys.modules["fastkan"]
    benchmark.run(tmp_path / "peers.csv", "cpu")
    assert [(row["layer"], row["pass"]) for row in timing_plots.read(tmp_path)] == [("fast-kan", "forward+backward")]
    assert "left out: inkan is not installed, see layers/flash/peers.py" in capsys.readouterr().out


def test_the_sweep_of_a_gpu_has_all_of_them():
    names = {job.layer for job in benchmark.jobs("cuda", quick=True) if isinstance(job, benchmark.Job)}
    compiled = {f"{name} compiled" for name in benchmark.peers.COMPILED}
    assert set(benchmark.peers.NAMES) | compiled == set(timing_plots.OTHERS) <= names
    marks = timing.Times(2.0, 1.0, 3.0)
    jobs = [benchmark.Job(name, "8-4", 5) for name in timing_plots.OTHERS]
    assert {job.peer for job in jobs} == set(benchmark.peers.NAMES) and not benchmark.Job("FlashKAN", "8-4", 5).peer
    rows = [benchmark.row(job, "", "", marks, None, 0.0) for job in jobs]
    assert {row["layer"] for row in rows if row["k"] != 3} == {"embedding_bag"}


def test_what_is_missing_is_said_by_its_name(monkeypatch):
    monkeypatch.setattr(benchmark.peers.importlib.util, "find_spec", lambda package: None)
    assert benchmark.peers.missing("efficient-kan") == "efficient_kan"
    reason = benchmark.reason_to_skip(benchmark.Job("efficient-kan compiled", "8-4", 5), "cpu")
    assert reason.startswith("efficient_kan is not installed")


@pytest.mark.parametrize("layer", ("inkan", "FlashKAN"))
def test_only_a_layer_of_another_project_may_raise_anything(layer, tmp_path, monkeypatch, capsys):
    plan = [benchmark.Job(layer, "8-4", 5), benchmark.Job("nn.Linear", "8-4", 5)]
    monkeypatch.setattr(benchmark, "jobs", lambda device, quick: plan)
    monkeypatch.setattr(benchmark.peers, "missing", lambda name: "")
    build = benchmark.build

    def fails(name, *of):
        if name == layer:
            raise TypeError("no such argument")
        return build(name, *of)

    monkeypatch.setattr(benchmark, "build", fails)
    if layer == "FlashKAN":
        with pytest.raises(TypeError, match="no such argument"):
            benchmark.run(tmp_path / "ours.csv", "cpu")
        return
    benchmark.run(tmp_path / "theirs.csv", "cpu")
    assert {row["layer"] for row in timing_plots.read(tmp_path)} == {"nn.Linear"}
    assert "left out: TypeError: no such argument" in capsys.readouterr().out


def test_an_mlp_has_about_as_many_weights():
    for shape, size in (((784, 10), 5), ((784, 10), 500), ((512, 512), 100)):
        mlp, kan = (benchmark.build(name, *shape, size) for name in ("MLP", "FlashKAN"))
        count, wanted = (sum(p.numel() for p in model.parameters()) for model in (mlp, kan))
        assert abs(count / wanted - 1) < 0.02


def test_rows_are_whole_and_can_be_read_back(tmp_path, monkeypatch):
    plan = [benchmark.Job("FlashKAN", "8-4", 5), benchmark.Job("KANLinear", "8-4", 20)]
    monkeypatch.setattr(benchmark, "jobs", lambda device, quick: plan)
    benchmark.run(tmp_path / "small.csv", "cpu")
    with (tmp_path / "small.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == benchmark.FIELDS
    rows = timing_plots.read(tmp_path)
    assert [(row["layer"], row["G"], row["pass"]) for row in rows] == [
        (job.layer, job.size, name) for job in plan for name in benchmark.PASSES
    ]
    assert all(row["checked"] and 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in rows)
    assert {row["mode"] for row in rows} == {"eager"}
    benchmark.run(tmp_path / "small.csv", "cpu", minutes=-1)
    assert timing_plots.read(tmp_path) == []


def test_layers_that_take_turns_have_rows_of_their_own(tmp_path, monkeypatch):
    plan = (benchmark.Job("nn.Linear", "8-4", 5), benchmark.Job("FlashKAN", "8-4", 20))
    monkeypatch.setattr(benchmark, "jobs", lambda device, quick: [benchmark.InTurn(plan, rounds=2)])
    benchmark.run(tmp_path / "turns.csv", "cpu")
    rows = timing_plots.read(tmp_path)
    assert [(row["layer"], row["G"]) for row in rows] == [(job.layer, job.size) for job in plan]
    assert {(row["pass"], row["mode"], row["checked"]) for row in rows} == {("forward+backward", "in turn", True)}


def test_where_rows_are_written(tmp_path, monkeypatch):
    """In the repository beside the others; where the package alone is installed, where the benchmark is run."""
    written = []
    monkeypatch.setattr(benchmark, "run", lambda out, *_: written.append(out.parent))
    monkeypatch.setattr("sys.argv", ["benchmark", "--device", "cpu"])
    monkeypatch.chdir(tmp_path)
    benchmark.main()
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "site-packages" / "layers" / "flash" / "benchmark.py"))
    benchmark.main()
    assert written == [timing_plots.TIMINGS, tmp_path]


RIGHT, WRONG = (benchmark.Job(name, "8-4", 5) for name in ("nn.Linear", "FlashKAN"))


@pytest.mark.parametrize("job", (WRONG, benchmark.InTurn((RIGHT, WRONG), rounds=2)), ids=("alone", "in turn"))
def test_a_wrong_layer_gets_no_row_nor_do_those_it_takes_turns_with(job, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "jobs", lambda device, quick: [job])
    build = benchmark.build
    monkeypatch.setattr(
        benchmark, "build", lambda name, *of: Wrong(8, 4, 5) if name == "FlashKAN" else build(name, *of)
    )
    benchmark.run(tmp_path / "wrong.csv", "cpu")
    assert timing_plots.read(tmp_path) == []


def test_crossover_lies_where_the_lines_cross():
    local, other = {10: 10.0, 100: 10.0, 1000: 10.0}, {10: 1.0, 100: 10 * 10**0.5, 1000: 1000.0}
    # Between 10 and 100 the ratio falls from 10 to 10^-0.5: two thirds of the way.
    assert timing_plots.crossover(local, other) == pytest.approx(10 * 10 ** (2 / 3))
    assert timing_plots.crossover(other, local) is None
    assert timing_plots.crossover({5: 1.0, 10: 1.0}, {5: 2.0, 10: 2.0}) == 5
