"""Gradients of cross-entropies at the logits, from which Fisher matrices are made.

With p = softmax(z) the Fisher matrix of one sample at its logits z is F = E_{y ~ p}[g g^T] = diag(p) - p p^T,
g = p - e_y the gradient of -log p_y. It is the Hessian of the cross-entropy too, so that J^T F J, J the Jacobian of
the logits, is both the Fisher matrix and the generalised Gauss-Newton matrix of the network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

FISHERS = ("sampled", "exact", "empirical")


def logit_directions(
    logits: Tensor, fisher: str, *, labels: Tensor | None = None, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield gradients g at the logits, such that the sum of their g g^T is, or estimates, each sample's Fisher matrix.

    A class of no probability (a logit that the model masks) is never drawn, and of no part in the sum.

    Args:
        logits: z [n, classes], finite but for classes that are masked by minus infinity.
        fisher: `"sampled"`: one g = p - e_y with y drawn from p; `"exact"`: sqrt(p_c) (p - e_c) for each class c;
            `"empirical"`: p - e_y with the true label, which gives no Fisher matrix: it vanishes where the model is
            sure and right.
        labels: y [n], for `"empirical"`.
        generator: of the draws, on the host; the global random state is not touched.

    Yields:
        [n, classes], in the logits' type.
    """
    probabilities = logits.detach().cpu().double().softmax(dim=1)

    def like_logits(wide: Tensor) -> Tensor:
        return wide.to(device=logits.device, dtype=logits.dtype)

    if fisher == "exact":
        one_hot = torch.eye(logits.shape[1], dtype=torch.float64)
        for column, unit in zip(probabilities.T, one_hot, strict=True):
            if bool(column.any()):
                yield like_logits(column.sqrt()[:, None] * (probabilities - unit))
        return
    if fisher == "sampled":
        # A race of exponential clocks, class c's of rate p_c. It is how torch.multinomial draws one class, without its
        # checks, which take as long as the draw.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator)
        labels = (probabilities / clocks).argmax(dim=1)
    elif labels is None:
        raise TypeError("fisher='empirical' needs labels")
    yield like_logits(probabilities - F.one_hot(labels.cpu().long(), logits.shape[1]))
