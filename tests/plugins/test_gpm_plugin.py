"""GPM inside Avalanche: streams of every kind, beside other plugins, interrupted and resumed."""

from __future__ import annotations

import warnings

import pytest
import torch
from avalanche.benchmarks.scenarios import class_incremental_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    EvaluationPlugin,
    EWCPlugin,
    LRSchedulerPlugin,
    ReplayPlugin,
)
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import DataError, GPMPlugin, InMemoryDataPlugin, ModelError
from avalanche_gradproj.metrics import projection_metrics
from avalanche_gradproj.testing import MethodCase, leftovers, strategy, stream

CASE = MethodCase("gpm", lambda: GPMPlugin(threshold=0.9, n_samples=40))
HEADS = MethodCase("gpm", lambda: GPMPlugin(threshold=0.9, n_samples=40), task_incremental=True)


def old_outputs(model, benchmark, task):
    """Evaluation outputs of the first experience's inputs, by the head of that task."""
    batch = torch.stack([sample[0] for sample in benchmark.train_stream[0].dataset])
    model.eval()
    with torch.no_grad():
        out = model(batch, torch.full((len(batch),), task)) if task is not None else model(batch)
    model.train()
    return out


def drift(case, plugins, task, **kwargs):
    """How far three experiences move what the network computes for the first one's inputs."""
    benchmark = stream(task_labels=case.task_incremental)
    learner = strategy(case, plugins, **kwargs)
    learner.train(benchmark.train_stream[0])
    before = old_outputs(learner.model, benchmark, task)
    for experience in benchmark.train_stream[1:]:
        learner.train(experience)
    return float((old_outputs(learner.model, benchmark, task) - before).norm() / before.norm())


@pytest.mark.parametrize("task", [None, 0], ids=["domain-incremental", "task-incremental"])
def test_full_energy_protects_the_function(task):
    """With every direction of the old inputs held, old outputs stay, through convolution, norm and linear layers."""
    case = CASE if task is None else HEADS
    held = drift(case, [GPMPlugin(threshold=1.0, threshold_step=0, n_samples=48)], task)
    free = drift(case, [], task)
    assert held < 1e-4 < 0.1 < free


def test_class_incremental_with_a_growing_head():
    torch.manual_seed(0)
    targets = (torch.arange(120) % 6).tolist()
    data = ClassificationDataset(
        [TensorDataset(torch.randn(120, 12), torch.tensor(targets))],
        data_attributes=[DataAttribute(targets, "targets")],
    )
    order = list(range(6))
    benchmark = class_incremental_benchmark({"train": data, "test": data}, class_order=order, num_experiences=3)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), IncrementalClassifier(16, 2))
    plugin = GPMPlugin(threshold=0.9, n_samples=40)
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=10,
        eval_mb_size=10,
        plugins=[plugin],
        evaluator=EvaluationPlugin(),
    )
    for experience in benchmark.train_stream:
        learner.train(experience)
    assert set(plugin.bases) == {"0"}
    assert plugin.report()["2.classifier.weight"].reason == "task head"
    assert model[2].classifier.out_features == 6


def test_a_head_is_covered_where_include_says_so():
    plugin = GPMPlugin(threshold=0.9, n_samples=40, include=["body.hidden", "head"])
    benchmark = stream(task_labels=True)
    learner = strategy(HEADS, [plugin])
    for experience in benchmark.train_stream:
        learner.train(experience)
    heads = {name for name in plugin.bases if name.startswith("head")}
    assert heads == {f"head.classifiers.{t}.classifier" for t in range(3)}
    assert plugin.report()["body.conv.weight"].reason == "not in include"


def test_a_plain_last_layer_is_projected_and_can_be_excluded():
    for exclude, expected in ((None, {"conv", "hidden", "out"}), (["out"], {"conv", "hidden"})):
        plugin = GPMPlugin(threshold=0.9, n_samples=40, exclude=exclude)
        strategy(CASE, [plugin]).train(stream().train_stream[0])
        assert set(plugin.bases) == expected
    assert plugin.report()["out.bias"].reason == "excluded"


def test_beside_other_plugins():
    """Replay, EWC, schedules and early stopping go on working, and old weights stay protected."""
    benchmark = stream()
    plugin = GPMPlugin(threshold=0.9, n_samples=40)
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loss_metrics(stream=True))
    torch.manual_seed(0)
    learner = strategy(CASE, [], evaluator=evaluator)
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.1, momentum=0.9)
    replay = ReplayPlugin(mem_size=20)
    learner = Naive(
        model=learner.model,
        optimizer=optimizer,
        train_mb_size=8,
        train_epochs=6,
        eval_mb_size=16,
        evaluator=evaluator,
        eval_every=1,
        plugins=[
            replay,
            EWCPlugin(ewc_lambda=0.5),
            LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 2)),
            EarlyStoppingPlugin(patience=1, val_stream_name="test_stream"),
            plugin,
        ],
    )
    for experience in benchmark.train_stream:
        learner.train(experience, eval_streams=[benchmark.test_stream])
        assert not leftovers(learner.model, learner)
        assert all(value <= 1e-4 for value in plugin.method.leak.values())
    assert len(replay.storage_policy.buffer) == 20
    assert plugin.method.experiences == 3
    assert len(plugin.method.leak) == 3


