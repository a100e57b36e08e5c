"""Samples of each old experience, kept: the episodic memory of methods that look back at old data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from avalanche_gradproj.errors import ConfigurationError, DataError, NonFiniteError, StateError, choice
from avalanche_gradproj.methods.arguments import kinds

SELECTIONS = ("random", "last")


class EpisodicMemory:
    """Inputs, targets and task labels of the same number of samples of each old experience.

    Memory: `bytes_held`. Where all experiences have inputs of one shape they lie in one tensor, so that all samples
    together cost no copy.

    Args:
        size: samples an experience; 0 keeps nothing.
        selection: `"random"`, or `"last"`: the last ones seen in training (`observe`).
        device: where the samples lie; None for the device on which they come.
        seed: of the generator that draws samples, together with the number of experiences seen.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.
    """

    def __init__(
        self, size: int, *, selection: str = "random", device: torch.device | str | None = None, seed: int = 0
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ConfigurationError(f"patterns_per_exp={size!r}: give a number of samples, 0 for no memory")
        choice("selection", selection, SELECTIONS)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigurationError(f"seed={seed!r}: give an integer")
        try:
            self.device = None if device is None else torch.empty(0, device=device).device
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ConfigurationError(
                f"memory_device={device!r}: give a device that this machine has, 'cpu' or 'cuda' ({error})"
            ) from error
        self.size, self.selection, self.seed = size, selection, seed
        #: Experiences seen, also by a memory that keeps nothing.
        self.experiences = 0
        self._samples: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._seen: deque[tuple[Tensor, ...]] = deque()
        self._joined: tuple[Tensor, Tensor, Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, experience: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs, targets and task labels (None without) of an old experience, where the memory lies."""
        return self._samples[experience]

    @property
    def joined(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The samples of all experiences in order, None where their shapes or types differ."""
        return self._joined

    @property
    def bytes_held(self) -> int:
        """Bytes of all samples, and of the mini-batches seen last."""
        parts = (part for sample in (*self._samples, *self._seen) for part in sample if part is not None)
        return sum(part.numel() * part.element_size() for part in parts)

    def observe(self, batch: Any) -> None:
        """Take note of a mini-batch of training, before the model sees it.

        With `"last"` copies of the most recent ones are held until `add`; otherwise it is only looked at, so that what
        could not be kept is refused before the first step.

        Args:
            batch: (inputs, targets) or (inputs, targets, ..., task labels).

        Raises:
            DataError: for elements that are no tensors, or of different lengths.
        """
        if self.size == 0:
            return
        parts = _tensors(batch)
        if self.selection != "last":
            return
        self._seen.append(tuple(part.clone() for part in parts))
        while self._count_seen() - len(self._seen[0][0]) >= self.size:
            self._seen.popleft()

    def forget(self) -> None:
        """Let go of the mini-batches seen: at the beginning of an experience, where the last one was broken off."""
        self._seen.clear()

    def _count_seen(self) -> int:
        return sum(len(part[0]) for part in self._seen)

    def draw(self, size: int) -> Tensor:
        """Return the indices of the samples to give to `add`, of an experience of `size`.

        With `"last"` those are the last of the experience, as many as were not seen in training.

        Raises:
            DataError: if there are fewer than are to be kept.
        """
        if size < self.size:
            raise DataError(
                f"the experience has {size} samples and patterns_per_exp={self.size} are to be kept: give "
                f"patterns_per_exp<={size}"
            )
        if self.selection == "last":
            return torch.arange(size - max(0, self.size - self._count_seen()), size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.experiences)
        return torch.randperm(size, generator=generator)[: self.size]

    def add(self, batches: Iterable[Any]) -> None:
        """Keep samples of an experience just learned: those seen last, if any are held, and the first that come.

        Args:
            batches: (inputs, targets) or (inputs, targets, ..., task labels) tensors each, with those seen last in all
                at least as many samples as are kept; no more are looked at than needed.

        Raises:
            DataError: for elements that are no tensors, or too few samples; nothing changes then.
            NonFiniteError: if an input holds an infinity or a NaN; nothing changes then.
        """
        if self.size:
            self._keep([*self._samples, self._gather(batches)])
        self._seen.clear()
        self.experiences += 1

    def _gather(self, batches: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        held = self._count_seen()
        parts, wanted = list(self._seen), max(0, self.size - held)
        if held > self.size:
            parts[0] = tuple(part[held - self.size :] for part in parts[0])
        rest = iter(batches)
        while wanted > 0 and (batch := next(rest, None)) is not None:
            parts.append(_tensors(batch))
            wanted -= len(parts[-1][0])
        seen = sum(len(part[0]) for part in parts)
        if seen < self.size:
            raise DataError(f"{seen} samples came and patterns_per_exp={self.size} are to be kept: give more data")
        kinds = {tuple((tuple(element.shape[1:]), element.dtype) for element in part) for part in parts}
        if len(kinds) > 1:
            shapes = ", ".join(str([list(shape) for shape, _ in kind]) for kind in sorted(kinds, key=str))
            raise DataError(
                f"the mini-batches of experience {self.experiences} have samples of different kinds ({shapes}): they "
                "must be of one shape and type to be kept"
            )
        columns = [torch.cat(column)[: self.size].detach().clone() for column in zip(*parts, strict=True)]
        if columns[0].is_floating_point() and not bool(torch.isfinite(columns[0]).all()):
            raise NonFiniteError(
                f"the samples to be kept of experience {self.experiences} hold an infinity or a NaN: clean the data"
            )
        if self.device is not None:
            columns = [column.to(self.device) for column in columns]
        return columns[0], columns[1], columns[2] if len(columns) > 2 else None

    def _keep(self, samples: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Lay all samples into one tensor a column where that is possible; `self[k]` are its parts."""
        self._samples, self._joined = samples, None
        kinds = {tuple(_kind(part) for part in sample) for sample in samples}
        if len(kinds) != 1:
            return
        inputs, targets, labels = (list(column) for column in zip(*samples, strict=True))
        joined = torch.cat(inputs), torch.cat(targets), torch.cat(labels) if labels[0] is not None else None
        split = [[None] * len(samples) if part is None else part.split(self.size) for part in joined]
        self._joined = joined
        self._samples = list(zip(*split, strict=True))

    def state(self) -> dict[str, Any]:
        """Return everything as tensors and numbers, on the host."""
        samples = [[None if part is None else part.detach().cpu().clone() for part in own] for own in self._samples]
        seen = [[part.cpu().clone() for part in own] for own in self._seen]
        return {"experiences": self.experiences, "patterns_per_exp": self.size, "samples": samples, "seen": seen}

    def place(self, device: torch.device) -> None:
        """Move all samples to a device, unless the memory was given one of its own."""
        if self.device is None and any(sample[0].device != device for sample in self._samples):
            self._keep([(x.to(device), y.to(device), _to(t, device)) for x, y, t in self._samples])

    def load(self, state: Any) -> None:
        """Take a state, its samples to the memory's device.

        Raises:
            StateError: if it is no such state, or of another number of samples or other shapes; nothing changes then.
        """
        kinds(state, experiences=int, patterns_per_exp=int, samples=list)
        if state["patterns_per_exp"] != self.size:
            raise StateError(
                f"the state keeps patterns_per_exp={state['patterns_per_exp']}, this method {self.size}: make it with "
                "the number of the state"
            )
        loaded: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for index, sample in enumerate(state["samples"]):
            whole = isinstance(sample, list | tuple) and len(sample) == 3
            own = [] if not whole else list(sample[:2]) + ([] if sample[2] is None else [sample[2]])
            if not whole or any(not isinstance(part, Tensor) or len(part) != self.size for part in own):
                raise StateError(
                    f"the state's samples of experience {index} are damaged: expected inputs, targets and task labels "
                    f"of {self.size} samples"
                )
            if sample[0].is_floating_point() and not bool(torch.isfinite(sample[0]).all()):
                raise StateError(f"the state's inputs of experience {index} hold an infinity or a NaN: it is damaged")
            if self._joined is not None and sample[0].shape != self._samples[0][0].shape:
                raise StateError(
                    f"the state's inputs of experience {index} have shape {tuple(sample[0].shape)}, those here "
                    f"{tuple(self._samples[0][0].shape)}: the state is of other data"
                )
            inputs, targets = (part.to(self.device, copy=True) for part in sample[:2])
            labels = None if sample[2] is None else sample[2].to(self.device, copy=True)
            loaded.append((inputs, targets, labels))
        if self.size and len(state["samples"]) != state["experiences"]:
            raise StateError(
                f"the state has learned {state['experiences']} experiences and holds samples of "
                f"{len(state['samples'])}: there is no memory for an old experience"
            )
        seen = state.get("seen", [])
        whole = isinstance(seen, list) and all(isinstance(part, list | tuple) and len(part) >= 2 for part in seen)
        if not whole or not all(isinstance(element, Tensor) for part in seen for element in part):
            raise StateError("the state's 'seen' is damaged: expected mini-batches of tensors")
        self._keep(loaded)
        self._seen = deque(tuple(element.clone() for element in part) for part in seen)
        self.experiences = state["experiences"]


def _tensors(batch: Any) -> tuple[Tensor, ...]:
    """Return inputs, targets and, where there are any, task labels of a mini-batch."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise DataError(
            f"the memory needs batches (inputs, targets) or (inputs, targets, task labels), not {type(batch).__name__}"
        )
    part = (batch[0], batch[1]) if len(batch) == 2 else (batch[0], batch[1], batch[-1])
    if not all(isinstance(element, Tensor) for element in part):
        kinds = ", ".join(type(element).__name__ for element in part)
        raise DataError(f"the memory keeps tensors, the batch holds ({kinds}): collate them to tensors")
    if len({len(element) if element.dim() else 0 for element in part}) > 1:
        shapes = ", ".join(str(list(element.shape)) for element in part)
        raise DataError(f"inputs, targets and task labels of a batch have shapes {shapes}: expected one entry a sample")
    return tuple(element.detach() for element in part)


def _to(part: Tensor | None, device: torch.device) -> Tensor | None:
    return None if part is None else part.to(device)


def _kind(part: Tensor | None) -> Any:
    return None if part is None else (tuple(part.shape[1:]), part.dtype, part.device)
