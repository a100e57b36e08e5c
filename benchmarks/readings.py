"""What the methods' plugins say after each experience, ready for JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from avalanche_gradproj import GradProjError
from benchmarks import held


def free_shares(plugins: Sequence[Any]) -> dict[str, float] | None:
    """Read how much of each layer's input space is still free, between 0 and 1.

    Args:
        plugins: the method's plugins.

    Returns:
        Layer to share; None for methods without bases.
    """
    found: dict[str, float] = {}
    for plugin in plugins:
        with contextlib.suppress(GradProjError, AttributeError):
            for row in plugin.report():
                if row.free_share is not None:
                    found[row.layer or row.parameter] = float(row.free_share)
    return found or None


def bytes_held(plugins: Sequence[Any]) -> int | None:
    """Read what the method keeps of the past: bytes, None where no plugin counts them."""
    known = [int(value) for value in map(_bytes_held, plugins) if value is not None]
    return sum(known) if known else None


def _bytes_held(plugin: Any) -> Any:
    """What one plugin says that it keeps, or what is counted for it."""
    owners = (plugin, getattr(plugin, "method", None))
    said = next((owner.bytes_held for owner in owners if getattr(owner, "bytes_held", None) is not None), None)
    return held.bytes_held(plugin) if said is None else said


def growth(plugins: Sequence[Any]) -> float | None:
    """Read what the method added to the network, as a share of its numbers; None for methods that add nothing."""
    found = [plugin.growth for plugin in plugins if getattr(plugin, "growth", None) is not None]
    return float(found[0]) if found else None


def report(plugins: Sequence[Any]) -> str | None:
    """Print the reports of the method's plugins; None where there are none."""
    texts = [str(plugin.report()) for plugin in plugins if hasattr(plugin, "report")]
    return "\n".join(texts) or None


def added(model: nn.Module, before: int, plugins: Sequence[Any]) -> int:
    """Count the numbers that a network has gained.

    Args:
        model: the network.
        before: its parameters before the first training.
        plugins: the method's plugins; one that has a growth counts by it (what it stores need not be a parameter).

    Returns:
        How many more there are.
    """
    share = growth(plugins)
    ledgers = [getattr(getattr(plugin, "method", None), "ledger", None) for plugin in plugins]
    bases = [ledger.base for ledger in ledgers if ledger is not None]
    if share is not None and bases:
        return round(share * bases[0])
    return parameters(model) - before


def parameters(model: nn.Module) -> int:
    """Count a network's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
