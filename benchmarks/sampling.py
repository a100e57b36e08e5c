"""Which training samples an experience trains on, and which are held back for validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.utils import shuffle
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Which training samples go where.

    Attributes:
        valid_share: share of an experience's training samples that goes to validation.
        valid_rule: `first` takes the first samples in order; `random` shuffles with `seed` first.
        train_limit: at most so many training samples an experience, a random choice; 0 keeps all.
        draw_rule: `same`: experiences over the same images choose the same ones; `each`: every experience draws
            its own, as the code of the GEM family does for experiences of equal size (the i-th `torch.randperm` after
            the seed); validation samples are then the first of them, whatever `valid_rule` says.
        seed: for the random choices; they depend on nothing else.
    """

    valid_share: float = 0.0
    valid_rule: Literal["first", "random"] = "random"
    train_limit: int = 0
    draw_rule: Literal["same", "each"] = "same"
    seed: int = 0

    def divide(self, indices: Tensor, experience: int = 0) -> tuple[Tensor, Tensor]:
        """Divide the training samples of one experience into training and validation samples.

        Args:
            indices: the samples, int64 [n].
            experience: its position in the stream; matters to `each` alone.

        Returns:
            Training and validation samples, int64 each.
        """
        order = np.arange(len(indices))
        if self.draw_rule == "each":
            order = self._own_order(len(indices), experience)
        elif self.valid_rule == "random":
            order = shuffle(order, random_state=self.seed)
        n_valid = int(self.valid_share * len(order))
        train, valid = order[n_valid:], order[:n_valid]
        if 0 < self.train_limit < len(train):
            if self.draw_rule == "same":
                train = shuffle(train, random_state=self.seed)
            train = train[: self.train_limit]
        return indices[torch.from_numpy(train)], indices[torch.from_numpy(valid)]

    def _own_order(self, size: int, experience: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(experience):
            torch.randperm(size, generator=generator)
        return torch.randperm(size, generator=generator).numpy()
