"""Avalanche plugins: when a method acts."""

from avalanche_gradproj.plugins.gpm import GPMPlugin
from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin

__all__ = ["GPMPlugin", "InMemoryDataPlugin"]
