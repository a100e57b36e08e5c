"""Between a model and the quadratic forms on it: forms from factors, penalties from forms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from avalanche_gradproj.errors import ModelError
from avalanche_gradproj.layers.select import Coverage
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.methods.kfac_curvature import Curvature, DiagonalCurvature, LayerCurvature, place
from avalanche_gradproj.methods.kfac_penalty import DiagonalSite, Form, MatrixSite, QuadraticPenalty
from avalanche_gradproj.methods.kfac_sums import FactorSums


def refuse_compiled(coverage: Coverage) -> None:
    """Refuse layers inside what `torch.compile` made.

    Raises:
        ModelError: naming the first one.
    """
    for unit in coverage.units:
        if "_orig_mod" in unit.name.split("."):
            raise ModelError(
                f"layer {unit.name!r} is inside a module made by torch.compile, which runs without the hooks that "
                "factors are taken with: give the model that torch.compile was given (model._orig_mod), or exclude it"
            )


def recentred(coverage: Coverage, held: Collection[str] = ()) -> Curvature:
    """Return a form of weight 0 without terms, centred on the present weights of every layer and other parameter.

    Args:
        coverage: the model.
        held: parameters that have diagonal terms, whatever they are part of now.
    """
    layers = {unit.name: LayerCurvature((), _centre(unit)) for unit in coverage.units}
    diagonal = {}
    for name in {**dict.fromkeys(coverage.frozen), **dict.fromkeys(held)}:
        device, dtype = place(coverage.parameters[name])
        centre = coverage.parameters[name].detach().to(device=device, dtype=dtype, copy=True)
        diagonal[name] = DiagonalCurvature(torch.zeros_like(centre), centre)
    return Curvature(0.0, layers, diagonal)


def curvature_of(coverage: Coverage, sums: FactorSums, weight: float, *, known: Collection[str] = ()) -> Curvature:
    """Return the form of an experience, centred on the present weights.

    A layer that was not called, or on which no loss depends, has no part in it; one that was trained and not seen here
    is warned of.

    Args:
        coverage: the model.
        sums: what the pass over the data gave.
        weight: strength times the number of samples.
        known: layers under penalty, which may well have a gradient without having been called.
    """
    here = recentred(coverage)
    layers = {}
    for unit in coverage.units:
        layer = sums.layers[unit.name]
        terms = layer.terms(sums.samples)
        if layer.inputs.count == 0 and unit.weight.parameter.grad is not None and unit.name not in known:
            warnings.warn(
                f"layer {unit.name!r} was trained but never called while factors were taken (it is used in training "
                "mode alone, its weight is used outside of it, or it runs without gradients there): what it learned is "
                "not protected",
                stacklevel=3,
            )
        if terms:
            device, dtype = place(unit.weight.parameter)
            own = tuple(term.to(device, dtype) for term in terms)
            layers[unit.name] = LayerCurvature(own, here.layers[unit.name].centre, weight)
    diagonal = {}
    for name, squares in sums.diagonal.items():
        centre = here.diagonal[name].centre
        diagonal[name] = DiagonalCurvature((squares / sums.samples).to(centre), centre, weight)
    return Curvature(weight, layers, diagonal)


def penalty_of(
    coverage: Coverage,
    forms: Sequence[Curvature],
    samples: float,
    damping: float,
    refresh_every: int = 1,
    tensors: Callable[[Unit], Callable[[], tuple[Tensor, ...]]] | None = None,
) -> QuadraticPenalty | None:
    """Return the penalty that forms are on a model in training, or None where they say nothing.

    Args:
        coverage: the model.
        forms: each of an own centre.
        samples: N by which the sum is divided, since the loss is a mean over that many samples.
        damping: added to every eigenvalue of a sample's curvature.
        refresh_every: calls for which parts of the products may be kept (`linalg.kept`).
        tensors: how the tensors of a unit are had at each step; None where they are its parameters.

    Raises:
        ModelError: if parameters with diagonal terms live on several devices.
    """
    matrices = []
    for unit in coverage.units:
        own = []
        for form in forms:
            layer, factor = form.layers.get(unit.name), form.weight / samples
            if layer is not None and layer.terms and factor:
                # Damping counts the experiences that used the layer.
                own_damping = damping * layer.input_weight / form.weight
                terms = [term.scaled(factor, 0.0 if index else own_damping) for index, term in enumerate(layer.terms)]
                own.append(Form(terms, layer.centre))
        if own and any(parameter.requires_grad for parameter in unit.parameters):
            if tensors is None:
                matrices.append(MatrixSite(unit.tensors, own, refresh_every, unit.slices))
            else:
                matrices.append(MatrixSite(tensors(unit), own, refresh_every))
    diagonal = _diagonal(coverage, forms, samples, damping)
    return QuadraticPenalty(matrices, diagonal, refresh_every) if matrices or diagonal is not None else None


def _diagonal(coverage: Coverage, forms: Sequence[Curvature], samples: float, damping: float) -> DiagonalSite | None:
    forms = [form for form in forms if form.weight and form.diagonal]
    known = {name for form in forms for name in form.diagonal}
    chosen = {name: p for name, p in coverage.parameters.items() if name in known and p.requires_grad}
    if not chosen:
        return None
    if len({parameter.device for parameter in chosen.values()}) > 1:
        raise ModelError(
            f"the parameters {', '.join(chosen)} have diagonal terms, which make up one vector, and live on several "
            "devices: put the model on one device, or exclude some"
        )
    curvatures, centres = [], []
    for form in forms:
        values, places = [], []
        for name, parameter in chosen.items():
            own = form.diagonal.get(name)
            _, dtype = place(parameter)
            absent = torch.zeros_like(parameter, dtype=dtype).flatten()
            # What was not there in an experience has no curvature of it, and no damping.
            if own is None:
                values.append(absent)
            else:
                values.append((own.values.flatten() * form.weight + damping * own.weight) / samples)
            places.append(absent if own is None else own.centre.flatten())
        curvatures.append(torch.cat(values))
        centres.append(torch.cat(places))
    return DiagonalSite(list(chosen.values()), curvatures, centres)


def _centre(unit: Unit) -> Tensor:
    device, dtype = place(unit.weight.parameter)
    return unit.weights().to(device=device, dtype=dtype, copy=True)
