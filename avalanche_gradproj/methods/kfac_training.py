"""A quadratic penalty in the training of an experience: as a term of the loss, or as a gradient of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.methods.base import Penalty
from avalanche_gradproj.methods.kfac_penalty import QuadraticPenalty


@dataclass
class TrainingExperience:
    """The experience in training.

    Attributes:
        penalty: None where there is none.
        zero: a scalar on the model's device.
        model: the model.
        units: its covered layers.
        entered: what entered BatchNorms in the last training step, for those who need it.
    """

    penalty: QuadraticPenalty | None
    zero: Tensor
    model: nn.Module
    units: Sequence[Unit]
    entered: dict[str, Tensor] = field(default_factory=dict)


class QuadraticMethod(Penalty):
    """A method whose penalty is a quadratic form on the weights of the experience in training."""

    _training: TrainingExperience | None

    @property
    def penalising(self) -> bool:
        """Whether the experience in training has a penalty."""
        return self._training is not None and self._training.penalty is not None

    def penalty(self) -> Tensor:
        """Return the penalty at the present weights (see `refresh_every`), a differentiable scalar; 0 without one.

        Raises:
            StateError: outside of an experience.
        """
        if self._training is None:
            raise StateError("penalty() was called outside of an experience: use it inside `with experience(model)`")
        return self._training.zero if self._training.penalty is None else self._training.penalty.value()

    @property
    def adds_gradient(self) -> bool:
        """Whether `add_gradient` may take the place of `objective` in this step.

        Not without a penalty, where hooks of parameters watch the gradients' making, and in subclasses that have a
        `penalty` or `objective` of their own.
        """
        kind = type(self)
        plain = kind.penalty is QuadraticMethod.penalty and kind.objective is Penalty.objective
        training = self._training
        return plain and training is not None and training.penalty is not None and training.penalty.adds

    def add_gradient(self) -> Tensor:
        """Add the penalty's gradient to `.grad`, after the backward pass of the loss alone; return its value.

        The same as to add `penalty()` to the loss, up to rounding, and cheaper: autograd has no part in it. The value
        is a constant.

        Raises:
            StateError: outside of an experience, or where `adds_gradient` is False and there is a penalty.
        """
        if self._training is None or self._training.penalty is None:
            return self.penalty()
        if not self.adds_gradient:
            raise StateError(
                f"{self.name}: the gradient cannot be added by itself, since hooks of a parameter watch it or the "
                "penalty is no function of parameters alone: use objective(loss).backward()"
            )
        return self._training.penalty.add_gradient()

    def finish(self) -> None:
        """End the training of an experience: let go of the model."""
        self._training = None
