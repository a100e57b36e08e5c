"""Finding out whether code waits for a value of the device, also on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class HostRoundTripError(AssertionError):
    """A value was fetched from the device inside a training step."""


class _NoRoundTrips(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name or "aten.equal" in name:
            raise HostRoundTripError(f"{name} needs the device's answer in the middle of a training step")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_round_trips() -> Iterator[None]:
    """Raise `HostRoundTripError` where a value would have to travel to the host (also when all runs on the CPU)."""
    with _NoRoundTrips():  # type: ignore[no-untyped-call]
        yield
