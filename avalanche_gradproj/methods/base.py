"""What a method is: three kinds, and a state that survives a restart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.methods.report import Report

#: Runs a model on a batch of whatever `consolidate` was given.
Forward = Callable[[nn.Module, Any], Any]


class Method(ABC):
    """A continual-learning method with a versioned state.

    A subclass sets `name` and `state_version`, and implements `_state` (tensors, numbers and names only) and
    `_load_state`, which checks everything before it changes anything.
    """

    name: ClassVar[str]
    state_version: ClassVar[int] = 1
    #: The argument that says how many samples are drawn from an experience, for messages.
    samples_argument: ClassVar[str] = "n_samples"

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two experiences: tensors, numbers and names in a plain dict."""
        return {"method": self.name, "version": self.state_version, **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; the object is unchanged if it is refused.

        Args:
            state: what `state_dict` returned.

        Raises:
            StateError: naming what differs: the method, the version, a layer, a shape.
        """
        if not isinstance(state, dict) or "method" not in state or "version" not in state:
            raise StateError(
                f"this is no state of a method: expected a dict with 'method' and 'version', got {state!r:.80}"
            )
        if state["method"] != self.name:
            raise StateError(f"the state is of method {state['method']!r}, this is {self.name!r}: load it into its own")
        if state["version"] != self.state_version:
            raise StateError(
                f"the state of {self.name} has version {state['version']!r}, this package reads {self.state_version}: "
                "load it with the package that wrote it"
            )
        self._load_state(state)

    @abstractmethod
    def _state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_state(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def start(self, model: nn.Module, optimizer: Optimizer | None = None, *, heads: Sequence[str] = ()) -> None:
        """Begin an experience, with the model and optimizer as they are to be trained.

        Args:
            model: the model; all its parameters for this experience exist.
            optimizer: what will take the steps.
            heads: names of modules that are task heads.
        """

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Return the context in which training steps are taken: hooks and patches live in it alone."""

    @abstractmethod
    def finish(self) -> None:
        """End the training of an experience: after it no reference to the model is held."""

    def abandon(self) -> None:
        """Let go of the model after training that was broken off; nothing is learned, and nothing is lost."""
        if "_training" in self.__dict__:
            self.__dict__["_training"] = None

    @abstractmethod
    def consolidate(self, model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        """Learn from the finished experience what later ones must respect.

        Args:
            model: the trained model.
            batches: samples of the experience, in mini-batches: what a plain loop gives, or from a plugin what
                Avalanche collates, `[x, y, task label]`.
            forward: runs the model on such a batch, as a plugin's strategy would (task labels select heads); default
                the model on the batch, or on its first part.
        """

    def required_samples(self) -> int | None:
        """Return how many samples an experience must have at least, None for any number."""
        return None

    def draw(self, size: int) -> Tensor:
        """Return the indices of the samples that `consolidate` is to see, of an experience of `size`."""
        return torch.arange(size)

    @abstractmethod
    def report(self) -> Report:
        """Return what is done with every parameter."""

    @contextmanager
    def experience(self, model: nn.Module, optimizer: Optimizer | None = None, **settings: Any) -> Iterator[None]:
        """`start`, `active` and `finish` as one context, for plain PyTorch loops.

        Args:
            model: the model.
            optimizer: what will take the steps.
            **settings: further arguments of `start`.
        """
        self.start(model, optimizer, **settings)
        try:
            with self.active():
                yield
        except BaseException:
            self.abandon()
            raise
        self.finish()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the experience in training: it refers to the model, and cannot be pickled."""
        return {**self.__dict__, "_training": None} if "_training" in self.__dict__ else dict(self.__dict__)


class GradientTransform(Method):
    """A method that changes gradients, or the steps made of them: GPM, OGD, LOGD."""

    @abstractmethod
    def transform(self, *, trusted: bool = True) -> None:
        """Change the gradients: call it after the backward pass, before the optimizer's step.

        Args:
            trusted: whether the gradients are what the backward pass left; False where somebody may have changed
                them since.
        """

    def listen(self, listening: bool) -> None:
        """Say whether the coming forward passes are those of training steps.

        Needed where others run forward and backward passes of their own during an epoch; a method that takes part in
        the backward pass then does so for training steps alone. Without a call every pass counts.
        """

    @abstractmethod
    def after_step(self) -> None:
        """Change the step that was taken: call it after the optimizer's step."""


class Penalty(Method):
    """A method that adds a term to the loss: K-FAC Laplace, XK-FAC."""

    @abstractmethod
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
            model: the model; all its parameters for this experience exist.
            optimizer: what will take the steps.
            heads: names of modules that are heads of one task.
            samples: samples of the experience, over which its loss is a mean; None for as many as the last one had.
        """

    @property
    @abstractmethod
    def penalising(self) -> bool:
        """Whether the experience in training has a penalty; where not, nothing needs to be added."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return the differentiable scalar to be added to the loss of a mini-batch."""

    def objective(self, loss: Tensor) -> Tensor:
        """Return what a training step minimises.

        Args:
            loss: of the mini-batch, a scalar.
        """
        return loss + self.penalty()


class TaskWeights(Method):
    """A method that gives each experience parameters of its own: HALRP."""

    @abstractmethod
    def select(self, experience: int) -> None:
        """Make the model compute with the parameters of an experience, counted from 0."""
