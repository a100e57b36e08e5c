"""The life of one task's parameters in a model: free copies, factors in training, what is kept of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.layers.norm import held_statistics, tracked_norms
from avalanche_gradproj.layers.perturbed import Factors
from avalanche_gradproj.layers.tasks import (
    OwnLayer,
    PackedPerturbation,
    Perturbation,
    PerturbedLayer,
    Selection,
    TaskLayer,
)
from avalanche_gradproj.methods.optimizers import adopt, dismiss, forget


@dataclass
class TaskTraining:
    """A task in training.

    Attributes:
        model: the model.
        layers: the model's layers with parameters for every task, by name.
        selection: theirs.
        task: the task's label.
        optimizer: what trains it; None if unknown.
        heads: task -> modules of the model that are its heads.
        frozen: the model's parameters of no such layer, which the first task alone trains.
        new: whether the task is learned for the first time.
        before: what a revisited task had in each layer's place.
        tensors_before: tensors of the model that a later visit of the task may change, and their values.
    """

    model: nn.Module
    layers: Mapping[str, TaskLayer]
    selection: Selection
    task: int
    optimizer: Optimizer | None
    heads: Mapping[int, Sequence[nn.Module]]
    frozen: Sequence[nn.Parameter]
    new: bool = True
    before: dict[str, nn.Module] = field(default_factory=dict)
    tensors_before: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def first(self) -> bool:
        """Whether the task's parameters are the model's own."""
        return self.selection.tasks[:1] == [self.task]

    @property
    def alone(self) -> bool:
        """Whether there is no other task, so that everything may be trained."""
        return self.selection.tasks == [self.task]

    def perturbed(self) -> dict[str, PerturbedLayer]:
        """Return the layers whose weights are perturbed."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, PerturbedLayer)}

    def perturbations(self) -> dict[str, Perturbation]:
        """Return the task's factors in training, by layer."""
        own = {name: layer.tasks[str(self.task)] for name, layer in self.perturbed().items() if not self.first}
        return {name: module for name, module in own.items() if isinstance(module, Perturbation)}

    def begin(self, head: str | None, seed: int) -> None:
        """Make a place for the task: free copies of the first one's layers, a new head; or what it had, to go on.

        Args:
            head: the layer that starts anew with every task.
            seed: of its weights, together with the task's label.
        """
        key = str(self.task)
        self.new = self.task not in self.selection.tasks
        if not self.selection.tasks:
            for layer in self.layers.values():
                layer.first.fill_(self.task)
        if self.new:
            for name, layer in self.layers.items() if self.selection.tasks else ():
                layer.tasks[key] = _fresh(layer.base, seed + self.task) if name == head else copy.deepcopy(layer.base)
            self.selection.tasks.append(self.task)
        else:
            self.tensors_before = [(tensor, tensor.detach().clone()) for tensor in self._tensors()]
        if not self.new and not self.first:
            self.before = {name: layer.tasks[key] for name, layer in self.layers.items()}
            self.replace({name: _reopened(module) for name, module in self.before.items()})
        self.selection.choose(self.task)
        self.selection.learning = self.task
        self.set_gradients()

    def _tensors(self) -> Iterator[Tensor]:
        """Yield what a later visit of the task may change in the model itself: its heads; of the first one, layers.

        Of the only one, everything.
        """
        if self.alone:
            yield from chain(self.model.parameters(), self.model.buffers())
            return
        for module in self.heads.get(self.task, ()):
            yield from chain(module.parameters(), module.buffers())
        for layer in self.layers.values() if self.first else ():
            if isinstance(layer, OwnLayer):
                yield from chain(layer.base.parameters(), layer.base.buffers())
            elif layer.base.bias is not None:
                yield layer.base.bias  # type: ignore[misc]

    def set_gradients(self) -> None:
        """Let the task's parameters take gradients, and no others, of which the optimizer remembers nothing then."""
        for layer in self.layers.values():
            for name, parameter in layer.base.named_parameters():
                shared = isinstance(layer, PerturbedLayer) and name == "weight"
                wanted = self.first and (self.alone or not shared) and name not in layer.held
                self._allow(parameter, wanted)
            for label, module in layer.tasks.items():
                for name, parameter in module.named_parameters():
                    self._allow(parameter, label == str(self.task) and name not in layer.held)
        for parameter in self.frozen:
            self._allow(parameter, self.alone)
        for task, modules in self.heads.items():
            for parameter in (p for module in modules for p in module.parameters()):
                self._allow(parameter, task == self.task)

    def _allow(self, parameter: nn.Parameter, wanted: bool) -> None:
        parameter.requires_grad_(wanted)
        if not wanted:
            parameter.grad = None
            if self.optimizer is not None:
                forget(self.optimizer, [parameter])

    def own(self, task: int) -> Iterator[tuple[nn.Parameter, Sequence[nn.Parameter]]]:
        """Yield a task's parameters, each with those that it stands for, whose group of the optimizer it belongs to."""
        for layer in self.layers.values():
            base = dict(layer.base.named_parameters())
            own = layer.tasks[str(task)].named_parameters() if str(task) in layer.tasks else ()
            for name, parameter in own:
                yield parameter, [base[key] for key in (name, "weight") if key in base]
        for place, module in enumerate(self.heads.get(task, ())):
            others = [dict(own[place].named_parameters()) for own in self.heads.values() if len(own) > place]
            for name, parameter in module.named_parameters():
                yield parameter, [other[name] for other in others if name in other]

    def adopt(self) -> None:
        """Let the optimizer train the task's parameters, from a fresh start.

        It gets what it lacks of other tasks' too, without ever training it: Avalanche puts every parameter of a model
        into the optimizer, and could not tell their groups.
        """
        if self.optimizer is None:
            return
        for task in self.selection.tasks:
            adopt(self.optimizer, self.own(task))
        if not self.first:
            for parameter, _ in self.own(self.task):
                forget(self.optimizer, [parameter])
                parameter.grad = None

    def replace(self, modules: Mapping[str, nn.Module], task: int | None = None) -> None:
        """Put other modules in a task's places of some layers; the optimizer lets go of what was there.

        Args:
            modules: by layer.
            task: default the one in training.
        """
        key = str(self.task if task is None else task)
        for name, module in modules.items():
            places = self.layers[name].tasks
            gone = list(places[key].parameters())
            module.train(self.layers[name].training)
            places[key] = module
            if self.optimizer is not None:
                dismiss(self.optimizer, gone)

    def install(self, factors: Mapping[str, Factors]) -> None:
        """Put factors where the free copies were, and let the optimizer train them."""
        self.replace({name: Perturbation(own) for name, own in factors.items()})
        self.set_gradients()
        self.adopt()

    def withdraw(self) -> None:
        """Take back what `begin` and training did to the task; the first one's training cannot be undone."""
        self.selection.learning = None
        with torch.no_grad():
            for tensor, value in self.tensors_before:
                tensor.copy_(value)
        if self.first:
            if self.new:  # what comes next is the first task then
                self.selection.tasks.clear()
                self.selection.choose(None)
                for layer in self.layers.values():
                    layer.first.fill_(-1)
            return
        if self.before:
            self.replace(self.before)
        elif self.new:
            if self.optimizer is not None:
                dismiss(self.optimizer, [p for layer in self.layers.values() for p in _in_place(layer, self.task)])
            for layer in self.layers.values():
                if str(self.task) in layer.tasks:
                    del layer.tasks[str(self.task)]
            if self.task in self.selection.tasks:
                self.selection.tasks.remove(self.task)
        self.selection.choose(self.selection.tasks[-1])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the statistics of norm layers that no task has for itself, once there are several tasks."""
        inside = {id(module) for layer in self.layers.values() for module in layer.modules()}
        norms = [norm for norm in tracked_norms(self.model).values() if id(norm) not in inside]
        with nullcontext() if self.alone or not norms else held_statistics(self.model, norms):
            yield

    def settle(self) -> None:
        """End the training: nothing takes gradients, and the optimizer remembers nothing of later tasks' parameters."""
        self.selection.learning = None
        for parameter, _ in () if self.first else self.own(self.task):
            self._allow(parameter, False)


def _reopened(module: nn.Module) -> nn.Module:
    """Return a learned task's module with parameters that can be trained on."""
    return Perturbation(module.factors()) if isinstance(module, PackedPerturbation) else copy.deepcopy(module)


def _in_place(layer: TaskLayer, task: int) -> list[nn.Parameter]:
    return list(layer.tasks[str(task)].parameters()) if str(task) in layer.tasks else []


def _fresh(head: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a head with weights drawn anew; the global random state stays."""
    fresh = copy.deepcopy(head).cpu()  # drawn there, so that a seed means the same on every device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh.reset_parameters()  # type: ignore[operator]
    return fresh.to(next(head.parameters()).device)
