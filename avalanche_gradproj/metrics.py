"""What the methods do, as Avalanche plugin metrics: every Avalanche logger shows them.

    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), *projection_metrics(), loggers=[...])

All act once after each experience, and read what the strategy's plugins of this package hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue

from avalanche_gradproj.plugins.base import MethodPlugin

#: Layer name -> value, read from a method after an experience; empty where the method does not have it.
Reading = Callable[[Any], Mapping[str, float]]


def _cores(strategy: Any) -> list[Any]:
    return [plugin.method for plugin in strategy.plugins if isinstance(plugin, MethodPlugin)]


class LayerMetric(PluginMetric[dict[str, float]]):
    """One number a layer after each experience.

    Args:
        name: the metric's name in the logs.
        reading: takes the numbers from the method.
        monitor: whether the method must sum up the removed share of the gradients, at the cost of one more product
            a layer and step.
    """

    def __init__(self, name: str, reading: Reading, *, monitor: bool = False) -> None:
        super().__init__()
        self._name = name
        self._reading = reading
        self._monitor = monitor
        self._values: dict[str, float] = {}

    def before_training(self, strategy: Any) -> None:
        """Ask the method to sum up what the metric needs."""
        if self._monitor:
            for core in _cores(strategy):
                core.monitor = True

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        """Emit `<name>/<phase>/<stream>/<experience>/<layer>` for every layer.

        The evaluator comes after the plugins, so that the basis of this experience is already there.
        """
        self._values = {}
        for core in _cores(strategy):
            self._values.update(self._reading(core))
        stream = strategy.experience.origin_stream.name
        prefix = f"{self._name}/train_phase/{stream}_stream/Exp{strategy.experience.current_experience:03d}"
        step = strategy.clock.train_iterations
        return [MetricValue(self, f"{prefix}/{layer}", value, step) for layer, value in self._values.items()]

    def result(self) -> dict[str, float]:
        """Return the last values, by layer."""
        return dict(self._values)

    def reset(self) -> None:
        """Forget the last values."""
        self._values = {}

    def __str__(self) -> str:
        return self._name


def _ranks(core: Any) -> dict[str, float]:
    bases = getattr(core, "bases", {})
    return {name: float(sum(block.shape[1] for block in blocks)) for name, blocks in bases.items()}


def _attribute(name: str) -> Reading:
    def reading(core: Any) -> Mapping[str, float]:
        return getattr(core, name, {})

    return reading


def _bytes(core: Any) -> dict[str, float]:
    by_experience = {f"of_Exp{i:03d}": float(n) for i, n in enumerate(getattr(core, "bytes_by_experience", ()))}
    return {"all": float(core.bytes_held), **by_experience}


def rank_metrics() -> LayerMetric:
    """Rank of each layer's basis, summed over its blocks."""
    return LayerMetric("Rank", _ranks)


def free_share_metrics() -> LayerMetric:
    """Share of each layer's input dimensions that is still free, between 0 and 1."""
    return LayerMetric("FreeShare", _attribute("free_shares"))


def removed_share_metrics() -> LayerMetric:
    """Share of each layer's squared gradient norm that lay in its basis over the experience, between 0 and 1.

    It is what projecting gradients removes; where steps are projected (Adam, say) it says the same of the gradients.
    """
    return LayerMetric("RemovedShare", _attribute("removed_share"), monitor=True)


def leak_metrics() -> LayerMetric:
    """Share of each layer's change over the experience that lies in its basis: 0 but for rounding."""
    return LayerMetric("Leak", _attribute("leak"))


def stray_metrics() -> LayerMetric:
    """The leak before it was taken back at the end: more than rounding means that something undid the projection."""
    return LayerMetric("Stray", _attribute("stray"))


def growth_metrics() -> list[LayerMetric]:
    """Numbers that tasks have added over those of the model as it was given, in all and by each; ranks of the last."""

    def growth(core: Any) -> Mapping[str, float]:
        ledger = getattr(core, "ledger", None)
        if ledger is None:
            return {}
        by_task = {f"of_Task{label:03d}": one.numbers / ledger.base for label, one in ledger.records.items()}
        return {"all": ledger.growth, **by_task}

    return [LayerMetric("Growth", growth), LayerMetric("PerturbationRank", _attribute("ranks"))]


def memory_metrics() -> LayerMetric:
    """Bytes that the method holds between experiences; of penalties also what each experience added."""
    return LayerMetric("BytesHeld", _bytes)


def projection_metrics() -> list[LayerMetric]:
    """Return all metrics of projection methods."""
    return [
        rank_metrics(),
        free_share_metrics(),
        removed_share_metrics(),
        leak_metrics(),
        stray_metrics(),
        memory_metrics(),
    ]
