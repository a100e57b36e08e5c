"""Orthogonal Gradient Descent (Farajtabar, Azizan, Mott, Li; AISTATS 2020, arXiv 1910.07104)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import ConfigurationError, DataError, StateError, choice
from avalanche_gradproj.methods.base import Forward, GradientTransform
from avalanche_gradproj.methods.flat import FlatCoverage, FlatMemory, cover_flat
from avalanche_gradproj.methods.flat_training import FlatTraining
from avalanche_gradproj.methods.gpm import APPLY_TO, BATCHNORM
from avalanche_gradproj.methods.logit_gradients import TARGETS, Route, logit_gradients
from avalanche_gradproj.methods.projected import STRAY
from avalanche_gradproj.methods.report import Report, ReportRow, statistics_notes


class OrthogonalGradientDescent(GradientTransform):
    """The core of OGD: gradients of old logits, orthonormalised, and training orthogonally to them.

    In a plain PyTorch loop::

        ogd = OrthogonalGradientDescent(n_gradients=200)
        with ogd.experience(model, optimizer):
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                ogd.transform()
                optimizer.step()
                ogd.after_step()
        chosen = ogd.draw(len(inputs))
        ogd.consolidate(model, [(inputs[chosen], targets[chosen])])

    After each experience the gradients of logits of `n_gradients` random training samples over all covered parameters,
    one vector, are orthonormalised into V (Gram-Schmidt, algorithm 1 of the paper); training then takes
    `g <- g - V^T (V g)`, so that, to first order, the remembered logits stay. Every parameter that takes a gradient is
    covered, scale and shift of norm layers among them, but for task heads: other experiences give them no gradient.

    Memory: 4 p bytes a stored gradient (8 p in float64), p the numbers of all covered parameters, in one matrix, and
    8 r^2 for r of them; while it grows, after an experience, the old and the new one exist at once. See docs/ogd.md.

    Departures from the paper: steps of any optimizer are handled (`apply_to`), running statistics of BatchNorm are
    held (`batchnorm`), each gradient is orthogonalised twice, memory can be bounded.

    Args:
        n_gradients: gradients kept from an experience, before dependent ones are dropped. With 0 the method does
            nothing at all.
        target: `"gtl"`: the logit of each sample's true class; `"ave"`: the mean of its logits; `"all"`: every one of
            its logits that depends on the covered parameters, of as many samples as give `n_gradients`.
        max_bytes: bytes of the matrix at most; None for no bound. It must hold the gradients of one experience;
            once it is full, further ones are not stored, the old ones are kept, and a warning names their number.
        include: patterns of parameters to cover (see `methods.flat.cover_flat`).
        exclude: patterns of parameters to leave alone.
        apply_to: `"gradient"`, `"update"` (the step that the optimizer took), or `"auto"`: gradient where that is
            provably enough (SGD without weight decay, one parameter group), else update.
        batchnorm: running statistics from the second experience on: `"freeze"` (the function whose gradients are
            stored is the one with these statistics) or `"track"`.
        seed: of the generator that draws samples.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.
    """

    name = "OGD"
    state_version = 1
    samples_argument = "n_gradients"

    def __init__(
        self,
        n_gradients: int = 200,
        *,
        target: str = "gtl",
        max_bytes: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        apply_to: str = "auto",
        batchnorm: str = "freeze",
        seed: int = 0,
    ) -> None:
        choice("target", target, TARGETS)
        choice("apply_to", apply_to, APPLY_TO)
        choice("batchnorm", batchnorm, BATCHNORM)
        _whole_number("n_gradients", n_gradients, least=0)
        _whole_number("seed", seed)
        if max_bytes is not None:
            _whole_number("max_bytes", max_bytes, least=1)
        self.n_gradients, self.target, self.max_bytes = n_gradients, target, max_bytes
        self.include, self.exclude = include, exclude
        self.apply_to, self.batchnorm, self.seed = apply_to, batchnorm, seed
        #: Experiences learned so far.
        self.experiences = 0
        #: Leak over the last finished experience (`FlatTraining.finish`) under the key "all"; empty without vectors.
        self.leak: dict[str, float] = {}
        self._memory = FlatMemory()
        self._heads: tuple[str, ...] = ()
        self._report: Report | None = None
        self._training: FlatTraining | None = None

    @property
    def vectors(self) -> Tensor:
        """V [count, p]: orthonormal rows over the covered parameters, in the order of `shapes`; a view."""
        return self._memory.vectors.rows

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Covered parameter -> its shape, in the order in which they make up a vector."""
        return dict(self._memory.shapes)

    @property
    def bytes_held(self) -> int:
        """Bytes of the matrix of stored gradients, and of the triangle that says what it is made of."""
        return self._memory.vectors.bytes_held

    def required_samples(self) -> int | None:
        """Return how many samples an experience must have at least, None for any number."""
        return None if self.target == "all" or self.n_gradients == 0 else self.n_gradients

    def draw(self, size: int) -> Tensor:
        """Draw the samples whose gradients are to be stored, in the order in which they are used.

        The generator depends on `seed` and the number of experiences alone, so that a restart changes nothing.

        Raises:
            DataError: if there are fewer than `n_gradients` (but for `target="all"`, which needs fewer samples).
        """
        wanted = self.required_samples()
        if wanted is not None and size < wanted:
            raise DataError(
                f"the experience has {size} samples and n_gradients={wanted} are to be drawn: give n_gradients<={size}"
            )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.experiences)
        return torch.randperm(size, generator=generator)[: self.n_gradients]

    def start(self, model: nn.Module, optimizer: Optimizer | None = None, *, heads: Sequence[str] = ()) -> None:
        """Begin an experience; see `Method.start`.

        Raises:
            ModelError: if no parameter is covered (`methods.flat.cover_flat`).
            ConfigurationError: for a pattern that matches nothing, or a `max_bytes` too small.
            StateError: if the model is not the one that the stored gradients belong to.
        """
        self._heads = tuple(heads)
        coverage = self._attach(model)
        hold = self._memory.vectors.count > 0 and self.batchnorm == "freeze"
        self._training = FlatTraining(
            model, optimizer, coverage.covered, self._memory, apply_to=self.apply_to, hold_statistics=hold
        )
        self._describe(model, coverage)

    def active(self) -> AbstractContextManager[None]:
        """Return the context in which training steps are taken."""
        return nullcontext() if self._training is None else self._training.active()

    def transform(self, *, trusted: bool = True) -> None:
        """Project the gradients; see `GradientTransform.transform`."""
        if self._training is not None:
            self._training.transform()

    def after_step(self) -> None:
        """Project the step, where it is the update that is projected."""
        if self._training is not None:
            self._training.after_step()

    def finish(self) -> None:
        """End the training of an experience: measure the leak, let go of the model."""
        if self._training is None:
            return
        after, before = self._training.finish()
        self.leak = {} if after is None else {"all": after}
        if before is not None and before > STRAY:
            warnings.warn(
                f"{100 * before:.1f} % of the parameters' change over the experience lay in the span of the stored "
                "gradients and was taken back at its end; something changed gradients or weights after OGD did (with "
                f"apply_to={self._training.apply_to!r}): use apply_to='update', or put that plugin before OGD",
                stacklevel=2,
            )
        self._training = None

    def consolidate(self, model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        """Store gradients of the experience just learned.

        The model runs in evaluation mode; modes, statistics, gradients and random states are left as they were. After
        an error the stored gradients are what they were.

        Args:
            model: the trained model.
            batches: mini-batches, tuples `(inputs, targets, ...)`; the first so many samples are used as give
                `n_gradients` gradients (see `draw`).
            forward: `forward(model, batch)` gives the logits [n, classes]; default `model(batch[0])`.

        Raises:
            DataError: if there are too few samples, or a label has no logit.
            NonFiniteError: if a logit or a gradient is not finite.
        """
        coverage = self._attach(model)
        vectors, route = self._memory.vectors, Route()
        room = self.n_gradients if self.max_bytes is None else min(self.n_gradients, self._capacity() - vectors.count)
        before = vectors.count
        try:
            self._store(model, batches, max(0, room), forward, route)
        except BaseException:
            vectors.truncate(before)
            raise
        if room < self.n_gradients:
            warnings.warn(
                f"max_bytes={self.max_bytes} is full: it holds {self._capacity()} gradients of {self._memory.length} "
                f"parameters, so that {self.n_gradients - max(0, room)} of {self.n_gradients} gradients of experience "
                f"{self.experiences} were not stored and what they protect is lost: give more bytes or fewer "
                "n_gradients",
                stacklevel=2,
            )
        self.experiences += 1
        how = "batched" if route.batched else "sample by sample (the model cannot be run under torch.func.vmap)"
        self._describe(model, coverage, [] if self.n_gradients == 0 else [f"gradients of logits were computed {how}"])

    def report(self) -> Report:
        """Return what is done with every parameter of the model last seen.

        Raises:
            StateError: before the first experience began.
        """
        if self._report is None:
            raise StateError("OGD has seen no model yet: the report is there from the start of the first experience")
        return self._report

    def _store(
        self, model: nn.Module, batches: Iterable[Any], wanted: int, forward: Forward | None, route: Route
    ) -> None:
        if wanted == 0:
            return
        vectors, missing = self._memory.vectors, wanted
        vectors.reserve(vectors.count + wanted)
        for rows in self._gradients(model, batches, forward, route):
            # Masked logits depend on nothing: they are none of the experience's.
            own = (rows[rows.any(dim=1)] if self.target == "all" else rows)[:missing]
            vectors.add(own)
            missing -= len(own)
            if missing == 0:
                return
        if self.target != "all" or missing == wanted:
            raise DataError(
                f"{wanted - missing} gradients came and {wanted} are needed: give more samples or fewer n_gradients"
            )

    def _gradients(
        self, model: nn.Module, batches: Iterable[Any], forward: Forward | None, route: Route
    ) -> Iterator[Tensor]:
        names = list(self._memory.shapes)
        for batch in batches:
            yield from logit_gradients(model, names, batch, target=self.target, forward=forward, route=route)

    def _capacity(self) -> int:
        """Return how many gradients `max_bytes` holds."""
        return 0 if self.max_bytes is None else self.max_bytes // self._memory.vector_bytes

    def _attach(self, model: nn.Module) -> FlatCoverage:
        coverage = cover_flat(model, include=self.include, exclude=self.exclude, heads=self._heads)
        self._memory.attach(coverage)
        needed, one = max(self.n_gradients, self._memory.vectors.count), self._memory.vector_bytes
        if self.max_bytes is not None and self._capacity() < needed:
            raise ConfigurationError(
                f"max_bytes={self.max_bytes} holds {self._capacity()} gradients of {self._memory.length} parameters "
                f"({one} bytes each) and {needed} are to be kept: give max_bytes>={needed * one}, fewer n_gradients, "
                "or exclude parameters"
            )
        return coverage

    def _describe(self, model: nn.Module, coverage: FlatCoverage, notes: Sequence[str] = ()) -> None:
        resting = [] if self._training is None else self._training.resting
        alone = dict.fromkeys(resting, "the optimizer does not have it") | coverage.alone
        rows = [
            ReportRow(name, tuple(p.shape), "left alone" if name in alone else "projected", alone.get(name, ""))
            for name, p in coverage.parameters.items()
        ]
        vectors = self._memory.vectors
        held = f"{vectors.count} orthonormal gradients over {self._memory.length} parameters: {self.bytes_held} bytes"
        statistics = statistics_notes(model, held=self.batchnorm == "freeze" and self.n_gradients > 0)
        acts = [] if self._training is None else self._training.notes
        self._report = Report(tuple(rows), (held, *statistics, *acts, *notes))

    def _state(self) -> dict[str, Any]:
        return {"experiences": self.experiences, "memory": self._memory.state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        if not isinstance(state.get("experiences"), int):
            raise StateError(f"the state's 'experiences' is {state.get('experiences')!r:.80}, expected an int")
        self._memory.load(state.get("memory"))
        self.experiences = state["experiences"]


def _whole_number(argument: str, value: Any, *, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ConfigurationError(f"{argument}={value!r}: give an integer{'' if least is None else f' >= {least}'}")
