"""The training loop of the notebooks: same seed, same run; what the log says is what happened; clear errors."""

import csv
import datetime
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import Images
from layers import FlashKAN, KANLinear
from layers.tutorial import sweep_mnist, training


def drawings(seed=0, count=230):
    """Random images of which the brightness tells the label, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randint(0, 30, (count, 28, 28), generator=generator)
    return (labels[:, None, None] * 24 + noise).to(torch.uint8), labels


@pytest.fixture
def mnist():
    return Images("made up", False, *drawings(0), *drawings(1, 70))


@pytest.fixture
def data(mnist):
    return training.digits(mnist)


def layer(kind=FlashKAN, **how):
    torch.manual_seed(0)
    return kind(784, 10, 4, grid_range=(0, 1), **how)


def test_digits_map_pixels_to_the_range(mnist):
    for lo, hi in ((0, 1), (-1, 1)):
        data = training.digits(mnist, (lo, hi))
        expected = lo + (hi - lo) * mnist.train_images.flatten(1).double() / 255
        assert data.train[0].dtype == torch.float32 and data.name == "made up"
        assert torch.allclose(data.train[0].double(), expected, atol=1e-6)
        assert torch.equal(data.test[1], mnist.test_labels)
    assert training.digits(mnist, dtype=torch.float64).test[0].dtype == torch.float64


def test_batches_show_everything_once_an_epoch():
    order = training.batches(23, 5, seed=3)
    epochs = [torch.cat([next(order) for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 20 and epoch.max() < 23
    assert not torch.equal(epochs[0], epochs[1])
    again = training.batches(23, 5, seed=3)
    assert torch.equal(epochs[0][:5], next(again))
    assert not torch.equal(epochs[0][:5], next(training.batches(23, 5, seed=4)))


@pytest.mark.parametrize("batch", [0, 24, 2.5, True])
def test_bad_batches(batch):
    with pytest.raises(ValueError, match="batch must be an integer from 1 to the number of images, 23, got"):
        training.batches(23, batch, seed=0)


def test_evaluate_is_the_loss_and_the_share_that_is_right(monkeypatch, data):
    monkeypatch.setattr(training, "EVALUATE_AT_ONCE", 32)
    model = nn.Sequential(training.Blank(0.5), layer())
    x, labels = data.test
    out = model[1](x)
    loss, accuracy = training.evaluate(model, x, labels)
    assert math.isclose(loss, F.cross_entropy(out, labels).item(), rel_tol=1e-5)
    assert accuracy == (out.argmax(1) == labels).sum().item() / len(labels)
    assert model.training


def test_one_seed_is_one_run(data):
    logs = [training.fit(layer(), data, epochs=2, batch=50, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(logs[0].steps, logs[1].steps) and logs[0].test_loss == logs[1].test_loss
    assert not torch.equal(logs[0].steps, logs[2].steps)


def test_the_log_says_what_happened(data):
    model = layer()
    log = training.fit(model, data, epochs=3, batch=50)
    assert [len(column) for column in (log.loss, log.train_accuracy, log.test_loss, log.test_accuracy)] == [3] * 4
    assert len(log.steps) == 3 * 4
    assert log.loss == pytest.approx(log.steps.view(3, 4).mean(1).tolist())
    assert (log.test_loss[-1], log.test_accuracy[-1]) == training.evaluate(model, *data.test)
    assert log.loss[-1] < log.loss[0] and log.train_accuracy[-1] > log.train_accuracy[0]
    assert all(seconds > 0 for seconds in log.seconds)
    assert log.line(0).split()[:2] == ["1", f"{log.loss[0]:.4f}"] and log.line().split()[0] == "3"


def test_one_epoch_by_hand(data):
    """Adam, the cosine, the batches and the penalty: the loop written once more in a few lines."""
    model, other = layer(), layer()
    log = training.fit(model, data, epochs=2, batch=50, lr=1e-2, penalty=lambda: 1e-3 * model.smoothness(), seed=7)
    optimiser = torch.optim.Adam(other.parameters(), lr=1e-2, betas=(0.9, 0.99))
    order, steps = training.batches(230, 50, 7), []
    for step in range(8):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 8)) / 2
        index = next(order)
        loss = F.cross_entropy(other(data.train[0][index]), data.train[1][index])
        optimiser.zero_grad()
        (loss + 1e-3 * other.smoothness()).backward()
        optimiser.step()
        steps.append(loss.item())
    assert log.steps.tolist() == pytest.approx(steps, rel=1e-5)
    assert torch.allclose(model.spline_weight, other.spline_weight, atol=1e-4)


def test_two_kinds_of_layer_take_one_path(mnist):
    data, paths = training.digits(mnist, dtype=torch.float64), []
    for kind in (FlashKAN, KANLinear):
        paths.append(training.fit(layer(kind, dtype=torch.float64), data, epochs=5, batch=20).steps)
    assert (paths[0] - paths[1]).abs().max() < 1e-8


def test_progress_and_table(capsys, data):
    training.fit(layer(), data, epochs=2, batch=100, title="a title")
    shown = capsys.readouterr()
    lines = [line.split("\r")[-1] for line in shown.out.splitlines()]
    assert training.Log.HEAD in lines and shown.err == ""
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ["1", "2"]
    assert "a title: 100%" in shown.out
    training.fit(layer(), data, epochs=1, batch=100)
    assert capsys.readouterr() == ("", "")


def test_a_run_that_diverges_is_stopped(data):
    model = layer()
    model.spline_weight.data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the loss is not finite any more in step 1; lr=0\.01 may be too high"):
        training.fit(model, data, epochs=3, batch=50, lr=1e-2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"lr": 0}, "lr must be above 0, got 0"),
        ({"batch": 1000}, "batch must be an integer from 1 to the number of images, 230, got 1000"),
    ],
)
def test_bad_settings(data, wrong, said):
    with pytest.raises(ValueError) as raised:
        training.fit(layer(), data, **wrong)
    assert str(raised.value) == said


def test_blank():
    blank, x = training.Blank(0.25, paper=-1.0), torch.rand(200, 200)
    torch.manual_seed(0)
    out = blank(x)
    gone = out == -1
    assert torch.equal(out[~gone], x[~gone])
    # 40,000 draws: the share is 0.25 to within 0.0022 (one standard deviation); six of them
    assert abs(gone.double().mean().item() - 0.25) < 0.013
    assert torch.equal(blank.eval()(x), x)
    with pytest.raises(ValueError, match="p must be at least 0 and below 1, got 1"):
        training.Blank(1)


def test_edges():
    x = torch.rand(2, 3, 784)
    out = training.Edges()(x)
    assert out.shape == (2, 3, 3 * 784) and torch.equal(out[..., :784], x) and out.min() >= 0 and out.max() <= 1
    page, right, below = (part.unflatten(-1, (28, 28)) for part in out.split(784, -1))
    assert torch.allclose(right[..., 5, 7] * 2 - 1, page[..., 5, 7] - page[..., 5, 8], atol=1e-6)
    assert torch.allclose(below[..., 5, 7] * 2 - 1, page[..., 5, 7] - page[..., 6, 7], atol=1e-6)
    assert torch.allclose(right[..., 27], (1 + page[..., 27]) / 2) and torch.allclose(
        below[..., 27, :], (1 + page[..., 27, :]) / 2
    )


def test_the_network_and_its_rivals():
    kan, widths = training.network(), training.mlp_widths()
    assert kan(torch.rand(3, 784)).shape == (3, 10)
    assert training.weights(kan) == sum(p.numel() for layer in (kan[0], kan[2]) for p in layer.parameters())
    assert training.multiplications(kan) == 5 * (784 * 64 + 64 * 10)
    assert widths["as many hidden units"] == kan[0].out_features
    same_work = training.mlp(widths["as many multiplications"])
    assert training.multiplications(same_work) == pytest.approx(training.multiplications(kan), abs=794)
    assert training.weights(training.mlp(widths["as many weights"])) == pytest.approx(training.weights(kan), abs=795)


def test_the_sweep_writes_rows_that_the_notebook_finds(monkeypatch, tmp_path, mnist):
    monkeypatch.setattr(sweep_mnist, "load_mnist", lambda: mnist)
    monkeypatch.setattr(sweep_mnist, "QUICK_GRIDS", (4,))
    monkeypatch.setattr(training, "BATCH", 50)
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *args, **how: fit(*args, **{**how, "epochs": 1, "batch": 50}))
    out = tmp_path / "results" / "sweep.csv"
    for _ in range(2):  # the second time replaces the rows of the first
        sweep_mnist.main(["--quick", "--parts", "grid", "--device", "cpu", "--out", str(out)])
    rows = sweep_mnist.read(out)
    assert len(rows) == 3 and set(rows[0]) == set(sweep_mnist.FIELDS)
    assert rows[0]["data"] == "made up" and rows[0]["torch"] == torch.__version__
    with out.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    found = sweep_mnist.numbers(rows, part="grid", name="FlashKAN", grid_size=4, lam=training.LAM)
    assert found == [float(rows[1]["test_accuracy"])]
    assert sweep_mnist.mean(rows, part="grid", name="linear") == float(rows[2]["test_accuracy"])
    with pytest.raises(ValueError, match="no row of the sweep fits"):
        sweep_mnist.numbers(rows, part="grid", name="FlashKAN", grid_size=5)


def test_the_committed_sweep_is_of_mnist():
    rows = sweep_mnist.read()
    assert rows and {row["data"] for row in rows} == {"MNIST"}
    keys = [tuple(row[name] for name in sweep_mnist.KEY) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(0 < float(row["test_accuracy"]) < 1 for row in rows)
    for row in rows:  # a placeholder has no machine, no version and no day
        assert row["device"] == "CPU" or row["device"].startswith("NVIDIA "), row
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", row["torch"]), row
        assert datetime.date.fromisoformat(row["date"]) >= datetime.date(2026, 11, 24), row
