"""HALRP as an Avalanche plugin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from avalanche.models import IncrementalClassifier
from avalanche.models.cosine_layer import CosineIncrementalClassifier
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, ModelError, choice
from avalanche_gradproj.methods.halrp import LowRankPerturbation
from avalanche_gradproj.methods.optimizers import dismiss
from avalanche_gradproj.methods.report import Report
from avalanche_gradproj.plugins.base import MethodPlugin, run_inside
from avalanche_gradproj.plugins.halrp_data import (
    as_strategy,
    companion,
    single_task,
    task_of,
    to_come,
    training_batches,
)
from avalanche_gradproj.plugins.task_model import UNSEEN, TaskModel, head_names


class HALRPPlugin(MethodPlugin):
    """Hessian-aware low-rank perturbations (arXiv 2311.15161), for task-incremental streams and any strategy.

    The first task trains the network. For every other one a free copy is trained for some epochs and fitted, layer by
    layer, by the first task's weight with scaled rows and columns and a low-rank term, whose rank is chosen over all
    layers by their share of the loss; these scales and factors, a bias, norm layers and a head are what the task trains
    and keeps, the factors pruned. Nothing of an old task changes: forgetting is 0.

    The model's Linear and Conv layers (and norm layers, and the head) are replaced by such with parameters for every
    task when training first begins, and `strategy.model` becomes a `TaskModel` of it, which takes task labels; new
    parameters join the group of the optimizer that the ones they stand for are in.

    Cost: a step needs no gradient of the base's weights; each new task has `warmup_epochs` before the strategy's own
    epochs, one pass for the layers' importance, and one symmetric eigendecomposition a layer. Memory: the free copy and
    its optimizer state during the warm-up; afterwards what the task keeps, see `report`.

    Args:
        warmup_epochs: epochs of the free copy, before the strategy's `train_epochs`.
        approximation_rate: share of the residuals' weighted squared norm that is kept, in (0, 1].
        max_rank: directions of a layer at most.
        l1: weight of the absolute values of the low-rank factors.
        weight_decay: of a task's scales and factors, and of the first task's weights.
        max_growth: bound on the numbers that all later tasks add, over those of the model as it was given; None for no
            bound. What is left is divided equally among the stream's tasks to come.
        prune_threshold: factors not above it in magnitude become 0 when their task ends.
        prune: `"own"`: the new task's factors alone are pruned; `"all"`: those of all tasks, again and again, as the
            official code does: outputs of old tasks move.
        importance: data whose gradients weigh the layers: `"train"`, or another stream (`benchmark.valid_stream`; its
            name where experiences know their benchmark), whose experience at the same place is taken.
        include: shell-style patterns of the Linear and Conv layers to perturb; others are frozen after the first task.
        exclude: patterns of layers and parameters to freeze after the first task.
        head: name of the layer that becomes one head a task in a model without `MultiHeadClassifier`; default the last
            Linear layer.
        unseen: samples of tasks that were never learned: `"raise"`, or `"base"` for the first task's outputs (as in
            evaluations while `strategy.train` runs, which may be of tasks to come).
        seed: of the initial weights of new heads (those of `MultiHeadClassifier` are Avalanche's).
        record_batch_size: samples in a mini-batch of the pass for the layers' importance over another stream.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.

    Errors before an experience trains, leaving everything as it was: `DataError` for a stream without task labels,
    `ModelError` for a layer that cannot be perturbed, `ConfigurationError` for a `max_growth` too small for one
    direction a layer. `StateError` in evaluation for a task that was never learned.
    """

    method: LowRankPerturbation

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
        importance: str | Sequence[Any] = "train",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        head: str | None = None,
        unseen: str = "raise",
        seed: int = 0,
        record_batch_size: int = 128,
    ) -> None:
        method = LowRankPerturbation(
            warmup_epochs=warmup_epochs,
            approximation_rate=approximation_rate,
            max_rank=max_rank,
            l1=l1,
            weight_decay=weight_decay,
            max_growth=max_growth,
            prune_threshold=prune_threshold,
            prune=prune,
            include=include,
            exclude=exclude,
            head=head,
            seed=seed,
        )
        super().__init__(method, record_batch_size=record_batch_size)
        if not isinstance(importance, str | Sequence):
            raise ConfigurationError(f"importance={importance!r}: give 'train', or another stream or its name")
        choice("unseen", unseen, UNSEEN)
        self.importance, self.unseen = importance, unseen
        self._single: int | None = None

    @property
    def growth(self) -> float:
        """Numbers that later tasks have added, over those of the model as it was given."""
        return self.method.growth

    def wrap(self, model: nn.Module) -> TaskModel:
        """Return the model as the strategy trains it: for loading a saved state before any training.

        Args:
            model: a model as it was built, its layers are replaced; or what `wrap` returned.

        Raises:
            ModelError: for a layer that cannot be perturbed.
        """
        if isinstance(model, TaskModel):
            self.method.wrap(model.model)
            return model
        for name, module in model.named_modules():
            within = any(name.startswith(f"{head}") for heads in head_names(model).values() for head in heads)
            if isinstance(module, IncrementalClassifier | CosineIncrementalClassifier) and not within:
                raise ModelError(
                    f"layer {name!r} is a {type(module).__name__}, one head for all tasks that grows: use Avalanche's "
                    "MultiHeadClassifier, or a Linear layer, which becomes one head a task"
                )
        layers = self.method.wrap(model, [name for names in head_names(model).values() for name in names])
        return TaskModel(model, next(iter(layers.values())).selection, self.unseen)

    def report(self) -> Report:
        """Return what is done with every parameter of `strategy.model`, and below it what each task added.

        Raises:
            StateError: before the first experience began.
        """
        report = self.method.report()
        return replace(report, rows=tuple(replace(row, parameter=f"model.{row.parameter}") for row in report))

    def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Make the experience's parameters, before Avalanche refreshes the optimizer."""
        del args
        experience = strategy.experience
        task = task_of(experience)
        held_out = None
        if not (isinstance(self.importance, str) and self.importance == "train"):
            dataset = companion(experience, self.importance).dataset.eval()
            held_out = self._batches(dataset, strategy)
        strategy.model = self.wrap(strategy.model).to(strategy.device)
        strategy.model.training_runs = True
        strategy.model = strategy.model_adaptation()
        strategy.model.train()
        batches = training_batches(strategy, kwargs)
        self._single = single_task(strategy.dataloader)
        with as_strategy(strategy, lambda: self._hint(strategy)) as (forward, criterion):
            try:
                self.method.start(
                    strategy.model.model,
                    strategy.optimizer,
                    heads=head_names(strategy.model.model),
                    task=task,
                    remaining=to_come(experience, self.method.tasks, task),
                    batches=batches,
                    held_out=held_out,
                    forward=forward,
                    criterion=criterion,
                )
            except BaseException:
                strategy.model.training_runs = False
                if not self.method.tasks:
                    self.method.unwrap(strategy.model.model)
                    strategy.model = strategy.model.model
                raise
            finally:
                if isinstance(strategy.model, TaskModel):
                    strategy.model.known = None
        if strategy.optimized_param_id is not None:
            # Avalanche finds parameters by name first: those of a task that is learned again are new ones.
            trained = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
            own = {name: p for name, p in strategy.model.named_parameters() if id(p) in trained}
            known = strategy.optimized_param_id
            dismiss(strategy.optimizer, [known[name] for name, p in own.items() if known.get(name, p) is not p])
            known.update(own)

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Let evaluation while `train` runs meet tasks that are about to be learned."""
        if isinstance(strategy.model, TaskModel):
            strategy.model.training_runs = True

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """End that."""
        if isinstance(strategy.model, TaskModel):
            strategy.model.training_runs = False

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Arrange for the coming epoch to run inside the method's context."""

        @contextmanager
        def inside() -> Iterator[None]:
            try:
                with self._inside():
                    yield
            except BaseException:
                strategy.model.training_runs = False
                raise

        run_inside(strategy, inside)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Look which tasks the mini-batches hold; the experience has begun already."""
        self._single = single_task(strategy.dataloader)

    def _hint(self, strategy: Any) -> None:
        # The task is known on the host: no need to wait for the labels' device.
        strategy.model.known = None if self._single is None else (strategy.mb_task_id, self._single)

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Say which task the mini-batch is of, where it is known."""
        self._hint(strategy)

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Forget it."""
        strategy.model.known = None

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of weight decay and l1 term."""
        self.method.regularise()
