"""Training in which the whole vector of the parameters moves orthogonally to stored vectors: V (W_end - W_start) = 0.

As in `methods/projected.py`, on the gradient (g <- g - V^T (V g), enough for SGD without weight decay and with one
learning rate for all) or on the update (after the step W <- W - V^T V (W - W_start), right for every optimizer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.layers.norm import held_statistics
from avalanche_gradproj.linalg.orthogonal import OrthonormalRows
from avalanche_gradproj.linalg.rank_one import Projection, choose
from avalanche_gradproj.methods.flat import FlatMemory
from avalanche_gradproj.methods.optimizers import gradient_suffices


class FlatTraining:
    """One experience of training with projected steps.

    A parameter that does not train (it takes no gradient, or the optimizer does not have it) cannot take part in a
    step: the vectors are then restricted to the others and orthonormalised anew, in a copy.

    Where vectors are mostly outer products (gradients of one sample in linear layers), their span is removed through
    these: the same projection in less time (`linalg.rank_one.choose`, once at the start).

    Memory: a copy of the covered parameters (`W_start`), and the factors of outer products.

    Args:
        model: the model in training.
        optimizer: what takes the steps; None if unknown.
        covered: name -> parameter; must have every parameter of the memory that trains.
        memory: the vectors; none: training is free.
        apply_to: `"gradient"`, `"update"` or `"auto"`.
        hold_statistics: keep the running statistics of normalisation layers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        covered: Mapping[str, nn.Parameter],
        memory: FlatMemory,
        *,
        apply_to: str = "auto",
        hold_statistics: bool = False,
    ) -> None:
        self._model = model
        self._hold_statistics = hold_statistics
        stepped = _groups(optimizer)
        active = {
            name: parameter
            for name, parameter in covered.items()
            if parameter.requires_grad and (optimizer is None or id(parameter) in stepped)
        }
        if apply_to == "auto":
            one_rate = len({stepped[id(parameter)] for parameter in active.values()}) <= 1 if stepped else True
            apply_to = "gradient" if gradient_suffices(optimizer) and one_rate else "update"
        self.apply_to = apply_to
        #: Covered parameters that do not train.
        self.resting = [name for name in memory.shapes if name not in active]
        self._parameters: list[nn.Parameter] = []
        self._vectors: OrthonormalRows | None = None
        self._projection: Projection | None = None
        self._start: Tensor | None = None
        #: What is to be said about this training.
        self.notes = [f"projection acts on: {apply_to}"]
        if memory.vectors.count and active:
            self._restrict(memory, active)
            self._start = self._flatten(self._parameters)
            if apply_to == "gradient" and optimizer is not None:
                self._project_momentum(optimizer)

    def _restrict(self, memory: FlatMemory, active: Mapping[str, nn.Parameter]) -> None:
        pieces = [(name, place) for name, place in memory.pieces() if name in active]
        self._parameters = [active[name] for name, _ in pieces]
        self._vectors = memory.vectors
        if self.resting:
            rows = torch.cat([memory.vectors.rows[:, place] for _, place in pieces], dim=1)
            self._vectors = OrthonormalRows(rows.shape[1], dtype=rows.dtype, device=rows.device)
            self._vectors.add(rows)
            # What it is made of are parts of V, not of gradients: no outer products.
            self._vectors = OrthonormalRows.of(self._vectors.rows)
        chosen = choose(self._vectors, [memory.shapes[name] for name, _ in pieces], memory.projection)
        self._projection = chosen.projection
        self.notes.append(f"projection: {chosen.note}")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hold statistics while the context lasts."""
        if not self._hold_statistics:
            yield
            return
        with held_statistics(self._model):
            yield

    @torch.no_grad()
    def transform(self) -> None:
        """Project the gradients, in gradient mode.

        A parameter without a gradient counts as one with a gradient of zeros, and gets its part of the projection.
        """
        if self._projection is None or self.apply_to != "gradient":
            return
        gradients = [parameter.grad for parameter in self._parameters]
        if all(gradient is None for gradient in gradients):
            return
        projected = self._pieces(self._projection.remove(self._flatten(gradients)))
        for parameter, gradient, piece in zip(self._parameters, gradients, projected, strict=True):
            if gradient is None or gradient.is_sparse:
                parameter.grad = piece.to(parameter.dtype, copy=True)
        kept = [(g, piece) for g, piece in zip(gradients, projected, strict=True) if g is not None and not g.is_sparse]
        if kept:
            torch._foreach_copy_([gradient for gradient, _ in kept], [piece for _, piece in kept])

    @torch.no_grad()
    def after_step(self) -> None:
        """In update mode, take back the part of the step that the vectors span."""
        if self.apply_to == "update":
            self._return_to_subspace()

    def _return_to_subspace(self) -> None:
        if self._projection is None or self._start is None:
            return
        change = self._flatten(self._parameters) - self._start
        allowed = self._start + self._projection.remove(change)
        torch._foreach_copy_([parameter.detach() for parameter in self._parameters], self._pieces(allowed))

    @torch.no_grad()
    def finish(self) -> tuple[float | None, float | None]:
        """Remove what rounding (or another plugin) let through, and measure it before and after.

        Returns:
            Leak after and before the removal, ||V dW|| / max(||dW||, 1e-3 ||W_start||); None where nothing is stored.
            Before it, None also where a parameter is in half precision: what its rounding lets through looks like a
            mistake.
        """
        coarse = any(parameter.element_size() < 4 for parameter in self._parameters)
        before = None if coarse else self._leak()
        self._return_to_subspace()
        return self._leak(), before

    def _leak(self) -> float | None:
        if self._vectors is None or self._start is None:
            return None
        change = self._flatten(self._parameters) - self._start
        floor = torch.maximum(change.norm(), 1e-3 * self._start.norm())
        inside = self._vectors.coordinates(change).norm()
        return float(torch.where(floor > 0, inside / floor, torch.zeros_like(inside)))

    def _flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return tensors shaped like the parameters as one vector, zeros for None."""
        dtype = torch.float32 if self._vectors is None else self._vectors.rows.dtype
        return torch.cat(
            [
                torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
                if tensor is None
                else (tensor.to_dense() if tensor.is_sparse else tensor.detach()).reshape(-1).to(dtype)
                for parameter, tensor in zip(self._parameters, tensors, strict=True)
            ]
        )

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    @torch.no_grad()
    def _project_momentum(self, optimizer: Optimizer) -> None:
        """Project what the optimizer remembers of directions that were still allowed before."""
        buffers = [optimizer.state.get(parameter, {}).get("momentum_buffer") for parameter in self._parameters]
        if self._projection is None or all(held is None for held in buffers):
            return
        projected = self._pieces(self._projection.remove(self._flatten(buffers)))
        for parameter, piece in zip(self._parameters, projected, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = piece.to(parameter.dtype, copy=True)


def _groups(optimizer: Optimizer | None) -> dict[int, int]:
    """Return the parameter group of each parameter that an optimizer steps, by identity."""
    if optimizer is None:
        return {}
    return {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
