"""MNIST as four tensors, loaded once, checked byte for byte.

The data: Y. LeCun, C. Cortes and C. J. C. Burges, *The MNIST database of handwritten digits* (1998): 60,000 drawings to
learn from and 10,000 to be tested on, 28x28 grey values, in four files of the format IDX (a short big-endian header,
then the bytes). They are kept where torchvision keeps them, in ``MNIST/raw``, plain or as ``.gz``.

A file is used only if the SHA-256 of its uncompressed content is the right one. A missing or damaged file is fetched
with torchvision; where that fails too, :mod:`data.digits` stands in, loudly.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import socket
import struct
import tempfile
import textwrap
import threading
import time
import urllib.request
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from data.digits import enlarged_digits

STAND_IN = "scikit-learn digits (enlarged)"

# name: (SHA-256 of the uncompressed file, shape)
FILES = {
    "train-images-idx3-ubyte": ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": ("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", (60_000,)),
    "t10k-images-idx3-ubyte": ("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": ("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", (10_000,)),
}

ANSWER_SECONDS = 10  # how long an address may take to answer at all; then there is no network
STALL_SECONDS = 10  # how long a download may stand still before it counts as broken
DOWNLOAD_ERRORS = (OSError, RuntimeError, HTTPException, EOFError, zlib.error, ImportError)


def inputs(images: Tensor, grid_range: tuple[float, float] = (-1, 1)) -> Tensor:
    """Grey values as the inputs of a layer: uint8 (*, H, W) to float32 (*, H * W), made on the images' own device.

    Pixel 0 becomes exactly the low end of ``grid_range``, 255 exactly the high end (both rounded to float32), and the
    254 values between them are evenly spaced.

    Args:
        images: uint8, at least two dimensions; (N, 28, 28) gives (N, 784).
        grid_range: two finite numbers, low < high; by default (-1, 1), as in the layers.

    Raises:
        TypeError: images is not a uint8 tensor, or grid_range is not two numbers.
        ValueError: images has fewer than two dimensions, or grid_range is empty, reversed or not finite.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a uint8 tensor, got {got}")
    if images.ndim < 2:
        raise ValueError(f"images must have shape (*, height, width), got {tuple(images.shape)}")
    try:
        lo, hi = grid_range
    except (TypeError, ValueError):
        lo = hi = None
    if not (isinstance(lo, Real) and isinstance(hi, Real)):
        raise TypeError(f"grid_range must be two numbers (low, high), got {grid_range!r}")
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(f"grid_range must be two finite numbers with low < high, got ({lo}, {hi})")
    x = images.flatten(-2).to(torch.float32).div_(255)
    # lerp hits both ends exactly; lo + x * (hi - lo) can miss the high one by a rounding error. torch.full, unlike
    # torch.tensor, makes its value on the device, with no copy from the host to wait for.
    ends = (torch.full((), float(end), dtype=torch.float32, device=x.device) for end in (lo, hi))
    return torch.lerp(*ends, x, out=x)


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Drawings of the ten digits and their labels, on one device.

    Attributes:
        name: of the data set, for every title and table: "MNIST", or the stand-in's name.
        real: True for MNIST itself, False for the stand-in.
        train_images: (60000, 28, 28) uint8, 0 = paper, 255 = ink.
        train_labels: (60000,) int64, 0..9.
        test_images: (10000, 28, 28) uint8.
        test_labels: (10000,) int64.
    """

    name: str
    real: bool
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    inputs = staticmethod(inputs)  # so that mnist.inputs(mnist.train_images) reads as it should

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.train_images.device

    def to(self, device: torch.device | str) -> Images:
        """The same data on ``device`` (about 55 MB to move); tensors that are there already are shared, not copied."""
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def __repr__(self) -> str:
        n, m = len(self.train_images), len(self.test_images)
        return f"Images({self.name!r}, {n:,} to learn from, {m:,} to test on, device={str(self.device)!r})"


def load_mnist(
    root: str | os.PathLike | None = None, *, download: bool = True, device: torch.device | str | None = None
) -> Images:
    """Loads MNIST from ``root/MNIST/raw``, fetching what is missing or damaged.

    Args:
        root: the folder that holds ``MNIST/raw``, as in torchvision. Default: this package's own folder.
        download: whether the network may be used and, where it fails, scikit-learn's digits may stand in (with a
            banner; ``.real`` is then False and ``.name`` says what it is). With False it is MNIST or an error.
        device: where the tensors go. Default: the CPU.

    Returns:
        :class:`Images`. Pixels stay uint8 (55 MB in all); :func:`inputs` makes floats of them on the device.

    Warns:
        UserWarning: a file was truncated, altered or unreadable; names it and says what was done about it.

    Raises:
        FileNotFoundError: ``download=False`` and a file is missing or damaged; names it.
        ImportError: MNIST cannot be had and scikit-learn, which would stand in, is not installed.
        TypeError: root is not a path.
    """
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"root must be a path or None, got {root!r}")
    device = torch.device("cpu" if device is None else device)
    root = Path(__file__).parent if root is None else Path(root).expanduser()
    raw = root / "MNIST" / "raw"

    contents, problems, notes, damaged = {}, [], [], []
    for name in FILES:
        content, faults = read_file(raw, name)
        if content is None:
            problems += faults or [f"{name} is missing"]
            damaged += faults
            continue
        contents[name] = content
        if faults:
            keep(raw, name, content)
            notes.append(f"{_listed(faults)}, so the .gz beside it was used, which is whole")

    lacking = [name for name in FILES if name not in contents]
    if lacking and not download:
        raise FileNotFoundError(
            f"MNIST is not complete in {raw}: {_listed(problems)}; put the four files there, or allow the download"
        )
    failure = None
    if lacking:
        fetched, failure = fetch(raw, lacking)
        contents |= fetched
    if damaged:
        outcome = "was fetched again" if failure is None else "was not used, and could not be replaced"
        notes.append(f"{_listed(damaged)}, and {outcome}")
    if notes:
        warnings.warn(f"MNIST: {'; '.join(notes)}.", stacklevel=2)
    if failure is not None:
        return _stand_in(problems, failure).to(device)
    tensors = (parse_idx(contents[name], shape, name) for name, (_, shape) in FILES.items())
    return Images("MNIST", True, *tensors).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def parse_idx(content: bytes, shape: tuple[int, ...], name: str = "the file") -> Tensor:
    """Reads an IDX file of unsigned bytes that must hold exactly ``shape``.

    The header is ``00 00 08 d`` (08: unsigned bytes, d: how many dimensions), then d sizes of four bytes, big-endian.

    Args:
        content: the uncompressed file.
        shape: (N, 28, 28) for images, (N,) for labels.
        name: of the file, for the errors.

    Returns:
        uint8 of ``shape`` for images; int64 (N,), each 0..9, for labels.

    Raises:
        ValueError: the header does not say ``shape``, the length is another, or a label is above 9.
    """
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    if not content.startswith(header):
        got = bytes(content[: len(header)]).hex(" ", 4)
        raise ValueError(f"{name} must begin with the IDX header {header.hex(' ', 4)} of shape {shape}, got {got}")
    if len(content) != len(header) + math.prod(shape):
        raise ValueError(f"{name} must be {len(header) + math.prod(shape):,} bytes long, got {len(content):,}")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).reshape(shape)
    if len(shape) > 1:
        return values
    if values.numel() and values.max() > 9:
        raise ValueError(f"{name} must hold labels from 0 to 9, got {values.max().item()}")
    return values.to(torch.int64)


def read_file(raw: Path, name: str) -> tuple[bytes | None, list[str]]:
    """Reads one of ``FILES``: the plain file, or else its ``.gz``, whichever is whole.

    Returns:
        The checked, uncompressed content, or None if neither form is whole; and what is wrong with each form that was
        looked at and is there, such as "train-images-idx3-ubyte is truncated (1,000 of 47,040,016 bytes)".
    """
    faults = []
    checksum, shape = FILES[name]
    size = 4 + 4 * len(shape) + math.prod(shape)
    for path in (raw / name, raw / f"{name}.gz"):
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
                content = stream.read(size + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except EOFError:
            faults.append(f"{path.name} is truncated (its gzip stream breaks off)")
        except (gzip.BadGzipFile, zlib.error):
            faults.append(f"{path.name} is damaged (not a valid gzip stream)")
        except OSError as error:
            faults.append(f"{path.name} cannot be read ({error.strerror or type(error).__name__})")
        else:
            if len(content) < size:
                faults.append(f"{path.name} is truncated ({len(content):,} of {size:,} bytes)")
            elif len(content) > size:
                faults.append(f"{path.name} is altered (longer than {size:,} bytes)")
            elif hashlib.sha256(content).hexdigest() != checksum:
                faults.append(f"{path.name} is altered (its SHA-256 is not {checksum[:8]}...)")
            else:
                return content, faults
    return None, faults


def keep(raw: Path, name: str, content: bytes) -> None:
    """Puts checked content in place in one step, so that no reader ever sees half a file and nothing whole is lost.

    If it cannot be written (a full or read-only disk), nothing changes: the content at hand is still good to use.
    """
    with suppress(OSError), tempfile.TemporaryDirectory(dir=raw, prefix=".part-") as folder:
        part = Path(folder, name)
        part.write_bytes(content)
        os.replace(part, raw / name)


# ---------------------------------------------------------------------------------------------------------------------
# Network


def fetch(raw: Path, names: list[str]) -> tuple[dict[str, bytes], str | None]:
    """Downloads some of ``FILES`` into ``raw``, each one checked before it takes its place.

    Returns:
        The content of every file that arrived whole, and why the others did not (None if all did). Stops at the first
        file that no address can deliver.
    """
    contents: dict[str, bytes] = {}
    try:
        mirrors = answering_mirrors()
    except DOWNLOAD_ERRORS as error:
        return contents, _short(error)
    reason = "none of the addresses that offer it answers (no network?)"
    for name in names:
        for mirror in mirrors:
            try:
                with _scratch(raw) as folder, _socket_timeout(STALL_SECONDS):
                    download_file(Path(folder), name, mirror)
                    content, faults = read_file(Path(folder), name)
            except DOWNLOAD_ERRORS as error:
                reason = f"{name}: {_short(error)}"
                continue
            if content is not None:
                contents[name] = content
                keep(raw, name, content)
                break
            reason = "what arrived was not right: " + _listed(faults or [f"{name} is missing"])
        if name not in contents:
            return contents, reason
    return contents, None


def download_file(folder: Path, name: str, mirror: str) -> None:
    """Has torchvision download one file from one address into ``folder`` (with its progress bar) and unpack it."""
    from torchvision.datasets import MNIST

    class OneFile(MNIST):
        raw_folder = str(folder)
        mirrors = [mirror]  # noqa: RUF012
        resources = [entry for entry in MNIST.resources if entry[0] == f"{name}.gz"]  # noqa: RUF012

        def __init__(self) -> None:
            pass  # the original loads the data set; this one only fetches

    OneFile().download()


def answering_mirrors() -> list[str]:
    """The addresses torchvision knows for MNIST that answer now, in its order; [] within ``ANSWER_SECONDS`` if none.

    A network that drops packets keeps a plain download waiting for minutes, one timeout per address of every host, so
    all are asked at once, in threads that nobody has to wait for.
    """
    from torchvision.datasets import MNIST

    answered = set()

    def ask(mirror: str) -> None:
        request = urllib.request.Request(mirror + MNIST.resources[0][0], method="HEAD")
        with suppress(OSError, HTTPException, ValueError):
            urllib.request.urlopen(request, timeout=ANSWER_SECONDS).close()
            answered.add(mirror)

    threads = [threading.Thread(target=ask, args=(mirror,), daemon=True) for mirror in MNIST.mirrors]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + ANSWER_SECONDS
    for thread in threads:
        # Once one has answered, the others get a second more.
        thread.join(min(max(0.0, deadline - time.monotonic()), 1.0 if answered else ANSWER_SECONDS))
    return [mirror for mirror in MNIST.mirrors if mirror in answered]


def _scratch(raw: Path) -> tempfile.TemporaryDirectory:
    """A folder beside the target, or in the system's temporary folder if the target cannot be written."""
    try:
        raw.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=raw, prefix=".download-")
    except OSError:
        return tempfile.TemporaryDirectory()


