"""Gradients of several losses side by side in one flat buffer, and which of its columns form a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from avalanche_gradproj.errors import ConfigurationError, ModelError
from avalanche_gradproj.linalg.gram import gram_matrix

#: Block of the parameters that the model itself holds, outside of any layer.
OWN = "(model)"


def partition(names: Sequence[str], blocks: str | int) -> dict[str, list[str]]:
    """Return block name -> names of its parameters.

    Args:
        names: parameters in the model's order.
        blocks: `"layer"`: all parameters of one module; `"network"`: all together; or a number of consecutive
            parameter tensors, the last block being what is left.

    Raises:
        ConfigurationError: if there are fewer tensors than one block is to hold.
    """
    if blocks == "network":
        return {"network": list(names)}
    parts: dict[str, list[str]] = {}
    if isinstance(blocks, int):
        if blocks > len(names):
            raise ConfigurationError(
                f"blocks={blocks!r}: the model has {len(names)} decomposed parameter tensors ({', '.join(names[:4])}"
                f"{', ...' if len(names) > 4 else ''}): give at most so many, 'layer' or 'network'"
            )
        for first in range(0, len(names), blocks):
            run = list(names[first : first + blocks])
            parts[run[0] if len(run) == 1 else f"{run[0]} .. {run[-1]}"] = run
        return parts
    for name in names:
        parts.setdefault(name.rpartition(".")[0] or OWN, []).append(name)
    return parts


class GradientBlocks:
    """K + 1 gradients [K + 1, p] of one model, block after block.

    Memory: (K + 1) p numbers, and p for the update.

    Args:
        parameters: name -> parameter, those that are decomposed.
        blocks: block name -> names of its parameters.
        count: K, the number of old gradients; the last row is for the gradient of the mini-batch.

    Raises:
        ModelError: if the parameters lie on several devices.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], blocks: Mapping[str, Sequence[str]], count: int) -> None:
        self.names = list(blocks)
        self.parameters = {name: parameters[name] for block in blocks.values() for name in block}
        devices = {str(parameter.device) for parameter in self.parameters.values()}
        if len(devices) > 1:
            raise ModelError(
                f"the decomposed parameters lie on several devices ({', '.join(sorted(devices))}): put the model on "
                "one, or exclude the parameters of all but one"
            )
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters.values())
        first = next(iter(self.parameters.values()))
        self.spans: dict[str, tuple[int, int]] = {}
        self.bounds: list[tuple[int, int]] = []
        end = 0
        for block in blocks.values():
            begin = end
            for name in block:
                self.spans[name] = (end, end + self.parameters[name].numel())
                end = self.spans[name][1]
            self.bounds.append((begin, end))
        dtype = torch.float64 if double else torch.float32
        self.rows = torch.zeros(count + 1, end, dtype=dtype, device=first.device)
        self._update = torch.empty(end, dtype=dtype, device=first.device)

    @property
    def bytes_held(self) -> int:
        """Bytes of the buffers."""
        return (self.rows.numel() + self._update.numel()) * self.rows.element_size()

    def view(self, rows: int | slice, name: str) -> Tensor:
        """Return the part of some rows that belongs to a parameter: [..., *shape], a view."""
        begin, end = self.spans[name]
        part = self.rows[rows, begin:end]
        return part.view(*part.shape[:-1], *self.parameters[name].shape)

    def put(self, row: int, gradients: Mapping[str, Tensor | None]) -> None:
        """Write one gradient, zeros where there is none.

        Args:
            row: which of the K + 1.
            gradients: parameter name -> gradient.
        """
        for name in self.spans:
            gradient = gradients.get(name)
            target = self.view(row, name)
            if gradient is None:
                target.zero_()
            else:
                target.copy_(gradient)

    def grams(self) -> Tensor:
        """Return the inner products within each block: [blocks, K + 1, K + 1] in float64."""
        return torch.stack([gram_matrix(self.rows[:, begin:end]) for begin, end in self.bounds])

    def combine(self, coefficients: Tensor, finite: Tensor) -> dict[str, Tensor]:
        """Return `g + sum_k c_k g_k` of each parameter: views of a buffer that the next call overwrites.

        Args:
            coefficients: c [blocks, K].
            finite: [blocks]; the others keep g.
        """
        own = self.rows[-1]
        for index, (begin, end) in enumerate(self.bounds):
            part = self._update[begin:end]
            weights = coefficients[index].to(self.rows.dtype)
            torch.addmv(own[begin:end], self.rows[:-1, begin:end].mT, weights, out=part)
            torch.where(finite[index], part, own[begin:end], out=part)
        return {
            name: self._update[begin:end].view(self.parameters[name].shape) for name, (begin, end) in self.spans.items()
        }
