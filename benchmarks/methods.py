"""The methods that can be compared: one table from a name to its settings and its plugins.

Each method is a record: what it is, the type of its settings, and a function that makes its Avalanche
plugins. A protocol holds the values of the settings; adding a method means adding a record here and values
there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.settings import setting, unknown


@dataclass(frozen=True)
class NoSettings:
    """For methods without hyper-parameters."""


@dataclass(frozen=True)
class EwcSettings:
    """Elastic weight consolidation, as Avalanche has it (one penalty for each earlier experience).

    Attributes:
        ewc_lambda: weight of the penalty.
    """

    ewc_lambda: float = setting(1.0, minimum=0)


@dataclass(frozen=True)
class ReplaySettings:
    """Experience replay, as Avalanche has it (every batch doubled by as many samples of the memory).

    Attributes:
        mem_size: samples in the memory, all experiences together.
    """

    mem_size: int = setting(200, minimum=1)


@dataclass(frozen=True)
class GpmSettings:
    """Gradient projection memory.

    Attributes:
        threshold: share of the activations' energy that a layer's basis holds; one value, or one for each
            layer.
        threshold_step: what each experience adds to the threshold.
        n_samples: training samples that the bases are made of; one value, one for each layer, or `all`.
        rank_rule: `paper`, or `official` for the code's rank of the first experience.
        apply_to: what is projected: the gradient, the optimizer's step, or whichever is needed.
        uncovered: what happens to parameters of layers without a basis.
        batchnorm: what happens to tracked BatchNorm statistics after the first experience.
        include: patterns of the layers to cover; none means all.
        exclude: patterns of the layers to leave out.
        route: how the projected gradient is computed.
    """

    threshold: float | tuple[float, ...] = setting(0.97, minimum=0, maximum=1)
    threshold_step: float = setting(0.003, minimum=0, maximum=1)
    n_samples: int | tuple[int, ...] | Literal["all"] = setting(125, minimum=1)
    rank_rule: Literal["paper", "official"] = setting("paper")
    apply_to: Literal["auto", "gradient", "update"] = setting("auto")
    uncovered: Literal["freeze", "train", "raise"] = setting("freeze")
    batchnorm: Literal["freeze", "track"] = setting("freeze")
    include: tuple[str, ...] | None = setting(None, optional=True)
    exclude: tuple[str, ...] | None = setting(None, optional=True)
    route: str = setting("auto")


@dataclass(frozen=True)
class Method:
    """One way to train on a stream.

    Attributes:
        name: what the command line calls it.
        summary: one line for people.
        settings: the type of its hyper-parameters.
        plugins: makes the Avalanche plugins from the settings and the run's seed.
        joint: train once on all experiences together, as an upper bound.
    """

    name: str
    summary: str
    settings: type
    plugins: Callable[[Any, int], list[Any]]
    joint: bool = False


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


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("naive", "fine-tuning, nothing against forgetting", NoSettings, _no_plugins),
        Method("ewc", "Avalanche's elastic weight consolidation", EwcSettings, _ewc),
        Method("replay", "Avalanche's experience replay", ReplaySettings, _replay),
        Method("joint", "all experiences at once, an upper bound", NoSettings, _no_plugins, joint=True),
        Method("gpm", "gradient projection memory", GpmSettings, _gpm),
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
