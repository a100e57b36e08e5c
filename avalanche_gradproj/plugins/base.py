"""When a method acts: Avalanche's callbacks around one core. All mathematics is in `methods`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from avalanche.benchmarks.scenarios.online import OnlineCLExperience
from avalanche.core import BaseSGDPlugin, SupervisedPlugin
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from avalanche.models.cosine_layer import CosineIncrementalClassifier
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, StateError
from avalanche_gradproj.methods.base import Forward, GradientTransform, Method
from avalanche_gradproj.methods.report import Report
from avalanche_gradproj.plugins.reading import mini_batches

#: Avalanche's task heads: they belong to one task, or grow with the classes.
HEADS = (MultiHeadClassifier, IncrementalClassifier, CosineIncrementalClassifier)


def task_heads(model: nn.Module) -> list[str]:
    """Return the names of a model's task heads."""
    return [name for name, module in model.named_modules() if name and isinstance(module, HEADS)]


class MethodPlugin(SupervisedPlugin):
    """Runs a method inside any Avalanche strategy: starts it before each experience and lets it learn after.

    In an online stream with `access_task_boundaries=True`, whose experiences are pieces of larger ones, the method
    consolidates after the last piece of each, on the whole of it; without boundaries every piece is an experience of
    its own.

    The method's hooks live only while `training_epoch` runs, and what it holds of the model is let go of if that is
    broken off: Avalanche has no callback for an exception, so the plugin wraps that call, once an epoch, in a context.

    Args:
        method: the core.
        record_batch_size: samples in a mini-batch of the pass over the data after an experience.

    Raises:
        ConfigurationError: if `record_batch_size` is no positive integer.
    """

    def __init__(self, method: Method, *, record_batch_size: int = 128) -> None:
        super().__init__()
        if isinstance(record_batch_size, bool) or not isinstance(record_batch_size, int) or record_batch_size < 1:
            raise ConfigurationError(f"record_batch_size={record_batch_size!r}: give a positive integer")
        self.method = method
        self.record_batch_size = record_batch_size
        self._pieces = 0

    def report(self) -> Report:
        """Return what is done with every parameter; prints as a table.

        Raises:
            StateError: before the first experience began.
        """
        return self.method.report()

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state: tensors, numbers and names; between two pieces of an experience, also how many."""
        return self.method.state_dict() | ({"pieces": self._pieces} if self._pieces else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; unchanged if it is refused (`StateError`)."""
        pieces = state.get("pieces", 0) if isinstance(state, dict) else 0
        if isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 0:
            raise StateError(f"the state's 'pieces' is {pieces!r:.80}, expected a number of pieces: it is damaged")
        self.method.load_state_dict(
            {key: value for key, value in state.items() if key != "pieces"} if pieces else state
        )
        self._pieces = pieces

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start the method on the adapted model and the refreshed optimizer."""
        needed = self.method.required_samples()
        size = len(whole_experience(strategy.experience).dataset)
        if needed is not None and size < needed:
            argument = self.method.samples_argument
            raise DataError(
                f"experience {strategy.experience.current_experience} has {size} samples and {argument}={needed} are "
                f"to be drawn from it: give {argument}<={size}"
            )
        self._start(strategy, size)

    def _start(self, strategy: Any, size: int) -> None:
        """Start the method on an experience of `size` samples."""
        self.method.start(strategy.model, strategy.optimizer, heads=task_heads(strategy.model))

    @contextmanager
    def _inside(self) -> Iterator[None]:
        try:
            with self.method.active():
                yield
        except BaseException:
            self.method.abandon()
            raise

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Arrange for the coming epoch to run inside the method's context."""
        run_inside(strategy, self._inside)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Finish, and learn from the experience what later ones must respect."""
        restore_epoch(strategy)
        self.method.finish()
        experience = strategy.experience
        if _is_piece(experience):
            # The stream's own mark of the last piece is missing where the pieces divide the experience evenly.
            self._pieces = 1 if experience.is_first_subexp else self._pieces + 1
            if not (experience.is_last_subexp or self._pieces == experience.sub_stream_length):
                return
            self._pieces = 0
        dataset = whole_experience(experience).dataset.eval()
        with own_forward(strategy) as forward:
            self.method.consolidate(strategy.model, self._batches(dataset, strategy), forward=forward)

    def _batches(self, dataset: Any, strategy: Any) -> Iterator[list[Any]]:
        """Yield the samples that the method draws, collated, on the device."""
        chosen, size = self.method.draw(len(dataset)).tolist(), self.record_batch_size
        return mini_batches(strategy, dataset, (chosen[i : i + size] for i in range(0, len(chosen), size)))


class GradientTransformPlugin(MethodPlugin):
    """Runs a `GradientTransform`: gradients change in `after_backward`, steps in `after_update`.

    Args:
        method: the core.
        record_batch_size: samples in a mini-batch of the pass over the data after an experience.

    Raises:
        ConfigurationError: if `record_batch_size` is no positive integer.
    """

    method: GradientTransform

    def __init__(self, method: GradientTransform, *, record_batch_size: int = 128) -> None:
        super().__init__(method, record_batch_size=record_batch_size)
        self._trusted = True

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start the method on the adapted model and the refreshed optimizer."""
        super().before_training_exp(strategy, *args, **kwargs)
        self._trusted = not acts_before(self, strategy.plugins, "after_backward")

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Arrange for the coming epoch to run inside the method's context."""
        super().before_training_epoch(strategy, *args, **kwargs)
        self.method.listen(False)

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Attend to the forward pass of the training step, and to no other plugin's."""
        self.method.listen(True)

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Attend no more: the way back is laid."""
        self.method.listen(False)

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Transform the gradients."""
        self.method.transform(trusted=self._trusted)

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Transform the step."""
        self.method.after_step()


@contextmanager
def own_forward(strategy: Any) -> Iterator[Forward]:
    """Give what runs a model on a batch as the strategy would: it may know more than the model's inputs."""
    held = strategy.mbatch

    def forward(model: nn.Module, batch: Any) -> Any:
        strategy.mbatch = batch
        return strategy.forward()

    try:
        yield forward
    finally:
        strategy.mbatch = held


