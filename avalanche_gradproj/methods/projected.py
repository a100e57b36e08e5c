"""Training within allowed subspaces: the part of an experience that all projection methods share.

Every covered weight W may change only orthogonally to its layer's basis M: (W_end - W_start) M = 0. Two ways:

- on the gradient: G <- G - (G M) M^T, enough for SGD without weight decay (momentum buffers are projected when the
  basis has grown); finished gradients are projected after the backward pass, or, for Linear layers with few rows in
  the batch, formed from projected inputs (`layers/inputs.py`);
- on the update: after the optimizer's step, W <- W - ((W - W_start) M) M^T, right for every optimizer. Taking the
  start of the experience instead of the weight before the step is the same in exact arithmetic, needs no copy a step,
  and keeps rounding from adding up.

At the end of an experience the same correction removes what rounding let through in gradient mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.layers.inputs import ProjectedInputs, projected_inputs
from avalanche_gradproj.layers.norm import held_statistics
from avalanche_gradproj.layers.unit import ParameterSlice, Unit
from avalanche_gradproj.linalg.projection import Projector
from avalanche_gradproj.linalg.subspace import Basis
from avalanche_gradproj.methods.optimizers import basis_of_movable, gradient_suffices, momentum_of, movable

#: Leak, before the correction at the end of an experience, that rounding cannot explain.
STRAY = 1e-2


class ProjectedTraining:
    """One experience of training with projected steps.

    Memory: a copy of the projected and the frozen parameters (`W_start`), and per layer the constants of its route
    (up to 3 features^2 numbers, twice that where they are laid out for oneDNN).

    Args:
        model: the model in training.
        optimizer: what takes the steps; None if unknown.
        units: covered layers.
        bases: basis of each layer, by name; layers with an empty one train freely.
        frozen: parameters that must not move.
        apply_to: `"gradient"`, `"update"` or `"auto"` (see `gradient_suffices`).
        route: a route of `linalg.projection`, `"inputs"` or `"auto"`.
        hold_statistics: keep the running statistics of normalisation layers.
        monitor: also sum up which share of the gradient is removed (see `removed`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        units: Sequence[Unit],
        bases: Mapping[str, Basis],
        frozen: Sequence[nn.Parameter],
        *,
        apply_to: str = "auto",
        route: str = "auto",
        hold_statistics: bool = False,
        monitor: bool = False,
    ) -> None:
        self._model = model
        if apply_to == "auto":
            matrices = [[part.parameter for part in unit.slices] for unit in units if bases[unit.name].rank > 0]
            apply_to = "gradient" if gradient_suffices(optimizer, matrices) else "update"
        self.apply_to = apply_to
        # A layer of which nothing can move needs nothing.
        self._units = [
            unit
            for unit in units
            if bases[unit.name].rank > 0 and any(movable(optimizer, part.parameter) for part in unit.slices)
        ]
        bases = {unit.name: basis_of_movable(unit, bases[unit.name], optimizer) for unit in self._units}
        # A layer without a free direction cannot learn: its gradient is zero, without a product.
        full = (
            [] if monitor or apply_to != "gradient" else [u for u in self._units if bases[u.name].full and u.is_whole]
        )
        inner = "auto" if route == "inputs" else route
        self.projectors = {unit.name: Projector(bases[unit.name], route=inner) for unit in self._units}
        self._inputs = {
            unit.name: layer
            for unit in self._units
            if unit not in full and unit.input_route and route in ("auto", "inputs") and apply_to == "gradient"
            if (layer := ProjectedInputs(unit, self.projectors[unit.name], forced=route == "inputs")).worthwhile()
        }
        self._frozen = [parameter for parameter in frozen if parameter.requires_grad]
        self._standing = [part.parameter for unit in full for part in unit.slices]
        owned = {part.name: part.parameter for unit in self._units for part in unit.slices}
        self._start = {name: parameter.detach().clone() for name, parameter in owned.items()}
        self._frozen_start = [parameter.detach().clone() for parameter in self._frozen]
        self._plan = [
            (unit, self._inputs.get(unit.name), self.projectors[unit.name], None if monitor else _plain_weight(unit))
            for unit in self._units
            if unit not in full
        ]
        self._hold_statistics = hold_statistics
        #: Layer name -> sums over the steps of squared Frobenius norms, [removed part of the gradient, whole gradient],
        #: on the device. Cross terms between the layer's own gradient and other terms on its weight are left out.
        self.removed: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._monitor = monitor
        if monitor:
            for name, layer in self._inputs.items():
                layer.monitor = self._input_monitor(name)
        if apply_to == "gradient" and optimizer is not None:
            self._project_momentum(optimizer)

    def listen(self, listening: bool) -> None:
        """Say whether the coming forward passes are those of training steps; others get their gradients whole."""
        for layer in self._inputs.values():
            layer.listening = listening

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hold statistics and take over backward passes while the context lasts."""
        with ExitStack() as stack:
            if self._hold_statistics:
                stack.enter_context(held_statistics(self._model))
            stack.enter_context(projected_inputs(self._inputs.values()))
            yield

    @torch.no_grad()
    def transform(self, *, trusted: bool = True) -> None:
        """Project the gradients (in gradient mode) and drop those of frozen parameters.

        A parameter without a gradient is skipped by every optimizer of torch, also by momentum and weight decay.
        """
        for parameter in self._frozen:
            parameter.grad = None
        for parameter in self._standing:
            if parameter.grad is not None:
                parameter.grad.zero_()
        if self.apply_to != "gradient" and not self._monitor:
            return
        for unit, layer, projector, plain in self._plan:
            formed = self._pending.pop(unit.name, None)
            if layer is not None and layer.is_projected() and trusted:
                if formed is not None:
                    self._count(unit.name, formed)
                continue
            if plain is not None:  # the same as below, for a weight that is its layer's whole matrix
                if plain.grad is not None:
                    plain.grad = projector.remove(plain.grad)
                continue
            gradient = unit.gradient()
            if gradient is None:
                continue
            if self._monitor:
                sums = _squares(projector.inside(gradient), gradient)
                # What was removed while the gradient was formed is orthogonal to what is left of it.
                self._count(unit.name, sums if formed is None else sums + formed[0])
            if self.apply_to == "gradient":
                unit.write_gradient(projector.remove(gradient))

    def after_step(self) -> None:
        """In update mode, take back the part of the step that lies in the basis, and frozen parameters' moves."""
        if self.apply_to == "update":
            self._return_to_subspace()

    @torch.no_grad()
    def _return_to_subspace(self) -> None:
        for unit in self._units:
            start = self._started(unit)
            change = unit.weights() - start
            unit.write_weights(start + self.projectors[unit.name].remove(change))
        if self._frozen:
            torch._foreach_copy_([parameter.detach() for parameter in self._frozen], self._frozen_start)

    @torch.no_grad()
    def finish(self) -> tuple[dict[str, float], dict[str, float]]:
        """Remove what rounding (or another plugin) let through, and measure it before and after.

        Returns:
            Leak by layer name after and before the removal: ||dW M||_F / max(||dW||_F, 1e-3 ||W_start||_F), dW the
            change of the weight over the experience. Before it, layers in half precision are left out: what their
            rounding lets through looks like a mistake.
        """
        coarse = {unit.name for unit in self._units if unit.weight.parameter.element_size() < 4}
        before = {name: value for name, value in self._leak().items() if name not in coarse}
        self._return_to_subspace()
        return self._leak(), before

    def _leak(self) -> dict[str, float]:
        ratios = []
        for unit in self._units:
            start = self._started(unit)
            change = unit.weights() - start
            floor = torch.maximum(change.norm(), 1e-3 * start.norm())
            inside = self.projectors[unit.name].inside(change).norm()
            ratios.append(torch.where(floor > 0, inside / floor, torch.zeros_like(inside)).double())
        names = [unit.name for unit in self._units]
        return dict(zip(names, torch.stack(ratios).tolist() if ratios else [], strict=True))

    def _started(self, unit: Unit) -> Tensor:
        start = unit.matrix(lambda part: self._start[part.name])
        return start if start is not None else torch.empty(0)

    @torch.no_grad()
    def _project_momentum(self, optimizer: Optimizer) -> None:
        """Project what the optimizer remembers of directions that were still allowed before."""

        def buffer(part: ParameterSlice) -> Tensor | None:
            return momentum_of(optimizer, part.parameter)

        for unit in self._units:
            momentum = unit.gather(buffer)
            if momentum is None:
                continue
            projected = self.projectors[unit.name].remove(momentum)
            unit.write(projected, lambda part: _present(buffer(part), part))

    def _count(self, name: str, sums: Tensor) -> None:
        self.removed[name] = self.removed[name] + sums if name in self.removed else sums

    def _input_monitor(self, name: str) -> Callable[[Tensor, Tensor], None]:
        """Return the monitor of a layer whose gradient D^T A is never formed whole: norms through n x n products."""
        projector = self.projectors[name]

        def monitor(rows: Tensor, gradients: Tensor) -> None:
            if projector.basis.features > rows.shape[1]:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            inside = projector.inside(rows)
            outer = (gradients @ gradients.T).double()
            sums = torch.stack([(outer * (inside @ inside.T)).sum(), (outer * (rows @ rows.T)).sum()])
            self._pending[name] = self._pending[name] + sums if name in self._pending else sums

        return monitor


