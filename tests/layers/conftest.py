"""Everything here runs in float64 unless a test says otherwise; `collect` runs a model under `record`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from avalanche_gradproj.layers.record import record
from avalanche_gradproj.layers.unit import Unit


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@dataclass
class Collected:
    """What came out of a model, and what each unit saw."""

    output: Tensor | None = None
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)

    def rows(self, name: str, call: int = 0) -> Tensor:
        """Rows [blocks, n, features] of one call."""
        return torch.cat(list(self.units[name].rows(self.inputs[name][call])), dim=1)

    def summed(self, name: str) -> Tensor:
        """Sum over calls and rows of (gradient at the output)^T row: [blocks, out, features]."""
        unit = self.units[name]
        # Calls come in the order of the forward pass, their gradients in the reverse order.
        pairs = zip(self.inputs[name], reversed(self.gradients[name]), strict=True)
        products = [unit.output_rows(gradient).mT @ torch.cat(list(unit.rows(x)), dim=1) for x, gradient in pairs]
        return torch.stack(products).sum(0)


@pytest.fixture(scope="session")
def collect() -> Callable[..., Collected]:
    """Return `collect(model, units, run)`: backward from a random combination of the outputs of `run()`."""

    def function(model: nn.Module, units: list[Unit], run: Callable[[], Tensor]) -> Collected:
        found = Collected(units={unit.name: unit for unit in units})
        model.zero_grad()
        with record(
            units,
            inputs=lambda unit, x: found.inputs.setdefault(unit.name, []).append(x),
            gradients=lambda unit, g: found.gradients.setdefault(unit.name, []).append(g),
        ):
            found.output = run()
            (found.output * torch.randn_like(found.output)).sum().backward()
        return found

    return function
