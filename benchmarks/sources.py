"""Where images come from: scikit-learn's digits, a user's `.npz`, or torchvision's downloads.

Whatever the source, the images end as one uint8 tensor [n, channels, height, width] for training and one for
test: a quarter of the memory that normalised floats take, which streams make out of them when they are
needed.
"""

from __future__ import annotations

import pickle
import socket
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from benchmarks.record import Expected
from benchmarks.settings import InputError

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_DOWNLOAD_TIMEOUT_SECONDS = 30.0
_LONGEST_REASON = 160
_BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class ImageData:
    """Images and labels in memory.

    Attributes:
        x_train: uint8 [n, channels, height, width].
        y_train: int64 [n], labels 0 .. n_classes - 1.
        x_test: as `x_train`.
        y_test: as `y_train`.
        n_classes: number of classes.
        coarse: class to superclass, or None where the source knows no superclasses.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    n_classes: int
    coarse: tuple[int, ...] | None = None


def read_digits() -> ImageData:
    """Read the 1797 digits that come with scikit-learn: every fifth image is for test, in their fixed order.

    Returns:
        The data; pixels run from 0 to 16, images are [1, 8, 8].
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test = torch.arange(len(images)) % 5 == 4
    return ImageData(images[~test], labels[~test], images[test], labels[test], n_classes=10)


def read_npz(path: Path, expected: Expected) -> ImageData:
    """Read a Keras-convention archive: `x_train`, `y_train`, `x_test`, `y_test`, optionally `coarse`.

    Args:
        path: the `.npz` file.
        expected: what the protocol needs.

    Returns:
        The data.

    Raises:
        InputError: if the file is missing or no archive, or if a key is missing or has the wrong shape, type
            or values; the message names the key, what came and what is expected.
    """
    if not path.is_file():
        raise InputError(f"data file {str(path)!r} does not exist")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in _KEYS + (("coarse",) if expected.coarse else ()) if key not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise InputError(f"{path}: key {missing[0]!r} is missing (found: {found})")
            arrays = {key: archive[key] for key in (*_KEYS, "coarse") if key in archive.files}
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        ValueError,
        OSError,
        AttributeError,
        EOFError,
        TypeError,
    ) as error:
        raise InputError(f"{path} is not a readable .npz archive of plain arrays: {_one_line(error)}") from error
    return _from_arrays(str(path), arrays, expected)


def _from_arrays(origin: str, arrays: dict[str, npt.NDArray[Any]], expected: Expected) -> ImageData:
    """Check the arrays of an archive and turn them into tensors."""
    for part in ("train", "test"):
        _check_images(origin, f"x_{part}", arrays[f"x_{part}"], expected)
        arrays[f"y_{part}"] = _check_labels(origin, f"y_{part}", arrays[f"y_{part}"], len(arrays[f"x_{part}"]))
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        came, wanted = list(arrays["x_test"].shape), list(arrays["x_train"].shape[1:])
        raise InputError(f"{origin}: key 'x_test' has shape {came}; expected images of {wanted} as in 'x_train'")
    present = np.unique(arrays["y_train"])
    n_classes = expected.n_classes or int(present[-1]) + 1
    for key in ("y_train", "y_test"):
        labels = np.unique(arrays[key])
        if not np.array_equal(labels, np.arange(n_classes)):
            found = f"{len(labels)} different labels from {labels[0]} to {labels[-1]}"
            raise InputError(f"{origin}: key {key!r} has {found}; expected each of 0 .. {n_classes - 1}")
    coarse = None
    if expected.coarse:
        coarse = _check_coarse(origin, arrays["coarse"], n_classes)
    return ImageData(
        _channels_first(arrays["x_train"]),
        torch.from_numpy(arrays["y_train"]),
        _channels_first(arrays["x_test"]),
        torch.from_numpy(arrays["y_test"]),
        n_classes,
        coarse,
    )


def _check_images(origin: str, key: str, images: npt.NDArray[Any], expected: Expected) -> None:
    """Refuse images of the wrong type or shape."""
    shape = "[n, h, w] or [n, h, w, c]"
    if expected.height_width is not None:
        height, width = expected.height_width
        shape = f"[n, {height}, {width}]" + (f" or [n, {height}, {width}, 1]" if expected.channels == 1 else "")
        if expected.channels not in (None, 1):
            shape = f"[n, {height}, {width}, {expected.channels}]"
    if images.dtype != np.uint8:
        raise InputError(f"{origin}: key {key!r} has dtype {images.dtype}; expected uint8 {shape}")
    channels = images.shape[3] if images.ndim == 4 else 1
    fits = (
        images.ndim in (3, 4)
        and images.size > 0
        and expected.channels in (None, channels)
        and expected.height_width in (None, images.shape[1:3])
    )
    if not fits:
        raise InputError(f"{origin}: key {key!r} has shape {list(images.shape)}; expected uint8 {shape}, n >= 1")


