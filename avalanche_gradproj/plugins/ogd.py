"""OGD as an Avalanche plugin."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent
from avalanche_gradproj.plugins.base import GradientTransformPlugin


class OGDPlugin(GradientTransformPlugin):
    """Orthogonal Gradient Descent (arXiv 1910.07104) for any strategy, model and optimizer.

    After each experience the gradients of logits of `n_gradients` random training samples (evaluation transforms,
    evaluation mode) over all covered parameters are orthonormalised into V. In later experiences the parameters move
    only orthogonally to V: to first order the remembered logits stay.

    Every parameter that takes a gradient is covered, scale and shift of norm layers among them. Task heads
    (`MultiHeadClassifier`, `IncrementalClassifier`) are left alone; a plain final Linear layer is covered. `include`
    and `exclude` override both. `report()` lists every parameter and its treatment.

    Memory: 4 p bytes a stored gradient, p the numbers of all covered parameters (a network of a million parameters and
    200 gradients: 800 MB an experience); `max_bytes` bounds that matrix. A step costs two passes over it, or a few
    small matrix products where most parameters are weights of Linear layers (`linalg.rank_one`).

    Args:
        n_gradients: gradients stored of an experience. 0 does nothing: training is bit for bit that of the strategy
            alone.
        target: `"gtl"`: the logit of the true class; `"all"`: every logit, of as many samples as give `n_gradients`
            gradients; `"ave"`: the mean of the logits.
        max_bytes: bytes of stored gradients at most. Less than one experience needs is refused before training; once
            it is full, later gradients are not stored, and a warning names their number.
        include: shell-style patterns of layer or parameter names to cover; default all but heads.
        exclude: patterns of layers or parameters to leave alone.
        apply_to: `"gradient"`, `"update"` or `"auto"`: the gradient where that is provably enough (SGD without weight
            decay, one parameter group), else the step that the optimizer took.
        batchnorm: running statistics: `"freeze"` as the first experience left them, or `"track"`.
        seed: of the generator that draws samples; the global random state is never touched.
        record_batch_size: samples in a mini-batch of the pass after an experience.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.

    Errors while training begins (before any step): `ModelError`, `ConfigurationError`, `DataError`, `StateError`, each
    naming the parameter or argument. After an experience, `DataError` for labels outside the logits and
    `NonFiniteError` for gradients that are not finite; the stored ones are then what they were.
    """

    method: OrthogonalGradientDescent

    def __init__(
        self,
        n_gradients: int = 200,
        *,
        target: str = "gtl",
        max_bytes: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        apply_to: str = "auto",
        batchnorm: str = "freeze",
        seed: int = 0,
        record_batch_size: int = 128,
    ) -> None:
        method = OrthogonalGradientDescent(
            n_gradients,
            target=target,
            max_bytes=max_bytes,
            include=include,
            exclude=exclude,
            apply_to=apply_to,
            batchnorm=batchnorm,
            seed=seed,
        )
        super().__init__(method, record_batch_size=record_batch_size)

    @property
    def vectors(self) -> Tensor:
        """The stored directions [count, p], orthonormal rows over the covered parameters."""
        return self.method.vectors
