"""HALRP stopped and begun again: saved states, checkpoints, copies, experiences broken off or learned again."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint

from avalanche_gradproj import StateError
from avalanche_gradproj.testing import leftovers
from avalanche_gradproj.testing.restart import optimizers_by_reference
from tests.plugins.halrp_setup import (
    Interrupt,
    adam,
    all_outputs,
    assert_same,
    benchmark,
    failing,
    learner,
    network,
    outputs,
    sgd,
    stale,
    train,
    two_groups,
)

LABELS = (5, 2, 9)


def restarted(strategy, fresh, folder):
    """Go on from the states of plugin and model, through a file, in a strategy of a fresh model."""
    torch.save((strategy.plugin.state_dict(), strategy.model.state_dict()), folder / "state.pt")
    plugin, model = torch.load(folder / "state.pt", weights_only=True)
    fresh.model = fresh.plugin.wrap(fresh.model)
    fresh.plugin.load_state_dict(plugin)
    fresh.model.load_state_dict(model)
    return fresh


def checkpointed(strategy, fresh, folder):
    with optimizers_by_reference():
        save_checkpoint(strategy, folder / "checkpoint.pkl")
    return maybe_load_checkpoint(fresh, folder / "checkpoint.pkl")[0]


def copied(strategy, fresh, folder):
    return copy.deepcopy(strategy)


@pytest.mark.parametrize("way", [restarted, checkpointed, copied])
@pytest.mark.parametrize("learned", [1, 2, 3])
@pytest.mark.parametrize(("kind", "optimizer"), [("plain", sgd), ("heads", adam)])
def test_going_on_equals_never_having_stopped(kind, optimizer, learned, way, tmp_path):
    """Also where what follows is the first task, or another, learned again."""
    stream = benchmark((*LABELS, 5, 2)).train_stream
    strategy = learner(network(kind), optimizer, max_growth=3.0)
    train(strategy, stream[:learned])
    other = way(strategy, learner(network(kind, seed=8), optimizer, max_growth=3.0), tmp_path)
    assert_same(all_outputs(strategy.model, LABELS[:learned]), all_outputs(other.model, LABELS[:learned]))
    assert other.plugin.method.tasks == list(LABELS[:learned])
    for one in (strategy, other):
        train(one, stream[learned:])
    assert_same(all_outputs(strategy.model, LABELS), all_outputs(other.model, LABELS))
    assert other.plugin.growth == strategy.plugin.growth
    assert str(other.plugin.report()) == str(strategy.plugin.report())
    assert stale(other) == []
    mine, theirs = strategy.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("way", [restarted, checkpointed])
def test_going_on_with_two_groups(way, tmp_path):
    stream = benchmark().train_stream
    strategy = learner(network(), two_groups)
    train(strategy, stream[:2])
    other = way(strategy, learner(network(seed=8), two_groups), tmp_path)
    for one in (strategy, other):
        train(one, stream[2:])
    assert_same(all_outputs(strategy.model, range(3)), all_outputs(other.model, range(3)))


@pytest.mark.parametrize(
    ("classes", "width"),
    [((2, 3, 5), 5), ((3, 3, 3), 2), ((2, 5), 2)],
)
def test_heads_of_any_width_are_loaded(classes, width, tmp_path):
    """Avalanche's `MultiHeadClassifier` begins with 2 classes by default, and grows each head."""
    strategy = learner(network("heads", width=width, masking=True))
    train(strategy, benchmark(LABELS[: len(classes)], classes).train_stream)
    tasks = strategy.plugin.method.tasks
    other = restarted(strategy, learner(network("heads", seed=8, width=width, masking=True)), tmp_path)
    assert_same(all_outputs(strategy.model, tasks), all_outputs(other.model, tasks))


def test_states_that_do_not_fit_are_refused():
    stream = benchmark().train_stream
    strategy = learner(network())
    train(strategy, stream[:2])
    good, before = strategy.plugin.state_dict(), all_outputs(strategy.model, (0, 1))
    damaged = {key: value for key, value in good["ledger"].items() if key != "base"}
    for change, named in (
        ({"method": "GPM"}, "GPM"),
        ({"version": 0}, "version 0"),
        ({"ledger": damaged}, "damaged"),
        ({"ledger": None}, "damaged"),
        ({"ledger": {**good["ledger"], "records": [{"task": 1}]}}, "damaged"),
        ({"plan": {"layers": []}}, "damaged"),
        ({"tasks": "none"}, "damaged"),
        ({"pieces": -1}, "pieces"),
    ):
        with pytest.raises(StateError, match=named):
            strategy.plugin.load_state_dict({**good, **change})
        assert strategy.plugin.state_dict() == good
    with pytest.raises(StateError, match="no state"):
        strategy.plugin.load_state_dict([])
    assert_same(before, all_outputs(strategy.model, (0, 1)))
    train(strategy, stream[2:])
    assert_same(before, all_outputs(strategy.model, (0, 1)))


def test_states_of_plugin_and_model_belong_together():
    stream = benchmark().train_stream
    strategy, other, third = learner(network()), learner(network(seed=1)), learner(network("heads"))
    train(strategy, stream[:2])
    other.plugin.load_state_dict(strategy.plugin.state_dict())
    with pytest.raises(StateError, match=r"tasks \[\] and this HALRP learned \[0, 1\]"):
        train(other, stream[2:])
    third.plugin.load_state_dict(strategy.plugin.state_dict())
    with pytest.raises(StateError, match="other layers, heads"):
        third.plugin.wrap(third.model)
    fresh = learner(network())
    fresh.model = strategy.model
    with pytest.raises(StateError, match="another HALRP"):
        train(fresh, stream[2:])


