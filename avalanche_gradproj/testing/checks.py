"""What every method must do, as functions that raise `AssertionError`."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_gradproj.errors import GradProjError, StateError
from avalanche_gradproj.testing.cases import EXPERIENCES, MethodCase, strategy, stream
from avalanche_gradproj.testing.device import no_host_round_trips


def _train(learner: Naive, benchmark: Any, experiences: range) -> None:
    for index in experiences:
        torch.manual_seed(100 + index)
        learner.train(benchmark.train_stream[index])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _difference(one: nn.Module, other: nn.Module) -> str:
    """Return the name of the first tensor in which two models differ, or an empty string."""
    ours, theirs = one.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys():
        return min(ours.keys() ^ theirs.keys())
    for name, value in ours.items():
        if not torch.equal(value, theirs[name]):
            return name
    return ""


def check_neutral_equals_naive(case: MethodCase) -> None:
    """With neutral settings, weights and statistics after three experiences equal Naive's bit for bit."""
    if case.neutral is None:
        return
    benchmark = stream(task_labels=case.task_incremental)
    plain, learner = strategy(case, []), strategy(case, [case.neutral()])
    _train(plain, benchmark, range(EXPERIENCES))
    _train(learner, benchmark, range(EXPERIENCES))
    name = _difference(plain.model, learner.model)
    _require(not name, f"{case.name}: with neutral settings {name!r} differs from Naive's")


def check_acts(case: MethodCase) -> None:
    """With its own settings, the method changes what is learned: else every other check would be empty."""
    benchmark = stream(task_labels=case.task_incremental)
    plain, learner = strategy(case, []), strategy(case, [case.make()])
    _train(plain, benchmark, range(EXPERIENCES))
    _train(learner, benchmark, range(EXPERIENCES))
    _require(bool(_difference(plain.model, learner.model)), f"{case.name}: training equals Naive's, nothing was done")


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
    for interrupt in (None, _Interrupt(20), _Interrupt(20, stop=True)):
        plugins = [case.make(), *([] if interrupt is None else [interrupt])]
        given = list(plugins)
        learner = strategy(case, plugins)
        with contextlib.suppress(_StopError):
            _train(learner, benchmark, range(EXPERIENCES))
        found = leftovers(learner.model, learner)
        _require(not found, f"{case.name}: left behind after {interrupt!r}: {', '.join(found)}")
        _require(plugins == given, f"{case.name}: the list of plugins was changed")
        modes = {module.training for module in learner.model.modules()}
        _require(modes == {True}, f"{case.name}: modules are not all in training mode after {interrupt!r}")


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
            _require(close, f"{case.name}: after_training_exp changed {name!r} by more than rounding")
        for name, value in before[1].items():
            same = (value is None) == (after[1][name] is None) and (value is None or torch.equal(value, after[1][name]))
            _require(same, f"{case.name}: after_training_exp changed the gradient of {name!r}")
        same = all(after[2].get(name, mode) == mode for name, mode in before[2].items())
        _require(same, f"{case.name}: after_training_exp changed train/eval modes")
        same = torch.equal(before[3][0], after[3][0]) and (before[3][1] == after[3][1]).all()
        _require(bool(same) and before[3][2] == after[3][2], f"{case.name}: after_training_exp drew random numbers")

    plugin.after_training_exp = watched
    _train(learner, benchmark, range(EXPERIENCES))


@contextmanager
def _optimizers_by_reference() -> Iterator[None]:
    """Let dill find the modules of torch's optimizers, whose names `torch.optim` deletes.

    Else it pickles the optimizer's class by value, which fails with typing_extensions 4.16 for any strategy of
    Avalanche: that class holds, through a deprecation, a marker that cannot be pickled.
    """
    hidden = {
        name: module
        for path, module in sys.modules.items()
        if path.startswith("torch.optim.") and not hasattr(torch.optim, name := path.removeprefix("torch.optim."))
        if "." not in name
    }
    for name, module in hidden.items():
        setattr(torch.optim, name, module)
    try:
        yield
    finally:
        for name in hidden:
            delattr(torch.optim, name)


