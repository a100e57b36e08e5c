"""Which BatchNorm stands behind which matrix layer: seen on one mini-batch, and checked on it numerically."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.layers.pair_checks import Run, not_mergeable, not_what_was_given, without_zeros
from avalanche_gradproj.layers.record import undisturbed
from avalanche_gradproj.layers.unit import Unit

_UNSEEN = "the model did not call it on the mini-batch"


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
    be the same. They are not where something else uses the layer's output too. That is done twice: parameters that are
    zero throughout (a head that has learned nothing yet, the last scale of a residual branch) hide what is behind them,
    and have other values the second time.

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
        altered = {} if given is None else not_what_was_given(found, by_name, norms, run)
        unpaired |= altered
        found = {name: layer for name, layer in found.items() if name not in altered}
        wrong = not_mergeable(found, by_name, norms, run)
        with without_zeros(model):
            wrong = list(dict.fromkeys([*wrong, *not_mergeable(found, by_name, norms, run)]))
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
