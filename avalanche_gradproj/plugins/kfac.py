"""K-FAC Laplace as an Avalanche plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.plugins.penalty import PenaltyPlugin, alone_with_gradients


class KFACLaplacePlugin(PenaltyPlugin):
    """Kronecker-factored online Laplace approximation (arXiv 1805.07810) for any strategy, model and optimizer.

    After experience t, with N_t samples, the Fisher matrix of every Linear, convolution and attention layer is
    approximated by a Kronecker product B_t (x) A_t, from one pass over the data (evaluation transforms, evaluation
    mode). In later experiences the loss gets, for each layer's weight W with its bias as last column,

        1 / (2 N) sum_t strength_t N_t <W - W_t*, B_t (W - W_t*) A_t + damping (W - W_t*)>

    N the samples of the experience in training. Scale and shift of norm layers, embeddings and other parameters get the
    same with the diagonal of their Fisher matrix. Heads of one task each (`MultiHeadClassifier`) are left alone, since
    data of other tasks gives them no gradient; a head that all experiences share is penalised, also one that grows
    (`IncrementalClassifier`). `include` and `exclude` override both. What takes no gradient in an experience has no
    factors of it, also if it is unfrozen later. `report()` lists every parameter.

    The strategy's criterion must be a mean of cross-entropies, unless `fisher="empirical"`.

    Memory: 4 (d^2 + out^2 + out d) bytes a layer of d inputs (a bias counts as one) and `out` outputs, for every
    experience in separate mode, once in online mode; in training as much again for scaled copies of B. A step costs
    2 out d (out + d) operations a layer and form, whatever the batch size: see `truncate`, and docs/kfac.md.

    Args:
        strength: at least 0: one for all experiences or one each; the last one holds for all further ones. 1 is the
            posterior of the paper; it overestimates how sure the weights are, so that about 1 to 3 was best there. 0
            everywhere does nothing: training is bit for bit that of the strategy alone.
        mode: `"separate"`: each experience keeps its factors and centre; `"online"`: one pair of factors a layer,
            averaged, centred on the last solution. Sums of Kronecker products are none themselves: the cross terms
            that stand for them are right where all A, or all B, of a layer are equal.
        fisher: `"sampled"`: labels drawn from the model's prediction; `"exact"`: a backward pass for every class;
            `"empirical"`: true labels, which gives no Fisher matrix.
        n_samples: samples drawn from an experience for its factors, None for all of them.
        truncate: None, or a share in (0, 1], such as 0.99: the leading eigenvectors of each factor that hold this
            share of its squared Frobenius norm are kept, the rest as a multiple of the identity that keeps the trace.
            Factors whose truncation would not make products cheaper stay whole.
        damping: added to every eigenvalue of a sample's curvature, centred like it.
        refresh_every: k, a departure from the paper that saves time: all of the penalty's products are formed in every
            k-th step, in between its gradient is estimated without bias. 1 is exact; see docs/kfac.md.
        eigenbasis: a departure from the paper, for optimizers that scale single weights (Adam): they step in the
            eigenbasis of each layer's factors, where the penalty is diagonal; loss and penalty stay what they are. In
            online mode; see docs/kfac.md.
        include: shell-style patterns of layer names to cover; default all but heads of one task.
        exclude: patterns of layers or parameters to leave alone.
        seed: of the generator that draws samples and labels; the global random state is never touched.
        record_batch_size: samples in a mini-batch of the pass after an experience.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.

    Errors while training begins (before any step): `ModelError`, `ConfigurationError`, `DataError`, `StateError`, each
    naming the layer or argument. After an experience, `NonFiniteError` for values that are not finite, `DataError` and
    `ModelError` for labels or outputs that do not fit; the factors are then what they were.
    """

    method: KroneckerLaplace

    def __init__(
        self,
        strength: float | Sequence[float] = 1.0,
        *,
        mode: str = "separate",
        fisher: str = "sampled",
        n_samples: int | None = None,
        truncate: float | None = None,
        damping: float = 0.0,
        refresh_every: int = 1,
        eigenbasis: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
        record_batch_size: int = 128,
    ) -> None:
        method = KroneckerLaplace(
            strength,
            mode=mode,
            fisher=fisher,
            n_samples=n_samples,
            truncate=truncate,
            damping=damping,
            refresh_every=refresh_every,
            eigenbasis=eigenbasis,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        super().__init__(method, record_batch_size=record_batch_size)

        self._adds = False

    def _start(self, strategy: Any, size: int) -> None:
        self.method.criterion = strategy._criterion
        super()._start(strategy, size)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the penalty to the loss, where its gradient cannot be added after the backward pass."""
        self._adds = self._whole() and self.method.adds_gradient and alone_with_gradients(self, strategy)
        if not self._adds:
            super().before_backward(strategy, *args, **kwargs)

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of the penalty, and to the loss that is logged its value."""
        if self._adds:
            self._adds = False
            strategy.loss = strategy.loss.detach() + self.method.add_gradient()

    def _whole(self) -> bool:
        """Whether both callbacks are these: a subclass may have one of its own that does not call the other's part."""
        kind, base = type(self), KFACLaplacePlugin
        return kind.before_backward is base.before_backward and kind.after_backward is base.after_backward