def test_a_plugin_that_changes_gradients_first_is_not_trusted():
    """The fast route forms projected gradients; noise added to them before GPM's turn is projected as well."""

    class Noise(Naive.PLUGIN_CLASS):
        def after_backward(self, strategy, **kwargs):
            for parameter in strategy.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.data.add_(torch.ones_like(parameter))  # unseen by version counters

    benchmark = stream()
    plugin = GPMPlugin(threshold=0.9, n_samples=40, route="inputs")
    learner = strategy(CASE, [Noise(), plugin])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*taken back at its end.*")
        for experience in benchmark.train_stream:
            learner.train(experience)
    learner = strategy(CASE, [GPMPlugin(threshold=0.9, n_samples=40, route="inputs"), Noise()])
    learner.train(benchmark.train_stream[0])
    with pytest.warns(UserWarning, match="taken back at its end"):
        learner.train(benchmark.train_stream[1])


def test_early_stopping_mid_experience_leaves_no_patch():
    benchmark = stream()

    class StopAtOnce(Naive.PLUGIN_CLASS):
        def before_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 1:
                strategy.stop_training()

    plugin = GPMPlugin(threshold=0.9, n_samples=40)
    learner = strategy(CASE, [plugin, StopAtOnce()], train_epochs=5)
    for experience in benchmark.train_stream:
        learner.train(experience)
        assert not leftovers(learner.model, learner)
    assert plugin.method.experiences == 3


def test_keyboard_interrupt_and_going_on():
    """An interrupted experience leaves memory and model usable; training it again works."""

    class Interrupt(Naive.PLUGIN_CLASS):
        armed = True

        def after_forward(self, strategy, **kwargs):
            if self.armed and strategy.clock.train_exp_counter == 1:
                raise KeyboardInterrupt

    benchmark = stream()
    interrupt, plugin = Interrupt(), GPMPlugin(threshold=0.9, n_samples=40)
    learner = strategy(CASE, [plugin, interrupt])
    learner.train(benchmark.train_stream[0])
    bases = plugin.state_dict()
    with pytest.raises(KeyboardInterrupt):
        learner.train(benchmark.train_stream[1])
    assert not leftovers(learner.model, learner)
    assert str(plugin.state_dict()) == str(bases)
    interrupt.armed = False
    learner.train(benchmark.train_stream[1])
    assert plugin.method.experiences == 2


@pytest.mark.parametrize("size", [8, 9], ids=["even pieces", "a short last piece"])
def test_online_stream_consolidates_once_per_experience(size):
    benchmark = stream()
    plugin = GPMPlugin(threshold=0.9, n_samples=40)
    learner = strategy(CASE, [plugin], train_epochs=1)
    for count, experience in enumerate(benchmark.train_stream):
        for piece in split_online_stream([experience], experience_size=size, access_task_boundaries=True):
            assert plugin.method.experiences == count
            learner.train(piece)
    assert plugin.method.experiences == 3


def test_online_stream_without_boundaries():
    benchmark = stream()
    plugin = GPMPlugin(threshold=0.9, n_samples=8)
    learner = strategy(CASE, [plugin], train_epochs=1)
    for piece in split_online_stream(benchmark.train_stream[:1], experience_size=8):
        learner.train(piece)
    assert plugin.method.experiences == 6
    learner = strategy(CASE, [GPMPlugin(threshold=0.9, n_samples=9)], train_epochs=1)
    with pytest.raises(DataError, match="has 8 samples and n_samples=9"):
        learner.train(next(iter(split_online_stream(benchmark.train_stream[:1], experience_size=8))))


def test_too_few_samples_and_refused_models_before_training():
    benchmark = stream()
    learner = strategy(CASE, [GPMPlugin(n_samples=49)])
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    with pytest.raises(DataError, match="experience 0 has 48 samples and n_samples=49"):
        learner.train(benchmark.train_stream[0])
    assert all(torch.equal(before[k], v) for k, v in learner.model.state_dict().items())
    learner = strategy(CASE, [GPMPlugin(n_samples=40)])
    learner.model.hidden.weight = learner.model.out.weight = nn.Parameter(torch.randn(10, 24))
    with pytest.raises(ModelError, match=r"'hidden.weight' and 'out.weight'"):
        learner.train(benchmark.train_stream[0])


@pytest.mark.parametrize("fast_loader", [False, True])
def test_metrics_reach_the_loggers(fast_loader):
    class Recorder:
        def __init__(self):
            self.values = {}

        def log_metrics(self, values):
            self.values.update({value.name: value.value for value in values})

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    benchmark, recorder = stream(), Recorder()
    evaluator = EvaluationPlugin(*projection_metrics())
    plugin = GPMPlugin(threshold=0.9, n_samples=40)
    learner = strategy(CASE, [plugin, *([InMemoryDataPlugin()] if fast_loader else [])], evaluator=evaluator)
    for index, experience in enumerate(benchmark.train_stream):
        learner.train(experience)
        recorder.values.update(evaluator.get_last_metrics())
        prefix = f"train_phase/train_stream/Exp{index:03d}"
        for layer in ("conv", "hidden", "out"):
            columns = sum(block.shape[1] for block in plugin.bases[layer])
            assert recorder.values[f"Rank/{prefix}/{layer}"] == columns
            share = recorder.values[f"FreeShare/{prefix}/{layer}"]
            assert share == pytest.approx(1 - columns / plugin.bases[layer][0].shape[0])
            if index > 0:
                assert 0 < recorder.values[f"RemovedShare/{prefix}/{layer}"] <= 1
                assert recorder.values[f"Leak/{prefix}/{layer}"] < 1e-4
        held = sum(block.numel() * 4 for blocks in plugin.bases.values() for block in blocks)
        assert recorder.values[f"BytesHeld/{prefix}/all"] == held
