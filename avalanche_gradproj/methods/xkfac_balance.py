"""Scales that drive the loss of the new experience and the penalty for the old ones to similar values."""

from __future__ import annotations

import torch
from torch import Tensor

#: Steps over which values are averaged: enough to see through the noise of mini-batches, few beside an epoch.
TIME_CONSTANT = 20


class Balance:
    """Scales in proportion to the running means of two terms.

    With the means v_t of the loss and v_s of the penalty,

        alpha_t = 2 v_t / (v_t + v_s),    alpha_s = 2 v_s / (v_t + v_s)

    so that the larger term is pressed harder and both tend to similar values; equal terms are left as they are. Nothing
    is differentiated through the scales, and nothing waits for the device.

    Args:
        time_constant: steps over which values are averaged.
    """

    def __init__(self, time_constant: float = TIME_CONSTANT) -> None:
        self._keep = 1.0 - 1.0 / time_constant
        self._means: Tensor | None = None

    def scales(self, loss: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and alpha_s after one more step, scalars.

        Args:
            loss: the weighted loss, one number.
            penalty: the weighted penalty, one number.
        """
        present = torch.stack([loss.detach().reshape(()), penalty.detach().to(loss).reshape(())]).abs()
        # A step that went wrong, and that its optimizer may skip, leaves no trace.
        held = torch.zeros_like(present) if self._means is None else self._means
        moved = present if self._means is None else torch.lerp(present, held, self._keep)
        self._means = torch.where(torch.isfinite(present).all(), moved, held)
        total = self._means.sum()
        shares = torch.where(total > 0, 2.0 * self._means / total, 1.0)
        return shares[0], shares[1]
