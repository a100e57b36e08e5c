"""Methods that give each task parameters of its own."""

from __future__ import annotations

from typing import Any

from benchmarks.method_records.common import Method
from benchmarks.method_settings import HalrpSettings
from benchmarks.record import Protocol


def _halrp(settings: HalrpSettings, seed: int) -> list[Any]:
    """This package's HALRP."""
    from avalanche_gradproj import HALRPPlugin

    return [
        HALRPPlugin(
            warmup_epochs=settings.warmup_epochs,
            approximation_rate=settings.approximation_rate,
            max_rank=settings.max_rank,
            l1=settings.l1,
            weight_decay=settings.weight_decay,
            max_growth=settings.max_growth,
            prune_threshold=settings.prune_threshold,
            prune=settings.prune,
            importance=settings.importance,
            # After each experience every test experience is evaluated, also those whose task is still to come.
            unseen="base",
            seed=seed,
        )
    ]


def _unsuited_halrp(settings: HalrpSettings, protocol: Protocol) -> str | None:
    if not protocol.task_labels:
        return "one output layer is shared by all experiences and there are no task labels, which halrp needs"
    if settings.importance == "valid" and not protocol.valid_share:
        return "importance=valid: there are no validation samples; expected importance=train"
    left = protocol.epochs - settings.warmup_epochs
    if left < 1:
        return (
            f"warmup_epochs={settings.warmup_epochs}: they count among the {protocol.epochs} epochs of an experience; "
            f"expected fewer than epochs={protocol.epochs}"
        )
    return None


LOWRANK = (
    Method(
        "halrp",
        "Hessian-aware low-rank perturbation (needs task labels)",
        HalrpSettings,
        _halrp,
        unsuited=_unsuited_halrp,
        own_epochs=lambda settings: settings.warmup_epochs,
    ),
)
