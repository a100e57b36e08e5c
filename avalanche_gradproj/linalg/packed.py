"""Tensors that are mostly zeros, stored as their other entries and one bit for each."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Store a tensor without its zeros.

    Args:
        tensor: of any shape, with n entries.

    Returns:
        Its entries that are not 0, in order, and ceil(n / 8) bytes (uint8) whose bits say where they are.
    """
    flat = tensor.detach().reshape(-1)
    kept = flat != 0
    bits = torch.zeros(-(-len(flat) // 8) * 8, dtype=torch.uint8, device=flat.device)
    bits[: len(flat)] = kept
    return flat[kept], (bits.view(-1, 8) << _places(bits)).sum(1, dtype=torch.uint8)


def unpack(values: Tensor, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of a given shape that `pack` stored, bit for bit (but for the sign of zeros)."""
    kept = ((bits[:, None] >> _places(bits)) & 1).view(-1).bool()
    result = torch.zeros(shape, dtype=values.dtype, device=values.device)
    result.view(-1).masked_scatter_(kept[: result.numel()], values)
    return result


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
