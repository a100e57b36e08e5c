"""Training that is broken off inside Avalanche leaves a plugin without any hold on the model, and able to go on."""

from __future__ import annotations

import gc
import weakref

import pytest
from avalanche.core import SupervisedPlugin

from avalanche_gradproj.testing import leftovers, strategy, stream
from tests.contracts.cases import CASES


class Interrupt(SupervisedPlugin):
    """Raises in a step of the second experience, as Ctrl-C does."""

    def __init__(self):
        super().__init__()
        self.steps, self.armed = 0, True

    def after_update(self, strategy, *args, **kwargs):
        self.steps += strategy.clock.train_exp_counter == 1
        if self.armed and self.steps == 3:
            self.armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_hold_on_the_model(case):
    plugin = case.make()
    learner = strategy(case, [plugin, Interrupt()])
    experiences = list(stream(task_labels=case.task_incremental).train_stream)
    learner.train(experiences[0])
    held = plugin.method.bytes_held
    with pytest.raises(KeyboardInterrupt):
        learner.train(experiences[1])
    assert plugin.method.bytes_held == held
    assert not leftovers(learner.model, learner)
    model = weakref.ref(learner.model)
    del learner
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_goes_on(case):
    plugin = case.make()
    learner = strategy(case, [plugin, Interrupt()])
    experiences = list(stream(task_labels=case.task_incremental).train_stream)
    learner.train(experiences[0])
    with pytest.raises(KeyboardInterrupt):
        learner.train(experiences[1])
    for experience in experiences[1:]:
        learner.train(experience)
    assert plugin.method.experiences == len(experiences)
