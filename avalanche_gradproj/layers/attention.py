"""Multi-head attention as four matrices: the query, key, value and output projections.

`nn.MultiheadAttention` calls no submodule for them (the output projection's hooks never fire), so their inputs and
outputs are read where they are computed: while the layer's forward runs, calls of `torch.nn.functional.linear` are
watched, and a call belongs to the projections whose weights it was given, wherever in the packed weight those lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_gradproj.layers.unit import OnCall, ParameterSlice, Unit


def attention_units(name: str, module: nn.Module) -> list[Unit]:
    """Return the units `<name>.q_proj`, `.k_proj`, `.v_proj` and `.out_proj`, each W [out, in (+ 1)].

    Packed projections own rows of `in_proj_weight` and `in_proj_bias`; separate ones (`kdim`, `vdim`) a weight each.

    Args:
        name: the layer's name.
        module: the attention layer, batch first or not.
    """
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(f"{name}: attention_units needs an nn.MultiheadAttention, got {type(module).__name__}")
    size, prefix = module.embed_dim, f"{name}." if name else ""
    units = []
    for index, letter in enumerate("qkv"):
        start, stop = index * size, (index + 1) * size
        if module.in_proj_weight is not None:
            weight = ParameterSlice(f"{prefix}in_proj_weight", module.in_proj_weight, start, stop)
        else:
            own = f"{letter}_proj_weight"
            weight = ParameterSlice.whole(prefix + own, getattr(module, own))
        bias = None
        if module.in_proj_bias is not None:
            bias = ParameterSlice(f"{prefix}in_proj_bias", module.in_proj_bias, start, stop)
        units.append(_projection(f"{prefix}{letter}_proj", module, weight, bias))
    out = module.out_proj
    weight = ParameterSlice.whole(f"{prefix}out_proj.weight", out.weight)
    bias = ParameterSlice.whole(f"{prefix}out_proj.bias", out.bias) if out.bias is not None else None
    units.append(_projection(f"{prefix}out_proj", module, weight, bias))
    return units


def _projection(name: str, module: nn.Module, weight: ParameterSlice, bias: ParameterSlice | None) -> Unit:
    out, features = weight.stop - weight.start, weight.parameter.shape[1]

    def bare_rows(x: Tensor) -> Iterator[Tensor]:
        yield x.reshape(1, -1, features)

    return Unit(
        name=name,
        module=module,
        weight=weight,
        bias=bias,
        blocks=1,
        out=out,
        features=features + (bias is not None),
        bare_rows=bare_rows,
        output_rows=lambda y: y.reshape(1, -1, out),
        batch_dimension=1,  # inside, attention is sequence first whatever `batch_first` says
    )


@contextmanager
def watched_projections(units: list[Unit], on_call: OnCall) -> Iterator[None]:
    """Report every linear map that uses a unit's weight while the context lasts.

    `torch.nn.functional.linear` is replaced for that time, which is that of one layer's forward. A `TorchFunctionMode`
    would not do: the attention function hands itself over to the mode whole, and is then run outside of it.

    Args:
        units: the units of one attention layer.
        on_call: called as `on_call(unit, input, output, columns)`; `columns` are the unit's own in the last axis of
            the output, which packed projections share.
    """
    linear = F.linear

    def watched(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # torch's own names
        output = linear(input, weight, bias)
        for unit in units:
            columns = _columns(unit, weight)
            if columns is not None:
                replacement = on_call(unit, input, output, columns)
                output = output if replacement is None else replacement
        return output

    F.linear = watched
    try:
        yield
    finally:
        F.linear = linear


def _columns(unit: Unit, weight: Tensor) -> slice | None:
    """Return where in the output of a linear map with this weight the unit's part lies, None if nowhere."""
    parameter = unit.weight.parameter
    if weight.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        return None
    first = (weight.storage_offset() - parameter.storage_offset()) // parameter.shape[1]
    begin, end = unit.weight.start - first, unit.weight.stop - first
    return slice(begin, end) if begin >= 0 and end <= weight.shape[0] else None