def test_a_model_whose_plugin_has_no_state_is_refused():
    stream = benchmark().train_stream
    strategy, ahead = learner(network()), learner(network(seed=2))
    train(strategy, stream[:2])
    ahead.model = ahead.plugin.wrap(ahead.model)
    ahead.model.load_state_dict(strategy.model.state_dict())
    with pytest.raises(StateError, match=r"tasks \[0, 1\] and this HALRP learned \[\]"):
        train(ahead, stream[2:])


def test_an_earlier_state_is_gone_back_to():
    stream = benchmark().train_stream
    strategy = learner(network())
    train(strategy, stream[:2])
    saved = copy.deepcopy((strategy.plugin.state_dict(), strategy.model.state_dict()))
    train(strategy, stream[2:])
    expected = all_outputs(strategy.model, range(3))
    strategy.plugin.load_state_dict(saved[0])
    strategy.model.load_state_dict(saved[1])
    assert strategy.plugin.method.tasks == [0, 1]
    with pytest.raises(StateError, match="task label 2"):
        outputs(strategy.model, 2)
    train(strategy, stream[2:])
    assert_same(expected, all_outputs(strategy.model, range(3)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["warm-up", "importance", "epoch", "between epochs", "after an epoch"])
@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_a_later_experience_broken_off(kind, where, error):
    stream = benchmark(LABELS)
    plugins = {
        "epoch": [Interrupt(2, "after_backward", 3, error)],
        "between epochs": [Interrupt(2, "before_training_epoch", 2, error)],
        "after an epoch": [Interrupt(2, "after_training_epoch", 2, error)],
    }.get(where, [])
    strategy = learner(network(kind), adam, plugins=plugins)
    train(strategy, stream.train_stream[:2])
    before, held, other = all_outputs(strategy.model, (5, 2)), strategy.plugin.growth, copy.deepcopy(strategy)
    patched = {"warm-up": (strategy.optimizer, "step", 2), "importance": (torch.autograd, "grad", 2)}.get(where)
    with failing(*patched, error=error) if patched else nullcontext(), pytest.raises(error):
        train(strategy, stream.train_stream[2:])
    assert stale(strategy) == []
    assert not leftovers(strategy.model, strategy)
    assert strategy.plugin.growth == held
    assert_same(before, all_outputs(strategy.model, (5, 2)))
    strategy.eval(stream.test_stream[:2])
    train(strategy, stream.train_stream[2:])
    assert_same(before, all_outputs(strategy.model, (5, 2)))
    assert strategy.plugin.method.tasks == list(LABELS)
    assert torch.isfinite(outputs(strategy.model, 9)).all()
    assert stale(strategy) == []
    if kind == "plain":  # Avalanche's head goes on from where it was
        other.plugins = [plugin for plugin in other.plugins if not isinstance(plugin, Interrupt)]
        train(other, stream.train_stream[2:])
        assert torch.equal(outputs(other.model, 9), outputs(strategy.model, 9))


@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_the_first_experience_broken_off_leaves_the_next_to_be_the_first(kind):
    stream = benchmark(LABELS)
    strategy = learner(network(kind), plugins=[Interrupt(0, "after_update", 3)])
    with pytest.raises(KeyboardInterrupt):
        train(strategy, stream.train_stream[:1])
    assert strategy.plugin.method.tasks == []
    train(strategy, stream.train_stream[1:])
    assert strategy.plugin.method.tasks == [2, 9]
    before = all_outputs(strategy.model, (2, 9))
    train(strategy, stream.train_stream[:1])
    assert_same(before, all_outputs(strategy.model, (2, 9)))
    assert stale(strategy) == []
    assert strategy.plugin.report().notes[0].startswith("task 2: the base")


@pytest.mark.parametrize("label", [5, 2])
@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_a_task_learned_again_and_broken_off_is_as_before(kind, label):
    stream = benchmark((*LABELS, label))
    strategy = learner(network(kind), plugins=[Interrupt(3, "after_update", 3)])
    train(strategy, stream.train_stream[:3])
    before = all_outputs(strategy.model, LABELS)
    with pytest.raises(KeyboardInterrupt):
        train(strategy, stream.train_stream[3:])
    assert stale(strategy) == []
    assert_same(before, all_outputs(strategy.model, LABELS))
    train(strategy, stream.train_stream[3:])
    before.pop(label)
    assert_same(before, all_outputs(strategy.model, LABELS))


def test_the_only_task_learned_again_and_broken_off_is_no_mixture():
    stream = benchmark((5, 5, 2))
    strategy = learner(network(), plugins=[Interrupt(1, "after_update", 3)])
    train(strategy, stream.train_stream[:1])
    before = copy.deepcopy(strategy.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        train(strategy, stream.train_stream[1:])
    moved = {name for name, value in strategy.model.state_dict().items() if not torch.equal(value, before[name])}
    assert not moved or {name for name, _ in strategy.model.named_parameters()} <= moved


def test_a_head_that_grows_leaves_nothing_in_the_optimizer():
    stream = benchmark((5, 2, 2), (2, 2, 4))
    strategy = learner(network("heads", width=2))
    train(strategy, stream.train_stream)
    assert stale(strategy) == []
