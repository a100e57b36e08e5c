"""The life of one task's parameters in a model: free copies, factors in training, what is kept of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
        first_before: tensors of the first task that a later visit may change, and their values.
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
    first_before: list[tuple[Tensor, Tensor]] = field(default_factory=list)

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
        elif self.first:
            self.first_before = [(t, t.detach().clone()) for t in self._tensors_of_first()]
        else:
            self.before = {name: layer.tasks[key] for name, layer in self.layers.items()}
            self.replace({name: _reopened(module) for name, module in self.before.items()})
        self.selection.choose(self.task)
        self.set_gradients()

    def _tensors_of_first(self) -> Iterator[Tensor]:
        """Yield what a later visit of the first task may change."""
        for layer in self.layers.values():
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

    def own(self) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
        """Yield the task's parameters, each with the first task's whose group of the optimizer it belongs to."""
        for layer in self.layers.values() if not self.first else ():
            like = dict(layer.base.named_parameters())
            for name, parameter in layer.tasks[str(self.task)].named_parameters():
                yield parameter, like.get(name, like.get("weight"))
        of_first = [dict(module.named_parameters()) for module in self.heads.get(self.selection.tasks[0], ())]
        for module, like in zip(self.heads.get(self.task, ()), of_first, strict=False):
            for name, parameter in module.named_parameters():
                yield parameter, like.get(name)

    def adopt(self) -> None:
        """Let the optimizer train the task's parameters, from a fresh start."""
        for parameter, like in self.own() if self.optimizer is not None else ():
            adopt(self.optimizer, parameter, like)  # type: ignore[arg-type]
            forget(self.optimizer, [parameter])  # type: ignore[arg-type]
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
        if self.first:
            with torch.no_grad():
                for tensor, value in self.first_before:
                    tensor.copy_(value)
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

    def settle(self) -> None:
        """End the training: nothing takes gradients, and the optimizer remembers nothing of later tasks' parameters."""
        gone = [] if self.alone else [parameter for parameter, _ in self.own()]
        for parameter in gone:
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
