"""Pixel orders: permutations and rotations of an image as lists of source pixels.

An order holds for each pixel of the result the pixel of the flattened image that it shows, `BLACK` for none.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from sklearn.utils import shuffle
from torch import Tensor

#: A pixel that shows nothing of the image.
BLACK = -1

_PERMUTATION_POOL = 10


def permutations(n_experiences: int, n_pixels: int, seed: int) -> list[Tensor]:
    """Draw the pixel orders of the permuted-MNIST protocol of the GPM family.

    The order at position i is `sklearn.utils.shuffle(arange(n_pixels), random_state=100 r + i)`, r the i-th
    element of the shuffled numbers 0 .. 9 (`random_state=seed`); every experience is permuted, the first one
    too.

    Args:
        n_experiences: how many; beyond ten, the numbers drawn from grow with it.
        n_pixels: pixels of an image.
        seed: the run's seed.

    Returns:
        One order each, int64 [n_pixels].
    """
    numbers = shuffle(np.arange(max(n_experiences, _PERMUTATION_POOL)), random_state=seed)
    states = [int(number) * 100 + position for position, number in enumerate(numbers[:n_experiences])]
    return [torch.from_numpy(shuffle(np.arange(n_pixels), random_state=state)) for state in states]


def gem_permutations(n_experiences: int, n_pixels: int, seed: int) -> list[Tensor]:
    """Draw the pixel orders of the permuted-MNIST protocol of the GEM family: `torch.randperm`, one after another.

    Args:
        n_experiences: how many; the first ones of a longer list are the same.
        n_pixels: pixels of an image.
        seed: the run's seed.

    Returns:
        One order each, int64 [n_pixels]; the first experience is permuted too.
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n_pixels, generator=generator) for _ in range(n_experiences)]


def rotations(n_experiences: int, shape: tuple[int, int, int], max_angle: float, seed: int) -> list[Tensor]:
    """Draw the rotations of the rotated-MNIST protocol of the GEM family, as pixel orders.

    The i-th angle lies at random between `i / n` and `(i + 1) / n` of `max_angle`, counter-clockwise; a pixel of the
    rotated image is the nearest one of the image (Pillow's `Image.rotate`), black where there is none.

    Args:
        n_experiences: n.
        shape: channels, height, width.
        max_angle: degrees.
        seed: the run's seed.

    Returns:
        One order each, int64 [channels * height * width].
    """
    draw = random.Random(seed)
    channels, height, width = shape
    # Pixels are counted from 1, since Pillow fills with 0 what lies outside.
    pixels = Image.fromarray(np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width))
    orders = []
    for position in range(n_experiences):
        angle = max_angle * (position + draw.random()) / n_experiences
        flat = torch.from_numpy(np.array(pixels.rotate(angle), dtype=np.int64)).flatten() - 1
        planes = [torch.where(flat >= 0, flat + plane * height * width, BLACK) for plane in range(channels)]
        orders.append(torch.cat(planes))
    return orders
