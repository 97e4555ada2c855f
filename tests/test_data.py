"""The loader: right files in every form are used, wrong ones never, and what cannot be had is said aloud.

Small IDX files with their own checksums stand for MNIST here, and no test reaches the network: the addresses and the
downloader are replaced, once by a server on this machine's own loopback address.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import math
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from data import Images, digits, inputs, load_mnist, mnist

TRAIN, TEST = 12, 6
SHAPES = {
    "train-images-idx3-ubyte": (TRAIN, 28, 28),
    "train-labels-idx1-ubyte": (TRAIN,),
    "t10k-images-idx3-ubyte": (TEST, 28, 28),
    "t10k-labels-idx1-ubyte": (TEST,),
}
NAMES = list(SHAPES)
PICTURES = NAMES[0]


def idx(shape: tuple[int, ...], seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256 if len(shape) > 1 else 10, shape, dtype=torch.uint8, generator=generator)
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values.numpy().tobytes()


GOOD = {name: idx(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """The checksum table of the small files, a small stand-in, and a network that fails the test if it is asked."""

    def forbidden(*arguments):
        raise AssertionError("this test must not need the network")

    table = {name: (hashlib.sha256(GOOD[name]).hexdigest(), shape) for name, shape in SHAPES.items()}
    monkeypatch.setattr(mnist, "FILES", table)
    monkeypatch.setattr(mnist, "enlarged_digits", functools.partial(digits.enlarged_digits, 30, 20))
    monkeypatch.setattr(mnist, "answering_mirrors", forbidden)
    monkeypatch.setattr(mnist, "download_file", forbidden)


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def network(monkeypatch) -> list[str]:
    """A network that delivers; the list fills with the names asked for."""
    asked = []

    def deliver(folder: Path, name: str, mirror: str) -> None:
        asked.append(name)
        (folder / f"{name}.gz").write_bytes(gzip.compress(GOOD[name]))
        (folder / name).write_bytes(GOOD[name])

    monkeypatch.setattr(mnist, "answering_mirrors", lambda: ["somewhere"])
    monkeypatch.setattr(mnist, "download_file", deliver)
    return asked


@pytest.fixture
def no_network(monkeypatch) -> None:
    monkeypatch.setattr(mnist, "answering_mirrors", lambda: [])


def write(raw: Path, *, gz: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> None:
    for name, content in GOOD.items():
        if name in gz:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        elif name not in without:
            (raw / name).write_bytes(content)


def assert_right(data: Images) -> None:
    """Every tensor holds what the small files hold, byte for byte."""
    assert (data.name, data.real) == ("MNIST", True)
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    for tensor, (name, shape) in zip(tensors, SHAPES.items(), strict=True):
        assert tensor.shape == shape, name
        assert tensor.dtype == (torch.uint8 if len(shape) > 1 else torch.int64), name
        assert tensor.to(torch.uint8).numpy().tobytes() == GOOD[name][4 + 4 * len(shape) :], name


# Right files


@pytest.mark.parametrize("gz", [(), tuple(NAMES), tuple(NAMES[:2])], ids=["plain", "gz", "both kinds"])
def test_whole_files_are_read_in_either_form(raw, tmp_path, gz):
    write(raw, gz=gz)
    before = sorted(path.name for path in raw.iterdir())
    assert_right(load_mnist(tmp_path))
    assert_right(load_mnist(str(tmp_path), download=False))
    assert sorted(path.name for path in raw.iterdir()) == before, "reading must write nothing"


def test_the_real_mnist(monkeypatch):
    monkeypatch.undo()
    root = Path(mnist.__file__).parent
    if not all(
        (root / "MNIST" / "raw" / name).exists() or (root / "MNIST" / "raw" / f"{name}.gz").exists() for name in NAMES
    ):
        pytest.skip("MNIST is not in data/MNIST/raw on this machine")
    data = load_mnist(download=False)
    assert (data.name, data.real) == ("MNIST", True)
    assert data.train_images.shape == (60_000, 28, 28) and data.test_images.shape == (10_000, 28, 28)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    # Well known from every normalisation of MNIST: mean 0.1307 and standard deviation 0.3081 of the training pixels.
    pixels = data.train_images.float() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)


# Wrong files


def damage_truncated(raw: Path, name: str) -> None:
    (raw / name).write_bytes(GOOD[name][:-5])


def damage_empty(raw: Path, name: str) -> None:
    (raw / name).write_bytes(b"")


def damage_altered(raw: Path, name: str) -> None:
    content = bytearray(GOOD[name])
    content[-3] ^= 1
    (raw / name).write_bytes(content)


def damage_longer(raw: Path, name: str) -> None:
    (raw / name).write_bytes(GOOD[name] + b"\0")


def damage_altered_gz(raw: Path, name: str) -> None:
    content = bytearray(GOOD[name])
    content[-3] ^= 1
    (raw / f"{name}.gz").write_bytes(gzip.compress(content))


def damage_truncated_gz(raw: Path, name: str) -> None:
    (raw / f"{name}.gz").write_bytes(gzip.compress(GOOD[name])[:-20])


def damage_broken_gz(raw: Path, name: str) -> None:
    stream = bytearray(gzip.compress(GOOD[name]))
    stream[10] |= 0b110  # a block type that does not exist
    (raw / f"{name}.gz").write_bytes(stream)


def damage_checksum_gz(raw: Path, name: str) -> None:
    stream = bytearray(gzip.compress(GOOD[name]))
    stream[-8] ^= 1  # gzip's own checksum of the content
    (raw / f"{name}.gz").write_bytes(stream)


def damage_not_gz(raw: Path, name: str) -> None:
    (raw / f"{name}.gz").write_bytes(b"<html>404 Not Found</html>")


def damage_folder(raw: Path, name: str) -> None:
    (raw / f"{name}.gz").mkdir()


DAMAGES = [
    (damage_truncated, "is truncated"),
    (damage_empty, "is truncated (0 of"),
    (damage_altered, "is altered"),
    (damage_longer, "is altered (longer"),
    (damage_altered_gz, ".gz is altered"),
    (damage_truncated_gz, ".gz is truncated"),
    (damage_broken_gz, ".gz is damaged"),
    (damage_checksum_gz, ".gz is damaged"),
    (damage_not_gz, ".gz is damaged"),
    (damage_folder, ".gz cannot be read"),
]
each_damage = pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[d.__name__[7:] for d, _ in DAMAGES])
each_name = pytest.mark.parametrize("name", NAMES)


@each_damage
@each_name
def test_a_wrong_file_is_named_and_fetched_again(raw, tmp_path, network, damage, words, name):
    write(raw, without=(name,))
    damage(raw, name)
    with pytest.warns(UserWarning, match=f"{name}.*fetched again") as caught:
        data = load_mnist(tmp_path)
    assert words in str(caught[0].message)
    assert len(caught) == 1 and caught[0].filename == __file__, "one sentence, pointing at the caller"
    assert_right(data)
    assert network == [name], "only the wrong file is fetched"
    assert_right(load_mnist(tmp_path))  # without a warning: what was fetched has been kept


@each_damage
def test_a_wrong_file_that_cannot_be_replaced_is_not_used(raw, tmp_path, no_network, capsys, damage, words):
    write(raw, without=(PICTURES,))
    damage(raw, PICTURES)
    with pytest.warns(UserWarning, match=f"{PICTURES}.*could not be replaced"):
        data = load_mnist(tmp_path)
    assert not data.real
    assert words in " ".join(capsys.readouterr().out.replace("#", " ").split())
    with pytest.raises(FileNotFoundError, match=PICTURES):
        load_mnist(tmp_path, download=False)


@pytest.mark.parametrize("damage", [damage_truncated, damage_empty, damage_altered, damage_longer])
def test_a_whole_gz_serves_where_the_plain_file_is_wrong(raw, tmp_path, damage):
    write(raw, gz=tuple(NAMES))
    damage(raw, PICTURES)
    with pytest.warns(UserWarning, match=f"{PICTURES} is .* the .gz beside it was used"):
        assert_right(load_mnist(tmp_path))
    assert (raw / PICTURES).read_bytes() == GOOD[PICTURES], "torchvision would read the plain file: it must be right"
    assert_right(load_mnist(tmp_path, download=False))


def test_a_whole_plain_file_serves_whatever_the_gz_is(raw, tmp_path):
    write(raw)
    damage_broken_gz(raw, PICTURES)
    assert_right(load_mnist(tmp_path))


def test_both_forms_wrong_are_both_named(raw, tmp_path, network):
    write(raw, without=(PICTURES,))
    damage_truncated(raw, PICTURES)
    damage_not_gz(raw, PICTURES)
    with pytest.warns(UserWarning, match=f"{PICTURES} is truncated .*, {PICTURES}.gz is damaged .*fetched again"):
        assert_right(load_mnist(tmp_path))


# Downloads


@each_name
def test_one_missing_file_is_fetched_alone_and_without_a_warning(raw, tmp_path, network, name):
    write(raw, without=(name,))
    assert_right(load_mnist(tmp_path))
    assert network == [name]


def test_everything_is_fetched_into_an_empty_folder_that_does_not_exist(tmp_path, network):
    assert_right(load_mnist(tmp_path / "not" / "there"))
    assert network == NAMES
    assert sorted(p.name for p in (tmp_path / "not" / "there" / "MNIST" / "raw").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("error", [ConnectionResetError("cut"), RuntimeError("not found"), TimeoutError(), EOFError()])
def test_a_download_that_breaks_half_way_loses_nothing(raw, tmp_path, monkeypatch, network, capsys, error):
    deliver = mnist.download_file

    def break_at_the_third(folder: Path, name: str, mirror: str) -> None:
        if name == NAMES[2]:
            (folder / f"{name}.gz").write_bytes(gzip.compress(GOOD[name])[:100])
            (folder / name).write_bytes(GOOD[name][:100])
            raise error
        deliver(folder, name, mirror)

    monkeypatch.setattr(mnist, "download_file", break_at_the_third)
    write(raw, without=(NAMES[1], NAMES[2]))
    kept = {name: (raw / name).stat() for name in (NAMES[0], NAMES[3])}
    assert not load_mnist(tmp_path).real
    assert type(error).__name__ in capsys.readouterr().out
    for name, before in kept.items():
        now = (raw / name).stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert (raw / NAMES[1]).read_bytes() == GOOD[NAMES[1]], "what did arrive whole is kept"
    assert sorted(p.name for p in raw.iterdir()) == sorted([NAMES[0], NAMES[1], NAMES[3]]), "no half file, no scratch"
    # and the next attempt needs the rest only
    monkeypatch.setattr(mnist, "download_file", deliver)
    network.clear()
    assert_right(load_mnist(tmp_path))
    assert network == [NAMES[2]]


def test_a_wrong_delivery_is_refused_and_the_next_address_asked(raw, tmp_path, monkeypatch, network):
    deliver, asked = mnist.download_file, []

    def first_one_lies(folder: Path, name: str, mirror: str) -> None:
        asked.append(mirror)
        if mirror == "liar":
            return damage_altered(folder, name)
        return deliver(folder, name, mirror)

    monkeypatch.setattr(mnist, "answering_mirrors", lambda: ["liar", "honest"])
    monkeypatch.setattr(mnist, "download_file", first_one_lies)
    write(raw, without=(PICTURES,))
    assert_right(load_mnist(tmp_path))
    assert asked == ["liar", "honest"]
    assert (raw / PICTURES).read_bytes() == GOOD[PICTURES]


def test_only_wrong_deliveries_never_take_a_place(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "answering_mirrors", lambda: ["liar"])
    monkeypatch.setattr(mnist, "download_file", lambda folder, name, mirror: damage_altered(folder, name))
    damage_truncated(raw, PICTURES)
    with pytest.warns(UserWarning, match=f"{PICTURES} is truncated"):
        assert not load_mnist(tmp_path).real
    assert "what arrived was not right" in capsys.readouterr().out
    assert [p.name for p in raw.iterdir()] == [PICTURES]
    assert (raw / PICTURES).read_bytes() == GOOD[PICTURES][:-5]


def test_a_disk_that_cannot_be_written_does_not_stop_the_loading(raw, tmp_path, monkeypatch, network):
    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(mnist.os, "replace", full)
    assert_right(load_mnist(tmp_path))
    assert list(raw.iterdir()) == []


def test_the_socket_timeout_is_set_for_the_download_and_restored(tmp_path, monkeypatch, network):
    seen = []

    def fail(folder, name, mirror):
        seen.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(mnist, "download_file", fail)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(33)
    try:
        assert not load_mnist(tmp_path).real
        assert seen == [mnist.STALL_SECONDS]
        assert socket.getdefaulttimeout() == 33
    finally:
        socket.setdefaulttimeout(before)


def test_silent_addresses_are_given_up_within_the_time_limit(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("torchvision")
    release = threading.Event()

    def never(request, timeout):
        release.wait(30)
        raise OSError("at last")

    monkeypatch.setattr(mnist, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(mnist.urllib.request, "urlopen", never)
    start = time.monotonic()
    try:
        assert mnist.answering_mirrors() == []
        assert time.monotonic() - start < 5
    finally:
        release.set()


class Handler(http.server.BaseHTTPRequestHandler):
    """/whole/ delivers, /cut/ closes the line in the middle of a file, anything else is 404."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        _, place, name = self.path.split("/")
        content = gzip.compress(GOOD[name.removesuffix(".gz")], mtime=0)
        self.send_response(200 if place in ("whole", "cut") else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content if place == "whole" else content[: len(content) // 2])
            self.close_connection = True

    def log_message(self, *arguments) -> None:
        pass


def test_torchvision_downloads_past_an_address_that_breaks_off(raw, tmp_path, monkeypatch):
    """The true path, torchvision included, against a server of our own: one address is gone, one breaks off."""
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.undo()
    table = {name: (hashlib.sha256(GOOD[name]).hexdigest(), shape) for name, shape in SHAPES.items()}
    monkeypatch.setattr(mnist, "FILES", table)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    md5 = {n: hashlib.md5(gzip.compress(c, mtime=0), usedforsecurity=False).hexdigest() for n, c in GOOD.items()}
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(f"{name}.gz", md5[name]) for name in NAMES])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        mirrors = [f"{here}/{place}/" for place in ("gone", "cut", "whole")]
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", mirrors)
        try:
            assert mnist.answering_mirrors() == mirrors[1:]
            assert_right(load_mnist(tmp_path))
        finally:
            server.shutdown()
    assert sorted(p.name for p in raw.iterdir()) == sorted(NAMES)
    assert_right(load_mnist(tmp_path, download=False))


