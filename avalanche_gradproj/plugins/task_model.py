"""A model whose layers hold parameters for every task, called as Avalanche calls its multi-task models."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from torch import Tensor, nn

from avalanche_gradproj.errors import DataError, StateError

UNSEEN = ("raise", "base")


class TaskModel(MultiTaskModule):
    """Computes each sample with the parameters of its task; mini-batches may mix tasks.

    Its saved state loads into one that was made of a fresh model: tasks and heads that are missing there are made.

    Args:
        model: the user's model, its layers replaced; called with task labels if it is a multi-task model itself.
        selection: which task the layers compute with.
        unseen: what becomes of samples of a task that was never learned: `"raise"`, or `"base"` for the outputs of the
            first task's network.
    """

    def __init__(self, model: nn.Module, selection: Any, unseen: str = "raise") -> None:
        super().__init__()
        self.model = model
        self.selection = selection
        self.unseen = unseen
        self.known: tuple[Tensor, int] | None = None
        """Labels of a mini-batch that are known to be all of one task: they need not be looked at."""
        self.training_runs = False
        """Whether `strategy.train` runs: what it evaluates in between may be of tasks to come."""

    def adaptation(self, experience: Any) -> None:
        """Do nothing: heads inside are adapted by themselves, and nothing here grows with classes."""

    def forward(self, x: Tensor, task_labels: Tensor | int | None = None) -> Any:
        """Return each sample's outputs.

        Args:
            x: inputs [n, ...].
            task_labels: one for all, or [n]; None for the outputs of every learned task.

        Returns:
            Outputs [n, ...]; where tasks have heads of different widths, the narrower ones are followed by zeros. A
            dict from task to outputs for None.

        Raises:
            StateError: for a task that was never learned.
        """
        if task_labels is None:
            return self.forward_all_tasks(x)
        if isinstance(task_labels, int):
            return self.forward_single_task(x, task_labels)
        if self.known is not None and self.known[0] is task_labels:
            return self._outputs(x, self.known[1], task_labels)
        if len(x) == 0 or len(task_labels) != len(x):
            raise DataError(
                f"{len(x)} samples came with {len(task_labels)} task labels: give one a sample, one or more"
            )
        first = int(task_labels[0])
        mask = task_labels == first
        if bool(mask.all()):
            return self._outputs(x, first, task_labels)
        parts = []
        for task in task_labels.unique().tolist():
            rows = (task_labels == task).nonzero()[:, 0]
            parts.append((rows, self._outputs(x[rows], task, task_labels[rows])))
        width = max(part.shape[1] for _, part in parts)
        result = parts[0][1].new_zeros(len(x), width, *parts[0][1].shape[2:])
        for rows, part in parts:
            padded = part if part.shape[1] == width else nn.functional.pad(part, (0, width - part.shape[1]))
            result = result.index_copy(0, rows, padded)
        return result

    def forward_single_task(self, x: Tensor, task_label: int) -> Any:
        """Return the outputs of one task for all samples."""
        return self._outputs(x, task_label, None)

    def forward_all_tasks(self, x: Tensor) -> dict[int, Any]:
        """Return the outputs of every learned task for all samples, by label."""
        return {task: self.forward_single_task(x, task) for task in self.selection.tasks}

    def _outputs(self, x: Tensor, task: int, labels: Tensor | None) -> Any:
        tasks = self.selection.tasks
        if tasks and task not in tasks:
            if self.unseen == "raise" and not self.training_runs:
                raise StateError(
                    f"a sample has task label {task}, which was never learned: learned are {', '.join(map(str, tasks))}"
                    "; evaluate experiences of these alone, or give unseen='base'"
                )
            task, labels = tasks[0], None
        self.selection.choose(task)
        if not isinstance(self.model, MultiTaskModule):
            return self.model(x)
        # Avalanche's own forward takes one label for all, and does not have to look at them then.
        if type(self.model).forward is MultiTaskModule.forward:
            return self.model(x, task)
        output = self.model(x, torch.full((len(x),), task, device=x.device) if labels is None else labels)
        return self._own_width(output, task)

    def _own_width(self, output: Any, task: int) -> Any:
        """Take off the zeros by which Avalanche widens the output of a head to that of the widest: they could win."""
        heads = [module for module in self.model.modules() if isinstance(module, MultiHeadClassifier)]
        if len(heads) != 1 or not isinstance(output, Tensor) or output.dim() != 2:
            return output
        own = dict(heads[0].classifiers.items()).get(str(task))
        width = output.shape[1] if own is None else own.classifier.out_features
        return output[:, :width] if width < output.shape[1] == heads[0].max_class_label else output

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, module in self.named_modules():
            if isinstance(module, MultiHeadClassifier):
                _make_heads(module, state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _make_heads(heads: MultiHeadClassifier, state: dict[str, Any], prefix: str) -> None:
    """Make heads and masks of the sizes that a saved state has, grown ones too."""
    for key, value in state.items():
        task = key.removeprefix(f"{prefix}active_units_T")
        own = f"{prefix}classifiers.{task}."
        weight = state.get(f"{own}classifier.weight")
        if task == key or weight is None:
            continue
        heads.register_buffer(f"active_units_T{task}", torch.zeros_like(value))
        head = dict(heads.classifiers.items()).get(task)
        if head is None or head.classifier.weight.shape != weight.shape:
            head = type(heads.classifiers["0"])(heads.in_features, len(weight), masking=False, auto_adapt=False)
            heads.classifiers[task] = head.to(weight)
        if f"{own}active_units" in state:
            head.register_buffer("active_units", torch.zeros_like(state[f"{own}active_units"]))
        heads.max_class_label = max(heads.max_class_label, len(weight))


def head_names(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the heads that a model has for its tasks, by the task's label."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadClassifier):
            for task in module.classifiers:
                names.setdefault(int(task), []).append(f"{name}.classifiers.{task}".lstrip("."))
    return names