def _is_piece(experience: Any) -> bool:
    """Whether an experience is a piece of a larger one whose boundaries may be known."""
    return isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries


def whole_experience(experience: Any) -> Any:
    """Return the experience that an online piece was cut from, or the experience itself."""
    return experience.origin_experience if _is_piece(experience) else experience


def acts(plugin: Any, callback: str) -> bool:
    """Whether a plugin has a callback of its own, such as `"after_backward"`, by its class or by itself."""
    idle = getattr(BaseSGDPlugin, callback)
    return callback in getattr(plugin, "__dict__", {}) or getattr(type(plugin), callback, idle) is not idle


def acts_before(plugin: Any, plugins: Iterable[Any], callback: str) -> bool:
    """Whether a plugin that comes earlier in the list has that callback too."""
    return any(acts(other, callback) for other in takewhile(lambda other: other is not plugin, plugins))


def run_inside(strategy: Any, context: Callable[[], Any]) -> None:
    """Run the strategy's next `training_epoch` inside a context, exception or not.

    The replaced attribute lasts until that call begins; several plugins' contexts nest.

    Args:
        strategy: any Avalanche strategy with a method `training_epoch`.
        context: makes the context manager.
    """
    held = strategy.__dict__.get("training_epoch")
    epoch = strategy.training_epoch

    def run(**kwargs: Any) -> Any:
        if held is None:
            restore_epoch(strategy)
        else:
            strategy.training_epoch = held
        with context():
            return epoch(**kwargs)

    run.wraps_epoch = True  # type: ignore[attr-defined]
    strategy.training_epoch = run


def wraps_epoch(call: Any) -> bool:
    """Whether an epoch is one that `run_inside` runs in a context."""
    return getattr(call, "wraps_epoch", False)


def restore_epoch(strategy: Any) -> None:
    """Take back what `run_inside` left where the epoch never ran (early stopping)."""
    if wraps_epoch(strategy.__dict__.get("training_epoch")):
        del strategy.__dict__["training_epoch"]
