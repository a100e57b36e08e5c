"""L2 anchor: weights are pulled to where earlier experiences left them, all alike."""

from contextlib import nullcontext
from typing import Any

import torch

from avalanche_gradproj.errors import StateError, numbers
from avalanche_gradproj.methods.base import Penalty
from avalanche_gradproj.methods.report import Report, ReportRow
from avalanche_gradproj.plugins.penalty import PenaltyPlugin


class L2Anchor(Penalty):
    """Adds `strength / 2 sum_t ||w - w_t||^2` to the loss, as T times the distance to the mean of w_1 .. w_T."""

    name = "l2_anchor"
    active = nullcontext  # training steps need no hooks
    finish = Penalty.abandon  # lets go of the model

    def __init__(self, strength: float) -> None:
        (self.strength,) = numbers("strength", strength, float, "a number from 0", lambda s: 0 <= s < 1e30, one=True)
        self._anchors: dict[str, tuple[int, torch.Tensor]] = {}  # parameter: T and the mean
        self._training: dict[str, torch.Tensor] | None = None
        self._report = Report(())

    def start(self, model: Any, optimizer: Any = None, *, heads: Any = (), samples: Any = None) -> None:
        weights = self._training = dict(model.named_parameters())
        for name, (_, mean) in self._anchors.items():
            if name in weights and mean.shape != weights[name].shape:
                raise StateError(f"{name!r} has shape {tuple(weights[name].shape)}, its anchor {tuple(mean.shape)}")
        self._report = Report(tuple(ReportRow(name, tuple(w.shape), "penalised") for name, w in weights.items()))

    @property
    def penalising(self) -> bool:
        return bool(self._anchors) and self.strength > 0

    def penalty(self) -> torch.Tensor:
        known = [(w, *self._anchors[name]) for name, w in self._training.items() if name in self._anchors]
        return self.strength / 2 * sum(count * (w - mean.to(w)).square().sum() for w, count, mean in known)

    def consolidate(self, model: Any, batches: Any, *, forward: Any = None) -> None:
        for name, weight in model.named_parameters():
            count, mean = self._anchors.get(name, (0, torch.zeros_like(weight)))
            self._anchors[name] = count + 1, torch.lerp(mean.to(weight), weight.detach(), 1 / (count + 1))

    def report(self) -> Report:
        return self._report

    def _state(self) -> dict[str, Any]:
        return {"anchors": dict(self._anchors)}

    def _load_state(self, state: dict[str, Any]) -> None:
        self._anchors = dict(state["anchors"])


def l2_anchor(strength: float = 0.003) -> PenaltyPlugin:
    """Weights are pulled to where earlier experiences left them."""
    return PenaltyPlugin(L2Anchor(strength))
