"""Linear layers as matrices: inputs of any rank, one row for every leading index."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from avalanche_gradproj.layers.unit import ParameterSlice, Unit


def linear_units(name: str, module: nn.Module) -> list[Unit]:
    """Return the unit of an `nn.Linear`: W [out, in (+ 1)], rows [1, n, in (+ 1)].

    Args:
        name: the layer's name.
        module: the layer.
    """
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name}: linear_units needs an nn.Linear, got {type(module).__name__}")
    bias = module.bias is not None

    def bare_rows(x: Tensor) -> Iterator[Tensor]:
        yield x.reshape(1, -1, module.in_features)

    return [
        Unit(
            name=name,
            module=module,
            weight=ParameterSlice.whole(f"{name}.weight" if name else "weight", module.weight),
            bias=ParameterSlice.whole(f"{name}.bias" if name else "bias", module.bias) if bias else None,
            blocks=1,
            out=module.out_features,
            features=module.in_features + bias,
            bare_rows=bare_rows,
            output_rows=lambda y: y.reshape(1, -1, module.out_features),
            input_route=True,
        )
    ]
