"""What a Laplace approximation keeps of each experience: factors, diagonal terms, and where they are centred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.kronecker import Factor, KroneckerTerm


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """One layer's part of a quadratic form.

    Attributes:
        terms: sum of Kronecker products, a sample's mean.
        centre: W* [blocks, out, d].
        input_weight: weight of the experiences that used the layer: the input factors are their mean, and damping
            counts them.
    """

    terms: tuple[KroneckerTerm, ...]
    centre: Tensor
    input_weight: float = 0.0


@dataclass(frozen=True, eq=False)
class DiagonalCurvature:
    """One parameter's part of a quadratic form.

    Attributes:
        values: mean squared gradient of a sample's loss, shaped like the parameter.
        centre: theta*, shaped like it.
        weight: weight of the experiences that had the parameter: damping counts them.
    """

    values: Tensor
    centre: Tensor
    weight: float = 0.0


@dataclass(frozen=True, eq=False)
class Curvature:
    """The quadratic form that an experience leaves behind, or the sum of several.

    Attributes:
        weight: strength times the number of samples, summed over the experiences.
        layers: by layer name.
        diagonal: by parameter name.
    """

    weight: float
    layers: dict[str, LayerCurvature] = field(default_factory=dict)
    diagonal: dict[str, DiagonalCurvature] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Return every tensor."""
        found = [part for layer in self.layers.values() for term in layer.terms for part in term.tensors]
        found += [layer.centre for layer in self.layers.values()]
        return found + [part for own in self.diagonal.values() for part in (own.values, own.centre)]

    def truncated(self, share: float | None) -> Curvature:
        """Return the form with thin factors where their products are cheaper (`linalg.kronecker.Factor.cheaper`)."""
        if share is None:
            return self
        layers = {
            name: replace(layer, terms=tuple(term.cheaper(share) for term in layer.terms))
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def moved(self, units: Mapping[str, Unit], parameters: Mapping[str, nn.Parameter]) -> Curvature:
        """Return the form on the devices and in the types of a model's weights (float32 at least)."""
        layers = {}
        for name, layer in self.layers.items():
            device, dtype = place(units[name].weight.parameter)
            terms = tuple(term.to(device, dtype) for term in layer.terms)
            layers[name] = replace(layer, terms=terms, centre=layer.centre.to(device=device, dtype=dtype))
        diagonal = {}
        for name, own in self.diagonal.items():
            device, dtype = place(parameters[name])
            values, centre = (part.to(device=device, dtype=dtype) for part in (own.values, own.centre))
            diagonal[name] = DiagonalCurvature(values, centre, own.weight)
        return Curvature(self.weight, layers, diagonal)

    def state(self) -> dict[str, Any]:
        """Return tensors, numbers and names."""
        layers = {
            name: {
                "terms": [term.state() for term in layer.terms],
                "centre": layer.centre.detach().cpu().clone(),
                "input_weight": layer.input_weight,
            }
            for name, layer in self.layers.items()
        }
        diagonal = {
            name: {
                "values": own.values.detach().cpu().clone(),
                "centre": own.centre.detach().cpu().clone(),
                "weight": own.weight,
            }
            for name, own in self.diagonal.items()
        }
        return {"weight": self.weight, "layers": layers, "diagonal": diagonal}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Curvature:
        """Rebuild a form.

        Raises:
            ValueError: naming the layer or parameter whose tensors do not fit.
        """
        layers, diagonal = {}, {}
        for name, layer in state["layers"].items():
            try:
                terms = tuple(KroneckerTerm.from_state(term) for term in layer["terms"])
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
            centre = layer["centre"]
            for term in terms:
                if (term.left.matrix.shape[0], term.left.size, term.right.size) != tuple(centre.shape):
                    raise ValueError(f"layer {name!r}: factors do not fit a centre {tuple(centre.shape)}")
            layers[name] = LayerCurvature(terms, centre, float(layer["input_weight"]))
        for name, own in state["diagonal"].items():
            if own["values"].shape != own["centre"].shape:
                raise ValueError(f"parameter {name!r}: {tuple(own['values'].shape)} and {tuple(own['centre'].shape)}")
            diagonal[name] = DiagonalCurvature(own["values"], own["centre"], float(own["weight"]))
        return Curvature(float(state["weight"]), layers, diagonal)


def place(parameter: Tensor) -> tuple[torch.device, torch.dtype]:
    """Return where a parameter's curvature lives, and its type: the parameter's, but float32 for half precision."""
    return parameter.device, torch.float32 if parameter.element_size() < 4 else parameter.dtype


def merged(old: Curvature, new: Curvature) -> Curvature:
    """Return one form for two, centred where the new one is: the recursion of the online approximation.

    With the weights w of what is summed, each layer keeps `A = sum w A / sum w` and `B = sum w B / sum w`, to be
    multiplied by `sum w`. That is the sum of the Kronecker products where all A are equal, or all B; else their
    cross terms stand for it. A layer that was not used in an experience has B = 0 there and leaves A as it is.

    Args:
        old: terms that are not truncated.
        new: the same, or none for a layer of `old` that was not used and is centred anew. Where a layer has several
            terms, each is merged with that of the same place.
    """
    weight = old.weight + new.weight
    layers = {}
    for name in {**old.layers, **new.layers}:
        before, after = old.layers.get(name), new.layers.get(name)
        parts = [(form.weight / weight if weight else 0.0, own) for form, own in ((old, before), (new, after)) if own]
        last = parts[-1][1]
        count = max(len(own.terms) for _, own in parts)
        terms = tuple(_merged_term([part for part in parts if len(part[1].terms) > k], k, last) for k in range(count))
        if terms:
            used = sum(own.input_weight for _, own in parts if own.terms)
            layers[name] = LayerCurvature(terms, last.centre, used)
    diagonal = {}
    for name in {**old.diagonal, **new.diagonal}:
        values = [
            form.diagonal[name].values * (form.weight / weight if weight else 0.0)
            for form in (old, new)
            if name in form.diagonal
        ]
        last_one = new.diagonal.get(name) or old.diagonal[name]
        total = sum(form.diagonal[name].weight for form in (old, new) if name in form.diagonal)
        diagonal[name] = DiagonalCurvature(sum(values[1:], values[0]), last_one.centre, total)
    return Curvature(weight, layers, diagonal)


def _merged_term(parts: Sequence[tuple[float, LayerCurvature]], index: int, last: LayerCurvature) -> KroneckerTerm:
    """Return one term for the terms `index` of (share of the sum, layer) pairs, for as many outputs as `last` has."""
    outputs = last.centre.shape[1]
    total = sum(own.input_weight for _, own in parts)
    left = parts[0][1].terms[index].left.matrix.new_zeros(last.centre.shape[0], outputs, outputs)
    right: Factor | None = None
    for share, own in parts:
        term = own.terms[index]
        left = _padded_sum(left, term.left.matrix * share)
        inputs = term.right if len(parts) == 1 else term.right.scaled(own.input_weight / total)
        right = inputs if right is None else right.plus(inputs)
    if right is None:
        raise ValueError("a term without parts")
    return KroneckerTerm(Factor(left), right)


def _padded_sum(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of [blocks, n, n] and a second that may have more rows and columns."""
    rows = max(one.shape[1], other.shape[1])
    result = one.new_zeros(one.shape[0], rows, rows)
    for part in (one, other):
        result[:, : part.shape[1], : part.shape[2]] += part
    return result


def sharing(form: Curvature, whole: Curvature) -> Curvature:
    """Return a truncated form whose tensors that are not truncated are those of the whole one: they are kept once."""
    layers = {}
    for name, layer in form.layers.items():
        own = whole.layers[name]
        terms = tuple(
            KroneckerTerm(
                w.left if term.left.rank == w.left.rank else term.left,
                w.right if term.right.rank == w.right.rank else term.right,
            )
            for term, w in zip(layer.terms, own.terms, strict=True)
        )
        layers[name] = replace(layer, terms=terms, centre=own.centre)
    return replace(form, layers=layers, diagonal=whole.diagonal)


def check_fits(curvature: Curvature, units: Sequence[Unit], parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that a form is of a model.

    Raises:
        StateError: naming the layer or parameter that is missing or of another shape. A layer of one block may have
            more outputs than it had (a head that grows).
    """
    by_name = {unit.name: unit for unit in units}
    for name, layer in curvature.layers.items():
        unit, shape = by_name.get(name), tuple(layer.centre.shape)
        if unit is None:
            raise StateError(
                f"the factors are of another model: layer {name!r} is not among the covered layers of this one "
                f"({', '.join(by_name)}): use the model, include and exclude that they were made with"
            )
        grown = unit.blocks == 1 and unit.out >= shape[1]
        if (unit.blocks, unit.features) != (shape[0], shape[2]) or not (grown or unit.out == shape[1]):
            raise StateError(
                f"the factors are of another model: layer {name!r} is {[unit.blocks, unit.out, unit.features]} here "
                f"and {list(shape)} there (blocks, outputs, inputs; a bias counts as one)"
            )
    for name, own in curvature.diagonal.items():
        here = parameters.get(name)
        if here is None or here.shape != own.centre.shape:
            found = "not there" if here is None else str(tuple(here.shape))
            raise StateError(
                f"the diagonal terms are of another model: parameter {name!r} is {found}, expected "
                f"{tuple(own.centre.shape)}"
            )
