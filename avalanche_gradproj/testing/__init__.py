"""The conformance kit: what every method must do, as functions that a test suite calls.

A method, also one that lives in another package, is described by a `MethodCase`; each check takes one and raises
`AssertionError` with what was found and what was expected::

    import pytest
    from avalanche_gradproj.testing import CHECKS, MethodCase

    CASE = MethodCase("mine", make=lambda: MyPlugin(strength=1.0), neutral=lambda: MyPlugin(strength=0.0))

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conforms(check):
        check(CASE)

The plugin must have `report()`, `state_dict()` and `load_state_dict(state)`. Checks train small networks on small
random streams: a few seconds a method in all.
"""

from avalanche_gradproj.testing.cases import MethodCase, strategy, stream
from avalanche_gradproj.testing.checks import CHECKS, leftovers
from avalanche_gradproj.testing.device import HostRoundTripError, no_host_round_trips

__all__ = ["CHECKS", "HostRoundTripError", "MethodCase", "leftovers", "no_host_round_trips", "strategy", "stream"]
