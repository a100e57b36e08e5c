"""What every method must do, as functions that raise `AssertionError`."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from avalanche.core import BaseSGDPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_gradproj.errors import GradProjError, StateError
from avalanche_gradproj.testing.cases import EXPERIENCES, MethodCase, strategy, stream
from avalanche_gradproj.testing.comparing import difference, require, train
from avalanche_gradproj.testing.restart import check_restart
from avalanche_gradproj.testing.steps import (
    check_double_precision,
    check_gradients_alone,
    check_lets_go,
    check_no_host_round_trip,
)


def check_interface(case: MethodCase) -> None:
    """`make` gives a new Avalanche plugin at each call, with the three methods that the other checks call."""
    require(callable(case.make), f"{case.name}: make={case.make!r:.60} cannot be called: give MyPlugin, not MyPlugin()")
    one, other = case.make(), case.make()
    for plugin in (one, other):
        require(
            isinstance(plugin, BaseSGDPlugin),
            f"{case.name}: make() gives a {type(plugin).__name__}, which is no plugin of Avalanche: put a core into "
            "one of avalanche_gradproj.plugins (GradientTransformPlugin, PenaltyPlugin)",
        )
        missing = [name for name in ("report", "state_dict", "load_state_dict") if not hasattr(plugin, name)]
        require(not missing, f"{case.name}: {type(plugin).__name__} has no method {', '.join(missing)}")
    require(one is not other, f"{case.name}: make() gives the same plugin twice: it has to make a new one")


def check_training_twice(case: MethodCase) -> None:
    """Two plugins that are trained one after the other, from the same seeds, learn the same, bit for bit."""
    learners = []
    for _ in range(2):
        learners.append(strategy(case, [case.make()]))
        train(learners[-1], stream(task_labels=case.task_incremental), range(EXPERIENCES))
    name = difference(learners[0].model, learners[1].model)
    require(
        not name,
        f"{case.name}: {name!r} differs when the same is trained twice: something is kept outside of the plugin (an "
        "attribute of the class, a global), or random numbers are drawn without a seed",
    )


def check_neutral_equals_naive(case: MethodCase) -> None:
    """With neutral settings, weights and statistics after three experiences equal Naive's bit for bit."""
    if case.neutral is None:
        return
    benchmark = stream(task_labels=case.task_incremental)
    plain, learner = strategy(case, []), strategy(case, [case.neutral()])
    train(plain, benchmark, range(EXPERIENCES))
    train(learner, benchmark, range(EXPERIENCES))
    name = difference(plain.model, learner.model)
    require(not name, f"{case.name}: with neutral settings {name!r} differs from Naive's")


def check_acts(case: MethodCase) -> None:
    """With its own settings, the method changes what is learned: else every other check would be empty."""
    benchmark = stream(task_labels=case.task_incremental)
    plain, learner = strategy(case, []), strategy(case, [case.make()])
    train(plain, benchmark, range(EXPERIENCES))
    train(learner, benchmark, range(EXPERIENCES))
    require(bool(difference(plain.model, learner.model)), f"{case.name}: training equals Naive's, nothing was done")


class _StopError(Exception):
    """Raised in the middle of training by a check."""


class _Interrupt(Naive.PLUGIN_CLASS):
    """Raises, or stops the training, at one of its steps."""

    def __init__(self, step: int, *, stop: bool = False) -> None:
        super().__init__()
        self.left, self.stop = step, stop

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0 and self.stop:
            strategy.stop_training()
        elif self.left == 0:
            raise _StopError


def hooked(optimizer: Any) -> bool:
    """Whether an optimizer has hooks around its step."""
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(getattr(optimizer, kind, None) for kind in kinds)


def leftovers(model: nn.Module, learner: Any) -> list[str]:
    """Return the hooks, patches and modes that a method left on a model, optimizer or strategy."""
    found = []
    for name, module in model.named_modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        found += [f"{kind} of {name!r}" for kind in kinds if getattr(module, kind)]
        found += [f"patched forward of {name!r}"] if "forward" in module.__dict__ else []
    found += [f"hook on {name!r}" for name, p in model.named_parameters() if getattr(p, "_backward_hooks", None)]
    found += ["hooks of the optimizer"] if hooked(getattr(learner, "optimizer", None)) else []
    found += ["patched training_epoch"] if "training_epoch" in learner.__dict__ else []
    return found


