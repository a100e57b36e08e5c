"""Mean-gradient projection: later steps are orthogonal to the mean gradient of each earlier experience's loss."""

from typing import Any

import torch

from avalanche_gradproj.errors import NonFiniteError, numbers
from avalanche_gradproj.layers.record import undisturbed
from avalanche_gradproj.methods.base import GradientTransform
from avalanche_gradproj.methods.flat import FlatMemory, cover_flat
from avalanche_gradproj.methods.flat_training import FlatTraining
from avalanche_gradproj.methods.report import Report, ReportRow, statistics_notes
from avalanche_gradproj.plugins.base import GradientTransformPlugin


class MeanGradient(GradientTransform):
    """Holds earlier losses to first order: steps orthogonal to g_t, the mean gradient of experience t at its end."""

    name = "mean_gradient"

    def __init__(self, directions: int) -> None:
        (self.directions,) = numbers("directions", directions, int, "an integer from 0", lambda n: n >= 0, one=True)
        self._memory, self._training, self._report = FlatMemory(), None, Report(())  # the memory: orthonormal vectors

    def start(self, model: Any, optimizer: Any = None, *, heads: Any = ()) -> None:
        coverage, memory = cover_flat(model, heads=heads), self._memory
        memory.attach(coverage)  # refuses by name a model that the vectors are not of
        hold = memory.vectors.count > 0  # the vectors are of the network with the statistics that its BatchNorm had
        training = self._training = FlatTraining(model, optimizer, coverage.covered, memory, hold_statistics=hold)
        why = dict.fromkeys(training.resting, "the optimizer does not have it") | coverage.alone
        named = [(name, tuple(weight.shape), why.get(name, "")) for name, weight in coverage.parameters.items()]
        rows = [ReportRow(name, shape, "left alone" if alone else "projected", alone) for name, shape, alone in named]
        self._report = Report(tuple(rows), (*statistics_notes(model, held=self.directions > 0), *training.notes))

    def active(self) -> Any:
        return self._training.active()

    def transform(self, *, trusted: bool = True) -> None:
        self._training.transform()

    def after_step(self) -> None:
        self._training.after_step()

    def finish(self) -> None:
        self._training.finish()
        self._training = None

    def consolidate(self, model: Any, batches: Any, *, forward: Any = None) -> None:
        if self._memory.vectors.count >= self.directions:
            return
        weights = dict(model.named_parameters())
        total = {name: torch.zeros_like(weights[name], dtype=torch.float64) for name in self._memory.shapes}
        trained = {name: weights[name] for name in total if weights[name].requires_grad}
        with undisturbed(model), torch.enable_grad():  # the random numbers that `batches` draws are given back too
            for batch in batches:
                logits = model(batch[0]) if forward is None else forward(model, batch)
                loss = torch.nn.functional.cross_entropy(logits, batch[1], reduction="sum")
                found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
                total |= {name: total[name] + gradient for name, gradient in zip(trained, found, strict=True)}
        for name, gradient in total.items():
            if not gradient.isfinite().all():
                raise NonFiniteError(f"the mean gradient of {name!r} is not finite: lower the learning rate")
        self._memory.vectors.add(torch.cat([gradient.flatten() for gradient in total.values()])[None])

    @property
    def bytes_held(self) -> int:
        return self._memory.vectors.bytes_held

    def report(self) -> Report:
        return self._report

    def _state(self) -> dict[str, Any]:
        return {"memory": self._memory.state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        self._memory.load(state.get("memory"))


def mean_gradient(directions: int = 100) -> GradientTransformPlugin:
    """Later steps are orthogonal to the mean gradient of each earlier experience's loss."""
    return GradientTransformPlugin(MeanGradient(directions))
