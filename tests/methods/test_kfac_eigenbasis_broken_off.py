"""Steps in the eigenbasis of Kronecker factors that are broken off, or run inside each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.layers.unit import Unit
from tests.methods.kfac_eigenbasis_setup import MODELS, adam, data, distance, hooks_of, learned, snapshot, steps

pytestmark = pytest.mark.usefixtures("double")


class Failing(torch.optim.SGD):
    """Raises in the middle of its second step, with some parameters moved."""

    steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        if self.steps == 2:
            self.param_groups[0]["params"][0].add_(1.0)
            raise RuntimeError("in the step")
        return super().step(closure)


def interrupt(*args):
    raise KeyboardInterrupt


def broken_step(optimizer, how):
    """Raises after coordinates were written: in the step, or in a hook just before or after it."""
    if how == "pre-hook":
        optimizer.register_step_pre_hook(interrupt)
    if how == "post-hook":
        optimizer.steps, hooks = 5, optimizer._optimizer_step_post_hooks
        hooks.move_to_end(optimizer.register_step_post_hook(interrupt).id, last=False)
    optimizer.step()


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("how", ["step", "pre-hook", "post-hook"])
def test_a_step_that_is_broken_off_leaves_weights_and_gradients_as_they_were(which, how):
    model, laplace = learned(MODELS[which])
    optimizer = Failing(model.parameters(), lr=0.1)
    laplace.start(model, optimizer, samples=60)
    with laplace.active():
        steps(laplace, model, optimizer, data(9), 1)
    optimizer.zero_grad()
    (F.cross_entropy(model(data(9)[0]), data(9)[1]) + laplace.penalty()).backward()
    before, gradients = snapshot(model), [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients]
    with pytest.raises((RuntimeError, KeyboardInterrupt)), laplace.active():
        broken_step(optimizer, how)
    for p, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert p.grad is gradient
        assert torch.equal(gradient, value)
    turned = [n for n in before if which != "linear" or not n.startswith("1.")]  # the norm layer is not
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in turned)
    assert len(hooks_of(optimizer)) == (how != "step")


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_a_class_whose_step_calls_that_of_its_base(eps):
    """It runs all hooks twice; here it raises and goes on in between too."""

    class Twice(torch.optim.Adam):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(0.5)
            shown = [p.grad for group in self.param_groups for p in group["params"]]
            try:
                handle = register_optimizer_step_pre_hook(interrupt)
                super().step(closure)
            except KeyboardInterrupt:
                handle.remove()
            super().step(closure)
            here = [p.grad for group in self.param_groups for p in group["params"]]
            assert all(one is other for one, other in zip(here, shown, strict=True))

    class Once(torch.optim.Adam):
        pass

    def run(kind, factor):
        model, laplace = learned()
        optimizer = kind(model.parameters(), lr=0.02, eps=eps)
        with laplace.experience(model, optimizer, samples=60):
            for _ in range(3):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data(9)[0]), data(9)[1]) + laplace.penalty()
                (factor * loss).backward()
                optimizer.step()
        return snapshot(model)

    assert distance(run(Twice, 1.0), run(Once, 0.5)) < 1e-12


@pytest.mark.parametrize("at", range(4))
def test_an_interruption_between_two_writes(at, monkeypatch):
    """Two layers: written once before the step, once after it."""
    model, laplace = learned()
    optimizer, write, calls = adam(model), Unit.write_weights, []

    def interrupted(self, matrix):
        calls.append(self.name)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        write(self, matrix)

    F.cross_entropy(model(data(9)[0]), data(9)[1]).backward()
    before, gradients = snapshot(model), [p.grad for p in model.parameters()]
    monkeypatch.setattr(Unit, "write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt), laplace.experience(model, optimizer, samples=60):
        optimizer.step()
    assert all(p.grad is own for p, own in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in before if n[0] in "03")
    assert not hooks_of(optimizer)


def test_training_that_goes_on_after_a_broken_step_is_stopped():
    model, laplace = learned()
    optimizer = Failing(model.parameters(), lr=0.1)
    with laplace.experience(model, optimizer, samples=60):
        steps(laplace, model, optimizer, data(9), 1)
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="in the step"):
            optimizer.step()
        with pytest.raises(StateError, match="broken off"):
            optimizer.step()
        assert distance(before, snapshot(model)) == 0
        steps(laplace, model, optimizer, data(9), 1)
