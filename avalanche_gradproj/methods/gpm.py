"""Gradient Projection Memory (Saha, Garg, Roy; ICLR 2021, arXiv 2103.09762)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import DataError, StateError, choice, in_unit, numbers
from avalanche_gradproj.layers.select import UNCOVERED, Coverage, cover
from avalanche_gradproj.linalg.projection import ROUTES
from avalanche_gradproj.linalg.subspace import RANK_RULES, grow_basis
from avalanche_gradproj.methods.arguments import kinds
from avalanche_gradproj.methods.base import Forward, GradientTransform
from avalanche_gradproj.methods.memory import BasisMemory
from avalanche_gradproj.methods.projected import ProjectedTraining, warn_of_stray
from avalanche_gradproj.methods.report import Report, projection_report, statistics_notes
from avalanche_gradproj.methods.rows import collect_rows, per_layer, warn_of_unseen

APPLY_TO = ("auto", "gradient", "update")
BATCHNORM = ("freeze", "track")


class GradientProjectionMemory(GradientTransform):
    """The core of GPM: one orthonormal basis a layer, grown after each experience, and projected training.

    In a plain PyTorch loop::

        gpm = GradientProjectionMemory(threshold=0.97)
        with gpm.experience(model, optimizer):
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                gpm.transform()
                optimizer.step()
                gpm.after_step()
        gpm.consolidate(model, [x for x, y in loader])

    After experience t = 0, 1, ... each layer's basis M is extended until it explains `threshold_t` of the energy of
    the layer's rows (equations 5, 8, 9), `threshold_t = min(1, threshold + threshold_step * t)`; later updates of the
    layer's weight are orthogonal to it (equation 6 of the paper applied to gradient or update).

    Departures from the official code: `rank_rule`; an own generator of samples; any optimizer (`apply_to`).

    Args:
        threshold: share of the energy, between 0 and 1: one for all layers or one a covered layer, in the model's
            order. With 0 everywhere the method does nothing at all.
        threshold_step: added to the threshold per experience.
        n_samples: samples drawn from an experience: one number, one a layer (the first so many of those drawn), or
            None for all of the data, in one streaming pass.
        rank_rule: `"paper"`, or `"official"`: one direction fewer in the first experience.
        apply_to: `"gradient"`, `"update"` (the step that the optimizer took), or `"auto"`: gradient where that is
            provably enough (SGD without weight decay), else update.
        uncovered: parameters of no matrix layer from the second experience on: `"freeze"`, `"train"` or `"raise"`.
        batchnorm: running statistics from the second experience on: `"freeze"` or `"track"`.
        include: patterns of layers to cover (see `layers.select.cover`).
        exclude: patterns of layers and parameters to leave alone.
        route: `"auto"`, or how gradients are projected: `"dense"`, `"factored"`, `"complement"`, or `"inputs"` (Linear
            layers only; the others choose).
        seed: of the generator that draws samples.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.
    """

    name = "GPM"
    state_version = 1

    def __init__(
        self,
        threshold: float | Sequence[float] = 0.97,
        threshold_step: float = 0.003,
        n_samples: int | Sequence[int] | None = 125,
        *,
        rank_rule: str = "paper",
        apply_to: str = "auto",
        uncovered: str = "freeze",
        batchnorm: str = "freeze",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        route: str = "auto",
        seed: int = 0,
    ) -> None:
        choice("rank_rule", rank_rule, RANK_RULES)
        choice("apply_to", apply_to, APPLY_TO)
        choice("uncovered", uncovered, UNCOVERED)
        choice("batchnorm", batchnorm, BATCHNORM)
        choice("route", route, ("auto", "inputs", *ROUTES))
        self.threshold = numbers("threshold", threshold, float, "between 0 and 1", in_unit)
        (self.threshold_step,) = numbers(
            "threshold_step", threshold_step, float, "one number from 0 to 1", in_unit, one=True
        )
        (self.seed,) = numbers("seed", seed, int, "one integer from 0 to 2**31", lambda v: 0 <= v <= 2**31, one=True)
        self.n_samples = (
            n_samples
            if n_samples is None
            else numbers("n_samples", n_samples, int, "a positive integer", lambda v: v >= 1)
        )
        self.rank_rule, self.apply_to, self.uncovered = rank_rule, apply_to, uncovered
        self.batchnorm, self.route = batchnorm, route
        self.include, self.exclude = include, exclude
        #: Sum up which share of the gradients is removed; costs one more product a layer and step.
        self.monitor = False
        #: Experiences learned so far.
        self.experiences = 0
        #: Leak of each layer over the last finished experience (`ProjectedTraining.finish`).
        self.leak: dict[str, float] = {}
        #: The same before it was taken back: more than rounding means that something changed weights after GPM did.
        self.stray: dict[str, float] = {}
        #: Share of each layer's squared gradient norm that was removed over the last experience, if monitored.
        self.removed_share: dict[str, float] = {}
        self._memory = BasisMemory()
        self._protecting = False
        self._known: frozenset[str] = frozenset()
        self._heads: tuple[str, ...] = ()
        self._report: Report | None = None
        self._training: ProjectedTraining | None = None

    @property
    def bases(self) -> dict[str, list[Tensor]]:
        """Layer name -> orthonormal columns [d, r] of each block; the bias is the last of the d."""
        return self._memory.blocks()

    @property
    def free_shares(self) -> dict[str, float]:
        """Layer name -> share of its input dimensions, over all blocks, that is still free (between 0 and 1)."""
        return {name: basis.free_share for name, basis in self._memory.items()}

    @property
    def bytes_held(self) -> int:
        """Bytes of the bases, which is what GPM keeps between experiences."""
        return self._memory.bytes_held

    def required_samples(self) -> int | None:
        """Return how many samples an experience must have at least, None for any number."""
        return None if self.n_samples is None or not any(self.threshold) else max(self.n_samples)

    def draw(self, size: int) -> Tensor:
        """Draw the samples that the current experience is remembered by, in the order in which they are used.

        The generator depends on `seed` and the number of experiences alone, so that a restart changes nothing.

        Raises:
            DataError: if there are fewer than `n_samples`.
        """
        wanted = self.required_samples()
        if wanted is None:
            return torch.arange(size)
        if size < wanted:
            raise DataError(
                f"the experience has {size} samples and n_samples={wanted} are to be drawn: give n_samples<={size}"
            )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.experiences)
        return torch.randperm(size, generator=generator)[:wanted]

    def start(self, model: nn.Module, optimizer: Optimizer | None = None, *, heads: Sequence[str] = ()) -> None:
        """Begin an experience; see `Method.start`.

        Raises:
            ModelError: for a model that cannot be protected (`layers.select.cover`).
            ConfigurationError: for a number of thresholds or samples that is not the number of layers.
            StateError: if the model is not the one that the bases belong to.
        """
        self._heads = tuple(heads)
        coverage = self._cover(model)
        # A parameter that is new in this experience has nothing to protect yet.
        frozen = [coverage.parameters[name] for name in coverage.frozen if name in self._known and self._protecting]
        self._training = ProjectedTraining(
            model,
            optimizer,
            coverage.units,
            self._memory,
            frozen,
            apply_to=self.apply_to,
            route=self.route,
            hold_statistics=self._protecting and self.batchnorm == "freeze",
            monitor=self.monitor,
        )
        self._describe(model, coverage)

    def active(self) -> AbstractContextManager[None]:
        """Return the context in which training steps are taken."""
        return nullcontext() if self._training is None else self._training.active()

    def listen(self, listening: bool) -> None:
        """Say whether the coming forward passes are those of training steps; see `GradientTransform.listen`."""
        if self._training is not None:
            self._training.listen(listening)

    def transform(self, *, trusted: bool = True) -> None:
        """Project the gradients; see `GradientTransform.transform`."""
        if self._training is not None:
            self._training.transform(trusted=trusted)

    def after_step(self) -> None:
        """Project the step, where it is the update that is projected."""
        if self._training is not None:
            self._training.after_step()

    def finish(self) -> None:
        """End the training of an experience: measure leak and removed share, let go of the model."""
        if self._training is None:
            return
        self.leak, self.stray = self._training.finish()
        warn_of_stray(self.stray, self._training.apply_to)
        sums = {name: both.tolist() for name, both in self._training.removed.items()}
        # Rounding may leave the sum of a part above that of the whole.
        self.removed_share = {name: min(1.0, part / whole) if whole else 0.0 for name, (part, whole) in sums.items()}
        self._training = None

    def consolidate(self, model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        """Extend every layer's basis by the inputs of the experience just learned.

        The model runs in evaluation mode without gradients; modes, statistics, gradients and random states are left
        as they were. All bases change, or (after an error) none.

        Args:
            model: the trained model.
            batches: mini-batches (a tensor, or a tuple whose first element is one); `n_samples` of them are used.
            forward: runs the model on a batch; default `model(batch)`.

        Raises:
            DataError: if there are fewer samples than `n_samples`.
            NonFiniteError: if a layer sees an infinity or a NaN, naming it.
        """
        coverage = self._cover(model)
        units = coverage.units
        if not any(self.threshold):  # off: nothing to learn
            self.experiences += 1
            return self._describe(model, coverage)
        limits = {unit.name: limit for unit, limit in zip(units, per_layer(self.n_samples, units), strict=True)}
        statistics = collect_rows(model, units, batches, limits=limits, forward=forward)
        thresholds = [
            min(1.0, value + self.threshold_step * self.experiences) if value else 0.0  # 0 is off
            for value in per_layer(self.threshold, units)
        ]
        grown = dict(self._memory)
        rule = self.rank_rule if self.experiences == 0 else "paper"
        for unit, threshold in zip(units, thresholds, strict=True):
            rows = statistics[unit.name]
            warn_of_unseen(unit, rows)
            grown[unit.name] = grow_basis(rows, self._memory[unit.name], threshold, rank_rule=rule)
        self._memory.replace(grown)
        self._known = frozenset(coverage.parameters)
        self._protecting = self._protecting or any(threshold > 0 for threshold in thresholds)
        self.experiences += 1
        self._describe(model, coverage)

    def report(self) -> Report:
        """Return what is done with every parameter of the model last seen.

        Raises:
            StateError: before the first experience began.
        """
        if self._report is None:
            raise StateError("GPM has seen no model yet: the report is there from the start of the first experience")
        return self._report

    def _cover(self, model: nn.Module) -> Coverage:
        coverage = cover(
            model,
            include=self.include,
            exclude=self.exclude,
            heads=self._heads,
            uncovered=self.uncovered,
            keep=tuple(self._memory),
        )
        per_layer(self.threshold, coverage.units, "threshold")
        per_layer(self.n_samples, coverage.units, "n_samples")
        self._memory.attach(coverage.units)
        return coverage

    def _describe(self, model: nn.Module, coverage: Coverage) -> None:
        notes = statistics_notes(model, held=self.batchnorm == "freeze")
        if self._training is not None:
            notes.append(f"projection acts on: {self._training.apply_to}")
        self._report = projection_report(coverage, self._memory, notes)

    def _state(self) -> dict[str, Any]:
        return {
            "experiences": self.experiences,
            "protecting": self._protecting,
            "known": sorted(self._known),
            "bases": self._memory.state(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        kinds(state, experiences=int, protecting=bool, known=list, bases=dict)
        if state["experiences"] < 0:
            raise StateError(f"the state's 'experiences' is {state['experiences']}, expected 0 or more: it is damaged")
        self._memory.load(state["bases"])
        self.experiences, self._protecting = state["experiences"], state["protecting"]
        self._known = frozenset(state["known"])
