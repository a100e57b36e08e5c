"""Whether a BatchNorm's map can be applied at the layer before it, tried on one mini-batch in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_gradproj.layers.unit import Unit

#: Largest difference of outputs, over the largest output, that passes for rounding. Wrong pairs change them by as much
#: as they are, since the check draws scales and shifts of its own.
_TOLERANCE = 1e-3

#: Runs the model on a mini-batch, and gives its output.
Run = Callable[[], Any]


@contextmanager
def without_zeros(model: nn.Module) -> Iterator[None]:
    """Let parameters that are zero throughout have values drawn at random while the context lasts.

    Others take their places in their modules; they themselves are not written into. Parameters that are no plain
    tensors of real numbers (sparse, complex, without storage) stay as they are.

    Args:
        model: what is behind such a parameter shows in its output then.
    """
    generator = torch.Generator().manual_seed(1)
    drawn: dict[int, nn.Parameter] = {}
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not _plain(parameter) or bool(parameter.detach().any()):
                continue
            if id(parameter) not in drawn:
                width = parameter[0].numel() if parameter.dim() > 1 else 1
                # Positive and small: what a gate of the form 1 + p lets through, it still does.
                values = (torch.rand(parameter.shape, generator=generator) + 0.5) * (0.5 / width**0.5)
                drawn[id(parameter)] = nn.Parameter(values.to(parameter), requires_grad=parameter.requires_grad)
            places.append((module._parameters, name, parameter))
    try:
        for parameters, name, parameter in places:
            parameters[name] = drawn[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


def _plain(parameter: nn.Parameter) -> bool:
    dense = parameter.layout is torch.strided and parameter.device.type != "meta"
    return dense and parameter.is_floating_point() and parameter.element_size() > 1 and parameter.numel() > 0


def not_what_was_given(
    found: Mapping[str, str], units: Mapping[str, Unit], norms: Mapping[str, _BatchNorm], run: Run
) -> dict[str, str]:
    """Return why what enters a BatchNorm is not what its layer gave, for those where it is so.

    An average over positions commutes with a BatchNorm's map, so that outputs agree with it in between. But then rows
    at the layer's input and at the BatchNorm's output are not the same positions, and no curvature is made of them.

    Args:
        found: name of a BatchNorm -> name of the layer.
        units: the layers, by name.
        norms: the BatchNorms, by name.
        run: runs the model on one mini-batch.
    """
    given: dict[str, tuple[int, Tensor]] = {}
    got: dict[str, tuple[int, Tensor]] = {}

    def content(x: Tensor) -> tuple[int, Tensor]:
        """The same for whatever holds the same numbers, in any order."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        norms = [torch.linalg.vector_norm(x.detach(), order, dtype=wide) for order in (1, 2, 4)]
        return x.numel(), torch.stack(norms)

    def layer_hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: given.update({name: content(output)})

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            got[name] = content(args[0] if args else next(iter(kwargs.values())))

        return hook

    with ExitStack() as stack:
        for name, layer in found.items():
            stack.callback(units[layer].module.register_forward_hook(layer_hook(layer)).remove)
            stack.callback(norms[name].register_forward_pre_hook(norm_hook(name), with_kwargs=True).remove)
        run()
    reasons = {}
    for name, layer in found.items():
        if name in got and layer in given:
            same = got[name][0] == given[layer][0] and torch.allclose(got[name][1], given[layer][1], rtol=1e-4)
            if not same:
                reasons[name] = (
                    f"what enters it is not what layer {layer!r} gives: another layer stands before it, or something "
                    "stands between the two"
                )
    return reasons


def not_mergeable(
    found: Mapping[str, str], units: Mapping[str, Unit], norms: Mapping[str, _BatchNorm], run: Run
) -> list[str]:
    """Return the names of the BatchNorms whose map cannot be applied at their layers.

    Args:
        found: name of a BatchNorm -> name of the layer.
        units: the layers, by name.
        norms: the BatchNorms, by name.
        run: runs the model on one mini-batch.
    """
    generator = torch.Generator().manual_seed(0)
    maps = {}
    for name in found:
        channels = norms[name].num_features
        signs = torch.randint(2, (channels,), generator=generator) * 2 - 1  # maxima commute with positive scales
        scale = (torch.rand(channels, generator=generator) + 0.5) * signs
        maps[name] = scale, torch.randn(channels, generator=generator)

    def outputs(merged: Sequence[str]) -> list[Tensor]:
        with ExitStack() as stack:
            for name, (scale, shift) in maps.items():
                if name in merged:
                    unit = units[found[name]]
                    axis = -1 if isinstance(unit.module, nn.Linear) else 1
                    stack.enter_context(_replaced(unit.module, _mapping(scale, shift, axis)))
                    stack.enter_context(_replaced(norms[name], lambda x, output: x))
                else:
                    stack.enter_context(_replaced(norms[name], _mapping(scale, shift, 1, of_input=True)))
            torch.manual_seed(0)  # what the model draws is the same each time; whoever calls gives the state back
            return [tensor.detach() for tensor in _tensors(run())]

    if not found:
        return []
    plain = outputs([])
    if _close(plain, outputs(list(found))):
        return []
    return [name for name in found if not _close(plain, outputs([name]))]


@contextmanager
def _replaced(module: nn.Module, result: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's output by a function of its input and output."""

    def hook(own: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return result(args[0] if args else next(iter(kwargs.values())), output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _mapping(scale: Tensor, shift: Tensor, axis: int, *, of_input: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    def result(x: Tensor, output: Tensor) -> Tensor:
        h = x if of_input else output
        shape = [1] * h.dim()
        shape[axis] = -1
        return h * scale.to(h).view(shape) + shift.to(h).view(shape)

    return result


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _close(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    for one, other in zip(expected, got, strict=True):
        kept = torch.isfinite(one)  # masked logits are minus infinity
        if not bool((torch.isfinite(other) == kept).all()):
            return False
        wanted, difference = one[kept].double().abs(), (one[kept].double() - other[kept].double()).abs()
        # Every entry is measured by itself and by the median of those that differ at all: masked logits, which may be
        # large numbers and most of the entries, do not.
        moved = difference > 0
        wanted, difference = wanted[moved], difference[moved]
        if wanted.numel() and bool((difference > _TOLERANCE * (wanted + wanted.median())).any()):
            return False
    return True