# The stand-in


def test_without_a_network_the_stand_in_says_so(tmp_path, no_network, capsys):
    data = load_mnist(tmp_path)
    assert (data.name, data.real) == ("scikit-learn digits (enlarged)", False)
    assert data.train_images.shape == (30, 28, 28) and data.test_labels.shape == (20,)
    rows = capsys.readouterr().out.strip().split("\n")
    assert len(rows) > 10 and all(len(row) == 80 and row[0] == row[-1] == "#" for row in rows), "a whole box"
    text = " ".join("\n".join(rows).replace("#", " ").split())
    assert "THIS IS NOT MNIST" in text
    assert "SPEAKS OF THAT DATA SET, NOT OF MNIST" in text
    assert data.name in text and "no network" in text
    assert all(f"{name} is missing" in text for name in NAMES)
    assert str(tmp_path) not in text, "the banner ends up in notebooks: no path of this machine"


def test_the_stand_in_needs_scikit_learn(tmp_path, no_network, monkeypatch):
    def absent():
        raise ImportError("no module named sklearn")

    monkeypatch.setattr(mnist, "enlarged_digits", absent)
    with pytest.raises(ImportError, match=r"train-images-idx3-ubyte is missing.*pip install scikit-learn"):
        load_mnist(tmp_path)


