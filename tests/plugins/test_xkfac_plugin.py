"""XK-FAC inside Avalanche: as in a plain loop, with pieces of experiences, beside plugins that run the model too."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks.scenarios import class_incremental_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import XKFAC, DataError, KFACLaplacePlugin, ModelError, XKFACPlugin
from avalanche_gradproj.methods import xkfac_reparameterise
from avalanche_gradproj.testing import MethodCase, leftovers, strategy, stream

CASE = MethodCase("xkfac", XKFACPlugin, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4),
    ).double()


def learner_of(model, plugins, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"train_mb_size": 48, "eval_mb_size": 16, "evaluator": EvaluationPlugin(), **kwargs}
    return Naive(model=model, optimizer=optimizer, plugins=plugins, **settings)


def samples_of(experience):
    x = torch.stack([experience.dataset[i][0] for i in range(48)]).double()
    return x, torch.tensor([int(experience.dataset[i][1]) for i in range(48)])


def whole(x, y):
    data = ClassificationDataset([TensorDataset(x, y)], data_attributes=[DataAttribute(y.tolist(), "targets")])
    order = list(range(4))
    return class_incremental_benchmark({"train": data, "test": data}, class_order=order, num_experiences=1)


@pytest.mark.parametrize("settings", [{}, {"strength": 2.0, "mode": "separate", "adaptive": False, "damping": 0.1}])
def test_weights_are_those_of_a_plain_loop(settings):
    """The plugin adds timing alone; the whole experience is one mini-batch, so that order plays no part."""
    plugin, core = XKFACPlugin(**settings, fisher="exact"), XKFACPlugin(**settings, fisher="exact").method
    plain, model = network(), network()
    learner = learner_of(model, [plugin], train_epochs=3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for drawn in stream().train_stream:
        experience = whole(*samples_of(drawn)).train_stream[0]
        x, y = samples_of(experience)  # in its order: drawn signs belong to places
        plain.train()
        with core.experience(plain, optimizer, samples=48, batches=[x]):
            for _ in range(3):
                optimizer.zero_grad()
                core.objective(F.cross_entropy(plain(x), y)).backward()
                optimizer.step()
        core.consolidate(plain, [x])
        learner.train(experience)
    assert core.experiences == plugin.method.experiences == 3
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-7, atol=1e-9)


class RunsTheModel(SupervisedTemplate.PLUGIN_CLASS):
    """Runs the model on other data between the forward and the backward pass of every step."""

    def after_forward(self, strategy, *args, **kwargs):
        norms = [module for module in strategy.model.modules() if isinstance(module, nn.BatchNorm1d)]
        for norm in norms:
            norm.momentum = 0.0  # statistics do not move
        strategy.model(torch.randn(7, 12, dtype=torch.float64))
        for norm in norms:
            norm.momentum = 0.1


def test_only_the_training_step_counts():
    """Forward passes of others, before it and after it in the list, change nothing."""
    results = []
    for position in (None, 0, 1):
        model, plugin = network(), XKFACPlugin(5.0, adaptive=False, reparameterise=False)
        plugins = [plugin] if position is None else [plugin, RunsTheModel()][:: 1 if position else -1]
        learner = learner_of(model, plugins, train_epochs=2)
        for experience in stream().train_stream:
            x, y = samples_of(experience)
            learner.train(whole(x, y).train_stream[0])
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=1e-11)


def test_evaluation_in_the_middle_of_training_changes_nothing():
    results = []
    for every in (-1, 1):
        benchmark, plugin = stream(), XKFACPlugin()
        learner = strategy(CASE, [plugin], train_epochs=3, eval_every=every)
        for experience in benchmark.train_stream:
            learner.train(experience, eval_streams=[benchmark.test_stream], shuffle=False)
        results.append(nn.utils.parameters_to_vector(learner.model.parameters()))
        assert not leftovers(learner.model, learner)
    assert torch.equal(*results)


def test_pieces_of_an_experience_are_one_experience(monkeypatch):
    calls = []
    original = xkfac_reparameterise.reparameterise
    monkeypatch.setattr(
        "avalanche_gradproj.methods.xkfac.reparameterise", lambda *args: calls.append(1) or original(*args)
    )
    pieces = split_online_stream(stream().train_stream, experience_size=16, shuffle=False, access_task_boundaries=True)
    plugin = XKFACPlugin()
    learner = strategy(CASE, [plugin], train_epochs=1)
    seen = []
    for piece in pieces:
        learner.train(piece)
        seen.append((plugin.method.experiences, len(calls)))
    assert seen == [(0, 0), (0, 0), (1, 0), (1, 1), (1, 1), (2, 1), (2, 2), (2, 2), (3, 2)]


def test_a_mini_batch_of_one_sample_is_refused_by_name():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network().float()

        def forward(self, x):
            return self.net(x)

    learner = learner_of(Flat(), [XKFACPlugin()], train_mb_size=16)
    benchmark = stream()
    learner.train(benchmark.train_stream[0])
    learner.train_mb_size = 47
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(DataError, match=r"'net\.1'.*one sample.*train_mb_size"):
        learner.train(benchmark.train_stream[1], shuffle=False)
    assert not leftovers(learner.model, learner)
    assert before.keys() == learner.model.state_dict().keys()


def test_unpaired_batch_norms_are_refused_before_training():
    model = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 4))
    before = copy.deepcopy(model.state_dict())
    learner = learner_of(model, [XKFACPlugin()])
    with pytest.raises(ModelError, match="BatchNorm '0'"):
        learner.train(stream().train_stream[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    learner = learner_of(model, [XKFACPlugin(unpaired="freeze")])
    learner.train(stream().train_stream[0])


def test_the_curvature_is_of_mini_batches_of_the_size_asked_for(monkeypatch):
    from avalanche_gradproj.methods.kfac_factors import FactorPass

    sizes = []
    original = FactorPass._add
    monkeypatch.setattr(FactorPass, "_add", lambda self, batch: sizes.append(len(batch[0])) or original(self, batch))
    learner = strategy(CASE, [XKFACPlugin(record_batch_size=20)], train_epochs=1)
    learner.train(stream().train_stream[0])
    assert sizes == [20, 20, 8]


def test_old_accuracy_on_heads_and_shared_outputs():
    """After a stream, the first task's predictions moved less than with nothing, for both kinds of outputs."""
    for task_labels in (False, True):
        case = MethodCase("xkfac", XKFACPlugin, optimizer=CASE.optimizer, task_incremental=task_labels)
        benchmark, moved = stream(task_labels=task_labels), {}
        for name, plugins in (("naive", []), ("xkfac", [XKFACPlugin(5.0, adaptive=False)])):
            learner = strategy(case, plugins, train_epochs=20)
            x, _ = samples_of(benchmark.train_stream[0])
            args = (x.float(), torch.zeros(48, dtype=torch.long)) if task_labels else (x.float(),)
            outputs = []
            for experience in benchmark.train_stream:
                learner.train(experience)
                learner.model.eval()
                outputs.append(learner.model(*args).detach().softmax(1))
            moved[name] = (outputs[-1] - outputs[0]).abs().mean().item()
        assert moved["xkfac"] < 0.6 * moved["naive"]


def test_the_strategy_is_the_plugin():
    arguments = set(inspect.signature(XKFACPlugin).parameters)
    assert arguments <= set(inspect.signature(XKFAC.__init__).parameters)
    alone = {"eigenbasis"}  # of one pair of factors a layer, on the layer's own weight
    assert set(inspect.signature(KFACLaplacePlugin).parameters) - {"strength"} - alone <= arguments
    results = []
    for build in (
        lambda model, rest: XKFAC(model=model, strength=3.0, damping=0.1, plugins=[], **rest),
        lambda model, rest: Naive(model=model, plugins=[XKFACPlugin(3.0, damping=0.1)], **rest),
    ):
        model = network().float()
        rest = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.05), "train_mb_size": 8}
        learner = build(model, {**rest, "evaluator": EvaluationPlugin()})
        for experience in stream().train_stream:
            torch.manual_seed(1)
            learner.train(experience)
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*results)
