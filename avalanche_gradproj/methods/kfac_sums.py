"""What a pass over the data sums up for a layer, and the Kronecker products made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from avalanche_gradproj.linalg.kronecker import Factor, KroneckerTerm
from avalanche_gradproj.linalg.moment_sums import MomentSums


@dataclass
class LayerSums:
    """What one layer saw.

    Attributes:
        inputs: rows a at its input; their mean too, in an extended pass.
        outputs: gradients b of the mini-batch's summed losses at its output, one a row.
        totals: sums of those gradients over each mini-batch, in an extended pass.
        coupled: whether its rows reach the losses of other samples, through a later layer that normalises by the
            mini-batch; known in an extended pass.
    """

    inputs: MomentSums
    outputs: MomentSums
    totals: MomentSums
    coupled: bool = False

    def factors(self, samples: int) -> tuple[Tensor, Tensor] | None:
        """Return A [blocks, d, d], the mean of a a^T over rows, and B [blocks, out, out], their sum of b b^T a sample.

        None for a layer that was not called, or on which no loss depends.
        """
        left, right = self.outputs.moment(samples), self.inputs.moment(max(1, self.inputs.count))
        return None if left is None or right is None else (right, left)

    def terms(self, samples: int) -> tuple[KroneckerTerm, ...]:
        """Return the layer's block of the curvature of a sample: none for a layer without part in any loss.

        That is B (x) A; for coupled rows, with mu = E[a],

            B_within (x) (A - mu mu^T)  +  B_total (x) mu mu^T

        B_within the sum of b b^T over rows, B_total the product of their sum over the mini-batch with itself.

        Args:
            samples: n, by which both are divided.
        """
        factors = self.factors(samples)
        if factors is None:
            return ()
        right, left = factors
        mean, total = self.inputs.mean(), self.totals.moment(samples)
        if not self.coupled or mean is None or total is None:
            return (KroneckerTerm(Factor(left), Factor(right)),)
        column = mean[:, :, None]
        centred = right - column @ column.mT
        across = Factor(column, column.new_zeros(len(column)))
        return KroneckerTerm(Factor(left), Factor(centred)), KroneckerTerm(Factor(total), across)


@dataclass
class FactorSums:
    """What a pass gave.

    Attributes:
        layers: by layer name.
        samples: how many samples came.
        diagonal: parameter name -> sum over samples of its squared gradient, in float64.
    """

    layers: dict[str, LayerSums]
    samples: int = 0
    diagonal: dict[str, Tensor] = field(default_factory=dict)
