"""Avalanche's own methods: what the package's are compared with."""

from __future__ import annotations

import importlib.util
from typing import Any

from benchmarks.method_records.common import Method
from benchmarks.method_settings import AgemSettings, EwcSettings, GemSettings, NoSettings, ReplaySettings


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
    if importlib.util.find_spec("quadprog") is None:
        return "Avalanche's GEM needs quadprog, which is not installed: pip install quadprog"
    return _too_large("gem_patterns", settings.gem_patterns, smallest)


def _refuse_agem(settings: AgemSettings, smallest: int, experiences: int) -> str | None:
    needed = experiences - 1
    if settings.agem_sample_size < needed:
        size = settings.agem_sample_size
        return f"agem_sample_size={size}: it is divided among {needed} old experiences; expected at least {needed}"
    return _too_large("agem_patterns", settings.agem_patterns, smallest)


AVALANCHE = (
    Method("naive", "fine-tuning, nothing against forgetting", NoSettings, _no_plugins),
    Method("ewc", "Avalanche's elastic weight consolidation", EwcSettings, _ewc),
    Method("replay", "Avalanche's experience replay", ReplaySettings, _replay),
    Method(
        "joint",
        "all experiences at once, for as many epochs; often an upper bound",
        NoSettings,
        _no_plugins,
        joint=True,
    ),
    Method("gem", "Avalanche's gradient episodic memory", GemSettings, _gem, refuse=_refuse_gem),
    Method("agem", "Avalanche's averaged gradient episodic memory", AgemSettings, _agem, refuse=_refuse_agem),
)
