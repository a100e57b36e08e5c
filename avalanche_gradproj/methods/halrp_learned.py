"""What HALRP has learned: which tasks, what each added, and which of them a model computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.layers.task_plan import TaskPlan
from avalanche_gradproj.layers.tasks import Selection
from avalanche_gradproj.methods.base import TaskWeights
from avalanche_gradproj.methods.halrp_budget import Ledger
from avalanche_gradproj.methods.halrp_report import task_report
from avalanche_gradproj.methods.halrp_tasks import TaskTraining
from avalanche_gradproj.methods.report import Report


class PerturbedTasks(TaskWeights):
    """The part of HALRP that lasts from one experience to the next; the tensors are the model's.

    Attributes:
        ledger: what each task added.
    """

    name = "HALRP"

    def __init__(self) -> None:
        self.ledger = Ledger(1, {})
        self._plan: TaskPlan | None = None
        self._selection: Selection | None = None
        self._loaded: list[int] | None = None  # tasks of a state that no model was seen for yet
        self._heads: dict[int, list[str]] = {}
        self._report: Report | None = None

    @property
    def tasks(self) -> list[int]:
        """Labels of the tasks that were learned or are in training, in the order of learning."""
        if self._loaded is not None:
            return list(self._loaded)
        return [] if self._selection is None else list(self._selection.tasks)

    @property
    def growth(self) -> float:
        """Numbers that later tasks have added, over those of the model as it was given."""
        return self.ledger.growth

    @property
    def ranks(self) -> dict[str, float]:
        """Rank of each layer for the task that was learned last, as chosen before pruning."""
        last = next(reversed(self.ledger.records.values()), None)
        return {} if last is None else {name: float(rank) for name, rank in last.ranks.items()}

    @property
    def bytes_held(self) -> int:
        """Bytes that all later tasks added to the model."""
        return sum(self.bytes_by_experience)

    @property
    def bytes_by_experience(self) -> list[int]:
        """Bytes that each later task added to the model, as they are stored."""
        return [record.stored_bytes for record in self.ledger.records.values()]

    def select(self, experience: int) -> None:
        """Let the model compute with a task's parameters.

        Args:
            experience: the task's label.

        Raises:
            StateError: if it was never learned, or no model is known yet.
        """
        if self._selection is None or experience not in self._selection.tasks:
            raise StateError(f"task {experience!r} was never learned: {known(self.tasks)}")
        self._selection.choose(experience)

    def report(self) -> Report:
        """Return what is done with every parameter, and below it what each task added.

        Raises:
            StateError: before the first experience began.
        """
        if self._report is None:
            raise StateError("there is no report before the first experience began: train first")
        return self._report

    def _describe(self, training: TaskTraining) -> None:
        if self._plan is not None:
            tasks = training.selection.tasks
            self._report = task_report(training.model, self._plan, training.layers, self._heads, tasks, self.ledger)

    def _check(self, selection: Selection) -> None:
        """Refuse a model whose tasks are not those that were learned here."""
        expected = self.tasks
        if selection.tasks != expected:
            raise StateError(
                f"the model holds parameters of tasks {selection.tasks} and this HALRP learned {expected}: load the "
                "state of both, the model's as wrapped (`wrap`)"
            )

    def _state(self) -> dict[str, Any]:
        plan = None if self._plan is None else asdict(self._plan)
        return {"plan": plan, "tasks": self.tasks, "ledger": self.ledger.state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        ledger = Ledger.of_state(state.get("ledger"))
        try:
            plan = None if state["plan"] is None else TaskPlan(**state["plan"])
            tasks = [int(task) for task in state["tasks"]]
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state of {self.name} is damaged ({error!r}): save it again") from error
        self._plan, self.ledger, self._loaded, self._selection = plan, ledger, tasks, None
        self._report = None
        self.abandon()


def known(tasks: Sequence[int]) -> str:
    """Say which tasks were learned, for messages."""
    return f"learned are {', '.join(map(str, tasks))}" if tasks else "none was yet"
