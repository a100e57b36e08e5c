"""Methods that change gradients or steps."""

from __future__ import annotations

from typing import Any

from benchmarks.method_records.common import Method
from benchmarks.method_settings import GpmSettings, LogdSettings, OgdSettings


def _gpm(settings: GpmSettings, seed: int) -> list[Any]:
    """This package's GPM."""
    from avalanche_gradproj import GPMPlugin

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return [
        GPMPlugin(
            plain(settings.threshold),
            settings.threshold_step,
            None if settings.n_samples == "all" else plain(settings.n_samples),
            rank_rule=settings.rank_rule,
            apply_to=settings.apply_to,
            uncovered=settings.uncovered,
            batchnorm=settings.batchnorm,
            include=plain(settings.include),
            exclude=plain(settings.exclude),
            route=settings.route,
            seed=seed,
        )
    ]


def _ogd(settings: OgdSettings, seed: int) -> list[Any]:
    """This package's OGD."""
    from avalanche_gradproj import OGDPlugin

    max_bytes = settings.ogd_max_mb * 10**6 or None
    return [OGDPlugin(settings.n_gradients, target=settings.target, max_bytes=max_bytes, seed=seed)]


def _logd(settings: LogdSettings, seed: int) -> list[Any]:
    """This package's LOGD."""
    from avalanche_gradproj import LOGDPlugin

    return [
        LOGDPlugin(
            settings.patterns_per_exp,
            None if settings.n_components == "all" else settings.n_components,
            variant=settings.variant,
            margin=settings.margin,
            blocks=settings.blocks,
            selection=settings.selection,
            seed=seed,
        )
    ]


PROJECTION = (
    Method("gpm", "gradient projection memory", GpmSettings, _gpm),
    Method("ogd", "orthogonal gradient descent", OgdSettings, _ogd),
    Method("logd", "layerwise optimization by gradient decomposition", LogdSettings, _logd),
)
