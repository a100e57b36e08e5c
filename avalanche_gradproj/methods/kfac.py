"""Kronecker-factored Laplace approximation (Ritter, Botev, Barber; NeurIPS 2018, arXiv 1805.07810)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import StateError, choice
from avalanche_gradproj.layers.select import Coverage, cover
from avalanche_gradproj.linalg.cross_entropy import FISHERS
from avalanche_gradproj.methods.arguments import finite, kinds, one_number, optional_number, positive, share, strengths
from avalanche_gradproj.methods.base import Forward
from avalanche_gradproj.methods.kfac_bases import Eigenbases
from avalanche_gradproj.methods.kfac_factors import FactorPass
from avalanche_gradproj.methods.kfac_labels import Criterion, at_most, check_criterion, drawn
from avalanche_gradproj.methods.kfac_memory import MODES, CurvatureMemory
from avalanche_gradproj.methods.kfac_model import curvature_of, penalty_of, recentred, refuse_compiled
from avalanche_gradproj.methods.kfac_penalty import QuadraticPenalty
from avalanche_gradproj.methods.kfac_report import laplace_report
from avalanche_gradproj.methods.kfac_training import QuadraticMethod, TrainingExperience
from avalanche_gradproj.methods.report import Report


class KroneckerLaplace(QuadraticMethod):
    """The core of K-FAC Laplace: a Gaussian posterior of the weights, with Kronecker factors, as the next prior.

    In a plain loop::

        laplace = KroneckerLaplace(strength=1.0)
        for loader in loaders:
            with laplace.experience(model, samples=len(loader.dataset)):
                for x, y in loader:
                    optimizer.zero_grad()
                    (criterion(model(x), y) + laplace.penalty()).backward()
                    optimizer.step()
            laplace.consolidate(model, loader)

    With `n_samples`, `consolidate` gets mini-batches of `Subset(dataset, laplace.draw(len(dataset)).tolist())` instead.

    After experience t, with N_t samples, each layer's block of the Fisher matrix is approximated by B_t (x) A_t:
    `A_t = E[a a^T]` over the rows a at its input (the bias sees a constant 1), `B_t = E[sum b b^T]` over samples, the
    sum over a sample's rows, b the gradient of its loss at the layer's output. Later experiences minimise

        mean loss + 1 / (2 N) sum_t strength_t N_t sum_layers <W - W_t*, B_t (W - W_t*) A_t + damping (W - W_t*)>

    N the samples of the experience in training: with strength 1 that is, divided by N, minus the logarithm of the
    posterior whose prior has the precision of the paper's recursion (equation 9 there, with lambda for `strength`).
    Parameters of no matrix layer have the diagonal of their block instead.

    Departures from the paper: see docs/kfac.md.

    Args:
        strength: lambda, at least 0: one for all experiences, or one each, of which the last holds for further ones. 0
            leaves an experience out, everywhere it does nothing at all.
        mode: `"separate"`, or `"online"`: one pair of factors a layer, averaged, centred on the last solution.
        fisher: `"sampled"`: labels drawn from the model's prediction, one a sample; `"exact"`: all classes, a backward
            pass each; `"empirical"`: the true labels, which gives no Fisher matrix.
        n_samples: samples of an experience that are drawn for the factors; None for all. The weight stays
            N_t: `samples` of `start`, else what `draw` was given.
        truncate: None, or a share in (0, 1]: see `linalg.kronecker.Factor.truncated`; factors stay whole where their
            truncation would not make products cheaper.
        damping: added to every eigenvalue of each experience's curvature of a sample, for every penalised parameter.
        refresh_every: calls in one of which all products are formed; in the others a sample of them (`linalg.kept`).
        eigenbasis: let the optimizer step in the eigenbasis of the factors (`kfac_eigenbasis`), in online mode.
        include: patterns of layers to cover (see `layers.select.cover`).
        exclude: patterns of layers and parameters to leave alone.
        seed: of the generator that draws samples and labels; the global random state is not touched.

    Attributes:
        criterion: the loss in use, None for a mean of cross-entropies; checked when an experience begins.
        experiences: how many were learned.
        bytes_by_experience: bytes that each of them added.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.
    """

    name = "K-FAC Laplace"
    state_version = 1

    def __init__(
        self,
        strength: float | Sequence[float] = 1.0,
        *,
        mode: str = "separate",
        fisher: str = "sampled",
        n_samples: int | None = None,
        truncate: float | None = None,
        damping: float = 0.0,
        refresh_every: int = 1,
        eigenbasis: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        choice("mode", mode, MODES)
        choice("fisher", fisher, FISHERS)
        self.strength = strengths(strength)
        self.mode, self.fisher = mode, fisher
        self.n_samples: int | None = optional_number("n_samples", n_samples, int, "a positive integer", positive)
        self.truncate: float | None = optional_number("truncate", truncate, float, "a share above 0 and up to 1", share)
        self.damping: float = one_number("damping", damping, float, "a number from 0", finite)
        self.refresh_every: int = one_number("refresh_every", refresh_every, int, "a positive integer", positive)
        self.eigenbasis, self._bases = eigenbasis, Eigenbases(eigenbasis, mode)
        self.seed: int = one_number("seed", seed, int, "an integer from 0 to 2**31", lambda v: 0 <= v <= 2**31)
        self.include, self.exclude = include, exclude
        self.criterion: Criterion | None = None
        self.experiences = 0
        self.bytes_by_experience: list[int] = []
        self._memory = CurvatureMemory(mode, self.truncate)
        self._samples: int | None = None
        self._last_samples: int | None = None
        self._drawn_from: int | None = None
        self._heads: tuple[str, ...] = ()
        self._report: Report | None = None
        self._training: TrainingExperience | None = None

    @property
    def bytes_held(self) -> int:
        """Bytes of all factors, diagonals and centres."""
        return self._memory.bytes_held

    def required_samples(self) -> int | None:
        """Return `n_samples`, or None where the next experience is left out."""
        return self.n_samples if self._strength() else None

    def draw(self, size: int) -> Tensor:
        """Draw the samples that the factors are to be made of: all, or `n_samples` of them.

        Args:
            size: N_t, samples of the experience; remembered as its weight where `start` was not given it.

        Returns:
            Their indices.

        Raises:
            DataError: if there are fewer than `n_samples`.
        """
        self._drawn_from = size
        return drawn(self.required_samples(), size, self._generator(0))

    def start(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        heads: Sequence[str] = (),
        samples: int | None = None,
    ) -> None:
        """Begin an experience; see `Method.start`.

        Args:
            model: the model.
            optimizer: any; `eigenbasis` needs it, and one whose step evaluates no model.
            heads: names of modules that are heads of one task.
            samples: N, samples of the experience; None for as many as the last one had.

        Raises:
            ModelError: for a model that cannot be covered (`layers.select.cover`), compiled, or on several devices.
            ConfigurationError: for patterns that match nothing, `samples`, a criterion or optimizer that will not do.
            StateError: if the model is not the one that the factors belong to.
        """
        samples = optional_number("samples", samples, int, "a positive integer", positive)
        if self._strength():
            check_criterion(self.criterion, self.fisher)
        self._bases.check(optimizer, acts=bool(self._strength() or self._memory.forms))
        self._heads, self._samples = tuple(heads), samples
        coverage = self._cover(model)
        if self._strength():
            refuse_compiled(coverage)
        penalty, form = self._penalty_on(coverage), self._memory.whole
        self._training = self._bases.training(model, coverage, penalty, form, optimizer, self.experiences)
        self._describe(model, coverage)

    def active(self) -> AbstractContextManager[None]:
        """Return the context in which steps are taken in the `eigenbasis`; without it, one that does nothing."""
        return nullcontext() if self._training is None else self._bases.active(self._training)

    def consolidate(self, model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        """Take the factors of the experience just learned; after an error they are what they were.

        The model runs in evaluation mode; modes, statistics, gradients and random states are left as they were.

        Args:
            model: the trained model.
            batches: mini-batches: tensors, or tuples `(inputs, ...)`, for `"empirical"` `(inputs, targets, ...)`.
            forward: runs the model on a batch and gives logits [n, classes]; default `model(inputs)`.

        Raises:
            DataError: for no samples, or more than `n_samples`; and that of `kfac_factors.FactorPass.run`, as well as
                its ModelError and NonFiniteError.
        """
        self._bases.clear()
        coverage = self._cover(model)
        before, strength = self.bytes_held, self._strength()
        centres = recentred(coverage, self._memory.diagonal_names)
        if strength:
            factors = self._factor_pass(model, coverage, forward).run(at_most(self.n_samples, batches))
            samples = self._samples or self._drawn_from or factors.samples
            new = curvature_of(coverage, factors, strength * self._counted(samples), known=self._known())
            self._memory.add(new, centres)
            self._last_samples = samples
        else:
            self._memory.recentre(centres)
            self._last_samples = self._samples or self._drawn_from or self._last_samples
        self.bytes_by_experience.append(self.bytes_held - before)
        self.experiences += 1
        self._samples = self._drawn_from = None
        self._describe(model, coverage)

    def report(self) -> Report:
        """Return what is done with every parameter of the model last seen.

        Raises:
            StateError: before the first experience began.
        """
        if self._report is None:
            raise StateError(f"{self.name} has seen no model yet: the report is there once an experience has begun")
        return self._report

    def _strength(self) -> float:
        return self.strength[min(self.experiences, len(self.strength) - 1)]

    def _generator(self, purpose: int) -> torch.Generator:
        # Of `seed` and the number of experiences alone: a restart changes nothing.
        return torch.Generator().manual_seed(self.seed * 1_000_003 + 2 * self.experiences + purpose)

    def _counted(self, samples: int | None) -> float:
        return float(samples or 1)

    def _cover(self, model: nn.Module) -> Coverage:
        coverage = self._covered(model)
        self._memory.attach(coverage)
        return coverage

    def _covered(self, model: nn.Module) -> Coverage:
        return cover(model, include=self.include, exclude=self.exclude, heads=self._heads, keep=self._known())

    def _penalty_on(self, coverage: Coverage) -> QuadraticPenalty | None:
        samples = self._counted(self._samples or self._last_samples)
        return penalty_of(coverage, self._memory.forms, samples, self.damping, self.refresh_every)

    def _factor_pass(self, model: nn.Module, coverage: Coverage, forward: Forward | None, **further: Any) -> FactorPass:
        return FactorPass(
            model,
            coverage.units,
            diagonal=coverage.frozen,
            fisher=self.fisher,
            generator=self._generator(1),
            forward=forward,
            criterion=self.criterion,
            **further,
        )

    def _known(self) -> frozenset[str]:
        return frozenset(name for form in self._memory.forms for name in form.layers)

    def _describe(self, model: nn.Module, coverage: Coverage) -> None:
        kept = self._memory.forms, self.mode, self.fisher, self.bytes_by_experience
        self._report = laplace_report(model, coverage, *kept, eigenbasis=self.eigenbasis)

    def _state(self) -> dict[str, Any]:
        return {
            "experiences": self.experiences,
            "last_samples": self._last_samples,
            "bytes": list(self.bytes_by_experience),
            **self._bases.state(),
            **self._memory.state(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        kinds(state, experiences=int, bytes=list, last_samples=int | None)
        remembered = self._bases.checked(state)
        self._memory.load(state)
        self._bases.remembered, self._bases.turned = remembered
        self.experiences, self._last_samples = state["experiences"], state["last_samples"]
        self.bytes_by_experience = list(state["bytes"])
