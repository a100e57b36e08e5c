"""What the tests of the benchmarks share: images small enough to compute by hand, and the real data where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.sources import ImageData

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def mnist_file() -> Path:
    path = DATA / "mnist.npz"
    if not path.is_file():
        pytest.skip("the real MNIST arrays are not at ../shared/data/mnist.npz")
    return path


@pytest.fixture
def arrays() -> dict[str, Any]:
    """A valid archive: 4 classes, 6 training and 3 test images of 5 x 4 pixels each."""
    draw = np.random.default_rng(3)
    return {
        "x_train": draw.integers(0, 256, (24, 5, 4)).astype(np.uint8),
        "y_train": np.tile(np.arange(4), 6).astype(np.uint8),
        "x_test": draw.integers(0, 256, (12, 5, 4)).astype(np.uint8),
        "y_test": np.tile(np.arange(4), 3).astype(np.uint8),
    }


@pytest.fixture
def cifar_like() -> ImageData:
    """100 classes in 20 superclasses, 20 training and 2 test images of 3 x 32 x 32 each; class c has pixels c or c + 1.

    Superclass s holds the classes s, s + 20, s + 40, s + 60, s + 80.
    """
    draw = torch.Generator().manual_seed(0)
    parts = []
    for count in (20, 2):
        labels = torch.arange(100).repeat(count)
        noise = torch.randint(0, 2, (len(labels), 3, 32, 32), generator=draw)
        parts += [(labels[:, None, None, None] + noise).to(torch.uint8), labels]
    return ImageData(*parts, n_classes=100, coarse=tuple(c % 20 for c in range(100)))


@pytest.fixture
def mnist_like(tmp_path: Path) -> Path:
    """An archive of 60 training and 20 test images of 28 x 28 pixels in 10 classes."""
    draw = np.random.default_rng(7)
    arrays = {}
    for part, count in (("train", 60), ("test", 20)):
        arrays[f"x_{part}"] = draw.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        arrays[f"y_{part}"] = np.tile(np.arange(10), count // 10).astype(np.uint8)
    np.savez(tmp_path / "mnist_like.npz", **arrays)
    return tmp_path / "mnist_like.npz"


@pytest.fixture
def images(arrays: dict[str, Any]) -> ImageData:
    return ImageData(
        torch.from_numpy(arrays["x_train"])[:, None],
        torch.from_numpy(arrays["y_train"]).long(),
        torch.from_numpy(arrays["x_test"])[:, None],
        torch.from_numpy(arrays["y_test"]).long(),
        n_classes=4,
    )
