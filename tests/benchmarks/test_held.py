"""Bytes that Avalanche's own methods keep: counted from what there is to keep, and without touching the run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from avalanche.training.plugins import AGEMPlugin, EWCPlugin, GEMPlugin, ReplayPlugin

from benchmarks import held, readings
from benchmarks.build import build_strategy, build_stream
from benchmarks.jobs import make_job
from benchmarks.models import build_model
from benchmarks.run import run
from benchmarks.sources import read_digits

CPU = torch.device("cpu")
QUICK = {"epochs": "1", "train_limit": "40", "n_experiences": "3"}
#: An image of 8 x 8 pixels as float32, its label and its task label as int64.
SAMPLE = 4 * 64 + 8 + 8


def held_by(method, protocol="digits-split", **changes):
    """Bytes after each of three experiences."""
    job = make_job(protocol, method, 0, CPU, {**QUICK, **changes})
    result = run(job, read_digits())
    counts = [each["bytes_held"] for each in result["experiences"]]
    assert result["bytes_held"] == counts[-1]
    return counts


def test_ewc_keeps_parameters_and_importances_of_every_experience():
    job = make_job("digits-permuted", "ewc", 0, CPU, QUICK)
    model = build_model(job.protocol.model, build_stream(job.protocol, read_digits(), 0), job.protocol.hidden)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert held_by("ewc", "digits-permuted") == [2 * 4 * numbers * count for count in (1, 2, 3)]


@pytest.mark.parametrize(
    ("method", "changes", "samples"),
    [
        ("replay", {"mem_size": "20"}, (20, 20, 20)),
        ("replay", {"mem_size": "70"}, (40, 70, 70)),  # all 40 of the first, then shares of 70
        ("gem", {"gem_patterns": "15"}, (15, 30, 45)),
        ("agem", {"agem_patterns": "15", "agem_sample_size": "8"}, (15, 30, 45)),
    ],
)
def test_memories_are_as_large_as_their_samples(method, changes, samples):
    assert held_by(method, **changes) == [SAMPLE * count for count in samples]


def test_methods_that_keep_nothing_and_plugins_that_are_not_known_have_no_count():
    class Mine(EWCPlugin):
        """Keeps something else besides."""

    assert held_by("naive") == [None] * 3
    assert readings.bytes_held([]) is None
    assert held.bytes_held(Mine(1.0)) is None
    assert held.bytes_held(object()) is None
    assert readings.bytes_held([EWCPlugin(1.0), object()]) == 0


def test_before_any_training_nothing_is_held():
    for plugin in (EWCPlugin(1.0), ReplayPlugin(10), GEMPlugin(10, 0.5), AGEMPlugin(10, 10)):
        assert held.bytes_held(plugin) == 0


@pytest.mark.parametrize("method", ["ewc", "replay", "gem", "agem"])
def test_counting_changes_nothing(method):
    job = make_job("digits-split", method, 0, CPU, {**QUICK, "gem_patterns": "15", "agem_patterns": "15"})
    stream = build_stream(job.protocol, read_digits(), 0)
    strategy, plugins = build_strategy(job, stream, build_model(job.protocol.model, stream, job.protocol.hidden))
    strategy.train(stream.benchmark.train_stream[0])

    def states():
        return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002

    before = states()
    first = readings.bytes_held(plugins)
    assert first
    assert readings.bytes_held(plugins) == first
    assert states() == before
    assert [len(getattr(plugins[0], name, {})) for name in ("importances", "memory_x")] == (
        [1, 0] if method == "ewc" else [0, 1] if method == "gem" else [0, 0]
    )


class _Plain:
    """A plugin without a core that says what it keeps."""

    bytes_held = 12


class _Core:
    bytes_held = 30


class _WithCore:
    method = _Core()


def test_plugins_say_what_they_keep_themselves_or_by_their_core():
    assert readings.bytes_held([_Plain()]) == 12
    assert readings.bytes_held([_Plain(), _WithCore()]) == 42
