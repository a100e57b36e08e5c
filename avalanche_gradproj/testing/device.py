"""Finding out whether code waits for a value of the device, also on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class HostRoundTripError(AssertionError):
    """A value was fetched from the device inside a training step."""


class _NoRoundTrips(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        by_mask = "aten.index" in name and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if by_mask or any(part in name for part in _WAITING):
            raise HostRoundTripError(
                f"{name} needs the device's answer in the middle of a training step: use torch.where or clamp in place "
                "of .item(), of `if` on a tensor and of masks (a method that runs a multi-head model on old samples "
                "declares looks_back=True)"
            )
        return func(*args, **(kwargs or {}))


#: Operations whose result, or whose result's shape, is known only when the device has answered.
_WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "aten.equal",
    "repeat_interleave.Tensor",
)

#: Methods of a tensor that reach the host without an operation to be seen on a CPU.
_METHODS = ("cpu", "tolist", "numpy")


@contextmanager
def no_host_round_trips() -> Iterator[None]:
    """Raise `HostRoundTripError` where a value would have to travel to the host (also when all runs on the CPU)."""

    def refuse(name: str) -> Any:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise HostRoundTripError(f"Tensor.{name} fetches values in the middle of a training step")

        return method

    with ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, refuse(name)))
        stack.enter_context(_NoRoundTrips())  # type: ignore[no-untyped-call]
        yield
