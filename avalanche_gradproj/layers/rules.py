"""The one table from layer types to their matrices."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from avalanche_gradproj.errors import ModelError
from avalanche_gradproj.layers.attention import attention_units
from avalanche_gradproj.layers.conv import conv_units
from avalanche_gradproj.layers.linear import linear_units
from avalanche_gradproj.layers.unit import Unit

#: A new layer type is one line here: how to make its units. Its forward must be the type's own (see `units_of`).
RULES: dict[type[nn.Module], Callable[[str, nn.Module], list[Unit]]] = {
    nn.Linear: linear_units,
    NonDynamicallyQuantizableLinear: linear_units,
    nn.Conv1d: conv_units,
    nn.Conv2d: conv_units,
    nn.Conv3d: conv_units,
    nn.MultiheadAttention: attention_units,
}

#: The methods in which a module computes: a subclass that overrides one may use its weights in any way.
_COMPUTATION = ("forward", "_conv_forward")

#: Their weights act on shifted copies of the output, so that a row of inputs does not determine an output alone.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def covered_type(module: nn.Module) -> type[nn.Module] | None:
    """Return the type in the table that the module is, or None.

    A subclass counts only while it computes what its base computes.
    """
    for base in type(module).__mro__:
        if base in RULES:
            own = all(getattr(type(module), key, None) is getattr(base, key, None) for key in _COMPUTATION)
            return base if own else None
    return None


def units_of(name: str, module: nn.Module) -> list[Unit]:
    """Return the matrices of a module, none where the table does not hold its type.

    Args:
        name: the module's name in its model.
        module: the module itself, without its children.

    Raises:
        ModelError: for transposed convolutions, lazy and reparametrised weights, by name.
    """
    remedy = f"exclude it (exclude=[{name!r}]) to leave it unprotected, or replace it"
    if isinstance(module, TRANSPOSED):
        raise ModelError(f"layer {name!r} is a {type(module).__name__}, which cannot be projected: {remedy}")
    covered = covered_type(module)
    if covered is None:
        return []
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise ModelError(f"layer {name!r} is lazy, its shape is unknown: run one batch through the model first")
    units = RULES[covered](name, module)
    for part in (part for unit in units for part in unit.slices):
        if not isinstance(part.parameter, nn.Parameter):
            raise ModelError(
                f"layer {name!r}: {part.name!r} is reparametrised (weight norm, spectral norm, pruning, ...): what is "
                f"trained is not the weight that the inputs meet; remove the parametrisation first or {remedy}"
            )
    return units
