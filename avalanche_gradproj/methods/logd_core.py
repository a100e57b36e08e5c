"""Layerwise Optimization by Gradient Decomposition (Tang et al.; CVPR 2021, arXiv 2105.07561): the method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import ConfigurationError, ModelError, NonFiniteError, StateError
from avalanche_gradproj.layers.norm import tracked_norms
from avalanche_gradproj.layers.select import check_patterns, matches, refuse_lazy
from avalanche_gradproj.methods.base import Forward, GradientTransform
from avalanche_gradproj.methods.episodic import EpisodicMemory
from avalanche_gradproj.methods.gradient_blocks import GradientBlocks, partition
from avalanche_gradproj.methods.logd import check_arguments, update_coefficients
from avalanche_gradproj.methods.old_gradients import Criterion, OldGradients
from avalanche_gradproj.methods.report import Report, ReportRow


def _first(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of (inputs, targets[, task labels])."""
    return model(batch[0])


class LayerwiseGradientDecomposition(GradientTransform):
    """The core of LOGD: an episodic memory, and gradients decomposed block by block.

    In a plain PyTorch loop::

        logd = LayerwiseGradientDecomposition(patterns_per_exp=256, criterion=criterion)
        with logd.experience(model, optimizer):
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                logd.transform()
                optimizer.step()
        logd.consolidate(model, [(x[chosen], y[chosen])])  # chosen = logd.draw(len(x)), x and y of the experience

    With `selection="last"` the loop calls `logd.observe((x, y))` before each forward pass, consolidates with
    `logd.consolidate(model, [])`. With a gradient scaler, `scaler.unscale_(optimizer)` comes before `transform`: the
    official variant's margin has a scale.

    At every step, from the second experience on, the gradient of each old experience is taken on its memory at the
    current weights, and each block of the mini-batch's gradient becomes that of `methods.logd.logd_update`. All
    parameters that take a gradient are decomposed, heads and norm layers too. What the mini-batch gives no gradient
    (the heads of other tasks) gets none, and does not move, but counts in its block.

    Departures from the official code: `methods.logd.logd_update`; memory passes leave running statistics of
    normalisation layers alone, which in the official code they move; samples for the memory may be drawn at random.

    A step in which a block's memory gradients are not finite leaves the block's gradient as it came. That is noted on
    the device, and looked at when the experience ends (`finish`), so that no step waits for it.

    Args:
        patterns_per_exp: samples kept of each experience. With 0 the method does nothing at all.
        n_components: leading principal components of the specific gradients that are removed, None for all directions.
        criterion: loss of the model's output against targets; needed from the second experience on.
        forward: runs the model on (inputs, targets[, task labels]); default `model(inputs)`.
        variant: `"paper"` or `"official"`.
        margin: of the official variant.
        blocks: `"layer"` (all parameters of one module), `"network"`, or a number of consecutive parameter tensors.
        include: patterns of parameters, or of modules that hold them, to decompose; default all.
        exclude: patterns of those to leave alone.
        selection: samples that are kept: `"random"`, or `"last"`: those seen last in training, told by `observe`.
        memory_device: where samples lie; None for where they come.
        seed: of the generator that draws samples.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.
    """

    name = "LOGD"
    state_version = 1
    samples_argument = "patterns_per_exp"

    def __init__(
        self,
        patterns_per_exp: int = 256,
        n_components: int | None = None,
        *,
        criterion: Criterion | None = None,
        forward: Forward | None = None,
        variant: str = "paper",
        margin: float = 0.5,
        blocks: str | int = "layer",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        selection: str = "random",
        memory_device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(n_components, variant, margin)
        number = isinstance(blocks, int) and not isinstance(blocks, bool) and blocks >= 1
        if not number and blocks not in ("layer", "network"):
            raise ConfigurationError(
                f"blocks={blocks!r}: give 'layer', 'network' or a positive number of parameter tensors"
            )
        self.memory = EpisodicMemory(patterns_per_exp, selection=selection, device=memory_device, seed=seed)
        self.n_components, self.variant, self.margin, self.blocks = n_components, variant, float(margin), blocks
        self.include, self.exclude = include, exclude
        #: Loss of the model's output against targets; may be set until training of an experience begins.
        self.criterion = criterion
        #: Runs the model on a batch of the memory; may be set until training of an experience begins.
        self.forward: Forward = _first if forward is None else forward
        self._report: Report | None = None
        self._gradients: GradientBlocks | None = None
        self._old: OldGradients | None = None
        self._finite: Tensor | None = None

    @property
    def experiences(self) -> int:
        """Experiences learned so far."""
        return self.memory.experiences

    @property
    def bytes_held(self) -> int:
        """Bytes of the memory and, while an experience is trained, of the gradients and of what the model is lent."""
        training = 0 if self._gradients is None else self._gradients.bytes_held
        return self.memory.bytes_held + training + (0 if self._old is None else self._old.bytes_lent)

    def required_samples(self) -> int | None:
        """Return `patterns_per_exp`, None without a memory."""
        return self.memory.size or None

    def draw(self, size: int) -> Tensor:
        """Return the indices of the samples to keep; see `EpisodicMemory.draw`."""
        return self.memory.draw(size)

    def observe(self, batch: Any) -> None:
        """Take note of a mini-batch of training, for `selection="last"`; see `EpisodicMemory.observe`."""
        self.memory.observe(batch)

    def start(self, model: nn.Module, optimizer: Optimizer | None = None, *, heads: Sequence[str] = ()) -> None:
        """Begin an experience; see `Method.start`. Heads are decomposed as everything else.

        Raises:
            ModelError: for a lazy model, one on several devices, one without a parameter to decompose, or one that
                cannot run on the memory.
            ConfigurationError: for a pattern that matches nothing, blocks that do not fit, or a missing criterion.
        """
        self._release()
        parameters, alone = self._treat(model)
        blocks = partition(list(parameters), self.blocks)
        held = self.memory.bytes_held
        notes = [f"old experiences: {len(self.memory)}, {self.memory.size} samples each, {held} bytes"]
        if len(self.memory):
            self.memory.place(next(iter(parameters.values())).device)
            if self.criterion is None:
                raise ConfigurationError(
                    "criterion=None: gradients of old experiences need the loss; give criterion, called as "
                    "criterion(output, targets)"
                )
            gradients = GradientBlocks(parameters, blocks, len(self.memory))
            self._old = OldGradients(model, self.memory, gradients, self.forward, self.criterion)
            self._gradients = gradients
            self._finite = torch.ones(len(blocks), dtype=torch.bool, device=gradients.rows.device)
            notes.append(self._old.note)
        norms = tracked_norms(model)
        if norms:
            notes.append(
                f"running statistics of {len(norms)} normalisation layer(s): passes over the memory leave them alone"
            )
        self._describe(model, blocks, alone, notes)

    def active(self) -> AbstractContextManager[None]:
        """Return an empty context: nothing stays on the model between two calls."""
        return nullcontext()

    def transform(self, *, trusted: bool = True) -> None:
        """Decompose the gradients; see `GradientTransform.transform`. Nothing happens in the first experience."""
        if self._gradients is None or self._old is None or self._finite is None:
            return
        self._old.compute()
        with torch.no_grad():
            present = {name: parameter.grad for name, parameter in self._gradients.parameters.items()}
            self._gradients.put(len(self.memory), present)
            coefficients, finite = update_coefficients(
                grams := self._gradients.grams(),
                n_components=self.n_components,
                variant=self.variant,
                margin=self.margin,
            )
            self._finite &= torch.isfinite(grams.diagonal(dim1=1, dim2=2)[:, :-1]).all(dim=1)
            for name, update in self._gradients.combine(coefficients, finite).items():
                gradient = present[name]
                if gradient is not None:
                    gradient.copy_(update)

    def after_step(self) -> None:
        """Do nothing: the gradient decides."""

    def finish(self) -> None:
        """End the training of an experience: let go of the model and of the gradients.

        Raises:
            NonFiniteError: if gradients on the memory were not finite in some step, naming the first block.
        """
        names = [] if self._gradients is None else self._gradients.names
        finite = [] if self._finite is None else self._finite.tolist()
        self._release()
        for name, good in zip(names, finite, strict=True):
            if not good:
                raise NonFiniteError(
                    f"block {name!r}: the gradient on the memory of an old experience held an infinity or a NaN in "
                    "some step, where the block was trained without decomposition: training has diverged (lower the "
                    "learning rate)"
                )

    def abandon(self) -> None:
        """Let go of the model, and of the mini-batches seen; see `Method.abandon`."""
        self._release()
        self.memory.forget()

    def consolidate(self, model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        """Keep samples of the experience just learned.

        Args:
            model: not used.
            batches: (inputs, targets) or (inputs, targets, ..., task labels) each; the first `patterns_per_exp`
                samples are kept: those of `draw`.
            forward: not used: set it at the beginning, or as an attribute.

        Raises:
            DataError: for elements that are no tensors, or too few samples; nothing changes then.
            NonFiniteError: if an input holds an infinity or a NaN; nothing changes then.
        """
        self.memory.add(batches)

    def report(self) -> Report:
        """Return what is done with every parameter of the model last seen.

        Raises:
            StateError: before the first experience began.
        """
        if self._report is None:
            raise StateError("LOGD has seen no model yet: the report is there from the start of the first experience")
        return self._report

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the experience in training: it refers to the model, and cannot be pickled."""
        return {**self.__dict__, "_gradients": None, "_old": None, "_finite": None}

    def _release(self) -> None:
        self._gradients = self._old = self._finite = None

    def _treat(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the decomposed parameters, and why the others are left alone."""
        refuse_lazy(model)
        every = dict(model.named_parameters())
        check_patterns(model, every, self.include, "include")
        check_patterns(model, every, self.exclude, "exclude")
        chosen, alone = {}, {}
        for name, parameter in every.items():
            if not parameter.requires_grad:
                alone[name] = "takes no gradient"
            elif self.include is not None and not matches(name, self.include):
                alone[name] = "not in include"
            elif matches(name, self.exclude):
                alone[name] = "excluded"
            else:
                chosen[name] = parameter
        if not chosen:
            raise ModelError(
                "no parameter is decomposed: all are frozen, excluded or not in include: change the patterns"
            )
        return chosen, alone

    def _describe(
        self, model: nn.Module, blocks: dict[str, list[str]], alone: dict[str, str], notes: Sequence[str]
    ) -> None:
        owner = {name: block for block, names in blocks.items() for name in names}
        rows = []
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if name in owner:
                rows.append(ReportRow(name, shape, "decomposed", f"block {owner[name]}", owner[name]))
            else:
                rows.append(ReportRow(name, shape, "left alone", alone[name]))
        self._report = Report(tuple(rows), tuple(notes))

    def _state(self) -> dict[str, Any]:
        return self.memory.state()

    def _load_state(self, state: dict[str, Any]) -> None:
        self.memory.load(state)
