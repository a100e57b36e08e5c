"""K-FAC Laplace inside Avalanche: the loss that is logged, broken-off training, bad input, other plugins, metrics."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks.scenarios import class_incremental_benchmark
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.evaluation.metrics import loss_metrics
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import ConfigurationError, DataError, GPMPlugin, KFACLaplace, KFACLaplacePlugin, NonFiniteError
from avalanche_gradproj.linalg import kronecker
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.metrics import memory_metrics
from avalanche_gradproj.testing import MethodCase, leftovers, strategy, stream
from tests.plugins.kfac_setup import CASE, class_incremental, incremental, learning


class Watch(SupervisedTemplate.PLUGIN_CLASS):
    """Notes the loss before the backward pass, and the mean cross-entropy of the same mini-batch."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def before_backward(self, strategy, *args, **kwargs):
        own = F.cross_entropy(strategy.mb_output, strategy.mb_y)
        self.rows.append((strategy.clock.train_exp_counter, strategy.loss.item(), own.item()))


def test_the_loss_holds_the_penalty_from_the_second_experience_on():
    benchmark, plugin, watch = stream(), KFACLaplacePlugin(3.0), Watch()
    learner = strategy(CASE, [plugin, watch])
    for experience in benchmark.train_stream:
        learner.train(experience)
    first = [loss - own for index, loss, own in watch.rows if index == 0]
    later = [loss - own for index, loss, own in watch.rows if index > 0]
    assert first
    assert not any(first)
    assert min(later) >= 0
    assert max(later) > 1e-3


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_weights_are_those_of_a_plain_loop(mode):
    """The plugin adds timing alone: the core in a loop over the same mini-batches gives the same weights."""
    benchmark, plugin = stream(), KFACLaplacePlugin(2.0, mode=mode, fisher="exact")
    kwargs = {"train_mb_size": 48, "train_epochs": 2}
    learner, plain = strategy(CASE, [plugin], **kwargs), strategy(CASE, [], **kwargs).model
    laplace = KFACLaplacePlugin(2.0, mode=mode, fisher="exact").method
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    plain.double()
    learner.model.double()
    for experience in benchmark.train_stream:
        x = torch.stack([experience.dataset[i][0] for i in range(48)]).double()
        y = torch.tensor([int(experience.dataset[i][1]) for i in range(48)])
        with laplace.experience(plain, samples=48):
            for _ in range(2):
                optimizer.zero_grad()
                (F.cross_entropy(plain(x), y) + laplace.penalty()).backward()
                optimizer.step()
        laplace.consolidate(plain, [x])
        data = ClassificationDataset([TensorDataset(x, y)], data_attributes=[DataAttribute(y.tolist(), "targets")])
        whole = class_incremental_benchmark(
            {"train": data, "test": data}, class_order=list(range(4)), num_experiences=1
        )
        learner.train(whole.train_stream[0])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(learner.model.state_dict()[name], value, rtol=1e-8, atol=1e-10)


def unequal(features=12):
    """Three experiences of 40, 24 and 32 samples."""
    torch.manual_seed(0)
    targets = [0] * 40 + [1] * 24 + [2] * 32
    data = ClassificationDataset(
        [TensorDataset(torch.randn(96, features).double(), torch.tensor(targets))],
        data_attributes=[DataAttribute(targets, "targets")],
    )
    return class_incremental_benchmark({"train": data, "test": data}, class_order=[0, 1, 2], num_experiences=3)


@pytest.mark.parametrize("mode", ["separate", "online"])
@pytest.mark.parametrize("n_samples", [None, 16])
def test_weights_of_experiences_of_unequal_sizes(mode, n_samples):
    """N is the size of each experience, whatever is drawn from it; a step takes in the whole experience here."""
    kwargs = {"mode": mode, "fisher": "exact", "n_samples": n_samples}
    plugin, laplace = KFACLaplacePlugin(2.0, record_batch_size=7, **kwargs), KroneckerLaplace(2.0, **kwargs)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    plain = copy.deepcopy(model)
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=96,
        train_epochs=2,
        plugins=[plugin],
        evaluator=EvaluationPlugin(),
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for experience in unequal().train_stream:
        x = torch.stack([sample[0] for sample in experience.dataset])
        y = torch.tensor([int(sample[1]) for sample in experience.dataset])
        with laplace.experience(plain, samples=len(x)):
            for _ in range(2):
                optimizer.zero_grad()
                (F.cross_entropy(plain(x), y) + laplace.penalty()).backward()
                optimizer.step()
        laplace.consolidate(plain, [x[laplace.draw(len(x))]])
        learner.train(experience)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-8, atol=1e-10)
    expected = [80.0, 48.0, 64.0] if mode == "separate" else [192.0]
    assert [form.weight for form in plugin.method._memory.forms] == expected


class Broken(SupervisedTemplate.PLUGIN_CLASS):
    """Breaks off training in the middle."""

    def __init__(self):
        super().__init__()
        self.on = False

    def after_update(self, strategy, *args, **kwargs):
        if self.on:
            raise KeyboardInterrupt


