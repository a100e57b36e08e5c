"""The conformance kit: what every method must do, as pytest tests or as plain functions.

A method, also one that lives in another package, is described by a `MethodCase`. In any file that pytest collects:

    from avalanche_gradproj.testing import MethodCase, conformance

    test_mine = conformance(
        MethodCase(
            "mine",
            make=lambda: MyPlugin(strength=1.0),
            neutral=lambda: MyPlugin(strength=0.0),
            bad_arguments=[(lambda: MyPlugin(strength=-1.0), "strength=-1.0")],
        )
    )

`conformance` makes one test for each check and case (`test_mine[mine-check_restart]`). Each of `CHECKS` can also be
called with a case: it raises `AssertionError` with what was found and what was expected, and needs no pytest.

The plugin must have `report()`, `state_dict()` and `load_state_dict(state)`. Its state has the keys `"method"` and
`"version"`; one of another method or version is refused with a `StateError`, a bad argument with another exception of
`avalanche_gradproj.errors` that names it. A core made of the classes in `avalanche_gradproj.methods.base`, run by a
plugin of `avalanche_gradproj.plugins`, has most of this already. Checks train small networks on small random streams:
some seconds a case.
"""

from avalanche_gradproj.testing.cases import MethodCase, strategy, stream
from avalanche_gradproj.testing.checks import CHECKS, leftovers
from avalanche_gradproj.testing.conformance import conformance
from avalanche_gradproj.testing.device import HostRoundTripError, no_host_round_trips

__all__ = [
    "CHECKS",
    "HostRoundTripError",
    "MethodCase",
    "conformance",
    "leftovers",
    "no_host_round_trips",
    "strategy",
    "stream",
]
