"""Where K-FAC's plugin adds its gradient after the backward pass, and where to the loss before it."""

from __future__ import annotations

import pytest
import torch
from avalanche.training.supervised import Naive
from avalanche.training.templates import SupervisedTemplate

from avalanche_gradproj import GPMPlugin, KFACLaplacePlugin
from avalanche_gradproj.testing import strategy, stream
from tests.plugins.kfac_setup import CASE


class Accumulating(SupervisedTemplate.PLUGIN_CLASS):
    """Halves the loss before the backward pass, as one that sums up two mini-batches does."""

    def before_backward(self, strategy, *args, **kwargs):
        strategy.loss = strategy.loss / 2


class Halving(SupervisedTemplate.PLUGIN_CLASS):
    """Halves gradients after the backward pass."""

    def after_backward(self, strategy, *args, **kwargs):
        for parameter in strategy.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2


class Scaled(Naive):
    """Scales the loss for its backward pass, as with half precision."""

    def backward(self):
        (self.loss * 8).backward()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 8


class LossOnly(KFACLaplacePlugin):
    """The reference: the penalty is always part of the loss, as a plugin with an `after_backward` of its own has it."""

    def after_backward(self, strategy, *args, **kwargs):
        pass


class OwnLoop(Naive):
    """A training loop that knows no callbacks after the backward pass, and scales the loss for it."""

    def training_epoch(self, **kwargs):
        for batch in self.dataloader:
            self.mbatch = batch
            self._unpack_minibatch()
            self.optimizer.zero_grad()
            self._before_forward()
            self.mb_output = self.forward()
            self._after_forward()
            self.loss = self.criterion()
            self._before_backward()
            (self.loss * 8).backward()
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= 8
            self.optimizer_step()


class GraphKept(Naive):
    """Others may differentiate the loss again."""


def noted(plugin):
    """The number of calls of `add_gradient`, counted from now on."""
    calls, add = [], plugin.method.add_gradient
    plugin.method.add_gradient = lambda: (calls.append(1), add())[1]
    return calls


def train(plugin, before=(), after=(), kind=Naive):
    learner = strategy(CASE, [*before, plugin, *after])
    learner.__class__ = kind
    learner.retain_graph = kind is GraphKept
    for experience in stream().train_stream:
        learner.train(experience)
    return learner.model.state_dict()


def late():
    """A plugin whose callback is its own, not its class's."""
    plugin = SupervisedTemplate.PLUGIN_CLASS()
    plugin.before_backward = lambda strategy, **_: setattr(strategy, "loss", strategy.loss / 2)
    return plugin


class Adding(SupervisedTemplate.PLUGIN_CLASS):
    """Appends a plugin in the middle of training."""

    def before_training_epoch(self, strategy, *args, **kwargs):
        if not any(isinstance(own, Accumulating) for own in strategy.plugins):
            strategy.plugins.append(Accumulating())


@pytest.mark.parametrize(
    ("before", "after", "kind", "adds"),
    [
        ((), (), Naive, True),
        ((), (Halving,), Naive, True),
        ((Halving,), (), Naive, False),
        ((Accumulating,), (), Naive, False),
        ((), (Accumulating,), Naive, False),
        ((), (), Scaled, False),
        ((), (), OwnLoop, False),
        ((), (), GraphKept, False),
        ((), (late,), Naive, False),
        ((Adding,), (), Naive, False),
        ((), (lambda: GPMPlugin(0.9, n_samples=8),), Naive, True),
        ((lambda: GPMPlugin(0.9, n_samples=8),), (), Naive, False),
    ],
)
def test_training_is_that_with_the_penalty_in_the_loss(before, after, kind, adds):
    plugins = KFACLaplacePlugin(3.0, mode="online"), LossOnly(3.0, mode="online")
    calls = [noted(plugin) for plugin in plugins]
    found = [train(p, [b() for b in before], [a() for a in after], kind) for p in plugins]
    assert bool(calls[0]) == adds
    assert not calls[1]
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5)


def test_hooks_on_parameters_see_the_whole_gradient():
    plugin, seen = KFACLaplacePlugin(3.0, mode="online"), []
    learner, calls = strategy(CASE, [plugin]), noted(plugin)
    first, second = stream().train_stream[:2]
    learner.train(first)
    parameter = next(learner.model.parameters())
    parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
    learner.train(second)
    assert seen
    assert not calls