def test_mnist_or_an_error_when_the_download_is_not_allowed(raw, tmp_path):
    write(raw, without=(NAMES[3],))
    with pytest.raises(FileNotFoundError, match=f"{NAMES[3]} is missing"):
        load_mnist(tmp_path, download=False)


# The format, the class, the inputs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must begin with the IDX header"),
        (GOOD[NAMES[1]], "must begin with the IDX header"),
        (GOOD[PICTURES].replace(b"\0\0\x08\x03", b"\0\0\x09\x03", 1), "must begin with the IDX header"),
        (GOOD[PICTURES].replace(b"\0\0\0\x1c", b"\0\0\0\x1b", 1), "must begin with the IDX header"),
        (GOOD[PICTURES][:-1], "must be 9,424 bytes long, got 9,423"),
        (GOOD[PICTURES] + b"\0", "must be 9,424 bytes long, got 9,425"),
    ],
)
def test_a_wrong_idx_file_is_refused(content, words):
    with pytest.raises(ValueError, match=f"pictures {words}"):
        mnist.parse_idx(content, (TRAIN, 28, 28), "pictures")


def test_a_label_above_nine_is_refused():
    header = struct.pack(">HBBI", 0, 8, 1, 3)
    assert mnist.parse_idx(header + b"\0\x09\x05", (3,)).tolist() == [0, 9, 5]
    with pytest.raises(ValueError, match="labels from 0 to 9, got 10"):
        mnist.parse_idx(header + b"\0\x0a\x05", (3,))


