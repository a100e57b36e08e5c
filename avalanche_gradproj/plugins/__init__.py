"""Avalanche plugins: when a method acts."""

from avalanche_gradproj.plugins.gpm import GPMPlugin
from avalanche_gradproj.plugins.halrp import HALRPPlugin
from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin
from avalanche_gradproj.plugins.kfac import KFACLaplacePlugin
from avalanche_gradproj.plugins.logd import LOGDPlugin
from avalanche_gradproj.plugins.ogd import OGDPlugin
from avalanche_gradproj.plugins.xkfac import XKFACPlugin

__all__ = [
    "GPMPlugin",
    "HALRPPlugin",
    "InMemoryDataPlugin",
    "KFACLaplacePlugin",
    "LOGDPlugin",
    "OGDPlugin",
    "XKFACPlugin",
]
