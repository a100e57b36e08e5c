"""Hessian-aware low-rank perturbations of a network, one a task (Li et al., TKDE 2024, arXiv 2311.15161)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import ConfigurationError, StateError, choice
from avalanche_gradproj.layers.task_plan import plan_tasks, put_in_place, take_out
from avalanche_gradproj.layers.tasks import Selection, TaskLayer, task_layers
from avalanche_gradproj.methods.arguments import finite, one_number, optional_number, share
from avalanche_gradproj.methods.base import Forward
from avalanche_gradproj.methods.halrp_budget import Ledger, check_share, numbers_of
from avalanche_gradproj.methods.halrp_fit import fit_task
from avalanche_gradproj.methods.halrp_keep import keep_all, keep_own
from avalanche_gradproj.methods.halrp_learned import PerturbedTasks
from avalanche_gradproj.methods.halrp_regularise import Regulariser
from avalanche_gradproj.methods.halrp_tasks import TaskTraining

PRUNE = ("own", "all")


class LowRankPerturbation(PerturbedTasks):
    """The core of HALRP: the first task trains the network, every other one a low-rank perturbation of it.

    In a plain loop::

        halrp = LowRankPerturbation()
        for task, loader in enumerate(loaders):
            with halrp.experience(model, optimizer, task=task, batches=loader):
                for x, y in loader:
                    optimizer.zero_grad()
                    criterion(model(x), y).backward()
                    halrp.regularise()
                    optimizer.step()
        halrp.select(0)  # the model computes with the first task's parameters

    The model's layers are replaced in place when the first experience starts (`layers.task_plan`).

    Departures from the official code: one step of pruning keeps growth within `max_growth`, scales, biases, norm layers
    with their statistics and heads included (there, biases and statistics are not counted and pruning is by a quantile
    of the factors, so that it ends a little above); gradients are not multiplied by 10, which matters to Adam through
    its epsilon alone; each layer's low-rank directions are those of the residual's mean over kernel positions, and a
    layer with groups has one rank for all of them.

    Args:
        warmup_epochs: epochs of the free copy that is fitted, before the caller's own.
        approximation_rate: share of the residuals' weighted squared norm that the chosen directions explain.
        max_rank: directions of a layer at most.
        l1: weight of the low-rank factors' absolute values.
        weight_decay: half the weight of the squares of a later task's scales and factors, and of the first task's
            weights of Linear and Conv layers (not the head's); added to gradients, as the loss `wd / 2 ||w||^2` would.
        max_growth: numbers that all later tasks add, over those of the model as it was given; None for no bound.
        prune_threshold: what is not above it in magnitude is set to 0 when a task ends.
        prune: `"own"`: the new task's factors alone, to an equal part of what is left; `"all"`: those of every task, to
            equal shares of their entries, as often as the bound is met: outputs of old tasks then change.
        head: the layer that becomes one head a task, where the model has no heads for its tasks; default the last
            Linear layer.
        include: patterns of the Linear and Conv layers to perturb; others are frozen after the first task.
        exclude: patterns of layers and parameters to freeze after the first task.
        seed: of the weights that new heads start from.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.
    """

    def __init__(
        self,
        *,
        warmup_epochs: int = 1,
        approximation_rate: float = 0.9,
        max_rank: int = 100,
        l1: float = 1e-4,
        weight_decay: float = 1e-4,
        max_growth: float | None = 0.2,
        prune_threshold: float = 1e-5,
        prune: str = "own",
        head: str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        positive = "a positive integer"
        self.warmup_epochs: int = one_number("warmup_epochs", warmup_epochs, int, positive, lambda v: v >= 1)
        expected = "a number above 0 and at most 1"
        self.approximation_rate: float = one_number("approximation_rate", approximation_rate, float, expected, share)
        self.max_rank: int = one_number("max_rank", max_rank, int, positive, lambda v: v >= 1)
        self.l1: float = one_number("l1", l1, float, "a number from 0", finite)
        self.weight_decay: float = one_number("weight_decay", weight_decay, float, "a number from 0", finite)
        self.max_growth: float | None = optional_number("max_growth", max_growth, float, "a number from 0", finite)
        self.prune_threshold: float = one_number("prune_threshold", prune_threshold, float, "a number from 0", finite)
        choice("prune", prune, PRUNE)
        if head is not None and not isinstance(head, str):
            raise ConfigurationError(f"head={head!r}: give the name of a Linear layer, or None for the last one")
        super().__init__()
        self.seed: int = one_number("seed", seed, int, "an integer from 0", lambda v: 0 <= v < 2**63)
        self.prune, self.head, self.include, self.exclude = prune, head, include, exclude
        self._training: TaskTraining | None = None
        self._ranks: dict[str, int] = {}
        self._remaining: int | None = None
        self._regulariser: Regulariser | None = None

    @property
    def experiences(self) -> int:
        """Number of tasks that were learned."""
        return len(self.tasks) - (self._training is not None and self._training.new)

    def wrap(self, model: nn.Module, heads: Iterable[str] = ()) -> dict[str, TaskLayer]:
        """Replace a model's layers by such with parameters for every task, once: before a saved state is loaded, say.

        Args:
            model: changed in place.
            heads: names of modules that are heads of one task each; they are left to the model.

        Returns:
            The layers by name.

        Raises:
            ConfigurationError, ModelError: see `layers.task_plan.plan_tasks`.
            StateError: if the model's layers were replaced by another one, or are not those of the loaded state.
        """
        layers = task_layers(model)
        if layers and self._plan is None:
            raise StateError(
                "the model's layers hold parameters of another HALRP: load its state (load_state_dict) first, or give "
                "a model as it was built"
            )
        if not layers:
            settings = {"include": self.include, "exclude": self.exclude, "head": self.head}
            plan = plan_tasks(model, heads=heads, **settings)  # type: ignore[arg-type]
            if self._plan is not None and plan != self._plan:
                raise StateError("the loaded state is of a model with other layers, heads or include and exclude")
            self._plan = plan
            layers = put_in_place(model, plan, Selection())
        return layers

    def unwrap(self, model: nn.Module) -> None:
        """Give a model its layers back, as long as no task was learned."""
        if not any(layer.selection.tasks for layer in task_layers(model).values()):
            take_out(model)
            self._plan = None

    def start(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        heads: Sequence[str] | Mapping[int, Sequence[str]] = (),
        task: int | None = None,
        remaining: int | None = None,
        batches: Iterable[Any] | None = None,
        held_out: Iterable[Any] | None = None,
        forward: Forward | None = None,
        criterion: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        """Begin an experience: for a new task after the first, warm up a free copy, fit it, and put in factors.

        If it fails, or training is broken off (`abandon`), model and optimizer are as before, but for the weights of
        the first task.

        Args:
            model: the model, in training mode; its layers are replaced the first time.
            optimizer: trains the new parameters from then on: each joins the group of the parameter that it stands for.
            heads: task -> names of the modules that are its heads, where the model has heads for its tasks.
            task: the experience's label, an integer from 0; a label that was learned goes on training its own
                parameters. Default: how many were learned.
            remaining: experiences with new labels that are still to come, this one included; None if unknown.
            batches: mini-batches of the experience, (inputs, targets, ...) each; needed for a new task after the first.
            held_out: mini-batches for the layers' importance; default `batches`.
            forward: runs the model on a mini-batch; default `model(batch[0])`.
            criterion: loss of an output and a mini-batch; default the cross-entropy with `batch[1]`.

        Raises:
            ConfigurationError: if `max_growth` leaves too little for a task, or an argument is wrong.
            ModelError: for a layer that cannot be perturbed.
            StateError: if a new task comes without batches or optimizer.
            NonFiniteError: if the warm-up diverges.
        """
        if self._training is not None:  # broken off before its first step
            self.abandon()
        by_task = _by_task(heads)
        layers = self.wrap(model, [name for names in by_task.values() for name in names])
        selection = next(iter(layers.values())).selection
        self._check(selection)
        tasks, modules = selection.tasks, {t: [model.get_submodule(n) for n in names] for t, names in by_task.items()}
        task = len(tasks) if task is None else one_number("task", task, int, "an integer from 0", finite)
        of_first = modules.get(tasks[0] if tasks else task, [])
        if not tasks:
            of_others = [module for own in modules.values() for module in own]
            base = numbers_of([model]) - len(layers) - numbers_of(of_others) + numbers_of(of_first)
            self.ledger = Ledger(base, {})
        mine, again = modules.get(task, of_first), self.prune == "all"
        try:
            check_share(layers, self.ledger, tasks, task, self.max_growth, remaining, mine, again=again)
        except ConfigurationError:
            self.unwrap(model)
            raise
        fits = bool(tasks) and task not in tasks
        if fits and (batches is None or optimizer is None):
            raise StateError(f"task {task} is new: start needs its batches and the optimizer, to warm up a free copy")
        if fits and iter(batches or ()) is batches:
            raise ConfigurationError(
                "batches is an iterator, and warm-up and importance go through it one after the other: give what "
                "starts anew each time, a list or a DataLoader"
            )
        frozen = [p for name, p in model.named_parameters() if self._plan and name in self._plan.frozen]
        training = self._training = TaskTraining(model, layers, selection, task, optimizer, modules, frozen)
        self._selection, self._loaded, self._remaining, self._heads = selection, None, remaining, by_task
        try:
            training.begin(self._plan.head if self._plan else None, self.seed)
            training.adopt()
            if fits and batches is not None and optimizer is not None:
                run, loss = forward or _run, criterion or _cross_entropy
                with training.held():
                    self._ranks = fit_task(
                        training,
                        optimizer,
                        batches,
                        held_out,
                        lambda batch: loss(run(model, batch), batch),
                        epochs=self.warmup_epochs,
                        rate=self.approximation_rate,
                        max_rank=self.max_rank,
                    )
        except BaseException:
            self.abandon()
            raise
        self._regulariser = Regulariser(training, self.l1, self.weight_decay)
        self._describe(training)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Return the context in which training steps are taken: statistics of excluded norm layers are held in it."""
        if self._training is None:
            raise StateError("no experience was started: call start first")
        with self._training.held():
            yield

    def regularise(self) -> None:
        """Add the gradients of weight decay and l1 term: call it after the backward pass, before the step."""
        if self._regulariser is not None:
            self._regulariser.add()

    def finish(self) -> None:
        """Prune and pack the task's factors: they are not trained any more."""
        training = self._training
        if training is None:
            raise StateError("no experience was started: call start first")
        if not training.first:
            ranks = self._ranks if training.new else self.ledger.records[training.task].ranks
            share = self.ledger.share(training.task, self.max_growth, self._remaining)
            keep_own(training, self.ledger, ranks, share if self.prune == "own" else None, self.prune_threshold)
            if self.prune == "all":
                keep_all(training, self.ledger, self.max_growth, self.prune_threshold)
        training.settle()
        self._describe(training)
        self._training = self._regulariser = None

    def abandon(self) -> None:
        """Take back what an experience that was broken off did to model and optimizer."""
        training, self._training, self._regulariser = self._training, None, None
        if training is not None:
            training.withdraw()

    def consolidate(self, model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        """Do nothing: what a task learned is kept by `finish`."""
        del model, batches, forward

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_regulariser": None}


def _by_task(heads: Sequence[str] | Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Check and copy `heads`."""
    if not isinstance(heads, Mapping):
        if heads:
            raise ConfigurationError(f"heads={heads!r}: give a dict from a task's label to the names of its heads")
        return {}
    return {int(task): list(names) for task, names in heads.items()}


def _run(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def _cross_entropy(output: Any, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])
