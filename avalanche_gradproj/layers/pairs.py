"""Which BatchNorm stands behind which matrix layer: seen on one mini-batch, and checked on it numerically."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.layers.record import undisturbed
from avalanche_gradproj.layers.unit import Unit

#: Largest difference of outputs, over the largest output, that passes for rounding. Wrong pairs change them by as much
#: as they are, since the check draws scales and shifts of its own.
_TOLERANCE = 1e-3

_UNSEEN = "the model did not call it on the mini-batch"

#: Runs the model on a mini-batch, and gives its output.
Run = Callable[[], Any]


@dataclass(frozen=True)
class Pairs:
    """What was found.

    Attributes:
        found: name of a BatchNorm -> name of the layer that feeds it alone.
        unpaired: name of a BatchNorm -> why it has none.
        unseen: those that the model did not call: nothing is known of them.
    """

    found: dict[str, str]
    unpaired: dict[str, str]
    unseen: frozenset[str] = frozenset()


def find_pairs(
    model: nn.Module,
    units: Sequence[Unit],
    norms: Mapping[str, _BatchNorm],
    run: Run,
    given: Mapping[str, str] | None = None,
) -> Pairs:
    """Find the layer behind whose output each BatchNorm stands, and check that merging the two changes nothing.

    A BatchNorm belongs to a layer if it gets the very tensor that the layer returned, once in a forward pass. The check
    gives every BatchNorm a scale and a shift drawn at random, and applies them at the layer instead: the outputs must
    be the same. They are not where something else uses the layer's output too.

    Args:
        model: left as it was; runs in evaluation mode.
        units: layers that may be merged; attention projections are not.
        norms: the BatchNorms in question, by name.
        run: runs the model on one mini-batch.
        given: name of a BatchNorm -> name of its layer, instead of looking; others are unpaired.

    Raises:
        ConfigurationError: for names in `given` that do not exist or do not fit.
    """
    by_name = {u.name: u for u in units if isinstance(u.module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    unpaired = {
        name: "it keeps no running statistics, so that evaluation has no fixed map to merge"
        for name, norm in norms.items()
        if norm.running_mean is None
    }
    norms = {name: norm for name, norm in norms.items() if name not in unpaired}
    if given is None:
        with undisturbed(model):
            found = _observed(by_name, norms, run, unpaired)
    else:
        _check_names(given, by_name, norms, unpaired)
        found = dict(given)
        unpaired.update({name: "it is not among the pairs given" for name in norms if name not in found})
    for name in [name for name in found if name not in norms]:
        del found[name]  # given, and without statistics
    for name, layer in list(found.items()):
        outputs = by_name[layer].blocks * by_name[layer].out
        if norms[name].num_features != outputs:
            unpaired[name] = f"it has {norms[name].num_features} channels and layer {layer!r} {outputs} outputs"
            del found[name]
    with undisturbed(model):
        wrong = _disagreeing(found, by_name, norms, run)
    for name in wrong:
        unpaired[name] = (
            f"merging it into layer {found.pop(name)!r} changes the network's output: that layer's output is used "
            "elsewhere too, or something stands between the two"
        )
    for name in given or ():
        if name in unpaired:
            raise ConfigurationError(f"pairs: BatchNorm {name!r} and layer {(given or {})[name]!r}: {unpaired[name]}")
    return Pairs(found, unpaired, frozenset(name for name, why in unpaired.items() if why == _UNSEEN))


def _check_names(
    given: Mapping[str, str], units: Mapping[str, Unit], norms: Mapping[str, _BatchNorm], unpaired: Mapping[str, str]
) -> None:
    for name, layer in given.items():
        if name not in norms and name not in unpaired:
            raise ConfigurationError(f"pairs: the model has no BatchNorm {name!r} to merge, only {', '.join(norms)}")
        if layer not in units:
            raise ConfigurationError(
                f"pairs: {layer!r} is no covered Linear layer or convolution; there are {', '.join(units)}"
            )
    layers = Counter(given.values())
    for layer, count in layers.items():
        if count > 1:
            raise ConfigurationError(f"pairs: layer {layer!r} is given to {count} BatchNorms, a layer has one")


def _observed(
    units: Mapping[str, Unit], norms: Mapping[str, _BatchNorm], run: Run, unpaired: dict[str, str]
) -> dict[str, str]:
    """Return the layer whose output each BatchNorm got; say in `unpaired` why there is none."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor is held, so that its identity stays its own
    calls, fed = Counter[str](), Counter[str]()
    sources: dict[str, list[str | None]] = {name: [] for name in norms}

    def layer_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            calls[name] += 1
            outputs[id(output)] = (name, output)

        return hook

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            layer = outputs[id(x)][0] if id(x) in outputs else None
            sources[name].append(layer)
            if layer is not None:
                fed[layer] += 1

        return hook

    with ExitStack() as stack:
        for name, unit in units.items():
            stack.callback(unit.module.register_forward_hook(layer_hook(name)).remove)
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(norm_hook(name), with_kwargs=True).remove)
        run()
    found = {}
    for name, layers in sources.items():
        layer = layers[0] if layers else None
        if not layers:
            unpaired[name] = _UNSEEN
        elif len(layers) > 1:
            unpaired[name] = f"the model called it {len(layers)} times in one pass"
        elif layer is None:
            unpaired[name] = (
                "what enters it is not the output of a covered Linear layer or convolution (one that is excluded, or "
                "takes no gradient, is not covered)"
            )
        elif calls[layer] > 1 or fed[layer] > 1:
            unpaired[name] = f"layer {layer!r} is used {calls[layer]} times, by {fed[layer]} BatchNorms"
        else:
            found[name] = layer
    return found


def _disagreeing(
    found: Mapping[str, str], units: Mapping[str, Unit], norms: Mapping[str, _BatchNorm], run: Run
) -> list[str]:
    """Return the BatchNorms whose map cannot be applied at their layers."""
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
