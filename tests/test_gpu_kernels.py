"""The Triton kernels are right, GPU or not: Triton's interpreter runs them on the CPU."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.test_operator import no_cuda


def said_by(*commands: tuple[str, ...], **variables: str) -> tuple[str, ...]:
    """What modules print that run side by side, each in a process of its own."""
    pytest.importorskip("triton", reason="Triton comes with torch on Linux")
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    said, complaints = zip(*[run.communicate() for run in runs], strict=True)
    assert not any(run.returncode for run in runs), "".join(complaints)[-2000:]
    return said


def test_the_kernels_agree_with_float64():
    said = said_by(*[("tests.interpreted", str(half), "2") for half in range(2)], TRITON_INTERPRET="1")
    assert sum(int(text.split(" cases agree")[0]) for text in said) == 315


def test_the_kernels_compile(tmp_path):
    """With the Triton that is installed, for the GPU where all was measured and for the oldest one; sums are even."""
    old, new = said_by(("tests.compiled", "75"), ("tests.compiled", "90"), TRITON_CACHE_DIR=str(tmp_path))
    assert old.endswith("of 21 kernels compiled\n") and new.endswith("of 24 kernels compiled\n"), old + new


@pytest.fixture(params=range(3))
def products(request, monkeypatch):
    """Products in parts made by one of the tiles, whatever their sizes; it says how wrong they are."""
    pytest.importorskip("triton")
    from layers.flash import gpu_parts, gpu_tiles
    from tests import interpreted

    planned, side_by_side = interpreted.always(*interpreted.PLANS[request.param])
    monkeypatch.setattr(gpu_tiles, "planned", planned)
    monkeypatch.setattr(gpu_tiles, "side_by_side", side_by_side)
    gpu_parts._products.cache_clear()
    yield interpreted
    gpu_parts._products.cache_clear()


@pytest.mark.gpu
@no_cuda
def test_products_in_parts_of_numbers_of_all_sizes(products):
    """float16 has a small range; this must not show."""
    assert products.error_of_all_sizes("cuda") < 2e-5


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("case", ((300, 40, 200, 5, 3), (1030, 33, 129, 4, 2), (129, 70, 64, 9, 3)))
def test_products_in_parts_of_odd_sizes(products, case):
    with torch.device("cuda"):
        assert products.largest(products.dense_errors(case, 0)) < 1e-6


@pytest.mark.parametrize(
    "product, tile",
    (
        ((1024, 512, 12288), "LARGE"),  # 76 µs, by SMALL 84
        ((4096, 1024, 9216), "LARGE"),  # 392, 566
        ((4608, 512, 1024), "SMALL"),  # 39, by LARGE 52
        ((1024, 4608, 512), "SMALL"),  # 40, by LARGE 42
        ((7056, 64, 1024), "NARROW"),  # 13.5, by SMALL 16
        ((1024, 64, 18816), "NARROW"),  # 31, 40
    ),
)
def test_the_tile_that_was_measured_to_be_faster(product, tile):
    from layers.flash import gpu_tiles

    h200, a100 = (132, 227 * 1024), (108, 163 * 1024)
    assert gpu_tiles.plan((product,), *h200).tile is getattr(gpu_tiles, tile)
    assert gpu_tiles.plan((product,), *a100).tile is not gpu_tiles.LARGE, "it does not fit into the shared memory"


@pytest.mark.parametrize(
    "dtype, outputs, size, dense",
    (
        (torch.float16, 512, 86, True),  # backward 223 µs, by the local route 229
        (torch.float16, 512, 94, False),  # 238, 230
        (torch.bfloat16, 512, 88, True),  # 203, 208
        (torch.bfloat16, 512, 94, False),  # 216, 209
        (torch.float16, 64, 35, True),  # 117, 124
        (torch.float16, 128, 65, False),  # 120, 114
        (torch.bfloat16, 64, 45, True),  # 111, 120
        (torch.bfloat16, 128, 70, False),  # 112, 108
    ),
)
def test_the_route_that_was_measured_to_be_faster(dtype, outputs, size, dense):
    pytest.importorskip("triton")
    from layers.flash import dispatch

    weight = torch.empty(512, size + 3, outputs, dtype=dtype, device="meta")
    assert dispatch._dense_wins(torch.empty(1024, 512), weight, backward=True) is dense
    for samples, outputs, rows in (
        (256, 512, 14),
        (512, 512, 21),
        (1024, 256, 21),
        (1024, 128, 19),
        (1024, 77, 27),
        (4096, 1024, 23),
    ):
        assert dispatch.dense_wins(samples, rows, outputs, "parts", True), (samples, outputs, rows)
    for samples, outputs, rows in ((256, 512, 17), (1024, 512, 25), (1024, 64, 27), (8192, 256, 26)):
        assert not dispatch.dense_wins(samples, rows, outputs, "parts", True), (samples, outputs, rows)
    assert dispatch.dense_wins(1024, 47, 512, "parts", False) and not dispatch.dense_wins(1024, 48, 512, "parts", False)


@pytest.mark.parametrize(
    "samples, features, outputs, size, few",
    (
        (200, 784, 10, 500, True),
        (2048, 784, 10, 500, True),  # backward 263 µs, by the walk 301
        (4096, 784, 10, 5, True),  # 207, 478
        (4096, 784, 32, 5, True),  # 279, 484
        (8192, 784, 10, 29, True),  # 681, 988
        (8192, 64, 10, 5, False),  # 288, 144
        (4096, 784, 10, 100, True),  # 312, 481
        (8192, 784, 10, 100, False),  # sums in shared memory would be too long
        (4096, 784, 13, 100, False),  # and here windows too wide for them
        (200, 784, 33, 5, False),
        (500, 784, 32, 300, False),  # 102, 85
        (400, 784, 20, 100, False),  # 64, 60
        (256, 784, 20, 100, True),  # 39, 48
        (1000, 784, 32, 20, True),  # 95, 96
        (500, 784, 21, 50, True),  # such rows are not walked two samples at a time
        (1000, 784, 13, 50, True),  # 124, 120: as fast
    ),
)
def test_few_outputs_of_many_samples_go_where_it_was_measured_to_be_faster(samples, features, outputs, size, few):
    pytest.importorskip("triton")
    from layers.flash import gpu

    assert gpu._few(torch.empty(samples, features), torch.empty(features, size + 3, outputs), 3) is few


@pytest.mark.parametrize(
    "samples, features, outputs, size, forward, backward",
    (
        (10_000, 2, 32, 5, True, True),  # forward 4.5 µs, by other kernels 9.4; backward 9.4, 61.6
        (10_000, 8, 32, 100, True, True),  # 9.0, 8.9; 35, 76
        (10_000, 16, 32, 5, False, True),  # 14.5, 10.1; 21.5, 65
        (10_000, 32, 32, 100, False, False),  # 29.5, 17.5; 115, 96
        (10_000, 32, 32, 20, False, True),  # backward 49, 72
        (1000, 2, 5, 5, False, True),  # 3.4, 3.1; 5.6, 44.7
        (64, 2, 5, 5, False, False),  # backward 5.9, 5.2
        (200, 784, 10, 5, False, False),
        (300, 64, 10, 100, False, False),  # backward 12.1, 10.2
        (1000, 16, 10, 100, False, True),  # backward 10.4, 22.1
        (65_536, 2, 32, 500, True, False),  # 8.2, 42; 186, 158
        (200_000, 2, 32, 100, True, True),  # 18, 124; 168, 283
        (10_000, 2, 128, 20, True, True),  # 7.4, 9.8; 23, 53
        (4096, 8, 512, 5, False, False),  # 27, 20; 61, 50
        (2048, 32, 128, 20, False, False),  # 28, 21; 50, 35
        (65_536, 3, 64, 5, True, True),  # 17, 31; 42, 126
        (65_536, 8, 128, 5, False, False),  # 100, 78; 290, 174
    ),
)
def test_few_features_go_where_it_was_measured_to_be_faster(samples, features, outputs, size, forward, backward):
    pytest.importorskip("triton")
    from layers.flash import gpu_samples

    assert gpu_samples.takes_forward(samples, features, outputs) is forward
    assert gpu_samples.takes_backward(samples, features, size + 3, outputs) is backward


def test_pieces_of_products_have_all_samples():
    """Every row and sample is in one of them, none is empty, and no sum on tensor cores is longer than 1024."""
    pytest.importorskip("triton")
    from layers.flash import gpu_samples

    kinds = (torch.device("cpu"), torch.float32, torch.float32, torch.float32, torch.float32, None)
    for samples, features, outputs in itertools.product((100, 1000, 10_000, 1_000_000), (1, 5, 200), (1, 32, 200)):
        made = gpu_samples._backward(kinds, (samples, features, 8), outputs, 3, -1.0, 1.0, 1, 0, "tf32x3", 132)
        launch, _, (pieces, height, _) = made
        each, tiles = launch.numbers[4:6]
        assert height == 9 * features and tiles * launch.constants["BM"] >= height
        assert pieces * each >= samples > (pieces - 1) * each and 64 <= each <= 1024


def test_sums_fit_into_shared_memory():
    """48 KiB a program, of which Triton takes some for itself; places and samples share 32 bits, and five counts 64."""
    pytest.importorskip("triton")
    from layers.flash import gpu_sums

    shapes = itertools.product((1, 128, 200, 4096), (33, 103, 503, 1003, 5003), range(1, 17), range(1, 6))
    found = [gpu_sums.shape(*numbers) for numbers in shapes]
    assert gpu_sums.shape(200, 103, 10, 3).groups == 1 and gpu_sums.shape(200, 1003, 10, 3).groups == 2
    assert gpu_sums.shape(200, 103, 13, 3) is None and gpu_sums.shape(5000, 103, 10, 3) is None
    for shape in filter(None, found):
        assert shape.bytes <= 44 * 1024 and shape.listed < 2**11 and shape.warps * 12 + 12 < 64, shape


def test_a_walk_takes_no_more_samples_than_a_sum_stays_exact_for():
    pytest.importorskip("triton")
    from layers.flash import gpu_walk

    for samples, features, outputs, stretches in ((4096, 1024, 1024, 1), (8192, 256, 256, 8), (60_000, 784, 64, 15)):
        assert gpu_walk.walk_shape(samples, features, 103, outputs, 3, False, False, 132).stretches == stretches


def test_rounds_of_programs_are_full():
    """A round that is nearly empty takes as long as a full one: 1.1 rounds as long as 2, and 8.8 of an eighth as 9."""
    pytest.importorskip("triton")
    from layers.flash.gpu_walk import walk_shape
    from layers.flash.launch import fewest_parts

    for programs, together, most, parts in ((64, 396, 32, 6), (110, 100, 16, 8), (1, 100, 16, 16), (500, 100, 16, 1)):
        assert fewest_parts(programs, together, most, 1.03) == parts, (programs, together)
    assert fewest_parts(10, 100, 0, 1.03) == 1, "what cannot be cut stays whole"
    # As many walks as run at once; cut in four where a fourth of the GPU would be idle, if each is long enough.
    for samples, features, stretches in ((1024, 512, 2), (1024, 784, 4), (256, 784, 1)):
        assert walk_shape(samples, features, 103, 512, 3, False, False, 132).stretches == stretches


def test_what_a_program_sorts_fits_into_shared_memory():
    pytest.importorskip("triton")
    from layers.flash.gpu_sort import ranking

    for samples, size, how in (  # warps, inputs kept
        (200, 5, (4, True)),
        (1024, 1000, (4, True)),
        (1024, 4000, (2, True)),
        (2048, 100, (8, True)),
        (4096, 100, (16, True)),
        (8192, 100, (16, False)),
        (8192, 500, (4, False)),
        (12000, 100, None),  # PyTorch sorts
        (4096, 2400, None),
    ):
        found = ranking(samples, size, 3, False)
        assert (found and found[:2]) == how, (samples, size)
        assert found is None or found.bytes <= 44 * 1024
    assert not ranking(1024, 100, 3, True).kept, "in float64 an input does not fit into 32 bits"
    kernels = {ranking(samples, size, 3, False) for samples in range(1, 1025) for size in (5, 10, 20, 100, 500)}
    assert len(kernels) < 20, "a batch of another size shall seldom wait for a compiler"


F32, NARROW, WIDE = (False, False), (True, False), (False, True)


@pytest.mark.parametrize(
    "layer, kind, height, registers, parts",  # layer: B, I, R, O, k; height: samples of a tile
    (
        ((1024, 512, 103, 512, 3), F32, 128, 168, 6),
        ((1024, 512, 503, 512, 3), F32, 128, None, 4),
        ((1024, 512, 1003, 512, 3), F32, 256, None, 4),
        ((1024, 512, 503, 512, 3), NARROW, 64, 168, 6),
        ((1024, 512, 103, 512, 3), NARROW, 32, None, 6),
        ((1024, 512, 103, 512, 3), WIDE, 64, None, 4),
        ((1024, 512, 103, 512, 1), F32, 64, None, 4),
        ((512, 512, 103, 512, 3), F32, 64, None, 8),
        ((1100, 256, 103, 128, 3), F32, 64, None, 14),  # tall tiles would leave a fourth of the GPU idle
        ((4096, 1024, 103, 1024, 3), F32, 128, 168, 3),  # ten parts would be a little faster, and take 168 MB
    ),
)
def test_the_tiles_that_were_measured(layer, kind, height, registers, parts):
    pytest.importorskip("triton")
    from layers.flash.gpu_many import fit

    tile, split = fit(*layer, *kind, 132)
    assert (tile.samples, tile.registers, split) == (height, registers, parts)


def test_when_a_walk_takes_two_samples_at_a_time():
    """128 outputs always, 64 from three samples for each row on; never more outputs, high degrees, or single numbers."""
    pytest.importorskip("triton")
    from layers.flash.gpu_walk import walk_shape

    for outputs, rows, order, kind, two, stretches in (
        (128, 1003, 3, F32, True, 3),
        (128, 53, 3, NARROW, True, 3),
        (128, 303, 3, NARROW, False, 6),
        (64, 303, 3, F32, True, 5),
        (64, 503, 3, F32, False, 6),
        (32, 1003, 3, F32, True, 6),
        (62, 53, 3, F32, False, 6),
        (256, 53, 3, F32, False, 4),
        (64, 53, 4, F32, False, 6),
        (64, 53, 3, WIDE, False, 6),
    ):
        walk = walk_shape(1024, 512, rows, outputs, order, *kind, 132)
        assert (walk.two, walk.stretches) == (two, stretches), (outputs, rows, order, kind)


def test_the_registers_of_a_walk():
    pytest.importorskip("triton")
    from layers.flash.gpu_walk import walk_shape

    for outputs, kind, registers in (
        (512, F32, None),
        (512, NARROW, 240),
        (256, F32, 128),
        (256, WIDE, None),
        (128, F32, 168),  # samples two at a time
        (126, F32, None),
        (64, F32, 96),
        (32, F32, None),
    ):
        assert walk_shape(1024, 512, 103, outputs, 3, *kind, 132).registers == registers, (outputs, kind)


@pytest.mark.parametrize("count", (1, 300, 2**16 * 256, 2**28))
def test_no_axis_of_a_grid_is_longer_than_cuda_allows(count):
    from layers.flash.launch import block, ceil_div

    for least in (32, 256, 1024):
        each = block(count, least)
        assert each >= least and each & (each - 1) == 0 and ceil_div(count, each) < 2**16
    assert block(10**6, 32) == 32, "what is allowed stays as it was"


def test_no_part_of_a_sum_over_features_is_empty():
    """A program without features would read beyond the windows of the last one."""
    pytest.importorskip("triton")
    from layers.flash.gpu_many import fit

    for features in range(1, 1200):
        for samples, outputs, rows in ((1, 33, 8), (300, 64, 50), (1024, 512, 1003), (5, 700, 300), (1024, 512, 103)):
            for narrow in (False, True):
                _, split = fit(samples, features, rows, outputs, 3, narrow, False, 132)
                step = -(-features // split)
                assert (split - 1) * step < features <= split * step, (features, samples, outputs, rows)


@pytest.mark.parametrize(
    "setting, allowed",
    (
        ("cuda.matmul.allow_tf32 = True", True),
        ("cuda.matmul.fp32_precision = 'tf32'", True),
        ("fp32_precision = 'tf32'", True),
        ("cuda.matmul.fp32_precision = 'ieee'", False),
        ("cudnn.allow_tf32 = True", False),
    ),
)
def test_tf32_is_seen_in_the_old_setting_and_in_the_new(setting, allowed):
    """In a process of its own: PyTorch raises an error once both have been used."""
    program = (
        f"import torch; from layers.flash.launch import tf32_allowed; torch.backends.{setting}; print(tf32_allowed())"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(allowed)
