"""An optimizer's steps in the eigenbasis of Kronecker factors: the objective is the same, what is adaptive is not.

For a layer W under the penalty <W - W*, B (W - W*) A>, with A = U S U^T and B = V Q V^T, the optimizer is shown

    Z = V^T W U    and    V^T G U             G the gradient by W

instead of W and G, in the parameters themselves while its step lasts. Whatever it does to Z, W then moves by
V (Z' - Z) U^T: of the difference, so that rounding does not add up in the weights.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import ConfigurationError, StateError
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.eigenbasis import Eigenbasis
from avalanche_gradproj.methods.optimizers import forget


@dataclass(eq=False)
class TurnedUnit:
    """A layer and its basis.

    Attributes:
        unit: the layer.
        basis: the basis of its factors.
        turns: whether the optimizer's memory of it is in these coordinates.
    """

    unit: Unit
    basis: Eigenbasis
    turns: bool = False
    # Z as the last step left it, and the state of the parameters that have it.
    _z: Tensor | None = field(default=None, init=False)
    _stamp: tuple[tuple[int, int], ...] = field(default=(), init=False)

    def movable(self, owned: dict[int, int]) -> bool:
        """Whether the optimizer moves the whole matrix, by the parameters that it has (`owned_by`)."""
        return all(parameter.requires_grad and id(parameter) in owned for parameter in self.unit.parameters)

    def weights(self) -> Tensor:
        """Return a copy of what the parameters hold [blocks, out, d], in their type."""
        held = self.unit.weights()
        return held.clone() if self.unit.bias is None else held

    def coordinates(self, weights: Tensor) -> Tensor:
        """Return Z of the present weights: the last step's if nobody has written to the parameters since."""
        if self._z is not None and self._stamp == self._written():
            return self._z
        return self.basis.into(weights)

    def keep(self, z: Tensor) -> None:
        """Keep the coordinates of the weights that have just been written."""
        # In half precision a weight may stay where its coordinates move.
        exact = all(parameter.dtype == z.dtype for parameter in self.unit.parameters)
        self._z, self._stamp = (z, self._written()) if exact else (None, ())

    def _written(self) -> tuple[tuple[int, int], ...]:
        # Counted on the host. A write through `.data` is not: of that only a rule that reads weights, as weight decay
        # does, is misinformed, since the weights move by the difference of their coordinates.
        return tuple((parameter._version, parameter.data_ptr()) for parameter in self.unit.parameters)