def warn_of_stray(stray: Mapping[str, float], apply_to: str) -> None:
    """Warn where more than rounding had to be taken back at the end of an experience.

    Args:
        stray: layer name -> leak before the correction.
        apply_to: what was projected.
    """
    worst = max(stray, key=lambda name: stray[name], default=None)
    if worst is not None and stray[worst] > STRAY:
        warnings.warn(
            f"layer {worst!r}: {100 * stray[worst]:.1f} % of its change over the experience lay in the protected "
            f"subspace and was taken back at its end; something changed gradients or weights after that "
            f"(apply_to={apply_to!r}): use apply_to='update', or put that plugin first",
            stacklevel=3,
        )


def _plain_weight(unit: Unit) -> nn.Parameter | None:
    """Return the weight [out, features] that is all of the unit's matrix, None where there is more to it."""
    weight = unit.weight.parameter
    whole = unit.bias is None and unit.weight.is_whole and weight.shape == (unit.out, unit.features)
    return weight if whole and weight.element_size() >= 4 else None


def _squares(removed: Tensor, whole: Tensor) -> Tensor:
    return torch.stack([removed.double().square().sum(), whole.double().square().sum()])


def _present(buffer: Tensor | None, part: ParameterSlice) -> Tensor:
    return torch.zeros_like(part.parameter) if buffer is None else buffer
