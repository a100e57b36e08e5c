"""Going on after a restart: from states in fresh objects, and from Avalanche's checkpoint."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import MultiHeadClassifier
from avalanche.training.supervised import Naive
from torch import Tensor

from avalanche_gradproj.testing.cases import EXPERIENCES, MethodCase, strategy, stream
from avalanche_gradproj.testing.comparing import difference, require, train

#: Experiences before the restart.
_SEEN = 2


def check_restart(case: MethodCase) -> None:
    """Going on after a restart equals never having stopped, bit for bit.

    Once from the states of plugin, model and optimizer alone, in fresh objects; once from Avalanche's checkpoint. A
    plugin that gives the model other layers has a method `wrap(model)` that does so before any training.
    """
    benchmark = stream(task_labels=case.task_incremental)
    plugin = case.make()
    learner = strategy(case, [plugin])
    train(learner, benchmark, range(_SEEN))
    fresh = _from_states(case, _saved(case, plugin, learner), benchmark)
    resumed = _from_checkpoint(case, plugin, learner)
    for other in (learner, fresh, resumed):
        train(other, benchmark, range(_SEEN, EXPERIENCES))
    for how, other in (("the states of plugin, model and optimizer", fresh), ("Avalanche's checkpoint", resumed)):
        name = difference(learner.model, other.model)
        require(not name, f"{case.name}: going on from {how} gives another {name!r}")


def _saved(case: MethodCase, plugin: Any, learner: Naive) -> Any:
    """Save the three states and read them again, as plain values."""
    state = plugin.state_dict()
    found = _foreign(state, "state_dict()")
    require(not found, f"{case.name}: {found}: give tensors, numbers, names, and lists and dicts of them")
    # By name, since the order of an optimizer's parameters depends on when they came to it.
    optimizer = {name: learner.optimizer.state.get(p, {}) for name, p in learner.model.named_parameters()}
    buffer = io.BytesIO()
    torch.save({"plugin": state, "model": learner.model.state_dict(), "optimizer": optimizer}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _foreign(value: Any, where: str) -> str:
    """Name the first part of a state that is no plain value; empty if there is none."""
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return ""
    if isinstance(value, dict):
        return next(filter(None, (_foreign(part, f"{where}[{key!r}]") for key, part in value.items())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, (_foreign(part, f"{where}[{index}]") for index, part in enumerate(value))), "")
    return f"{where} is a {type(value).__module__}.{type(value).__name__}"


def _from_states(case: MethodCase, saved: Any, benchmark: Any) -> Naive:
    """Return a strategy of fresh objects that have the saved states."""
    plugin = case.make()
    learner = strategy(case, [plugin], seed=5)
    if hasattr(plugin, "wrap"):
        learner.model = plugin.wrap(learner.model)
    for module in learner.model.modules():
        for index in range(_SEEN) if isinstance(module, MultiHeadClassifier) else ():
            module.adaptation(benchmark.train_stream[index])
    plugin.load_state_dict(saved["plugin"])
    learner.model.load_state_dict(saved["model"])
    # Avalanche would do so when it first trains, and forget what the optimizer knows.
    learner.make_optimizer(reset_optimizer_state=True)
    for name, parameter in learner.model.named_parameters():
        if saved["optimizer"][name]:
            learner.optimizer.state[parameter] = saved["optimizer"][name]
    return learner


def _from_checkpoint(case: MethodCase, plugin: Any, learner: Naive) -> Naive:
    """Return the strategy as Avalanche's checkpoint restores it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pkl"
        with optimizers_by_reference():
            save_checkpoint(learner, file)
        resumed, _ = maybe_load_checkpoint(strategy(case, [case.make()], seed=5), file)
    kinds = [type(other) for other in resumed.plugins]
    require(
        type(plugin) in kinds,
        f"{case.name}: the class {type(plugin).__qualname__} of module {type(plugin).__module__!r} cannot be found "
        "again from a checkpoint: define it at the top of a module that can be imported, not in a script or a function",
    )
    return resumed


@contextmanager
def optimizers_by_reference() -> Iterator[None]:
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