@contextmanager
def _socket_timeout(seconds: float):
    """torchvision opens its connections without a timeout; only the process-wide default reaches them."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ---------------------------------------------------------------------------------------------------------------------
# Stand-in


def _stand_in(problems: list[str], failure: str) -> Images:
    try:
        tensors = enlarged_digits()
    except ImportError as error:
        raise ImportError(
            f"MNIST cannot be had ({_listed(problems)}; download: {failure}) and the data set that would stand in "
            "needs scikit-learn: pip install scikit-learn"
        ) from error
    _banner(
        "THIS IS NOT MNIST",
        f"MNIST could not be loaded: {_listed(problems)}.",
        f"The download failed: {failure}.",
        f'In its place: "{STAND_IN}", 1,797 small drawings enlarged to 28x28 and varied to the same number of images.',
        "EVERY FIGURE, TABLE AND CLAIM BELOW SPEAKS OF THAT DATA SET, NOT OF MNIST.",
        "For MNIST, run this again with a network, or put its four files into MNIST/raw in the data folder.",
    )
    return Images(STAND_IN, False, *tensors)


def _banner(*paragraphs: str, width: int = 80) -> None:
    inner = width - 6
    edge = "#" * width
    blank = f"## {'':{inner}} ##"
    rows = [edge, edge, blank]
    for paragraph in paragraphs:
        rows += [f"## {row:{inner}} ##" for row in textwrap.wrap(paragraph, inner, break_on_hyphens=False)] + [blank]
    print("\n".join([*rows, edge, edge]), flush=True)


def _listed(things: list[str]) -> str:
    return ", ".join(things)


def _short(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
