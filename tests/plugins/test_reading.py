"""Passes over the data after an experience: the same mini-batches from memory as from the data, read once."""

from __future__ import annotations

import pytest
import torch
from avalanche.benchmarks.utils import TransformGroups, make_avalanche_dataset

from avalanche_gradproj import GPMPlugin, InMemoryDataPlugin, KFACLaplacePlugin, XKFACPlugin
from avalanche_gradproj.plugins.reading import mini_batches
from tests.plugins.loading import TRAIN, Samples, class_incremental, dataset, strategy

GROUPS = [[3, 1, 2], [0], [7, 7]]


def batches(learner, data):
    return [[part.clone() for part in batch] for batch in mini_batches(learner, data, GROUPS)]


def same(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def tensors(state):
    """Every tensor of a state, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors(part)


def test_batches_are_the_same_and_nothing_is_read_again():
    source = Samples(TRAIN)
    held = InMemoryDataPlugin()
    benchmark = class_incremental(lambda rows: source if rows is TRAIN else Samples(rows))
    experience = benchmark.train_stream[0]
    learner = strategy([held], multi_head=False)
    learner.train(experience)
    plain = batches(strategy([]), experience.dataset.eval())
    before = source.reads
    found = batches(learner, experience.dataset.eval())
    assert source.reads == before
    assert [[part.dtype for part in batch] for batch in found] == [[part.dtype for part in batch] for batch in plain]
    assert same(found, plain)
    found[0][0].zero_()  # a copy
    assert same(batches(learner, experience.dataset.eval()), plain)


def test_data_that_are_not_held_are_read():
    """Another experience, and the same one by other transforms."""
    learner = strategy([InMemoryDataPlugin()], multi_head=False)
    benchmark = class_incremental(Samples)
    learner.train(benchmark.train_stream[0])
    other = benchmark.train_stream[1].dataset.eval()
    assert same(batches(learner, other), batches(strategy([]), other))

    source, doubled = dataset(Samples(TRAIN)), (lambda x: 2 * x, None)
    groups = TransformGroups({"train": doubled, "eval": (None, None)})
    data = make_avalanche_dataset(source, transform_groups=groups)
    plugin = InMemoryDataPlugin()
    plugin._fields(*_training_of(plugin, data.train()))
    assert plugin.held(data.train(), data.collate_fn, "cpu") is not None
    assert plugin.held(data.eval(), data.collate_fn, "cpu") is None


def _training_of(plugin, data):
    from avalanche_gradproj.plugins.in_memory import Signature

    signature = Signature(data, data.collate_fn, torch.device("cpu"))
    plugin._training = (signature, None)
    return signature, data, data.collate_fn, torch.device("cpu"), True


@pytest.mark.parametrize(
    ("make", "drawn"), [(KFACLaplacePlugin, 400), (XKFACPlugin, 400), (lambda: GPMPlugin(n_samples=50), 100)]
)
def test_a_method_learns_the_same_and_reads_less(make, drawn):
    states, reads = [], []
    for others in ([], [InMemoryDataPlugin()]):
        sources = []

        def source(rows, sources=sources):
            sources.append(Samples(rows))
            return sources[-1]

        benchmark, plugin = class_incremental(source), make()
        learner = strategy([plugin, *others], multi_head=False)
        for experience in benchmark.train_stream:
            learner.train(experience)
        states.append(plugin.state_dict())
        reads.append(sources[0].reads)
    one, other = (list(tensors(state)) for state in states)
    assert len(one) == len(other) > 1
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    probes = 5 * len(benchmark.train_stream)  # that tell whether the data are random
    assert reads[0] - reads[1] == drawn - probes