def test_images_move_and_describe_themselves(raw, tmp_path):
    write(raw)
    data = load_mnist(tmp_path)
    assert data.device == torch.device("cpu")
    assert data.to("cpu").train_images.data_ptr() == data.train_images.data_ptr()
    moved = load_mnist(tmp_path, device="meta")
    assert moved.device == moved.train_labels.device == moved.test_images.device == moved.test_labels.device
    assert moved.device == torch.device("meta") and (moved.name, moved.real) == ("MNIST", True)
    assert repr(data) == "Images('MNIST', 12 to learn from, 6 to test on, device='cpu')"
    with pytest.raises(AttributeError):
        data.name = "other"


def test_root_must_be_a_path():
    with pytest.raises(TypeError, match="root must be a path or None, got 5"):
        load_mnist(5)


EVERY_GREY = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
AWKWARD = [(-1, 1), (0, 1), (-1e3, 1e3), (999.5, 1000), (-1 / 3, 1e-2), (0.1, 0.2), (-1e-3, 1e2)]


def random_grids(count: int) -> list[tuple[float, float]]:
    """Grids with ends from -1000 to 1000 that float32 holds, at least 0.01 wide; the same ones in every run."""
    ends = torch.empty(count, 2).uniform_(-1e3, 1e3, generator=torch.Generator().manual_seed(0)).sort(-1).values
    return [(lo, hi) for lo, hi in ends.tolist() if hi - lo > 1e-2]


