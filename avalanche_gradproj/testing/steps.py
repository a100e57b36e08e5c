"""What a method may do within a step, and hold after it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch

from avalanche_gradproj.testing.cases import EXPERIENCES, MethodCase, strategy, stream
from avalanche_gradproj.testing.comparing import require, train
from avalanche_gradproj.testing.device import no_host_round_trips


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
    train(learner, benchmark, range(EXPERIENCES))


def check_gradients_alone(case: MethodCase) -> None:
    """`after_backward` changes gradients, and no parameter, statistic or `requires_grad`."""
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    learner = strategy(case, [plugin])
    original = plugin.after_backward

    def watched(owner: Any, *args: Any, **kwargs: Any) -> None:
        values = {name: value.clone() for name, value in owner.model.state_dict().items()}
        takes = {name: parameter.requires_grad for name, parameter in owner.model.named_parameters()}
        original(owner, *args, **kwargs)
        for name, value in owner.model.state_dict().items():
            require(
                name in values and torch.equal(value, values[name]),
                f"{case.name}: after_backward changed {name!r}: change gradients there, and weights in after_update",
            )
        for name, parameter in owner.model.named_parameters():
            require(
                parameter.requires_grad == takes[name], f"{case.name}: after_backward changed requires_grad of {name!r}"
            )

    plugin.after_backward = watched
    train(learner, benchmark, range(EXPERIENCES))


def check_double_precision(case: MethodCase) -> None:
    """A network of float64 trains, and stays of float64: tensors are made in the type of what they meet.

    Not with heads of tasks: Avalanche's multi-head models answer in float32 whatever they hold.
    """
    if case.task_incremental:
        return
    benchmark = stream(task_labels=case.task_incremental, dtype=torch.float64)
    plugin = case.make()
    learner = strategy(case, [plugin])
    learner.model.double()
    try:
        train(learner, benchmark, range(EXPERIENCES))
    except RuntimeError as error:
        raise AssertionError(
            f"{case.name}: training a network of float64 fails ({error!s:.200}): make tensors in the type and on the "
            "device of what they meet (torch.zeros_like, new_zeros)"
        ) from error
    wrong = [n for n, p in learner.model.named_parameters() if p.dtype != torch.float64]
    require(not wrong, f"{case.name}: {wrong} are no longer of float64")


def check_lets_go(case: MethodCase) -> None:
    """After training the plugin keeps no model alive: whoever drops the strategy gets the memory back.

    A plugin that goes on with another strategy would work on the wrong parameters.
    """
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    learner = strategy(case, [plugin])
    train(learner, benchmark, range(EXPERIENCES))
    left = {name: weakref.ref(parameter) for name, parameter in learner.model.named_parameters()}
    optimizer = weakref.ref(learner.optimizer)
    del learner
    gc.collect()
    alive = [name for name, reference in left.items() if reference() is not None]
    require(not alive, f"{case.name}: after training the plugin still refers to the model ({', '.join(alive[:3])})")
    require(optimizer() is None, f"{case.name}: after training the plugin still refers to the optimizer")
