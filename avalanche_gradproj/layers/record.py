"""Recording contexts: what enters a model's matrices, and the gradients at their outputs, handed to sinks.

Hooks and patches live inside the context and are gone after it, also after an exception.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avalanche_gradproj.layers.attention import watched_projections
from avalanche_gradproj.layers.merged import MergedUnit
from avalanche_gradproj.layers.unit import OnCall, Unit

#: A sink of layer inputs: `sink(unit, input)`.
InputSink = Callable[[Unit, Tensor], None]
#: A sink of gradients at layer outputs: `sink(unit, gradient)`, shaped like the output.
GradientSink = Callable[[Unit, Tensor], None]


@contextmanager
def watch(units: Iterable[Unit], on_call: OnCall) -> Iterator[None]:
    """Report every use of the units while the context lasts.

    Args:
        units: what to watch.
        on_call: called as `on_call(unit, input, output, columns)` during the forward pass.
    """
    by_module: dict[nn.Module, list[Unit]] = defaultdict(list)
    for unit in units:
        by_module[unit.module].append(unit)
    with ExitStack() as stack:
        # The fused kernels of attention and of whole encoder layers never call the parts that are watched.
        fused = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        for module, own in by_module.items():
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(_watch_attention(module, own, on_call))
            elif isinstance(own[0], MergedUnit):
                stack.enter_context(_watch_merged(own[0], on_call))
            else:
                handle = module.register_forward_hook(_hook(own[0], on_call), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _hook(unit: Unit, on_call: OnCall) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        return on_call(unit, args[0] if args else next(iter(kwargs.values())), output, slice(None))

    return hook


@contextmanager
def _watch_merged(unit: MergedUnit, on_call: OnCall) -> Iterator[None]:
    """Report the layer's input with the output of the BatchNorm behind it."""
    entered: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = [args[0] if args else next(iter(kwargs.values()))]

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return on_call(unit, entered.pop(), output, slice(None)) if entered else None

    with ExitStack() as stack:
        stack.callback(unit.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(unit.norm.register_forward_hook(after).remove)
        yield


@contextmanager
def _watch_attention(module: nn.MultiheadAttention, units: list[Unit], on_call: OnCall) -> Iterator[None]:
    """Run the layer's own forward under a watch of its linear maps."""
    original = module.__dict__.get("forward")
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with watched_projections(units, on_call):
            return forward(*args, **kwargs)

    module.forward = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if original is not None:
            module.forward = original  # type: ignore[method-assign]


@contextmanager
def record(
    units: Iterable[Unit], *, inputs: InputSink | None = None, gradients: GradientSink | None = None
) -> Iterator[None]:
    """Hand the inputs of the units, and the gradients at their outputs, to sinks while the context lasts.

    Gradients arrive during the backward pass of whatever was computed inside the context.

    Args:
        units: what to record.
        inputs: receives each input, detached.
        gradients: receives each gradient at a unit's output, detached.
    """

    def on_call(unit: Unit, x: Tensor, output: Tensor, columns: slice) -> Tensor | None:
        if inputs is not None:
            inputs(unit, x.detach())
        if gradients is not None and output.requires_grad:
            # A view that is overwritten in place loses its hooks in some versions of torch.
            replacement = output.clone() if output._is_view() else output
            sink = gradients

            def hand_over(gradient: Tensor) -> None:
                own = gradient if columns == slice(None) else gradient[..., columns]
                sink(unit, own.detach())

            replacement.register_hook(hand_over)
            return replacement
        return None

    with watch(units, on_call):
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; train/eval modes and random states as they were afterwards.

    Statistics of BatchNorm do not move in evaluation mode, gradients stay what they are, and whatever random
    numbers are drawn inside (by a transform, by a functional dropout) are given back.

    Args:
        model: the model to be run inside.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
            model.eval()
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        for module, training in modes.items():
            module.training = training
