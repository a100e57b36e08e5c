"""The methods that can be compared: one table from a name to its settings and its plugins.

Each method is a record (`method_records/`): what it is, the type of its settings (`method_settings.py`), and a
function that makes its Avalanche plugins. A protocol holds the values of the settings; adding a method to the table
means adding a record there and values in the protocols. Methods that other packages bring (`external.py`) are found
by the same function.
"""

from __future__ import annotations

from benchmarks.method_records.avalanche import AVALANCHE
from benchmarks.method_records.common import Method
from benchmarks.method_records.curvature import CURVATURE
from benchmarks.method_records.lowrank import LOWRANK
from benchmarks.method_records.projection import PROJECTION
from benchmarks.settings import unknown

__all__ = ["METHODS", "Method", "find_method"]

#: The methods of this project; those of other packages are in `external.found()`.
METHODS: dict[str, Method] = {method.name: method for method in (*AVALANCHE, *PROJECTION, *CURVATURE, *LOWRANK)}


def find_method(name: str) -> Method:
    """Look a method up, also among those of other packages.

    Args:
        name: its name.

    Returns:
        The method.

    Raises:
        InputError: if there is none of that name, with the nearest one, or if the package that brings it is broken.
    """
    if name in METHODS:
        return METHODS[name]
    from benchmarks import external

    brought = external.found()
    if name not in brought:
        raise unknown("method", name, {*METHODS, *brought})
    return external.method(name)