def check_nothing_left_behind(case: MethodCase) -> None:
    """No hook or patch stays after training, after an exception, after `stop_training`; the plugin list is not ours."""
    benchmark = stream(task_labels=case.task_incremental)
    for interrupt, when in (
        (None, "training"),
        (_Interrupt(20), "an exception in step 20"),
        (_Interrupt(20, stop=True), "stop_training in step 20"),
    ):
        plugins = [case.make(), *([] if interrupt is None else [interrupt])]
        given = list(plugins)
        learner = strategy(case, plugins)
        with contextlib.suppress(_StopError):
            train(learner, benchmark, range(EXPERIENCES))
        found = leftovers(learner.model, learner)
        require(not found, f"{case.name}: left behind after {when}: {', '.join(found)}")
        require(plugins == given, f"{case.name}: the list of plugins was changed")
        modes = {module.training for module in learner.model.modules()}
        require(modes == {True}, f"{case.name}: modules are not all in training mode after {when}")


def check_consolidation_disturbs_nothing(case: MethodCase) -> None:
    """What happens after an experience leaves weights, statistics, gradients, modes and random states alone.

    A method that gives each task parameters of its own may change those of the task that ends: what its report calls
    task-owned, and what it stores anew.
    """
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    learner = strategy(case, [plugin])
    original = plugin.after_training_exp

    def watched(owner: Any, *args: Any, **kwargs: Any) -> None:
        def state() -> tuple[Any, ...]:
            model = owner.model
            gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            modes = {name: module.training for name, module in model.named_modules()}
            draws = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index] # noqa: NPY002
            return copy.deepcopy(model.state_dict()), gradients, modes, draws

        before = state()
        owned = {row.parameter for row in plugin.report() if row.treatment == "task-owned"}
        original(owner, *args, **kwargs)
        after = state()
        for name in owned:
            for part in before[:2]:
                part.pop(name, None)
        for name, value in before[0].items():
            close = torch.allclose(value.double(), after[0][name].double(), rtol=1e-4, atol=1e-6)
            require(close, f"{case.name}: after_training_exp changed {name!r} by more than rounding")
        for name, value in before[1].items():
            same = (value is None) == (after[1][name] is None) and (value is None or torch.equal(value, after[1][name]))
            require(same, f"{case.name}: after_training_exp changed the gradient of {name!r}")
        same = all(after[2].get(name, mode) == mode for name, mode in before[2].items())
        require(same, f"{case.name}: after_training_exp changed train/eval modes")
        same = torch.equal(before[3][0], after[3][0]) and (before[3][1] == after[3][1]).all()
        require(bool(same) and before[3][2] == after[3][2], f"{case.name}: after_training_exp drew random numbers")

    plugin.after_training_exp = watched
    train(learner, benchmark, range(EXPERIENCES))


def check_wrong_states_refused(case: MethodCase) -> None:
    """A state of another method or version is refused with a `StateError` that names it, and changes nothing."""
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    train(strategy(case, [plugin]), benchmark, range(1))
    good = plugin.state_dict()
    for change, named in (({"method": "other"}, "other"), ({"version": 999}, "999")):
        try:
            plugin.load_state_dict({**good, **change})
        except StateError as error:
            require(named in str(error), f"{case.name}: the refusal {error!s:.100} does not name {named}")
        else:
            raise AssertionError(f"{case.name}: a state with {change} was accepted")
    require(str(plugin.state_dict()) == str(good), f"{case.name}: a refused state changed the method")


def check_report_has_every_parameter(case: MethodCase) -> None:
    """The report names every parameter of the model, gives a reason where one is not covered, and prints."""
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    learner = strategy(case, [plugin])
    train(learner, benchmark, range(2))
    report = plugin.report()
    named, expected = {row.parameter for row in report}, {name for name, _ in learner.model.named_parameters()}
    require(named == expected, f"{case.name}: the report differs from the model in {sorted(named ^ expected)}")
    silent = [row.parameter for row in report if row.treatment == "left alone" and not row.reason]
    require(not silent, f"{case.name}: left alone without a reason: {silent}")
    require(all(name in str(report) for name in expected), f"{case.name}: the printed report lacks a parameter")


def check_bad_arguments(case: MethodCase) -> None:
    """Each bad argument raises one exception of this package that names it."""
    for call, named in case.bad_arguments:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call()
        except GradProjError as error:
            require(named in str(error), f"{case.name}: the message {error!s} does not name {named!r}")
        else:
            raise AssertionError(f"{case.name}: a bad {named} was accepted")


#: Every check, in the order in which they help to find a mistake.
CHECKS: tuple[Callable[[MethodCase], None], ...] = (
    check_interface,
    check_bad_arguments,
    check_training_twice,
    check_acts,
    check_neutral_equals_naive,
    check_double_precision,
    check_gradients_alone,
    check_nothing_left_behind,
    check_lets_go,
    check_consolidation_disturbs_nothing,
    check_report_has_every_parameter,
    check_restart,
    check_wrong_states_refused,
    check_no_host_round_trip,
)
