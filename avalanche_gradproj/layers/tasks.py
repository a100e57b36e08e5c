"""Layers that hold parameters for every task, and compute with those of the one that is selected."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.layers.conv import Convolution
from avalanche_gradproj.layers.perturbed import Factors, perturbed
from avalanche_gradproj.linalg.packed import pack, unpack

#: Parameters of a perturbation that pruning acts on.
PRUNED = ("left", "right")


class Selection:
    """Which task the layers of one model compute with; all of them refer to the same object.

    Attributes:
        tasks: labels of the tasks that there are parameters for, in the order of learning; the first one's are the
            model's own.
        task: label of the selected one; None before any.
        learning: label of the one in training; None between experiences.
    """

    def __init__(self) -> None:
        self.tasks: list[int] = []
        self.task: int | None = None
        self.learning: int | None = None
        self._dense: dict[PackedPerturbation, Factors] = {}  # of the selected task

    def choose(self, task: int | None) -> None:
        """Select a task; dense factors of another are let go of. One without parameters gives the first's outputs."""
        if task != self.task:
            self.task = task
            self._dense.clear()

    def dense(self, packed: PackedPerturbation) -> Factors:
        """Return a stored perturbation's factors, unpacked once for as long as its task stays selected."""
        held = self._dense.get(packed)
        if held is None or (held.rows.device, held.rows.dtype) != (packed.rows.device, packed.rows.dtype):
            held = self._dense[packed] = packed.factors()
        return held

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": {}}


class Perturbation(nn.Module):
    """A task's own parameters of one Linear or Conv layer, in training (`layers.perturbed.Factors`).

    Args:
        factors: what they start from.
    """

    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        for name in ("rows", "columns", "left", "right", "bias"):
            value = getattr(factors, name)
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))

    def factors(self) -> Factors:
        """Return the parameters."""
        return Factors(self.rows, self.columns, self.left, self.right, self.bias)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        """Directions of the low-rank term."""
        return self.right.shape[1]

    def pruned_numbers(self) -> int:
        """Count the entries of the low-rank factors that are not 0."""
        return sum(int(torch.count_nonzero(getattr(self, name))) for name in PRUNED)

    def numbers(self) -> int:
        """Count what is stored, zeros of the low-rank factors excluded."""
        return self.pruned_numbers() + sum(p.numel() for name, p in self.named_parameters() if name not in PRUNED)


class PackedPerturbation(nn.Module):
    """A learned task's parameters, the zeros of its low-rank factors left out; nothing of it is trained.

    Directions whose left or right half is all zeros do nothing and are dropped. Stored are the other numbers and a bit
    for each entry (buffers `*_values`, `*_bits`), so that a saved model is as small as the count of numbers says, but
    for the bits.

    Args:
        factors: pruned factors.
    """

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        alive = (factors.left != 0).any(dim=1) & (factors.right != 0).any(dim=2)  # [groups, rank]
        kept = alive.any(dim=0)
        kept[:1] |= ~kept.any()  # one at least: a convolution to no channel at all is an error
        for name, tensor in (("left", factors.left[:, :, kept]), ("right", factors.right[:, kept])):
            values, bits = pack(tensor)
            self.register_buffer(f"{name}_values", values)
            self.register_buffer(f"{name}_bits", bits)
            self.register_buffer(f"{name}_shape", torch.tensor(tensor.shape))
        for name in ("rows", "columns", "bias"):
            value = getattr(factors, name)
            self.register_buffer(name, None if value is None else value.detach().clone())

    @classmethod
    def shaped(cls, state: dict[str, Tensor]) -> PackedPerturbation:
        """Make one whose buffers have the shapes of a saved state's."""
        one = cls(Factors(torch.zeros(1), torch.zeros(1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), None))
        for name in list(one._buffers):
            one.register_buffer(name, torch.empty_like(state[name]) if name in state else None)
        return one

    rows: Tensor
    columns: Tensor

    def factors(self) -> Factors:
        """Return the dense factors."""
        return Factors(self.rows, self.columns, self._unpacked("left"), self._unpacked("right"), self.bias)  # type: ignore[arg-type]

    def _unpacked(self, name: str) -> Tensor:
        shape = tuple(getattr(self, f"{name}_shape").tolist())
        return unpack(getattr(self, f"{name}_values"), getattr(self, f"{name}_bits"), shape)

    @property
    def rank(self) -> int:
        """Directions of the low-rank term that are left."""
        return int(self.right_shape[1])  # type: ignore[index]

    def pruned_numbers(self) -> int:
        """Count the entries of the low-rank factors that are not 0."""
        return sum(getattr(self, f"{name}_values").numel() for name in PRUNED)

    def numbers(self) -> int:
        """Count what is stored, bits and shapes excluded."""
        dense = (getattr(self, name) for name in ("rows", "columns", "bias"))
        return self.pruned_numbers() + sum(tensor.numel() for tensor in dense if tensor is not None)


