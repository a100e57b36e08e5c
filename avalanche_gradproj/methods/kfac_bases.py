"""The eigenbases of a Laplace approximation's factors, and whose memory of an optimizer is in them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import ConfigurationError, StateError
from avalanche_gradproj.layers.select import Coverage
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.eigenbasis import Eigenbasis
from avalanche_gradproj.methods.arguments import kinds, switches
from avalanche_gradproj.methods.kfac_curvature import Curvature
from avalanche_gradproj.methods.kfac_eigenbasis import TurnedSteps, TurnedUnit, check_optimizer, owned_by
from avalanche_gradproj.methods.kfac_penalty import QuadraticPenalty
from avalanche_gradproj.methods.kfac_training import TrainingExperience
from avalanche_gradproj.methods.optimizers import forget


@dataclass
class TurningExperience(TrainingExperience):
    """The experience in training.

    Attributes:
        steps: what turns the optimizer's steps; None where nothing does.
    """

    steps: TurnedSteps | None = None


class Eigenbases:
    """The eigenbases of a Laplace approximation with one pair of factors a layer.

    Args:
        used: whether steps are taken in them.
        mode: `"online"` has one pair.

    Attributes:
        remembered: how many experiences were learned when the optimizer last forgot what it knew of the layers: what
                it has come to know since belongs to the coordinates of the factors after so many. -1 before.
        turned: of which layers it has: name -> last columns that have no part in the basis.

    Raises:
        ConfigurationError: for a value that is no switch, or another mode.
    """

    def __init__(self, used: bool, mode: str) -> None:
        switches(eigenbasis=used)
        if used and mode != "online":
            raise ConfigurationError(
                f"eigenbasis=True needs one pair of factors a layer, and mode={mode!r} keeps one an experience: give "
                "mode='online', or eigenbasis=False"
            )
        self._used, self.remembered = used, -1
        self.turned: dict[str, int] = {}
        self._optimizer: weakref.ref[Optimizer] | None = None
        # By layer: the tensors that the factors are, columns apart, and the basis.
        self._found: dict[str, tuple[Tensor, Tensor, int, Eigenbasis]] = {}

    def training(
        self,
        model: nn.Module,
        coverage: Coverage,
        penalty: QuadraticPenalty | None,
        form: Curvature | None,
        optimizer: Optimizer | None,
        experiences: int,
    ) -> TrainingExperience:
        """Return the experience in training; the optimizer forgets what it knows in other coordinates.

        Args:
            model: the model.
            coverage: its covered layers.
            penalty: the penalty, None without one: then nothing is turned.
            form: what the penalty is made of, with whole factors.
            optimizer: what takes the steps.
            experiences: how many were learned. The pieces of an experience, and one that is trained again, share it
                and the optimizer's memory.
        """
        first = next(iter(coverage.parameters.values()))
        zero = torch.zeros((), device=first.device)
        steps = None
        if self._used and penalty is not None and form is not None and optimizer is not None:
            turned = self._turned(coverage.units, form, optimizer)
            self._forget(optimizer, turned, self.remembered != experiences)
            self.remembered = experiences
            steps = TurnedSteps(optimizer, turned)
        return TurningExperience(penalty, zero, model, coverage.units, steps=steps)

    def _forget(self, optimizer: Optimizer, turned: Sequence[TurnedUnit], anew: bool) -> None:
        """Drop the optimizer's memory of layers whose coordinates change: of all turned, or those turned otherwise."""
        same = self._optimizer is None or self._optimizer() is optimizer  # unknown after a restart: what it was
        known = self.turned if same else {}
        coordinates = {own.unit.name: self._found[own.unit.name][2] for own in turned if own.turns}
        for own in turned:
            before, now = known.get(own.unit.name), coordinates.get(own.unit.name)
            if before != now or (anew and now is not None):
                forget(optimizer, own.unit.parameters)
        self.turned, self._optimizer = coordinates, weakref.ref(optimizer)

    def check(self, optimizer: Optimizer | None, *, acts: bool) -> None:
        """Check that an optimizer's steps can be turned, where they, or later ones, are to be; see `check_optimizer`.

        Args:
            optimizer: what takes the steps.
            acts: whether the method does anything in this experience.
        """
        if self._used and acts:
            check_optimizer(optimizer)

    @staticmethod
    def active(training: TrainingExperience) -> AbstractContextManager[None]:
        """Return the context in which the steps of an experience are turned; one that does nothing where none are."""
        steps = training.steps if isinstance(training, TurningExperience) else None
        return nullcontext() if steps is None else steps.active()

    def clear(self) -> None:
        """Let go of the bases: the factors are about to change."""
        self._found = {}

    def state(self) -> dict[str, Any]:
        """Return what a restart in the middle of an experience needs: the coordinates of the optimizer's memory."""
        return {"remembered": self.remembered, "turned": dict(self.turned)} if self._used else {}

    def checked(self, state: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
        """Return `remembered` and `turned` of a state; of one made without the eigenbasis, that nothing is.

        Raises:
            StateError: if it is damaged.
        """
        if not self._used or "remembered" not in state:
            return -1, {}
        kinds(state, remembered=int, turned=dict)
        if not all(isinstance(name, str) and isinstance(apart, int) for name, apart in state["turned"].items()):
            raise StateError(
                f"the state's 'turned' is {state['turned']!r:.80}, expected names and numbers: it is damaged"
            )
        return state["remembered"], dict(state["turned"])

    def _turned(self, units: Sequence[Unit], form: Curvature, optimizer: Optimizer) -> list[TurnedUnit]:
        owned, turned, found = owned_by(optimizer), [], {}
        for unit in units:
            layer = form.layers.get(unit.name)
            if layer is None or not layer.terms or not form.weight:
                continue
            left, right = layer.terms[0].left, layer.terms[0].right
            # Steps of weight and bias by different rules must not be mixed.
            apart = int(len({owned.get(id(parameter)) for parameter in unit.parameters}) > 1)
            known = self._found.get(unit.name)
            if known is None or known[0] is not left.matrix or known[1] is not right.matrix or known[2] != apart:
                known = (left.matrix, right.matrix, apart, Eigenbasis.of(left, right, apart=apart))
            found[unit.name] = known
            own = TurnedUnit(unit, known[3])
            own.turns = own.movable(owned)
            turned.append(own)
        self._found = found
        return turned

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the bases, which the factors have, and the optimizer."""
        return {**self.__dict__, "_found": {}, "_optimizer": None}
