"""K-FAC extended to networks with BatchNorm (Lee, Hong, Joo, Kim; CVPR 2020, arXiv 2004.07507)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import ConfigurationError, StateError
from avalanche_gradproj.layers.merged import MergedUnit, watch_entering
from avalanche_gradproj.layers.norm import frozen
from avalanche_gradproj.layers.record import undisturbed
from avalanche_gradproj.layers.select import Coverage
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.methods.arguments import switches
from avalanche_gradproj.methods.base import Forward
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.methods.kfac_factors import FactorPass
from avalanche_gradproj.methods.kfac_labels import run_on
from avalanche_gradproj.methods.kfac_model import penalty_of
from avalanche_gradproj.methods.kfac_penalty import QuadraticPenalty
from avalanche_gradproj.methods.kfac_report import laplace_report
from avalanche_gradproj.methods.xkfac_balance import Balance
from avalanche_gradproj.methods.xkfac_pairs import BatchNormPlan, merged_units
from avalanche_gradproj.methods.xkfac_reparameterise import STATISTICS_SAMPLES, reparameterise


class ExtendedKroneckerLaplace(KroneckerLaplace):
    """The core of XK-FAC: K-FAC Laplace whose curvature and weights know about BatchNorm.

    In a plain loop::

        xkfac = ExtendedKroneckerLaplace()
        for loader in loaders:
            with xkfac.experience(model, optimizer, samples=len(loader.dataset), batches=loader):
                for x, y in loader:
                    optimizer.zero_grad()
                    xkfac.objective(criterion(model(x), y)).backward()
                    optimizer.step()
            xkfac.consolidate(model, loader)

    Where K-FAC Laplace has a layer's weight W, here is the matrix [W~, b~] that the layer and the BatchNorm behind it
    are in evaluation (`layers.merged`), in training steps by the mini-batch's statistics, through which the penalty is
    differentiated too. Its curvature is that of the loss of mini-batches (`kfac_sums.LayerSums.terms`).

    Departures from the paper, whose full text was not available: see docs/xkfac.md.

    Args:
        strength: `"balanced"`: with T experiences learned, `T / (T + 1)` times the mean of their penalties and
            `1 / (T + 1)` times the loss; or numbers, see `KroneckerLaplace`.
        adaptive: multiply penalty and loss by scales that drive the two to similar values (`xkfac_balance.Balance`).
        mode: see `KroneckerLaplace`.
        fisher: see `KroneckerLaplace`, as for `refresh_every`, `n_samples`, `truncate`, `include`, `seed`.
        damping: see `KroneckerLaplace`: weight decay that is centred on the old solution.
        reparameterise: at the start of an experience, merged weights become the layers' own, and BatchNorms start from
            the new data's statistics (`xkfac_reparameterise`).
        inter_example: the curvature's terms across samples; False for one Kronecker product a layer.
        batchnorm: `"merge"`; `"freeze"`: every BatchNorm stays as the first experience leaves it; `"track"`: layers
            without their BatchNorms, whose statistics drift and whose scale and shift have a diagonal term.
        pairs: `"auto"`, or the name of each BatchNorm -> that of its layer.
        unpaired: what happens to a BatchNorm without a layer: `"raise"`, or `"freeze"` from the second experience on.
        include: patterns of layers to cover.
        exclude: patterns of layers and parameters to leave alone; excluded BatchNorms are not merged.
        seed: of the generator that draws samples and labels.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.
    """

    name = "XK-FAC"
    state_version = 1

    def __init__(
        self,
        strength: str | float | Sequence[float] = "balanced",
        *,
        adaptive: bool = True,
        mode: str = "online",
        fisher: str = "sampled",
        damping: float = 0.0,
        refresh_every: int = 1,
        n_samples: int | None = None,
        reparameterise: bool = True,
        inter_example: bool = True,
        batchnorm: str = "merge",
        pairs: str | Mapping[str, str] = "auto",
        unpaired: str = "raise",
        truncate: float | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(strength, str) and strength != "balanced":
            raise ConfigurationError(f"strength={strength!r}: give 'balanced', a number from 0, or one an experience")
        switches(adaptive=adaptive, reparameterise=reparameterise, inter_example=inter_example)
        self.balanced = strength == "balanced"
        super().__init__(
            1.0 if isinstance(strength, str) else strength,
            mode=mode,
            fisher=fisher,
            n_samples=n_samples,
            truncate=truncate,
            damping=damping,
            refresh_every=refresh_every,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        self.adaptive, self.reparameterise, self.inter_example = adaptive, reparameterise, inter_example
        self.batchnorm = batchnorm
        self._plan = BatchNormPlan(batchnorm, pairs, unpaired, include, exclude)
        self._moved_for = 0  # experiences learned when coordinates last changed
        self._balance = Balance()
        self._listening: bool | None = None

    def start(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        heads: Sequence[str] = (),
        samples: int | None = None,
        batches: Iterable[Any] | None = None,
        forward: Forward | None = None,
    ) -> None:
        """Begin an experience; see `Method.start`.

        Args:
            model: see `KroneckerLaplace.start`, as for `heads` and `samples`.
            optimizer: any; it forgets what it knows of parameters that get new coordinates.
            heads: names of modules that are heads of one task.
            samples: N, samples of the experience.
            batches: mini-batches of it, as `consolidate` gets them: the first one to find the pairs, about
                `STATISTICS_SAMPLES` samples to reparameterise. None before the first experience leaves the search to
                `consolidate`.
            forward: as in `consolidate`.

        Raises:
            ModelError: also for a BatchNorm that cannot be merged, by name.
            ConfigurationError: also for pairs given that are none.
            DataError: if `batches` are needed and missing.
        """
        self._heads, kept = tuple(heads), self._plan.state()
        acts, data = bool(self._strength() or self._memory.forms), batches
        try:
            if acts and data is not None:
                data = self._find(model, data, forward)
            if acts:
                self._plan.hold(model, self._heads)
            super().start(model, optimizer, heads=heads, samples=samples)
            self._balance = Balance()
            if self.n_samples == 1 and self.normalises(model):
                raise ConfigurationError("n_samples=1: factors are made of mini-batches with BatchNorm, give 2 or more")
            self._move(model, optimizer, data, forward)
        except BaseException:
            self._plan.load(kept)
            self.abandon()
            raise

    def normalises(self, model: nn.Module) -> bool:
        """Whether BatchNorms normalise by the mini-batch in the pass after the experience in training."""
        return self._training is not None and bool(self._plan.by_batch(self._training.units, model))

    def some(self, size: int) -> Tensor:
        """Return the indices of about `STATISTICS_SAMPLES` samples of an experience of `size`, for `batches`."""
        return torch.randperm(size, generator=self._generator(0))[:STATISTICS_SAMPLES]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Return the context of training steps: it sees what enters BatchNorms, and holds those that are frozen."""
        training = self._training
        if training is None:
            raise StateError("training steps begin with `start`: use `with experience(model, ...)`")
        with ExitStack() as stack:
            if self.experiences:
                stack.enter_context(frozen(training.model, self._plan.held_norms(training.model)))
            if training.penalty is not None:
                stack.enter_context(watch_entering(merged_units(training.units), training.entered, self._wanted))
            yield

    def listen(self, listening: bool) -> None:
        """Say whether the next forward pass is that of a training step; where nobody says so, the last one is."""
        self._listening = listening
        if listening and self._training is not None:
            self._training.entered.clear()

    def penalty(self) -> Tensor:
        """Return the penalty, with the statistics of the last training step's mini-batch; see `Penalty.penalty`."""
        value = super().penalty()
        if self._training is not None:
            self._training.entered.clear()
        return value

    def objective(self, loss: Tensor) -> Tensor:
        """Return the weighted and scaled sum of a mini-batch's loss and the penalty; see `Penalty.objective`."""
        if self._training is not None and not self.penalising:
            return loss
        penalty = self.penalty()
        share = 1.0 / (self.experiences + 1) if self.balanced else 1.0
        loss, penalty = loss * share, penalty * share
        of_loss, of_penalty = self._balance.scales(loss, penalty) if self.adaptive else (1.0, 1.0)
        return of_loss * loss + of_penalty * penalty

    def consolidate(self, model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        """Take the curvature of the experience just learned; see `KroneckerLaplace.consolidate`.

        BatchNorms normalise by the mini-batch unless they are held, or the model's own `train` keeps them in evaluation
        mode, and their statistics stay; a diagonal that takes a pass a sample is taken in evaluation mode.
        """
        kept = self._plan.state()
        try:
            if self._plan.found is None and self._strength():
                batches = self._find(model, batches, forward)
            super().consolidate(model, batches, forward=forward)
        except BaseException:
            self._plan.load(kept)
            raise

    def _find(self, model: nn.Module, batches: Iterable[Any], forward: Forward | None) -> Iterable[Any]:
        """Find the pairs, where they are wanted, on the first mini-batch; return all mini-batches."""
        if not self._plan.looks:
            return batches
        with undisturbed(model):  # loaders draw random numbers
            data = iter(batches)
            first = next(data, None)
        if first is None:
            return data
        self._plan.find(model, super()._covered(model), self._heads, lambda: run_on(model, first, forward))
        return chain([first], data)

    def _move(
        self, model: nn.Module, optimizer: Optimizer | None, data: Iterable[Any] | None, forward: Forward | None
    ) -> None:
        """Reparameterise, once an experience, where there is a penalty that keeps what it leaves unchanged."""
        training = self._training
        units = [] if training is None or training.penalty is None else merged_units(training.units)
        if not units or not self.reparameterise or self._moved_for == self.experiences:
            return
        learned = {id(norm) for norm in self._plan.by_batch(units, model)}  # others stay fixed
        units = [unit for unit in units if id(unit.norm) in learned]
        if units:
            reparameterise(model, units, data, lambda batch: run_on(model, batch, forward), optimizer)
        self._moved_for = self.experiences

    def _wanted(self, norm: str) -> bool:
        # Others may run the model between forward and backward pass.
        heard = self._training is not None and norm in self._training.entered
        return self._listening is None or (self._listening and not heard)

    def _counted(self, samples: int | None) -> float:
        return 1.0 if self.balanced else super()._counted(samples)

    def _covered(self, model: nn.Module) -> Coverage:
        return self._plan.applied(super()._covered(model), model)

    def _penalty_on(self, coverage: Coverage) -> QuadraticPenalty | None:
        samples = self._counted(self._samples or self._last_samples)
        return penalty_of(coverage, self._memory.forms, samples, self.damping, self.refresh_every, self._tensors)

    def _tensors(self, unit: Unit) -> Callable[[], tuple[Tensor, ...]]:
        return partial(self._merged_tensors, unit) if isinstance(unit, MergedUnit) else unit.tensors

    def _merged_tensors(self, unit: MergedUnit) -> tuple[Tensor, ...]:
        entered = {} if self._training is None else self._training.entered
        if not entered and unit.norm.training:
            raise StateError(
                f"penalty() needs the mini-batch that entered BatchNorm {unit.norm_name!r}: call it after model(x), "
                "once for each training step"
            )
        return unit.tensors(entered.get(unit.norm_name))  # one that the step did not call has its running statistics

    def _factor_pass(self, model: nn.Module, coverage: Coverage, forward: Forward | None, **further: Any) -> FactorPass:
        by_batch = self._plan.by_batch(coverage.units, model)
        return super()._factor_pass(model, coverage, forward, extended=self.inter_example, by_batch=by_batch, **further)

    def _describe(self, model: nn.Module, coverage: Coverage) -> None:
        kept = self._memory.forms, self.mode, self.fisher, self.bytes_by_experience
        held, notes = self._plan.held_parameters(coverage, model), self._plan.notes(model)
        self._report = laplace_report(model, coverage, *kept, held=held, notes=notes)

    def _state(self) -> dict[str, Any]:
        own = {"moved_for": self._moved_for, "balanced": self.balanced}
        return {**super()._state(), **self._plan.state(), **own}

    def _load_state(self, state: dict[str, Any]) -> None:
        self._plan.check(state, self.balanced)
        super()._load_state(state)
        self._plan.load(state)
        self._moved_for = state["moved_for"]
