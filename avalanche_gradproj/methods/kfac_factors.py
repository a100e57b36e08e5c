"""One pass of data through a model: the Kronecker factors of every layer, and squared gradients of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_gradproj.errors import DataError, ModelError, NonFiniteError
from avalanche_gradproj.layers.coupling import entering, upstream
from avalanche_gradproj.layers.norm import batch_statistics
from avalanche_gradproj.layers.record import undisturbed, watch
from avalanche_gradproj.layers.scale import Scale, batch_dependent, scales_of, watch_scales
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.moment_sums import MomentSums
from avalanche_gradproj.methods.base import Forward
from avalanche_gradproj.methods.kfac_labels import (
    Criterion,
    check_logits,
    directions_of,
    refuse_reentrant,
    run_on,
    samples_of,
)
from avalanche_gradproj.methods.kfac_sums import FactorSums, LayerSums
from avalanche_gradproj.methods.logit_gradients import Route, weighted_gradients


class FactorPass:
    """Streams mini-batches through a model and sums up what Kronecker factors are made of.

    The backward pass ends at the outputs of the layers: no gradient of a weight is formed.

    Args:
        model: left as it was: modes, gradients, statistics, random states.
        units: the matrix layers.
        diagonal: names of other parameters whose squared gradients are wanted. Scale and shift of normalisation layers
            come with the same pass; any other kind needs one forward and backward pass a sample.
        fisher: see `linalg.cross_entropy.logit_directions`. With `"exact"`, where samples influence each other in the
            mini-batch, each direction gets a random sign a sample, so that their cross terms vanish on average.
        generator: of drawn labels and signs, on the host.
        forward: runs the model on a batch; default `model(batch)`, or `model(batch[0])` for a tuple.
        criterion: mean loss of which `"empirical"` takes the gradient; None for cross-entropy.
        extended: sum up what terms across samples are made of (see `kfac_sums.LayerSums.terms`).
        by_batch: BatchNorms that normalise by the mini-batch in this pass, though the model is in evaluation mode.
            Where a diagonal takes one pass a sample, they normalise by their running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        *,
        diagonal: Sequence[str] = (),
        fisher: str = "sampled",
        generator: torch.Generator | None = None,
        forward: Forward | None = None,
        criterion: Criterion | None = None,
        extended: bool = False,
        by_batch: Sequence[_BatchNorm] = (),
    ) -> None:
        self._model, self._units = model, list(units)
        self._fisher, self._generator, self._criterion = fisher, generator, criterion
        self._forward = forward
        self._extended, self._by_batch = extended, by_batch
        self._scales = scales_of(model, diagonal)
        of_scales = {name for scale in self._scales for name in scale.parameters.values()}
        self._others = [name for name in diagonal if name not in of_scales]
        self._route, self._called = Route(), False
        self.sums = FactorSums({u.name: LayerSums(*_moments(u)) for u in self._units})

    def run(self, batches: Iterable[Any]) -> FactorSums:
        """Add all mini-batches.

        Args:
            batches: tensors of samples, or tuples whose first element is one; `(inputs, targets, ...)` for
                `"empirical"`.

        Raises:
            DataError: for no samples, inputs that are no tensors, missing or wrong targets, or one sample alone where
                layers normalise by batch.
            ModelError: if the output is not logits [n, classes], a parameter's gradient cannot be told by sample, or
                layers are run where nobody can watch them (torch.compile, reentrant checkpoints, inference mode).
            NonFiniteError: for infinite values, naming the layer or parameter.
        """
        if torch.is_inference_mode_enabled():
            raise ModelError("factors are made of gradients, which torch.inference_mode() forbids: call it outside")
        with undisturbed(self._model):
            _refuse_coupled(self._others, batch_dependent(self._model))
            for batch in batches:
                self._add(batch)
        if self.sums.samples == 0:
            raise DataError("no sample came, and the factors need some: give the batches of the experience")
        if self._units and not self._called:
            raise ModelError(
                "none of the covered layers was called in the pass over the data, so that nothing would be protected: "
                "torch.compile runs a model without its modules' hooks (give the model that it was given, "
                "model._orig_mod), or the data uses other layers (see include and exclude)"
            )
        self._refuse_non_finite()
        return self.sums

    def _add(self, batch: Any) -> None:
        size = samples_of(batch)
        if size == 0:
            return
        with batch_statistics(self._by_batch):
            directions, unclear = self._add_factors(batch, size, batch_dependent(self._model))
        if unclear:
            _refuse_coupled(list(unclear), batch_dependent(self._model))
        if self._others or unclear:
            if self._by_batch:  # what the model predicts there is another distribution
                logits = run_on(self._model, batch, self._forward)
                check_logits(logits, size)
                directions = self._directions(logits, batch, signs=False)
            self._add_others([*self._others, *unclear], batch, size, directions)
        self.sums.samples += size

    def _directions(self, logits: Tensor, batch: Any, *, signs: bool) -> list[Tensor]:
        return list(directions_of(logits, batch, self._fisher, self._generator, self._criterion, signs=signs))

    def _add_factors(self, batch: Any, size: int, coupled: list[str]) -> tuple[list[Tensor], dict[str, None]]:
        """Add what comes with one pass of the mini-batch; return its directions, and names that need other passes."""
        if size == 1 and coupled:
            raise DataError(
                f"a mini-batch of one sample came, and layer {coupled[0]!r} normalises by the mini-batch: give batches "
                "of two or more (another record_batch_size)"
            )
        calls: list[tuple[Unit, GradientEdge, slice]] = []
        norms: list[tuple[Scale, Tensor, GradientEdge]] = []
        entered: list[Node] = []
        unclear: dict[str, None] = {}  # parameters of normalisation layers that take one pass a sample too

        def on_call(unit: Unit, x: Tensor, output: Tensor, columns: slice) -> Tensor:
            self._called = True
            if not torch.is_grad_enabled():  # the model's own no_grad: no gradient reaches the layer
                return output
            for rows in unit.bare_rows(x.detach()):
                self.sums.layers[unit.name].inputs.update(rows, mean=self._extended)
            output = _own(output)
            calls.append((unit, get_gradient_edge(output), columns))
            return output

        def on_scale(scale: Scale, x: Tensor, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            if not scale.tells_samples(x, size):
                unclear.update(dict.fromkeys(scale.parameters.values()))
                return output
            output = _own(output)
            norms.append((scale, x.detach(), get_gradient_edge(output)))
            return output

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(watch(self._units, on_call))
            stack.enter_context(watch_scales(self._scales, on_scale))
            if self._extended:
                stack.enter_context(entering([self._model.get_submodule(name) for name in coupled], entered))
            logits = run_on(self._model, batch, self._forward)
        check_logits(logits, size)
        if self.sums.samples == 0:
            refuse_reentrant(logits)
        before = upstream(entered)
        for unit, edge, _ in calls:
            self.sums.layers[unit.name].coupled |= edge.node in before
        norms = [norm for norm in norms if not unclear.keys() & norm[0].parameters.values()]
        directions = self._directions(logits, batch, signs=bool(coupled))
        edges = list({_key(edge): edge for edge in [call[1] for call in calls] + [norm[2] for norm in norms]}.values())
        for index, direction in enumerate(directions if edges else ()):
            last = index == len(directions) - 1
            found = torch.autograd.grad(logits, edges, direction, retain_graph=not last, allow_unused=True)
            gradients = {_key(edge): value for edge, value in zip(edges, found, strict=True)}
            self._add_layers(calls, gradients)
            self._add_scales(norms, gradients, size)
        return directions, unclear

    def _add_layers(
        self, calls: list[tuple[Unit, GradientEdge, slice]], gradients: Mapping[Any, Tensor | None]
    ) -> None:
        totals: dict[str, Tensor] = {}
        for unit, edge, columns in calls:
            gradient = gradients[_key(edge)]
            if gradient is None:
                continue
            rows = unit.output_rows(gradient if columns == slice(None) else gradient[..., columns])
            self.sums.layers[unit.name].outputs.update(rows)
            if self._extended:
                total = rows.sum(dim=1, keepdim=True)
                totals[unit.name] = totals[unit.name] + total if unit.name in totals else total
        for name, total in totals.items():
            self.sums.layers[name].totals.update(total)

    def _add_scales(
        self, norms: list[tuple[Scale, Tensor, GradientEdge]], gradients: Mapping[Any, Tensor | None], size: int
    ) -> None:
        of_samples: dict[str, Tensor] = {}  # a layer that is called twice has one gradient a sample
        for scale, x, edge in norms:
            gradient = gradients[_key(edge)]
            if gradient is not None:
                for name, own in scale.sample_gradients(x, gradient, size).items():
                    of_samples[name] = of_samples[name] + own if name in of_samples else own
        for name, own in of_samples.items():
            self._square(name, own)

    def _add_others(self, names: Sequence[str], batch: Any, size: int, directions: list[Tensor]) -> None:
        forward, parts = self._forward, batch
        if isinstance(batch, Tensor):
            given, parts = forward, (batch,)
            forward = None if given is None else lambda model, own: given(model, own[0])
        samples = torch.arange(size, device=directions[0].device).repeat(len(directions))
        weights = torch.cat(directions)
        for found in weighted_gradients(
            self._model, names, parts, samples, weights, forward=forward, route=self._route
        ):
            for name, own in zip(names, found, strict=True):
                self._square(name, own)

    def _square(self, name: str, gradients: Tensor) -> None:
        """Add the squares of gradients [n, *shape]."""
        wide = gradients.float() if gradients.element_size() < 4 else gradients
        squares = wide.square().sum(0)
        squares = squares if squares.device.type == "mps" else squares.double()
        held = self.sums.diagonal.get(name)
        self.sums.diagonal[name] = squares if held is None else held + squares

    def _refuse_non_finite(self) -> None:
        for name, layer in self.sums.layers.items():
            for what, moments in (("its input", layer.inputs), ("its output's gradient", layer.outputs)):
                if not moments.is_finite():
                    raise NonFiniteError(
                        f"layer {name!r}: {what} holds an infinity or a NaN, so that its factor would not be positive "
                        "semi-definite: training has diverged (lower the learning rate) or the data holds one"
                    )
        for name, squares in self.sums.diagonal.items():
            if not bool(torch.isfinite(squares).all()):
                raise NonFiniteError(
                    f"parameter {name!r} has a gradient that is an infinity or a NaN: training has diverged (lower the "
                    "learning rate) or the data holds one"
                )


def _moments(unit: Unit) -> tuple[MomentSums, MomentSums, MomentSums]:
    blocks = unit.blocks
    inputs = MomentSums(blocks, unit.features, constant=unit.constant)
    return inputs, MomentSums(blocks, unit.out), MomentSums(blocks, unit.out)


def _key(edge: GradientEdge) -> Any:
    return edge.node, edge.output_nr


def _refuse_coupled(names: Sequence[str], coupled: Sequence[str]) -> None:
    if names and coupled:
        raise ModelError(
            f"the term of parameter {names[0]!r} takes one pass a sample (it belongs to no matrix or normalisation "
            "layer, or to one whose input does not tell samples apart by its first axis), and layer "
            f"{coupled[0]!r} normalises by the mini-batch: exclude the parameter, or let the layer keep running "
            "statistics"
        )


def _own(output: Tensor) -> Tensor:
    """Return an output whose place in the graph is safe from operations in place, and that takes a gradient."""
    if not output.requires_grad:  # a layer whose weight takes none at present
        return output.detach().requires_grad_().clone()
    return output.clone() if output._is_view() else output
