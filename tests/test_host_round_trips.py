"""The guard against host round trips, which tests of all methods use."""

from __future__ import annotations

import pytest
import torch

from avalanche_gradproj.testing import HostRoundTripError, no_host_round_trips


@pytest.mark.parametrize(
    "fetch",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
    ],
)
def test_the_guard_against_host_round_trips_can_fail(fetch):
    with pytest.raises(HostRoundTripError), no_host_round_trips():
        fetch(torch.ones(3))
    with no_host_round_trips():
        torch.where(torch.ones(3) > 0, 1.0, 0.0).cumsum(0)
