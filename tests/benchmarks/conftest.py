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
def images(arrays: dict[str, Any]) -> ImageData:
    return ImageData(
        torch.from_numpy(arrays["x_train"])[:, None],
        torch.from_numpy(arrays["y_train"]).long(),
        torch.from_numpy(arrays["x_test"])[:, None],
        torch.from_numpy(arrays["y_test"]).long(),
        n_classes=4,
    )
