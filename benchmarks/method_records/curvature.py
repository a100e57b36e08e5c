"""Methods that add a penalty with the curvature of old experiences."""

from __future__ import annotations

from typing import Any

from benchmarks.method_records.common import Method
from benchmarks.method_settings import KfacSettings, XkfacSettings


def _kfac(settings: KfacSettings, seed: int) -> list[Any]:
    """This package's K-FAC Laplace."""
    from avalanche_gradproj import KFACLaplacePlugin

    return [
        KFACLaplacePlugin(
            settings.strength,
            mode=settings.mode,
            fisher=settings.fisher,
            n_samples=None if settings.n_factor_samples == "all" else settings.n_factor_samples,
            truncate=settings.truncate if settings.truncate < 1 else None,
            damping=settings.damping,
            refresh_every=settings.refresh_every,
            eigenbasis=settings.eigenbasis,
            seed=seed,
        )
    ]


def _xkfac(settings: XkfacSettings, seed: int) -> list[Any]:
    """This package's XK-FAC."""
    from avalanche_gradproj import XKFACPlugin

    return [
        XKFACPlugin(
            settings.strength,
            adaptive=settings.adaptive,
            mode=settings.mode,
            fisher=settings.fisher,
            damping=settings.damping,
            refresh_every=settings.refresh_every,
            n_samples=None if settings.n_factor_samples == "all" else settings.n_factor_samples,
            reparameterise=settings.reparameterise,
            inter_example=settings.inter_example,
            batchnorm=settings.batchnorm,
            truncate=settings.truncate if settings.truncate < 1 else None,
            seed=seed,
            record_batch_size=settings.factor_batch,
        )
    ]


CURVATURE = (
    Method("kfac", "K-FAC Laplace", KfacSettings, _kfac),
    Method("xkfac", "K-FAC extended to networks with BatchNorm", XkfacSettings, _xkfac),
    Method("kfac-unmerged", "XK-FAC without merging and without the term across samples", XkfacSettings, _xkfac),
    Method("kfac-merged", "XK-FAC without the term across samples", XkfacSettings, _xkfac),
    Method("kfac-fixed-bn", "K-FAC with BatchNorm fixed after the first experience", XkfacSettings, _xkfac),
)
