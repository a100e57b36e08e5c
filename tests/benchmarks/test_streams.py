"""Streams: which images, labels and task labels each experience holds, computed again with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.utils import shuffle

from benchmarks.build import build_stream
from benchmarks.orders import permutations
from benchmarks.protocols import find_protocol
from benchmarks.record import Normalisation
from benchmarks.sampling import Sampling
from benchmarks.settings import InputError, apply
from benchmarks.sources import read_npz
from benchmarks.streams import permute, split_by_class

RULE = Normalisation(mean=(0.1307,), std=(0.3081,))


def normalised(images):
    return (images.astype(np.float32) / np.float32(255) - np.float32(0.1307)) / np.float32(0.3081)


def expected_orders(count, pixels, seed):
    """The protocol in its own words, shuffling each image instead of an index."""
    numbers = shuffle(np.array(list(range(10)), dtype=int), random_state=seed)
    return [lambda flat, state=numbers[i] * 100 + i: shuffle(flat, random_state=state) for i in range(count)]


@pytest.mark.parametrize("seed", [0, 2])
def test_permutations_are_sklearns_applied_to_the_image(arrays, images, seed):
    stream = permute(images, permutations(3, 20, seed), RULE, Sampling(seed=seed))
    for i, scramble in enumerate(expected_orders(3, 20, seed)):
        for part, key in (("train", "x_train"), ("test", "x_test")):
            dataset = getattr(stream, part)[i]
            got, labels = dataset.as_tensors()
            wanted = np.stack([scramble(normalised(image).reshape(-1)) for image in arrays[key]])
            if part == "train":  # the validation rule shuffles even where it takes nothing
                order = shuffle(np.arange(24), random_state=seed)
                wanted = wanted[order]
                assert labels.tolist() == arrays["y_train"][order].tolist()
            np.testing.assert_allclose(got.reshape(len(got), -1).numpy(), wanted, rtol=0, atol=2e-7)


def test_more_than_ten_permutations_differ():
    orders = permutations(12, 20, 0)
    assert len({tuple(order.tolist()) for order in orders}) == 12


def test_a_prefix_of_the_permutations_is_the_same():
    for short, long in zip(permutations(3, 20, 5), permutations(10, 20, 5), strict=False):
        assert torch.equal(short, long)


def test_single_samples_equal_bulk_access(images):
    stream = permute(images, permutations(2, 20, 0), RULE, Sampling())
    colours = Normalisation(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    rgb = type(images)(
        images.x_train.repeat(1, 3, 1, 1), images.y_train, images.x_test.repeat(1, 3, 1, 1), images.y_test, 4
    )
    for dataset in (stream.train[1], split_by_class(rgb, [[0, 1]], colours, Sampling()).train[0]):
        bulk_x, bulk_y = dataset.as_tensors()
        some_x, some_y = dataset.as_tensors(torch.tensor([4, 1]))
        assert torch.equal(some_x, bulk_x[[4, 1]])
        assert torch.equal(some_y, bulk_y[[4, 1]])
        for i in range(len(dataset)):
            image, label = dataset[i]
            assert torch.equal(image, bulk_x[i])
            assert label == bulk_y[i]


def test_task_incremental_split_has_local_labels_and_task_labels(arrays, images):
    stream = split_by_class(images, [[0, 2], [3, 1]], Normalisation(), Sampling(seed=1))
    assert (stream.n_heads, stream.n_outputs, stream.input_shape) == (2, 2, (1, 5, 4))
    for i, group in enumerate([[0, 2], [3, 1]]):
        train = stream.benchmark.train_stream[i]
        assert (train.task_label, train.current_experience) == (i, i)
        assert train.classes_in_this_experience == {0, 1}
        inside = np.flatnonzero(np.isin(arrays["y_train"], group))
        order = inside[shuffle(np.arange(len(inside)), random_state=1)]
        assert list(train.dataset.targets) == [group.index(label) for label in arrays["y_train"][order]]
        for position, source in enumerate(order):
            image, label, task = train.dataset[position]
            assert task == i
            assert label == group.index(arrays["y_train"][source])
            np.testing.assert_array_equal(
                image[0].numpy(), arrays["x_train"][source].astype(np.float32) / np.float32(255)
            )
        assert len(stream.test[i]) == 6


def test_class_incremental_split_keeps_labels_and_one_task(images):
    stream = split_by_class(images, [[0, 2], [3, 1]], Normalisation(), Sampling(), labels="class")
    assert (stream.n_heads, stream.n_outputs) == (0, 4)
    second = stream.benchmark.train_stream[1]
    assert second.classes_in_this_experience == {1, 3}
    assert second.task_label == 0
    assert second.previous_classes == {0, 2}


def test_masked_split_keeps_labels_and_has_task_labels(images):
    stream = split_by_class(images, [[0, 2], [3, 1]], Normalisation(), Sampling(), labels="masked")
    assert (stream.n_heads, stream.n_outputs, stream.classes) == (2, 4, ((0, 2), (3, 1)))
    second = stream.benchmark.train_stream[1]
    assert second.classes_in_this_experience == {1, 3}
    assert second.task_label == 1
    assert set(stream.test[1].targets.tolist()) == {1, 3}


def test_a_class_in_two_experiences_is_refused(images):
    with pytest.raises(InputError, match="two experiences"):
        split_by_class(images, [[0, 2], [2, 1]], Normalisation(), Sampling())


@pytest.mark.parametrize(("rule", "start"), [("first", range(24)), ("random", None)])
def test_validation_and_training_are_disjoint_and_complete(images, rule, start):
    sampling = Sampling(valid_share=0.25, valid_rule=rule, seed=4)
    train, valid = sampling.divide(torch.arange(24))
    order = list(start) if start is not None else shuffle(np.arange(24), random_state=4).tolist()
    assert valid.tolist() == order[:6]
    assert train.tolist() == order[6:]
    stream = permute(images, permutations(2, 20, 0), RULE, sampling)
    assert [len(part) for part in stream.benchmark.streams.values()] == [2, 2, 2]
    assert set(stream.benchmark.streams) == {"train", "test", "valid"}


def test_train_limit_takes_that_many_and_no_validation_samples():
    sampling = Sampling(valid_share=0.25, valid_rule="first", train_limit=5, seed=0)
    train, valid = sampling.divide(torch.arange(24))
    assert len(train) == len(set(train.tolist())) == 5
    assert not set(train.tolist()) & set(valid.tolist())


@pytest.mark.data
def test_pmnist_holds_the_protocols_samples(mnist_file):
    protocol = apply(find_protocol("pmnist-gpm"), {"n_experiences": "2"})
    stream = build_stream(protocol, read_npz(mnist_file, protocol.expected), seed=2)
    assert [len(dataset) for dataset in (*stream.train, *stream.valid)] == [54000, 54000, 6000, 6000]
    assert [len(dataset) for dataset in stream.test] == [10000, 10000]
    with np.load(mnist_file) as archive:
        first, label = archive["x_train"][6000], archive["y_train"][6000]
    image, target = stream.train[1][0]
    scrambled = expected_orders(2, 784, 2)[1](normalised(first).reshape(-1))
    np.testing.assert_allclose(image.reshape(-1).numpy(), scrambled, rtol=0, atol=2e-7)
    assert target == label