def test_training_that_is_broken_off_leaves_no_reference_to_the_model():
    plugin, broken = KFACLaplacePlugin(), Broken()
    learner = incremental([plugin, broken])
    experiences = class_incremental()
    learner.train(experiences[0])
    broken.on = True
    with pytest.raises(KeyboardInterrupt):
        learner.train(experiences[1])
    assert not plugin.method.penalising
    assert plugin.method._training is None
    assert "training_epoch" not in learner.__dict__
    assert plugin.method.experiences == 1
    broken.on = False
    learner.train(experiences[1])
    assert plugin.method.experiences == 2
    assert "training_epoch" not in learner.__dict__


def test_an_epoch_that_never_runs_leaves_the_strategy_as_it_was():
    class Stop(SupervisedTemplate.PLUGIN_CLASS):
        def before_training_epoch(self, strategy, *args, **kwargs):
            strategy.stop_training()

    plugin = KFACLaplacePlugin()
    learner = learning(nn.Sequential(nn.Linear(12, 6)), [plugin, Stop()])
    learner.train(class_incremental()[0])
    assert plugin.method.experiences == 1
    assert "training_epoch" not in learner.__dict__


@pytest.mark.parametrize(("size", "sizes"), [(8, [8] * 6), (47, [48]), (23, [23, 23, 2]), (1, [1] * 46 + [2])])
def test_no_sample_is_alone_in_the_last_mini_batch(size, sizes):
    plugin, seen = KFACLaplacePlugin(record_batch_size=size), []
    dataset = stream().train_stream[0].dataset
    for batch in plugin._batches(dataset, strategy(CASE, [plugin])):
        seen.append(len(batch[0]))
    assert seen == sizes


def test_batch_statistics_without_running_ones():
    def model():
        norm = nn.BatchNorm1d(16, track_running_stats=False)
        return nn.Sequential(nn.Linear(12, 16), norm, nn.ReLU(), IncrementalClassifier(16, 6))

    incremental([KFACLaplacePlugin(record_batch_size=39)], model()).train(class_incremental()[0])  # 40 samples
    with pytest.raises(DataError, match=r"layer '1' normalises by the mini-batch.*record_batch_size"):
        incremental([KFACLaplacePlugin(record_batch_size=1)], model()).train(class_incremental()[0])


def test_wrong_losses_and_too_few_samples_are_refused_before_training():
    experience = stream().train_stream[0]
    learner = strategy(CASE, [KFACLaplacePlugin()], criterion=nn.MSELoss())
    before = [p.detach().clone() for p in learner.model.parameters()]
    with pytest.raises(ConfigurationError, match=r"criterion MSELoss\(\)"):
        learner.train(experience)
    assert all(torch.equal(one, p) for one, p in zip(before, learner.model.parameters(), strict=True))
    with pytest.raises(DataError, match="n_samples<=48"):
        strategy(CASE, [KFACLaplacePlugin(n_samples=49)]).train(experience)
    strategy(CASE, [KFACLaplacePlugin(fisher="empirical")]).train(experience)


def test_diverged_training_names_the_cause():
    case = MethodCase("kfac", CASE.make, optimizer=lambda p: torch.optim.SGD(p, lr=1e12))
    plugin = KFACLaplacePlugin()
    learner = strategy(case, [plugin])
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        learner.train(stream().train_stream[0])
    assert plugin.method.experiences == 0
    assert not leftovers(learner.model, learner)


@pytest.mark.parametrize("first", [True, False])
def test_beside_other_plugins(first, monkeypatch):
    monkeypatch.setattr(kronecker, "OPERATION_COST", 0)  # truncate the factors of a small network too
    benchmark, plugin = stream(), KFACLaplacePlugin(2.0, truncate=0.9)
    others = [ReplayPlugin(mem_size=20), EWCPlugin(ewc_lambda=0.5), GPMPlugin(threshold=0.6, n_samples=40)]
    learner = strategy(CASE, [plugin, *others] if first else [*others, plugin])
    for experience in benchmark.train_stream:
        learner.train(experience)
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())
    assert "eigenvectors" in str(plugin.report())
    assert max(others[2].method.leak.values()) < 1e-4  # what was added to the loss is projected too


def test_bytes_of_each_experience_are_a_metric_and_the_logged_loss_holds_the_penalty():
    benchmark, plugin = stream(), KFACLaplacePlugin()
    evaluator = EvaluationPlugin(memory_metrics(), loss_metrics(minibatch=True), loggers=[])
    learner = strategy(CASE, [plugin], evaluator=evaluator)
    for experience in benchmark.train_stream:
        learner.train(experience)
    logged = evaluator.get_all_metrics()
    held = logged["BytesHeld/train_phase/train_stream/Exp002/all"][1][-1]
    own = [logged[f"BytesHeld/train_phase/train_stream/Exp002/of_Exp{i:03d}"][1][-1] for i in range(3)]
    assert held == sum(own) == plugin.method.bytes_held > 0
    assert own == plugin.method.bytes_by_experience


def test_the_strategy_is_the_plugin():
    names = set(inspect.signature(KFACLaplacePlugin).parameters)
    assert names <= set(inspect.signature(KFACLaplace).parameters)
    weights = []
    for ready in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
        kwargs = {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "train_mb_size": 8,
            "evaluator": EvaluationPlugin(),
        }
        if ready:
            learner = KFACLaplace(**kwargs, strength=2.0, mode="online")
            assert learner.plugin.method.mode == "online"
        else:
            learner = Naive(**kwargs, plugins=[KFACLaplacePlugin(2.0, mode="online")])
        for experience in stream().train_stream:
            learner.train(experience)
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