def _check_labels(origin: str, key: str, labels: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Refuse labels that are no integers or not one an image; Keras's [n, 1] is taken too."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{origin}: key {key!r} has dtype {labels.dtype}; expected integers [{count}]")
    if labels.shape not in ((count,), (count, 1)):
        came = list(labels.shape)
        raise InputError(f"{origin}: key {key!r} has shape {came}; expected [{count}], one label an image")
    return labels.reshape(count).astype(np.int64)


def _check_coarse(origin: str, coarse: npt.NDArray[Any], n_classes: int) -> tuple[int, ...]:
    """Refuse a superclass table that does not give each class one superclass, all of the same size."""
    if coarse.shape != (n_classes,) or not np.issubdtype(coarse.dtype, np.integer):
        came = f"shape {list(coarse.shape)}, dtype {coarse.dtype}"
        raise InputError(f"{origin}: key 'coarse' has {came}; expected integers [{n_classes}]")
    _, sizes = np.unique(coarse, return_counts=True)
    if len(set(sizes.tolist())) != 1:
        raise InputError(f"{origin}: key 'coarse' has superclasses of {sizes.tolist()} classes; expected equal sizes")
    return tuple(int(index) for index in coarse)


def _channels_first(images: npt.NDArray[Any]) -> Tensor:
    """[n, h, w] or [n, h, w, c] to [n, c, h, w]."""
    tensor = torch.from_numpy(images)
    return tensor[:, None] if images.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def fit_images(data: ImageData, shape: tuple[int, int, int]) -> ImageData:
    """Bring images to the shape that a protocol's network takes: bilinear as Pillow does it, grey in every channel.

    Args:
        data: images of any size, grey or already of that many channels.
        shape: channels, height and width.

    Returns:
        The same data with other images; channels that repeat a grey image take no memory.

    Raises:
        InputError: if the images have another number of channels.
    """
    channels, height, width = shape
    if data.x_train.shape[1] not in (1, channels):
        came = list(data.x_train.shape[1:])
        raise InputError(f"the images are {came}; expected grey ones or {channels} channels, to bring to {list(shape)}")

    def fit(images: Tensor) -> Tensor:
        if images.shape[2:] != (height, width):
            planes = [
                Image.fromarray(plane).resize((width, height), _BILINEAR) for plane in images.flatten(0, 1).numpy()
            ]
            flat = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
            images = flat.unflatten(0, images.shape[:2])
        return images.expand(-1, channels, -1, -1)

    return replace(data, x_train=fit(data.x_train), x_test=fit(data.x_test))


def download(name: str) -> ImageData:
    """Fetch MNIST or CIFAR-100 through torchvision into Avalanche's data folder (kept for the next time).

    Args:
        name: `mnist` or `cifar100`.

    Returns:
        The data.

    Raises:
        InputError: if nothing can be fetched, with the advice to give a file.
    """
    from avalanche.benchmarks.datasets import default_dataset_location
    from torchvision import datasets

    readers: dict[str, Callable[..., Any]] = {"mnist": datasets.MNIST, "cifar100": datasets.CIFAR100}
    try:
        folder = Path(default_dataset_location(name))
        with _socket_timeout(_DOWNLOAD_TIMEOUT_SECONDS):
            train = readers[name](str(folder), train=True, download=True)
            test = readers[name](str(folder), train=False, download=True)
        coarse = _cifar_coarse(folder / "cifar-100-python" / "train") if name == "cifar100" else None
    except (OSError, RuntimeError) as error:
        advice = "give the images with --data FILE.npz or connect to a network"
        raise InputError(f"{name} could not be downloaded ({_one_line(error)}): {advice}") from error
    arrays: dict[str, npt.NDArray[Any]] = {
        "x_train": np.asarray(train.data, dtype=np.uint8),
        "y_train": np.asarray(train.targets, dtype=np.int64),
        "x_test": np.asarray(test.data, dtype=np.uint8),
        "y_test": np.asarray(test.targets, dtype=np.int64),
    }
    if coarse is not None:
        arrays["coarse"] = coarse
    return _from_arrays(name, arrays, Expected(coarse=coarse is not None))


def _cifar_coarse(path: Path) -> npt.NDArray[np.int64]:
    """Class to superclass from CIFAR-100's own file, which torchvision reads without the superclasses."""
    with path.open("rb") as file:
        entries = pickle.load(file, encoding="latin1")  # the archive whose checksum torchvision has verified
    coarse = np.zeros(100, np.int64)
    coarse[np.asarray(entries["fine_labels"])] = np.asarray(entries["coarse_labels"])
    return coarse


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Bound the wait for a network that swallows packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: BaseException) -> str:
    """The message of an exception, on one line and without the details of every mirror that was tried."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."
