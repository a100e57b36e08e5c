"""Strategies and heads beyond the ordinary."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from avalanche.models import IncrementalClassifier
from avalanche.models.cosine_layer import CosineIncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_gradproj import GPM, GPMPlugin
from avalanche_gradproj.plugins.base import task_heads
from avalanche_gradproj.testing import MethodCase, strategy, stream

CASE = MethodCase("gpm", lambda: GPMPlugin(threshold=0.9, n_samples=40))


def test_a_strategy_with_a_forward_of_its_own_is_recorded_through_it():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = nn.Linear(12, 10), nn.Linear(10, 4)

        def forward(self, x, gate):
            return self.out(torch.relu(self.body(x)) * gate)

    class WithGate(Naive):
        def forward(self):
            return self.model(self.mb_x, 0.5)

    torch.manual_seed(0)
    model = Gated()
    plugin = GPMPlugin(threshold=0.9, n_samples=40)
    learner = WithGate(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=8,
        plugins=[plugin],
        evaluator=EvaluationPlugin(),
    )
    for experience in stream().train_stream:
        learner.train(experience, eval_streams=[])
    assert plugin.method.experiences == 3
    assert set(plugin.bases) == {"body", "out"}


@pytest.mark.parametrize("moment", ["before_training_iteration", "before_backward", "after_update"])
def test_passes_of_other_plugins_get_whole_gradients(moment):
    """GEM, MIR and their like run the model themselves within an epoch: their gradients are not GPM's to project."""
    shares = []

    class Looks(Naive.PLUGIN_CLASS):
        pass

    def look(self, strategy, **kwargs):
        if strategy.clock.train_exp_counter == 1:
            hidden = strategy.model.hidden
            loss = strategy.model(strategy.mb_x).square().sum()
            weight, bias = torch.autograd.grad(loss, [hidden.weight, hidden.bias])
            gradient, (basis,) = torch.cat([weight, bias[:, None]], 1), plugin.bases["hidden"]
            shares.append(float((gradient @ basis).norm() / gradient.norm()))

    setattr(Looks, moment, look)
    plugin = GPMPlugin(threshold=0.9, n_samples=40, route="inputs")
    learner = strategy(CASE, [Looks(), plugin])
    for experience in stream().train_stream[:2]:
        learner.train(experience)
    assert len(shares) == 12
    assert min(shares) > 0.01


def test_heads_that_are_known():
    model = nn.ModuleDict({"a": IncrementalClassifier(3), "b": CosineIncrementalClassifier(3, 2), "c": nn.Linear(2, 2)})
    assert task_heads(model) == ["a", "b"]


def test_evaluation_inside_training_changes_nothing():
    """Periodic evaluation, by epoch or iteration, leaves the trained weights bit for bit as without it."""
    weights = []
    for settings in ({}, {"eval_every": 1}, {"eval_every": 2, "peval_mode": "iteration"}):
        learner = strategy(CASE, [GPMPlugin(threshold=0.9, n_samples=40, route="inputs")], **settings)
        for index, experience in enumerate(stream().train_stream):
            torch.manual_seed(index)
            # evaluation draws random numbers of its own: shuffle off, so that the batches are the same
            learner.train(experience, shuffle=False)
        weights.append(learner.model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_the_method_can_be_pickled_in_the_middle_of_an_experience():
    class Pickler(Naive.PLUGIN_CLASS):
        copies = ()

        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter == 1:
                self.copies = (*self.copies, pickle.loads(pickle.dumps(plugin)))

    plugin, pickler = GPMPlugin(threshold=0.9, n_samples=40), Pickler()
    learner = strategy(CASE, [plugin, pickler])
    for experience in stream().train_stream[:2]:
        learner.train(experience)
    assert pickler.copies[0].method.experiences == 1


@pytest.mark.parametrize("threshold", [0, 0.0, [0, 0, 0]])
def test_threshold_zero_needs_no_samples_and_does_nothing(threshold):
    learner, plain = strategy(CASE, [GPMPlugin(threshold=threshold)]), strategy(CASE, [])
    for index, experience in enumerate(stream().train_stream):  # 48 samples, fewer than the default 125
        for each in (learner, plain):
            torch.manual_seed(index)
            each.train(experience)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, learner.model.state_dict()[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    class Guard(Naive.PLUGIN_CLASS):
        def before_forward(self, strategy, **kwargs):
            torch.cuda.set_sync_debug_mode("error")

        def after_update(self, strategy, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    learner = strategy(CASE, [Guard(), GPMPlugin(threshold=0.9, n_samples=40), Guard()], device="cuda")
    for experience in stream().train_stream:
        learner.train(experience, eval_streams=[])


def test_the_strategy_is_naive_with_the_plugin():
    benchmark = stream()
    torch.manual_seed(0)
    plain = strategy(CASE, [CASE.make()])
    torch.manual_seed(0)
    twin = strategy(CASE, [])
    mine = []
    ready = GPM(
        model=twin.model,
        optimizer=twin.optimizer,
        threshold=0.9,
        n_samples=40,
        train_mb_size=8,
        train_epochs=2,
        plugins=mine,
        evaluator=EvaluationPlugin(),
    )
    assert mine == []
    assert ready.eval_mb_size == 8
    for index, experience in enumerate(benchmark.train_stream):
        for learner in (plain, ready):
            torch.manual_seed(index)
            learner.train(experience)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, ready.model.state_dict()[name]), name
    assert ready.plugin.bases.keys() == {"conv", "hidden", "out"}


def test_the_strategy_checks_its_arguments():
    model = nn.Linear(2, 2)
    settings = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with pytest.raises(TypeError, match="treshold"):
        GPM(**settings, treshold=0.9)
    with pytest.raises(ValueError, match="threshold=2"):
        GPM(**settings, threshold=2)
    names = list(inspect.signature(GPM).parameters)
    assert names[:4] == ["model", "optimizer", "threshold", "threshold_step"]
    assert "eval_every" in names