class TurnedSteps:
    """Turns layers before a step of an optimizer, and back after it.

    Layers of which the optimizer does not move all (a frozen bias, say) are not turned, nor those without any gradient;
    a part that has none while the other has one counts as having zeros. Other hooks of the optimizer find the weights
    and gradients themselves, but for those that run between these and the step.

    Args:
        optimizer: what takes the steps.
        turned: the layers.
    """

    def __init__(self, optimizer: Optimizer, turned: Sequence[TurnedUnit]) -> None:
        self._optimizer, self._turned = optimizer, turned
        # While a step lasts: the layers with their weights before and their coordinates, and the gradients before.
        self._held: list[tuple[TurnedUnit, Tensor, Tensor]] = []
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        # The call of that step: a class whose step calls that of its base runs all hooks twice, one pair in the other.
        self._step: FrameType | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Return the context in which steps are turned; one that is broken off is taken back in these layers."""
        with ExitStack() as stack:
            stack.callback(self._put_back)
            stack.callback(self._optimizer.register_step_pre_hook(self._before).remove)
            handle = self._optimizer.register_step_post_hook(self._after)
            stack.callback(handle.remove)
            hooks = handle.hooks_dict_ref()
            if hooks is not None:  # an average of weights that others take in such a hook is one of weights
                hooks.move_to_end(handle.id, last=False)
            yield

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show the optimizer coordinates."""
        if self._held and _runs(self._step):
            return
        if self._held:
            self._put_back()
            raise StateError(
                "a step of the optimizer was broken off and training went on, with weights in other coordinates: they "
                "have been put back now; leave the context of the experience after such an exception"
            )
        if kwargs.get("closure") is not None or any(callable(given) for given in args[1:]):
            raise ConfigurationError(
                "eigenbasis=True: the optimizer's step was given a closure, which would evaluate the model with its "
                "weights in other coordinates: call the backward pass first and step() without one, or take "
                "eigenbasis=False"
            )
        self._step = sys._getframe(1)
        with torch.no_grad():
            self._show()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Move the weights as their coordinates were, and give back the gradients."""
        if sys._getframe(1) is self._step:
            with torch.no_grad():
                self._move()

    def _show(self) -> None:
        """Write coordinates into the parameters, and put turned gradients beside them."""
        # All are formed before anything is changed.
        held, gradients, shown = [], [], {}
        for own, gradient in self._turning():
            weights = own.weights()
            held.append((own, weights, own.coordinates(weights)))
            for part in own.unit.slices:
                parameter = part.parameter
                if part.name not in shown:
                    gradients.append((parameter, parameter.grad))
                    whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    shown[part.name] = torch.empty_like(parameter) if part.is_whole else whole.clone()
            own.unit.write(own.basis.into(gradient), lambda part: shown[part.name])
        self._held, self._gradients = held, gradients
        for own, _, z in held:
            own.unit.write_weights(z)
        for (parameter, _), turned in zip(gradients, shown.values(), strict=True):
            parameter.grad = turned
        # What a parameter in half precision holds of Z is where the step begins.
        self._held = [(own, weights, self._shown(own, z)) for own, weights, z in held]

    def _move(self) -> None:
        """Write weights into the parameters, and the gradients back."""
        after = []
        for own, weights, z in self._held:
            moved = own.weights().to(z.dtype)
            after.append((own, moved, weights.to(z.dtype) + own.basis.back(moved - z)))
        for own, _, weights in after:
            own.unit.write_weights(weights)
        self._give_back()
        for own, z, _ in after:  # when all have been written: layers may share parameters
            own.keep(z)

    def _turning(self) -> Iterator[tuple[TurnedUnit, Tensor]]:
        """Yield the layers to be turned in this step, and their gradients [blocks, out, d]."""
        owned = owned_by(self._optimizer)
        for own in self._turned:
            movable = own.movable(owned)
            if movable != own.turns:  # frozen, or unfrozen, in the middle of an experience
                forget(self._optimizer, own.unit.parameters)
                own.turns = movable
            gradient = own.unit.gradient() if movable else None
            if gradient is not None:
                yield own, gradient

    @staticmethod
    def _shown(own: TurnedUnit, z: Tensor) -> Tensor:
        exact = all(parameter.dtype == z.dtype for parameter in own.unit.parameters)
        return z if exact else own.weights().to(z.dtype)

    @torch.no_grad()
    def _put_back(self) -> None:
        """Undo what a step that was broken off has left."""
        for own, weights, _ in self._held:
            own.unit.write_weights(weights)
        self._give_back()

    def _give_back(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._held, self._gradients, self._step = [], [], None


def check_optimizer(optimizer: Optimizer | None) -> None:
    """Check that an optimizer's steps can be turned.

    Raises:
        ConfigurationError: if there is none, or it evaluates the model inside its step.
    """
    if optimizer is None:
        raise ConfigurationError(
            "eigenbasis=True needs the optimizer: give it to start / experience(model, optimizer), or take "
            "eigenbasis=False"
        )
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"eigenbasis=True: optimizer is a {name}, expected a torch.optim.Optimizer, with hooks"
        )
    # Of the class: a learning rate scheduler replaces the instance's by one that shows `self` too.
    _, *given = inspect.signature(type(optimizer).step).parameters.values()
    needed = [
        own for own in given if own.default is own.empty and own.kind not in (own.VAR_POSITIONAL, own.VAR_KEYWORD)
    ]
    if needed:
        raise ConfigurationError(
            f"eigenbasis=True: the step of {name} needs {needed[0].name!r} and evaluates the model, whose weights are "
            "in other coordinates there: take an optimizer that steps along the gradient it finds (Adam, SGD), or "
            "eigenbasis=False"
        )


def owned_by(optimizer: Optimizer) -> dict[int, int]:
    """Return the parameters that an optimizer has: identity -> index of the group."""
    return {id(own): index for index, group in enumerate(optimizer.param_groups) for own in group["params"]}


def _runs(call: FrameType | None) -> bool:
    """Whether a call has not returned yet: whether it is among those that led here."""
    own: FrameType | None = sys._getframe()
    while own is not None and own is not call:
        own = own.f_back
    return own is not None
