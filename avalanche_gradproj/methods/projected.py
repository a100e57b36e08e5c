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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from avalanche_gradproj.layers.inputs import ProjectedInputs, projected_inputs
from avalanche_gradproj.layers.norm import held_statistics
from avalanche_gradproj.layers.unit import ParameterSlice, Unit
from avalanche_gradproj.linalg.projection import Projector
from avalanche_gradproj.linalg.subspace import Basis


def gradient_suffices(optimizer: Optimizer | None) -> bool:
    """Whether a step made of projected gradients stays in their subspace.

    True for `torch.optim.SGD` itself (with any momentum, dampening, Nesterov) without weight decay: its step is a
    linear combination of the gradients it was given. Weight decay adds the weight, elementwise rules (Adam and its
    kin) leave every subspace, and of an unknown class nothing is known.
    """
    return type(optimizer) is SGD and all(group["weight_decay"] == 0 for group in optimizer.param_groups)


class ProjectedTraining:
    """One experience of training with projected steps.

    Memory: a copy of the projected and the frozen parameters (`W_start`), and per layer the constants of its route
    (at most features^2 numbers).

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
            apply_to = "gradient" if gradient_suffices(optimizer) else "update"
        self.apply_to = apply_to
        self._units = [unit for unit in units if bases[unit.name].rank > 0]
        # A layer without a free direction cannot learn: no gradient is cheaper than a gradient of zeros.
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
        self._without_gradient = [*self._frozen, *(part.parameter for unit in full for part in unit.slices)]
        self._learning = [unit for unit in self._units if unit not in full]
        owned = {part.name: part.parameter for unit in self._units for part in unit.slices}
        self._start = {name: parameter.detach().clone() for name, parameter in owned.items()}
        self._frozen_start = [parameter.detach().clone() for parameter in self._frozen]
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
        for parameter in self._without_gradient:
            parameter.grad = None
        if self.apply_to != "gradient" and not self._monitor:
            return
        for unit in self._learning:
            layer = self._inputs.get(unit.name)
            formed = self._pending.pop(unit.name, None)
            if layer is not None and layer.is_projected() and trusted:
                if formed is not None:
                    self._count(unit.name, formed)
                continue
            gradient = unit.gradient()
            if gradient is None:
                continue
            projector = self.projectors[unit.name]
            if self._monitor:
                sums = _squares(projector.inside(gradient), gradient)
                # What was removed while the gradient was formed is orthogonal to what is left of it.
                self._count(unit.name, sums if formed is None else sums + formed[0])
            if self.apply_to == "gradient":
                unit.write_gradient(projector.remove(gradient))

    @torch.no_grad()
    def after_step(self) -> None:
        """In update mode, take back the part of the step that lies in the basis, and frozen parameters' moves."""
        if self.apply_to == "update":
            self._return_to_subspace()

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
            change of the weight over the experience.
        """
        before = self._leak()
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
            state = optimizer.state.get(part.parameter, {})
            held: Tensor | None = state.get("momentum_buffer")
            return held

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


def _squares(removed: Tensor, whole: Tensor) -> Tensor:
    return torch.stack([removed.double().square().sum(), whole.double().square().sum()])


def _present(buffer: Tensor | None, part: ParameterSlice) -> Tensor:
    return torch.zeros_like(part.parameter) if buffer is None else buffer
