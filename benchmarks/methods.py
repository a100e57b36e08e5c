"""The methods that can be compared: one table from a name to its settings and its plugins.

Each method is a record: what it is, the type of its settings (`method_settings.py`), and a function that makes
its Avalanche plugins. A protocol holds the values of the settings; adding a method means adding a record here
and values there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.method_settings import (
    AgemSettings,
    EwcSettings,
    GemSettings,
    GpmSettings,
    HalrpSettings,
    KfacSettings,
    LogdSettings,
    NoSettings,
    OgdSettings,
    ReplaySettings,
    XkfacSettings,
)
from benchmarks.record import Protocol
from benchmarks.settings import unknown


def _fits(settings: Any, smallest: int, experiences: int) -> str | None:
    """Refuse nothing."""
    del settings, smallest, experiences
    return None


def _suits(settings: Any, protocol: Protocol) -> str | None:
    """Refuse no protocol."""
    del settings, protocol
    return None


def _no_epochs(settings: Any) -> int:
    """Train no epochs besides those of the strategy."""
    del settings
    return 0


@dataclass(frozen=True)
class Method:
    """One way to train on a stream.

    Attributes:
        name: what the command line calls it.
        summary: one line for people.
        settings: the type of its hyper-parameters.
        plugins: makes the Avalanche plugins from the settings and the run's seed.
        joint: train once on all experiences together, as an upper bound.
        refuse: says what of the settings does not fit a stream, given the samples of its smallest experience and the
            number of experiences; for plugins that do not find out themselves before training.
        unsuited: says why a protocol cannot be run with the settings, whatever the data; None where it can.
        own_epochs: epochs that the plugin itself trains at the start of each experience after the first; they count
            among the experience's epochs, so that the strategy trains as many fewer.
    """

    name: str
    summary: str
    settings: type
    plugins: Callable[[Any, int], list[Any]]
    joint: bool = False
    refuse: Callable[[Any, int, int], str | None] = _fits
    unsuited: Callable[[Any, Protocol], str | None] = _suits
    own_epochs: Callable[[Any], int] = _no_epochs


def _no_plugins(settings: NoSettings, seed: int) -> list[Any]:
    """Plain fine-tuning."""
    del settings, seed
    return []


def _ewc(settings: EwcSettings, seed: int) -> list[Any]:
    """Avalanche's EWC."""
    from avalanche.training.plugins import EWCPlugin

    del seed
    return [EWCPlugin(ewc_lambda=settings.ewc_lambda)]


def _replay(settings: ReplaySettings, seed: int) -> list[Any]:
    """Avalanche's replay."""
    from avalanche.training.plugins import ReplayPlugin

    del seed  # its choice of samples follows the global random state, which the run seeds
    return [ReplayPlugin(mem_size=settings.mem_size)]


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


def _ogd(settings: OgdSettings, seed: int) -> list[Any]:
    """This package's OGD."""
    from avalanche_gradproj import OGDPlugin

    max_bytes = settings.ogd_max_mb * 10**6 or None
    return [OGDPlugin(settings.n_gradients, target=settings.target, max_bytes=max_bytes, seed=seed)]


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
            n_samples=None if settings.n_factor_samples == "all" else settings.n_factor_samples,
            reparameterise=settings.reparameterise,
            inter_example=settings.inter_example,
            batchnorm=settings.batchnorm,
            truncate=settings.truncate if settings.truncate < 1 else None,
            seed=seed,
            record_batch_size=settings.factor_batch,
        )
    ]


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


def _gem(settings: GemSettings, seed: int) -> list[Any]:
    """Avalanche's GEM."""
    from avalanche.training.plugins import GEMPlugin

    del seed  # its choice of samples follows the global random state, which the run seeds
    return [GEMPlugin(settings.gem_patterns, settings.memory_strength)]


def _agem(settings: AgemSettings, seed: int) -> list[Any]:
    """Avalanche's AGEM."""
    from avalanche.training.plugins import AGEMPlugin

    del seed  # as for GEM
    return [AGEMPlugin(settings.agem_patterns, settings.agem_sample_size)]


def _too_large(argument: str, patterns: int, smallest: int) -> str | None:
    """Say that a memory does not fit into an experience."""
    return f"{argument}={patterns}: there are experiences of {smallest} samples" if patterns > smallest else None


def _refuse_gem(settings: GemSettings, smallest: int, experiences: int) -> str | None:
    del experiences
    return _too_large("gem_patterns", settings.gem_patterns, smallest)


def _refuse_agem(settings: AgemSettings, smallest: int, experiences: int) -> str | None:
    needed = experiences - 1
    if settings.agem_sample_size < needed:
        size = settings.agem_sample_size
        return f"agem_sample_size={size}: it is divided among {needed} old experiences; expected at least {needed}"
    return _too_large("agem_patterns", settings.agem_patterns, smallest)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("naive", "fine-tuning, nothing against forgetting", NoSettings, _no_plugins),
        Method("ewc", "Avalanche's elastic weight consolidation", EwcSettings, _ewc),
        Method("replay", "Avalanche's experience replay", ReplaySettings, _replay),
        Method("joint", "all experiences at once, an upper bound", NoSettings, _no_plugins, joint=True),
        Method("gem", "Avalanche's gradient episodic memory", GemSettings, _gem, refuse=_refuse_gem),
        Method("agem", "Avalanche's averaged gradient episodic memory", AgemSettings, _agem, refuse=_refuse_agem),
        Method("gpm", "gradient projection memory", GpmSettings, _gpm),
        Method("ogd", "orthogonal gradient descent", OgdSettings, _ogd),
        Method("kfac", "K-FAC Laplace", KfacSettings, _kfac),
        Method("xkfac", "K-FAC extended to networks with BatchNorm", XkfacSettings, _xkfac),
        Method("kfac-unmerged", "XK-FAC without merging and without the term across samples", XkfacSettings, _xkfac),
        Method("kfac-merged", "XK-FAC without the term across samples", XkfacSettings, _xkfac),
        Method("kfac-fixed-bn", "K-FAC with BatchNorm fixed after the first experience", XkfacSettings, _xkfac),
        Method(
            "halrp",
            "Hessian-aware low-rank perturbation (needs task labels)",
            HalrpSettings,
            _halrp,
            unsuited=_unsuited_halrp,
            own_epochs=lambda settings: settings.warmup_epochs,
        ),
        Method("logd", "layerwise optimization by gradient decomposition", LogdSettings, _logd),
    )
}


def find_method(name: str) -> Method:
    """Look a method up.

    Args:
        name: its name.

    Returns:
        The method.

    Raises:
        InputError: if there is none of that name, with the nearest one.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
