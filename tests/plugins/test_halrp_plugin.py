"""HALRP inside Avalanche: old tasks stay, whatever the heads and optimizers; beside schedulers, loaders, evaluation."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks.scenarios import with_task_labels
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin
from avalanche.training.supervised import Naive

from avalanche_gradproj import HALRP, HALRPPlugin, InMemoryDataPlugin, StateError
from avalanche_gradproj.methods.halrp import LowRankPerturbation
from avalanche_gradproj.testing import leftovers
from tests.plugins.halrp_setup import (
    CLASSES,
    FEATURES,
    PROBE,
    SAMPLES,
    adam,
    all_outputs,
    assert_same,
    benchmark,
    learner,
    network,
    outputs,
    sgd,
    stale,
    train,
    two_groups,
)

LABELS = (5, 2, 9)


def weights(strategy):
    return {name: value.clone() for name, value in strategy.model.state_dict().items()}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize("optimizer", [sgd, adam, two_groups])
@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_old_outputs_stay_whatever_follows(kind, optimizer):
    """Labels in any order, evaluation of learned tasks between, a task learned again."""
    stream = benchmark((*LABELS, 2, 5))
    strategy = learner(network(kind), optimizer)
    known, seen = set(), {}
    for experience, label in zip(stream.train_stream, (*LABELS, 2, 5), strict=True):
        train(strategy, [experience])
        known.add(label)
        strategy.eval([e for e in stream.test_stream if e.task_label in known])
        now = all_outputs(strategy.model, sorted(known))
        assert_same({task: value for task, value in seen.items() if task != label}, now)
        assert label not in seen or not torch.equal(seen[label], now[label])
        seen = now
        assert stale(strategy) == []
        assert not leftovers(strategy.model, strategy)
    assert strategy.plugin.method.tasks == list(LABELS)
    bases = {p for name, p in strategy.model.named_parameters() if name.endswith(("1.base.weight", "5.base.weight"))}
    assert len(bases) == 2
    assert not [p for p in bases if strategy.optimizer.state.get(p) or p.requires_grad or p.grad is not None]


@pytest.mark.parametrize("kind", ["plain", "heads"])  # fmt: skip
def test_new_parameters_join_the_group_of_what_they_stand_for(kind):
    strategy, groups = learner(network(kind), two_groups), []

    class Spy(SupervisedPlugin):
        def after_backward(self, owner, *args, **kwargs):
            names = {id(p): name for name, p in owner.model.named_parameters()}
            groups.append([[names[id(p)] for p in group["params"]] for group in owner.optimizer.param_groups])
            assert all(p.grad is not None for p in owner.model.parameters() if p.requires_grad)

    strategy.plugins.insert(0, Spy())
    train(strategy, benchmark(LABELS).train_stream)
    assert len({len(found[0]) for found in groups}) > 1
    for found in groups:
        assert len(set(found[0] + found[1])) == len(found[0]) + len(found[1])
        wrong = [name for i, names in enumerate(found) for name in names if name.endswith("bias") is (i == 0)]
        assert wrong == []


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_the_first_experience_is_naive_s(kind, optimizer):
    results = []
    for make in (HALRP, Naive):
        model = network(kind)
        settings = {"weight_decay": 0.0, "max_growth": None} if make is HALRP else {"eval_mb_size": 8}
        settings |= {"train_mb_size": 8, "train_epochs": 3, "evaluator": EvaluationPlugin()}
        strategy = make(model=model, optimizer=optimizer(model), **settings)
        train(strategy, benchmark((3, 4)).train_stream[:1])
        found = weights(strategy)
        results.append(
            {n.removeprefix("model.").replace(".base.", "."): v for n, v in found.items() if "first" not in n}
        )
    assert_equal_states(*results)


def test_two_tasks_are_those_of_a_plain_loop():
    """The whole experience is one mini-batch, so that order plays no part; importance is of another stream."""
    stream, settings = benchmark((0, 1)), {"l1": 1e-3, "warmup_epochs": 2, "max_growth": 2.0, "max_rank": 2}
    strategy = learner(
        network(),
        train_mb_size=SAMPLES,
        train_epochs=3,
        importance=stream.test_stream,
        record_batch_size=10,
        **settings,
    )
    train(strategy, stream.train_stream, shuffle=False)
    core, model = LowRankPerturbation(**settings), network()
    optimizer = sgd(model)
    for task, experience in enumerate(stream.train_stream):
        x, y = (torch.stack([torch.as_tensor(sample[i]) for sample in experience.dataset]) for i in (0, 1))
        held = [(x[i : i + 10], y[i : i + 10]) for i in (0, 10, 20)]
        model.train()
        with core.experience(model, optimizer, remaining=2 - task, batches=[(x, y)], held_out=held):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                core.regularise()
                optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(strategy.model.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert strategy.plugin.method.ledger == core.ledger


def test_lr_schedulers_go_on_working():
    model, rates = network("heads"), []
    optimizer = two_groups(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)

    class Spy(SupervisedPlugin):
        def before_update(self, strategy, *args, **kwargs):
            rates.append([group["lr"] for group in strategy.optimizer.param_groups])

    strategy = learner(model, lambda _: optimizer, plugins=[LRSchedulerPlugin(scheduler), Spy()], train_mb_size=SAMPLES)
    train(strategy, benchmark().train_stream)
    assert rates == [pytest.approx(rate) for rate in [[0.05, 0.3], [0.005, 0.03]] * 3]


@pytest.mark.parametrize(
    ("kind", "classes", "masking"), [("plain", None, False), ("heads", None, True), ("heads", (2, 3, 5), False)]
)
def test_mixed_mini_batches_are_single_task_ones(kind, classes, masking):
    strategy = learner(network(kind, **({"masking": masking, "width": 2} if kind == "heads" else {})))
    train(strategy, benchmark(LABELS, classes).train_stream)
    single = all_outputs(strategy.model, LABELS)
    for order in ((5, 2, 9, 9, 2, 5, 5, 5, 2, 9), (9, 9, 9, 9, 2, 2, 2, 2, 2, 2), (2,) * 10):
        mixed = outputs(strategy.model, torch.tensor(order))
        for row, task in enumerate(order):
            torch.testing.assert_close(mixed[row, : single[task].shape[1]], single[task][row], rtol=1e-5, atol=1e-6)
            assert not mixed[row, single[task].shape[1] :].any()
    strategy.model.eval()
    every = strategy.model(PROBE, None)
    assert {task: torch.equal(value, every[task]) for task, value in single.items()} == dict.fromkeys(LABELS, True)
    assert torch.equal(strategy.model(PROBE, 2), single[2])


def test_predictions_of_narrow_heads_stay_when_wider_ones_come():
    stream = benchmark((0, 1), (2, 5), samples=60)
    strategy = learner(network("heads", width=2), train_epochs=8)
    train(strategy, stream.train_stream[:1])
    x = 3 * torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(3))
    before = outputs(strategy.model, 0, x).argmax(1)
    train(strategy, stream.train_stream[1:])
    assert torch.equal(outputs(strategy.model, 0, x).argmax(1), before)


def test_accuracy_of_old_experiences_stays_through_eval():
    stream = benchmark()
    strategy = learner(network("heads"), evaluator=EvaluationPlugin(accuracy_metrics(experience=True)), train_epochs=4)
    seen = {}
    for index, experience in enumerate(stream.train_stream):
        train(strategy, [experience])
        found = {key: v for key, v in strategy.eval(stream.test_stream[: index + 1]).items() if "eval_phase" in key}
        assert {key: found[key] for key in seen} == seen
        seen = found
    assert len(seen) == 3


def test_a_loader_in_memory_changes_nothing():
    results = []
    for plugins in ([], [InMemoryDataPlugin()]):
        strategy = learner(network("heads"), plugins=plugins)
        train(strategy, benchmark().train_stream)
        results.append(weights(strategy))
    assert_equal_states(*results)


def test_evaluation_in_the_middle_of_training_changes_nothing():
    results = []
    for every in (-1, 1):
        stream, strategy = benchmark(), learner(network(), eval_every=every)
        for index in range(3):
            learned = [stream.test_stream[: max(1, index)]]
            train(strategy, stream.train_stream[index : index + 1], eval_streams=learned, shuffle=False)
        results.append(weights(strategy))
    assert_equal_states(*results)


def test_evaluation_on_the_experience_in_training():
    strategy = learner(network(), eval_every=0)
    for experience in benchmark().train_stream:
        strategy.train(experience)


def test_a_whole_stream_at_once():
    results = []
    for at_once in (True, False):
        stream, strategy = benchmark(), learner(network(), train_mb_size=SAMPLES)
        for part in [stream.train_stream] if at_once else stream.train_stream:
            strategy.train(part, shuffle=False)
        results.append(weights(strategy))
    assert_equal_states(*results)


@pytest.mark.parametrize("kind", ["plain", "heads"])
@pytest.mark.filterwarnings("ignore:stream generators will be converted")
def test_pieces_of_experiences_go_on_training_their_task(kind):
    """Every piece is pruned when it ends: the bound holds, old tasks stay; a piece needs labels (with_task_labels)."""
    pieces = split_online_stream(benchmark(LABELS).train_stream, experience_size=8, access_task_boundaries=True)
    strategy, seen = learner(network(kind), train_epochs=1, max_growth=3.0), {}
    for piece in with_task_labels(pieces):
        strategy.train(piece)
        now = all_outputs(strategy.model, strategy.plugin.method.tasks)
        assert_same({task: value for task, value in seen.items() if task != piece.task_label}, now)
        assert not torch.equal(now[piece.task_label], seen.get(piece.task_label, torch.zeros(())))
        seen = now
        assert strategy.plugin.growth <= 3.0
    assert strategy.plugin.method.tasks == list(LABELS)


@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_the_report_has_every_parameter_once(kind):
    strategy = learner(network(kind), exclude=["5" if kind == "plain" else "body.5"], max_growth=2.5)
    with pytest.raises(StateError, match="train first"):
        strategy.plugin.report()
    base = sum(value.numel() for value in network(kind).state_dict().values())
    for experience in benchmark((0, 7, 3)).train_stream:
        train(strategy, [experience])
        report = strategy.plugin.report()
        rows = {row.parameter: row for row in report}
        assert len(rows) == len(report)
        assert {name: row.shape for name, row in rows.items()} == {
            name: tuple(p.shape) for name, p in strategy.model.named_parameters()
        }
        frozen = {name for name, row in rows.items() if row.treatment == "frozen"}
        assert {name.rpartition("body.")[2].removeprefix("model.") for name in frozen} == {
            "1.base.weight", "5.weight", "5.bias"
        }  # fmt: skip
        own = {row.reason for row in report if row.treatment == "task-owned"}
        assert {int(reason.split()[-1]) for reason in own} == set(strategy.plugin.method.tasks)
        assert report.notes[0] == f"task 0: the base, {base} numbers"
        assert len(report.notes) == len(strategy.plugin.method.tasks) + 1
        for task, record in strategy.plugin.method.ledger.records.items():
            found = {
                n: v for n, v in strategy.model.state_dict().items() if f"tasks.{task}." in n or f"ers.{task}." in n
            }
            count = sum(v.numel() for n, v in found.items() if not n.endswith(("_bits", "_shape")))
            assert any(f"task {task}: {count} numbers ({100 * count / base:.2f} %" in note for note in report.notes)
            assert record.stored_bytes == sum(value.nbytes for value in found.values())


def test_the_strategy_is_the_plugin():
    assert set(inspect.signature(HALRPPlugin).parameters) <= set(inspect.signature(HALRP.__init__).parameters)
    model = network()
    plugins = [HALRPPlugin(max_growth=4.0)]
    naive = Naive(model=model, optimizer=sgd(model), plugins=plugins, train_mb_size=8, train_epochs=2)
    strategy = learner(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(naive, benchmark().train_stream)
    train(strategy, benchmark().train_stream)
    assert_equal_states(weights(naive), weights(strategy))
    assert outputs(naive.model, 1).shape == (len(PROBE), CLASSES)