class TaskLayer(nn.Module):
    """A layer that belongs to the first task, and what other tasks have in its place.

    It stands where the layer stood: attributes that it has not are the layer's (`in_features`, `weight`). The first
    task's label is stored with it (a buffer, -1 before any), and everything else that a saved model needs to be loaded
    into a fresh one.

    Args:
        base: the first task's layer.
        selection: which task to compute with.
    """

    first: Tensor

    def __init__(self, base: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.tasks = nn.ModuleDict()
        self.selection = selection
        self.register_buffer("first", torch.tensor(-1))
        #: Parameters of the layer that its owner keeps from training.
        self.held = frozenset(name for name, p in base.named_parameters() if not p.requires_grad)

    def own(self) -> nn.Module | None:
        """Return what the selected task has in the layer's place; None for the first, and for one without."""
        key = str(self.selection.task)
        return self.tasks[key] if key in self.tasks else None  # noqa: SIM401 - a ModuleDict has no get

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(super().__getattr__("base"), name)

    def _built(self, state: dict[str, Tensor]) -> nn.Module:
        """Make the module that a task's saved state fits into."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make a place for every task of the state; tasks that it lacks are dropped."""
        lead = f"{prefix}tasks."
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in state_dict.items():
            if key.startswith(lead):
                task, _, name = key.removeprefix(lead).partition(".")
                found.setdefault(task, {})[name] = value
        for task in list(self.tasks):
            del self.tasks[task]
        for task, state in found.items():
            self.tasks[task] = self._built(state)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.selection.choose(None)  # what was unpacked is of other values
        self.selection.tasks = [] if self.first < 0 else [int(self.first), *map(int, self.tasks)]


class PerturbedLayer(TaskLayer):
    """A Linear or Conv layer: other tasks perturb its weight.

    While a task is being fitted its place holds a free copy of the layer; then a `Perturbation`; once it is learned, a
    `PackedPerturbation`.

    Attributes:
        route: how outputs are computed (`layers.perturbed.ROUTES`).
    """

    base: nn.Linear | Convolution
    route = "auto"

    def forward(self, input: Tensor) -> Tensor:
        """Compute with the selected task's parameters."""
        own = self.own()
        if own is None:
            return self.base(input)
        if isinstance(own, PackedPerturbation):
            return perturbed(self.base, input, self.selection.dense(own), self.route)
        if isinstance(own, Perturbation):
            return perturbed(self.base, input, own.factors(), self.route)
        return own(input)

    def _built(self, state: dict[str, Tensor]) -> nn.Module:
        if "weight" in state:
            return copy.deepcopy(self.base)
        halves = ("left", "right")
        packed = tuple(f"{half}_{part}" for half in halves for part in ("values", "bits", "shape"))
        low = packed if any(name in state for name in packed) else halves
        needed = ("rows", "columns", *low, *(() if self.base.bias is None else ("bias",)))
        missing = [name for name in needed if name not in state]
        if missing:
            raise StateError(f"the state of a perturbed layer lacks {', '.join(missing)}: it is damaged, save it again")
        if low is packed:
            built: nn.Module = PackedPerturbation.shaped(state)
        else:
            rows, columns, left, right = (state[name] for name in needed[:4])
            built = Perturbation(Factors(rows, columns, left, right, state.get("bias")))
        return built.to(device=self.base.weight.device, dtype=self.base.weight.dtype)


class OwnLayer(TaskLayer):
    """A layer of which every task has one of its own: norm layers, the head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the selected task's layer; that of a task that is not in training keeps its statistics."""
        own = self.own()
        if own is None:
            own = self.base
        if not own.training or self.selection.learning in (None, self.selection.task):
            return own(*args, **kwargs)
        own.eval()
        try:
            return own(*args, **kwargs)
        finally:
            own.train()

    def _built(self, state: dict[str, Tensor]) -> nn.Module:
        return copy.deepcopy(self.base)


def task_layers(model: nn.Module) -> dict[str, TaskLayer]:
    """Return the layers with parameters for every task, by the name that they stand under."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TaskLayer)}