def check_restart(case: MethodCase) -> None:
    """Saving after an experience and going on from a fresh plugin equals never having stopped, bit for bit."""
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    learner = strategy(case, [plugin])
    _train(learner, benchmark, range(2))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt"
        torch.save(plugin.state_dict(), file)
        # weights_only accepts tensors, numbers and names alone
        state = torch.load(file, weights_only=True)
        checkpoint = Path(folder) / "checkpoint.pkl"
        with _optimizers_by_reference():
            save_checkpoint(learner, checkpoint)
        resumed, _ = maybe_load_checkpoint(strategy(case, [case.make()], seed=5), checkpoint)
    fresh = case.make()
    fresh.load_state_dict(state)
    again = copy.deepcopy(learner)
    again.plugins[again.plugins.index(next(p for p in again.plugins if type(p) is type(plugin)))] = fresh
    for other in (learner, again, resumed):
        _train(other, benchmark, range(2, EXPERIENCES))
    for how, other in (("its state", again), ("Avalanche's checkpoint", resumed)):
        name = _difference(learner.model, other.model)
        _require(not name, f"{case.name}: going on from {how} gives another {name!r}")


def check_wrong_states_refused(case: MethodCase) -> None:
    """A state of another method or version is refused with a `StateError` that names it, and changes nothing."""
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    _train(strategy(case, [plugin]), benchmark, range(1))
    good = plugin.state_dict()
    for change, named in (({"method": "other"}, "other"), ({"version": 999}, "999")):
        try:
            plugin.load_state_dict({**good, **change})
        except StateError as error:
            _require(named in str(error), f"{case.name}: the refusal {error!s:.100} does not name {named}")
        else:
            raise AssertionError(f"{case.name}: a state with {change} was accepted")
    _require(str(plugin.state_dict()) == str(good), f"{case.name}: a refused state changed the method")


def check_report_has_every_parameter(case: MethodCase) -> None:
    """The report names every parameter of the model, gives a reason where one is not covered, and prints."""
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    learner = strategy(case, [plugin])
    _train(learner, benchmark, range(2))
    report = plugin.report()
    named, expected = {row.parameter for row in report}, {name for name, _ in learner.model.named_parameters()}
    _require(named == expected, f"{case.name}: the report differs from the model in {sorted(named ^ expected)}")
    silent = [row.parameter for row in report if row.treatment == "left alone" and not row.reason]
    _require(not silent, f"{case.name}: left alone without a reason: {silent}")
    _require(all(name in str(report) for name in expected), f"{case.name}: the printed report lacks a parameter")


def check_no_host_round_trip(case: MethodCase) -> None:
    """Between forward pass and next batch, nothing that the method does waits for a value of the device."""
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    learner = strategy(case, [plugin])

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with no_host_round_trips():
                return function(*args, **kwargs)

        return run

    # Avalanche's multi-head models look at the task labels, and select by them, forwards and backwards; Adam looks at
    # its step count: not the method's doing.
    own = ["before_forward", "before_backward", "after_backward", "before_update", "after_update"]
    if case.task_incremental and case.looks_back:
        own.remove("after_backward")
    for owner, names in (
        (learner, () if case.task_incremental else ("forward", "backward")),
        (plugin, own),
    ):
        for name in names:
            setattr(owner, name, guarded(getattr(owner, name)))
    _train(learner, benchmark, range(EXPERIENCES))


def check_bad_arguments(case: MethodCase) -> None:
    """Each bad argument raises one exception of this package that names it."""
    for call, named in case.bad_arguments:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call()
        except GradProjError as error:
            _require(named in str(error), f"{case.name}: the message {error!s} does not name {named!r}")
        else:
            raise AssertionError(f"{case.name}: a bad {named} was accepted")


#: Every check, in the order in which they help to find a mistake.
CHECKS: tuple[Callable[[MethodCase], None], ...] = (
    check_bad_arguments,
    check_acts,
    check_neutral_equals_naive,
    check_nothing_left_behind,
    check_consolidation_disturbs_nothing,
    check_report_has_every_parameter,
    check_restart,
    check_wrong_states_refused,
    check_no_host_round_trip,
)