@pytest.mark.parametrize("pair", AWKWARD + random_grids(100))
def test_inputs_end_exactly_on_the_grid(pair):
    lo, hi = torch.tensor(pair, dtype=torch.float32).tolist()
    x = inputs(EVERY_GREY, (lo, hi))
    assert x.dtype == torch.float32 and x.shape == (1, 256)
    assert x[0, 0].item() == lo and x[0, 255].item() == hi
    exact = lo + (hi - lo) * torch.arange(256, dtype=torch.float64) / 255
    # Three roundings, each of at most half a unit in the last place of a number no larger than the larger end or span.
    bound = 3 * 2.0**-24 * max(abs(lo), abs(hi), hi - lo)
    assert (x[0].double() - exact).abs().max().item() <= bound


def test_inputs_keep_leading_shapes_and_the_images():
    images = torch.randint(0, 256, (3, 2, 28, 28), dtype=torch.uint8)
    before = images.clone()
    assert inputs(images).shape == (3, 2, 784)
    assert torch.equal(inputs(images)[1, 1], inputs(images[1, 1])), "one image alone gives its own row"
    assert torch.equal(inputs(images.mT), inputs(images.mT.contiguous()))
    assert inputs(images[:0]).shape == (0, 2, 784)
    assert torch.equal(images, before)
    assert Images.inputs is inputs


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(2, 28, 28),), TypeError, "images must be a uint8 tensor, got torch.float32"),
        (([[0]],), TypeError, "images must be a uint8 tensor, got list"),
        ((torch.zeros(784, dtype=torch.uint8),), ValueError, "images must have shape"),
        ((EVERY_GREY, 1), TypeError, "grid_range must be two numbers"),
        ((EVERY_GREY, ("a", "b")), TypeError, "grid_range must be two numbers"),
        ((EVERY_GREY, (1, 0)), ValueError, "grid_range must be two finite numbers"),
        ((EVERY_GREY, (0, 0)), ValueError, "grid_range must be two finite numbers"),
        ((EVERY_GREY, (0, math.inf)), ValueError, "grid_range must be two finite numbers"),
        ((EVERY_GREY, (math.nan, 1)), ValueError, "grid_range must be two finite numbers"),
    ],
)
def test_inputs_refuse_with_one_sentence(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        inputs(*arguments)
    assert "\n" not in str(caught.value)


def test_importing_data_loads_neither_torchvision_nor_scikit_learn():
    code = "import sys, data; print(sorted({'torchvision', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)))"
    root = Path(mnist.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
