"""What HALRP has to know of a stream: which task an experience is of, how many are to come, its mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from avalanche_gradproj.errors import ConfigurationError, DataError
from avalanche_gradproj.plugins.base import whole_experience
from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin


def task_of(experience: Any) -> int:
    """Return the task label of an experience.

    Raises:
        DataError: if it has none or several, or if all experiences of its stream have the same.
    """
    labels = _labels(experience)
    where = f"experience {experience.current_experience}"
    if labels is None or len(labels) != 1:
        raise DataError(
            f"{where} has task labels {sorted(labels or ())}: every experience has to have one, for all its samples (a "
            "task-incremental stream; see with_task_labels and the option return_task_id of Avalanche's benchmarks)"
        )
    stream = _stream_labels(experience)
    if stream is not None and len(stream) > 1 and len({label for own in stream for label in own}) == 1:
        raise DataError(
            f"all {len(stream)} experiences of the stream have task label {next(iter(labels))}: there is no task to "
            "tell apart; give every experience a label of its own (return_task_id=True of Avalanche's benchmarks)"
        )
    return next(iter(labels))


def to_come(experience: Any, learned: Sequence[int], task: int) -> int | None:
    """Return how many labels of the stream are still to be learned, the experience's included; None if unknown."""
    stream = _stream_labels(experience)
    if stream is None:
        return None
    rest = stream[whole_experience(experience).current_experience :]
    return len({label for own in rest for label in own} - set(learned) | {task})


def _labels(experience: Any) -> set[int] | None:
    labels = getattr(experience, "task_labels", None)
    return None if labels is None else {int(label) for label in labels}


def _stream_labels(experience: Any) -> list[set[int]] | None:
    """Return the labels of each experience of a stream, None where they cannot be known."""
    stream = getattr(whole_experience(experience), "origin_stream", None)
    if not isinstance(stream, Sequence):
        return None
    labels = [_labels(own) for own in stream]
    return None if any(own is None for own in labels) else [own for own in labels if own is not None]


def companion(experience: Any, stream: str | Sequence[Any]) -> Any:
    """Return the experience at the same place of another stream.

    Args:
        experience: one of the training stream.
        stream: the other stream, or its name where the experience knows its benchmark.

    Raises:
        ConfigurationError: if there is no such stream, or it is shorter.
    """
    experience = whole_experience(experience)
    position = experience.current_experience
    if isinstance(stream, str):
        benchmark = getattr(experience.origin_stream, "benchmark", None)
        streams = getattr(benchmark, "streams", {})
        if stream not in streams:
            has = f"has the streams {', '.join(map(repr, streams))}" if streams else "is not known to its experiences"
            raise ConfigurationError(
                f"importance={stream!r}: there is no such stream, the benchmark {has}: give 'train' or the stream "
                "itself (importance=benchmark.valid_stream)"
            )
        stream = streams[stream]
    if len(stream) <= position:
        raise ConfigurationError(
            f"importance: the stream has {len(stream)} experiences, and number {position} is asked for: give one that "
            "runs beside the training stream"
        )
    return stream[position]


def training_batches(strategy: Any, kwargs: dict[str, Any]) -> Iterable[Any]:
    """Return the mini-batches on which the strategy is about to train: from memory if it has `InMemoryDataPlugin`."""
    strategy.make_train_dataloader(**kwargs)
    for plugin in strategy.plugins:
        if isinstance(plugin, InMemoryDataPlugin):
            plugin.before_training_exp(strategy)
    loader: Iterable[Any] = strategy.dataloader
    return loader


def single_task(loader: Any) -> int | None:
    """Return the one task of all samples of a loader, None where there are several or it is not known."""
    parts = getattr(loader, "datasets", None) or [getattr(loader, "dataset", None)]
    found = {
        label for part in parts for label in getattr(getattr(part, "targets_task_labels", None), "uniques", (None,))
    }
    return next(iter(found)) if len(found) == 1 else None


@contextmanager
def as_strategy(
    strategy: Any, before: Callable[[], None]
) -> Iterator[tuple[Callable[[nn.Module, Any], Any], Callable[[Any, Any], Tensor]]]:
    """Give what runs the model on a mini-batch, and its loss, as the strategy's training steps do.

    Args:
        strategy: its mini-batch and output are given back at the end.
        before: called before each forward pass.
    """
    held = strategy.mbatch, strategy.mb_output

    def forward(model: nn.Module, batch: Any) -> Any:
        strategy.mbatch = batch
        strategy._unpack_minibatch()
        before()
        return strategy.forward()

    def criterion(output: Any, batch: Any) -> Tensor:
        strategy.mb_output = output
        loss: Tensor = strategy.criterion()
        return loss

    try:
        yield forward, criterion
    finally:
        strategy.mbatch, strategy.mb_output = held
