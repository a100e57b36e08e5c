"""Gradient-projection, curvature and low-rank continual-learning methods for Avalanche."""

from importlib.metadata import PackageNotFoundError, version

from avalanche_gradproj.errors import (
    ConfigurationError,
    DataError,
    GradProjError,
    ModelError,
    NonFiniteError,
    StateError,
)
from avalanche_gradproj.plugins import (
    GPMPlugin,
    HALRPPlugin,
    InMemoryDataPlugin,
    KFACLaplacePlugin,
    LOGDPlugin,
    OGDPlugin,
    XKFACPlugin,
)
from avalanche_gradproj.strategies import GPM, HALRP, LOGD, OGD, XKFAC, KFACLaplace

try:
    __version__ = version("avalanche-gradproj")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "GPM",
    "HALRP",
    "LOGD",
    "OGD",
    "XKFAC",
    "ConfigurationError",
    "DataError",
    "GPMPlugin",
    "GradProjError",
    "HALRPPlugin",
    "InMemoryDataPlugin",
    "KFACLaplace",
    "KFACLaplacePlugin",
    "LOGDPlugin",
    "ModelError",
    "NonFiniteError",
    "OGDPlugin",
    "StateError",
    "XKFACPlugin",
]
