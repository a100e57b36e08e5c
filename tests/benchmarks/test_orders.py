"""Permutations, rotations and samples of the GEM family, computed again by its own rules."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.build import build_stream
from benchmarks.orders import BLACK, gem_permutations, rotations
from benchmarks.protocols import find_protocol
from benchmarks.record import Normalisation
from benchmarks.sampling import Sampling
from benchmarks.settings import apply
from benchmarks.sources import read_npz
from benchmarks.streams import permute


def rotated(images, angle):
    """Each image by itself, as the code of the GEM family does it."""
    turned = [np.asarray(Image.fromarray(image).rotate(angle)) for image in images]
    return np.stack(turned).astype(np.float32) / np.float32(255)


def test_permutations_are_torchs_one_after_another():
    torch.manual_seed(5)
    expected = [torch.randperm(20) for _ in range(4)]
    state = torch.get_rng_state()
    found = gem_permutations(4, 20, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_are_torchs_one_experience_after_another(arrays, images):
    torch.manual_seed(3)
    expected = [torch.randperm(24)[:7] for _ in range(3)]
    sampling = Sampling(train_limit=7, draw_rule="each", seed=3)
    stream = permute(images, gem_permutations(3, 20, 3), Normalisation(), sampling)
    for i, (chosen, order) in enumerate(zip(expected, gem_permutations(3, 20, 3), strict=True)):
        x, y = stream.train[i].as_tensors()
        flat = arrays["x_train"].reshape(24, -1)[chosen.numpy()][:, order.numpy()]
        np.testing.assert_array_equal(x.reshape(7, -1).numpy(), flat.astype(np.float32) / np.float32(255))
        assert y.tolist() == arrays["y_train"][chosen.numpy()].tolist()
        assert len(stream.test[i]) == 12


def test_validation_samples_are_no_training_samples_of_the_same_experience():
    sampling = Sampling(valid_share=0.25, draw_rule="each", train_limit=10, seed=1)
    for experience in range(3):
        train, valid = sampling.divide(torch.arange(24), experience)
        assert (len(train), len(valid)) == (10, 6)
        assert not set(train.tolist()) & set(valid.tolist())


@pytest.mark.parametrize("max_angle", [180.0, 360.0])
def test_rotations_are_pillows_of_every_image(arrays, images, max_angle):
    draw = random.Random(4)
    angles = [(i + draw.random()) * max_angle / 5 for i in range(5)]
    assert all(i * max_angle / 5 <= angle < (i + 1) * max_angle / 5 for i, angle in enumerate(angles))
    stream = permute(images, rotations(5, (1, 5, 4), max_angle, 4), Normalisation(), Sampling(valid_rule="first"))
    for i, angle in enumerate(angles):
        for part, key in (("train", "x_train"), ("test", "x_test")):
            found = getattr(stream, part)[i].as_tensors()[0][:, 0].numpy()
            np.testing.assert_array_equal(found, rotated(arrays[key], angle))
    image, _ = stream.train[2][3]
    assert torch.equal(image, stream.train[2].as_tensors()[0][3])


def test_all_colours_of_a_pixel_turn_together():
    grey, colour = rotations(2, (1, 6, 6), 90.0, 0), rotations(2, (3, 6, 6), 90.0, 0)
    assert (torch.cat(grey) == BLACK).any()
    for one, three in zip(grey, colour, strict=True):
        for plane in range(3):
            expected = torch.where(one == BLACK, BLACK, one + 36 * plane)
            assert torch.equal(three[36 * plane : 36 * (plane + 1)], expected)


@pytest.mark.data
def test_rmnist_holds_the_protocols_samples(mnist_file):
    protocol = apply(find_protocol("rmnist-logd"), {})
    stream = build_stream(protocol, read_npz(mnist_file, protocol.expected), seed=1)
    assert [len(dataset) for dataset in stream.train] == [1000] * 20
    assert [len(dataset) for dataset in stream.test] == [10000] * 20
    torch.manual_seed(1)
    chosen = [torch.randperm(60000)[:1000] for _ in range(20)][13].numpy()
    draw = random.Random(1)
    angle = [(i + draw.random()) * 180 / 20 for i in range(20)][13]
    with np.load(mnist_file) as archive:
        images, labels = archive["x_train"][chosen], archive["y_train"][chosen]
    x, y = stream.train[13].as_tensors()
    np.testing.assert_array_equal(x[:, 0].numpy(), rotated(images, angle))
    assert y.tolist() == labels.tolist()
