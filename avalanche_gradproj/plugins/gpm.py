"""GPM as an Avalanche plugin."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from avalanche_gradproj.methods.gpm import GradientProjectionMemory
from avalanche_gradproj.plugins.base import GradientTransformPlugin


class GPMPlugin(GradientTransformPlugin):
    """Gradient Projection Memory (arXiv 2103.09762) for any strategy, model and optimizer.

    After each experience the inputs of every Linear, convolution and attention layer are recorded on `n_samples`
    training images (evaluation transforms, evaluation mode) and the layer's orthonormal basis M is grown until it
    explains `threshold + threshold_step * t` of their energy. In later experiences every layer's weight changes only
    orthogonally to its basis, so that what the layer computes for old inputs stays.

    Task heads (`MultiHeadClassifier`, `IncrementalClassifier`) are left alone; a plain final Linear layer is projected.
    `include` and `exclude` override both. `report()` lists every parameter and its treatment.

    Memory: 4 r d bytes a layer between experiences (r the rank, d the inputs); during training besides a copy of the
    covered weights and the constants of the routes taken (docs/gpm.md). `method.monitor = True`, or the metric that
    needs it, sums up the removed share of the gradients.

    Args:
        threshold: share of the energy to be explained, in [0, 1]; one for all layers or one a covered layer in the
            model's order. 0 does nothing: training is bit for bit that of the strategy alone.
        threshold_step: added per experience; the sum is capped at 1.
        n_samples: samples drawn per experience; one number, one a covered layer, or None for all of the data.
        rank_rule: `"paper"`: the smallest rank that reaches the threshold; `"official"`: as the authors' code, one
            fewer in the first experience.
        apply_to: `"gradient"`, `"update"` or `"auto"`: the gradient where that is provably enough (SGD without weight
            decay), else the step that the optimizer took.
        uncovered: parameters of no matrix layer (norm scale and shift, embeddings, plain parameters): `"freeze"` from
            the second experience on, `"train"`, or `"raise"`.
        batchnorm: running statistics: `"freeze"` as the first experience left them, or `"track"`.
        include: shell-style patterns of layer names to cover; default all but heads.
        exclude: patterns of layers or parameters to leave alone.
        route: `"auto"` (by cost), or how projections are computed: `"dense"`, `"factored"`, `"complement"`, `"inputs"`.
        seed: of the generator that draws samples; the global random state is never touched.
        record_batch_size: samples in a mini-batch of the recording pass.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.

    Errors while training begins (before any step): `ModelError`, `ConfigurationError`, `DataError`, `StateError`, each
    naming the layer or argument. `NonFiniteError` after an experience whose activations are not finite; the bases are
    then what they were.
    """

    method: GradientProjectionMemory

    def __init__(
        self,
        threshold: float | Sequence[float] = 0.97,
        threshold_step: float = 0.003,
        n_samples: int | Sequence[int] | None = 125,
        *,
        rank_rule: str = "paper",
        apply_to: str = "auto",
        uncovered: str = "freeze",
        batchnorm: str = "freeze",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        route: str = "auto",
        seed: int = 0,
        record_batch_size: int = 128,
    ) -> None:
        method = GradientProjectionMemory(
            threshold,
            threshold_step,
            n_samples,
            rank_rule=rank_rule,
            apply_to=apply_to,
            uncovered=uncovered,
            batchnorm=batchnorm,
            include=include,
            exclude=exclude,
            route=route,
            seed=seed,
        )
        super().__init__(method, record_batch_size=record_batch_size)

    @property
    def bases(self) -> dict[str, list[Tensor]]:
        """Layer name -> orthonormal tensors [d, r], one a block; the bias is the last of the d."""
        return self.method.bases
