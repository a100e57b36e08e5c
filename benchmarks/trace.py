"""What a run knows while it goes on, and where it keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Version of the results' format; older ones are never mixed with newer ones.
FORMAT = 2


@dataclass
class Trace:
    """What a run has found so far.

    Attributes:
        initial: accuracies before any training, percent.
        matrix: a row of accuracies after each training, percent.
        losses: likewise the mean cross-entropy.
        experiences: what else is known of each training.
        added: parameters that the network has gained.
        wall_seconds: of all sessions.
        sessions: how often the run was started.
        nondeterministic: operations that PyTorch has no deterministic version of on this device.
        peak: memory of the sessions before this one, in mebibytes.
    """

    initial: list[float] = field(default_factory=list)
    matrix: list[list[float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    experiences: list[dict[str, Any]] = field(default_factory=list)
    added: int = 0
    wall_seconds: float = 0.0
    sessions: int = 0
    nondeterministic: list[str] = field(default_factory=list)
    peak: float | None = None


@dataclass(frozen=True)
class Session:
    """Where a run keeps what it finds, so that it can be stopped and go on.

    Attributes:
        folder: of this run alone.
        key: of the run; a checkpoint with another one is not used.
        wandb: settings of Weights & Biases (`logs.RunLogs`), None to leave it out.
    """

    folder: Path
    key: str
    wandb: Mapping[str, Any] | None = None

    @property
    def checkpoint(self) -> Path:
        """The file that a stopped run goes on from."""
        return self.folder / "checkpoint.pt"
