"""A run's logs: Avalanche's CSV and TensorBoard files and, where asked for, Weights & Biases.

The figures come from the run (`curves.py`, `evaluate.py`), not from Avalanche's evaluation, which would go through all
test images one by one. They are written anew from what is known when a run goes on after an interruption: the files of
a resumed run are those of one that was never stopped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avalanche.logging import CSVLogger, TensorboardLogger

if TYPE_CHECKING:
    from benchmarks.trace import Trace


class RunLogs:
    """Writes what a run finds below its folder: `csv/`, `tensorboard/`, and `wandb/`.

    The names of the metrics are Avalanche's (`Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp000`), accuracies from 0
    to 1 as there.

    Args:
        folder: of the run; older logs in it are replaced.
        trace: what the run has found; read when something is added.
        task_labels: whether each experience has a task label of its own.
        wandb: settings of Weights & Biases (project, name, config), None to leave it out.
    """

    def __init__(
        self, folder: Path, trace: Trace, *, task_labels: bool, wandb: Mapping[str, Any] | None = None
    ) -> None:
        for name in ("csv", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        self._trace = trace
        self._task_labels = task_labels
        self._csv = CSVLogger(str(folder / "csv"))
        self._board = TensorboardLogger(str(folder / "tensorboard"))
        self._wandb: Any = None if wandb is None else _start_wandb(wandb, folder)
        self._epochs = 0

    def add(self, position: int) -> None:
        """Write what one training gave.

        Args:
            position: its place in the trace.
        """
        self._trained(position, self._trace.experiences[position]["epochs"])
        self._evaluated(position, self._trace.matrix, self._trace.losses)

    def _trained(self, experience: int, epochs: list[list[float]]) -> None:
        """Write the curves of one training."""
        for epoch, (loss, accuracy) in enumerate(epochs):
            self._csv.print_train_metrics(experience, epoch, accuracy / 100, 0, loss, 0)
            task = f"Task{experience if self._task_labels else 0:03d}"
            self._write(f"Top1_Acc_Epoch/train_phase/train_stream/{task}", accuracy / 100, self._epochs)
            self._write(f"Loss_Epoch/train_phase/train_stream/{task}", loss, self._epochs)
            self._epochs += 1

    def _evaluated(self, after: int, matrix: list[list[float]], losses: list[list[float]]) -> None:
        """Write what the network does on every test experience."""
        for position, (accuracy, loss) in enumerate(zip(matrix[after], losses[after], strict=True)):
            learned = after > position < len(matrix)
            forgetting = (matrix[position][position] - accuracy) / 100 if learned else 0.0
            self._csv.print_eval_metrics(position, after, accuracy / 100, loss, forgetting)
            where = f"eval_phase/test_stream/Task{position if self._task_labels else 0:03d}/Exp{position:03d}"
            self._write(f"Top1_Acc_Exp/{where}", accuracy / 100, after)
            self._write(f"Loss_Exp/{where}", loss, after)
            if learned:
                self._write(f"ExperienceForgetting/{where}", forgetting, after)
        mean = sum(matrix[after]) / len(matrix[after]) / 100
        self._write("Top1_Acc_Stream/eval_phase/test_stream", mean, after)

    def close(self) -> None:
        """Finish the files."""
        self._csv.close()
        self._board.writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, name: str, value: float, step: int) -> None:
        self._board.log_single_metric(name, float(value), step)
        if self._wandb is not None:
            # Its steps have to grow: the epochs trained so far count for all figures.
            self._wandb.log({name: float(value)}, step=self._epochs)


def _start_wandb(settings: Mapping[str, Any], folder: Path) -> Any:
    """Start a run of Weights & Biases, or go on with it.

    Not through Avalanche's logger, which asks newer versions of wandb for a module that they no longer have.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")  # its banner would break the progress display
    return wandb.init(
        project=settings["project"],
        name=settings["name"],
        config=dict(settings["config"]),
        id=settings["id"],
        resume="allow",
        dir=str(folder),
        reinit="finish_previous",
    )
