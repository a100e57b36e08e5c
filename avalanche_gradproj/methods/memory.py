"""One orthonormal basis a layer, kept between experiences: the memory of projection methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.subspace import Basis


class BasisMemory(Mapping[str, Basis]):
    """Layer name -> basis, in the model's order.

    Memory: 4 r d bytes a block in float32, r its rank and d the layer's inputs.
    """

    def __init__(self) -> None:
        self._bases: dict[str, Basis] = {}

    def __getitem__(self, layer: str) -> Basis:
        return self._bases[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)

    @property
    def bytes_held(self) -> int:
        """Bytes of all columns."""
        return sum(basis.columns.numel() * basis.columns.element_size() for basis in self.values())

    def blocks(self) -> dict[str, list[Tensor]]:
        """Return layer name -> orthonormal columns [d, r] of each block."""
        return {name: basis.per_block() for name, basis in self.items()}

    def attach(self, units: Sequence[Unit]) -> None:
        """Give every layer a basis (an empty one where it has none) of its weight's type, on its device.

        Weights in half precision get a basis in float32.

        Args:
            units: the covered layers.

        Raises:
            StateError: if a basis is of a layer that is not among them, or of another shape; nothing changes then.
        """
        by_name = {unit.name: unit for unit in units}
        for name, basis in self.items():
            unit = by_name.get(name)
            if unit is None:
                raise StateError(
                    f"the bases are of another model: layer {name!r} is not among the covered layers of this one "
                    f"({', '.join(by_name)}): use the model, include and exclude that they were made with"
                )
            if (unit.blocks, unit.features) != (len(basis.ranks), basis.features):
                raise StateError(
                    f"the bases are of another model: layer {name!r} has {unit.blocks} block(s) of {unit.features} "
                    f"input features here and {len(basis.ranks)} of {basis.features} there (a bias counts as one)"
                )
        attached = {}
        for unit in units:
            weight = unit.weight.parameter
            dtype = torch.float32 if weight.element_size() < 4 else weight.dtype
            held = self._bases.get(unit.name) or Basis.empty(unit.blocks, unit.features, dtype, weight.device)
            attached[unit.name] = Basis(held.columns.to(device=weight.device, dtype=dtype), held.ranks)
        self._bases = attached

    def replace(self, bases: Mapping[str, Basis]) -> None:
        """Put new bases in the place of all old ones, at once."""
        self._bases = dict(bases)

    def state(self) -> dict[str, list[Tensor]]:
        """Return copies of all columns, on the host."""
        return {name: [columns.detach().cpu().clone() for columns in blocks] for name, blocks in self.blocks().items()}

    def load(self, state: Any) -> None:
        """Take the bases of a state.

        Raises:
            StateError: if it is no such state, or a layer that is already here has another shape; nothing changes then.
        """
        try:
            loaded = {str(name): Basis.from_blocks(blocks) for name, blocks in state.items()}
            for name, basis in loaded.items():
                _check_orthonormal(name, basis)
        except (AttributeError, IndexError, TypeError, RuntimeError) as error:
            raise StateError(
                f"the state's bases are damaged ({error}): expected a dict of layers, tensors [d, r]"
            ) from error
        for name, basis in self.items():
            other = loaded.get(name)
            if other is None or (len(other.ranks), other.features) != (len(basis.ranks), basis.features):
                found = "nothing" if other is None else f"{len(other.ranks)} block(s) of {other.features} features"
                raise StateError(
                    f"the state is of another model: for layer {name!r} it holds {found}, expected "
                    f"{len(basis.ranks)} block(s) of {basis.features} features"
                )
        self._bases = loaded


def _check_orthonormal(name: str, basis: Basis) -> None:
    """Refuse columns that no basis can have.

    Raises:
        TypeError: naming the layer, turned into a `StateError` by the caller.
    """
    if not basis.columns.is_floating_point() or basis.rank > basis.features:
        raise TypeError(f"layer {name!r} holds {basis.columns.dtype} {tuple(basis.columns.shape)}")
    for columns in basis.per_block():
        product = columns.double().T @ columns.double()
        if not torch.allclose(product, torch.eye(len(product), dtype=torch.float64), atol=1e-3):
            raise TypeError(f"the columns of layer {name!r} are not orthonormal")
