"""XK-FAC as an Avalanche plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from avalanche_gradproj.plugins.base import own_forward
from avalanche_gradproj.plugins.penalty import PenaltyPlugin, own_heads
from avalanche_gradproj.plugins.reading import mini_batches


class XKFACPlugin(PenaltyPlugin):
    """Extended Kronecker-factored curvature for networks with BatchNorm (arXiv 2004.07507), for any strategy.

    K-FAC Laplace (`KFACLaplacePlugin`) with three changes. A layer and the BatchNorm behind it are one matrix
    [W~, b~] = [gamma W / s, gamma (b - m) / s + beta], what they are in evaluation, and the penalty is on it, so that
    statistics are held too. Its curvature counts that samples of a mini-batch depend on each other through later
    BatchNorms: `(A - mu mu^T) (x) B_within + mu mu^T (x) B_total`. At the start of an experience merged weights become
    the layers' own, and BatchNorms start from the new data's statistics, the network staying the same function.

    The full text of the paper was not available and there is no official code: what is computed was derived from its
    principles, see docs/xkfac.md.

    Memory and cost: those of K-FAC Laplace, and `out^2 + d` numbers more for a layer with later BatchNorms; a step
    computes W~ and b~ besides. The curvature is that of mini-batches of `record_batch_size` samples.

    Args:
        strength: `"balanced"`: with T experiences learned, `T / (T + 1)` times the mean of their penalties and
            `1 / (T + 1)` times the loss. Or a number from 0, or one an experience, as for K-FAC Laplace: then the loss
            is not weighted. 0 everywhere does nothing: training is bit for bit that of the strategy alone.
        adaptive: multiply penalty and loss by scales that drive the two to similar values.
        mode: `"online"`: one form a layer, averaged over experiences, centred on the last solution; `"separate"`: each
            experience keeps its own.
        fisher: `"sampled"`, `"exact"` or `"empirical"`, as for K-FAC Laplace.
        damping: added to every eigenvalue of a sample's curvature: weight decay that is centred on the old solution.
        n_samples: samples drawn from an experience for its curvature, None for all of them.
        reparameterise: new coordinates at the start of an experience; what the optimizer remembers of these parameters
            is dropped. BatchNorms that the model's own `train` keeps in evaluation mode stay as they are.
        inter_example: the term across samples; False for one Kronecker product a layer.
        batchnorm: `"merge"`; `"freeze"`: every BatchNorm stays as the first experience leaves it; `"track"`: nothing is
            merged, statistics drift.
        pairs: `"auto"`: the layer behind whose output each BatchNorm stands, seen on a mini-batch and checked on it
            numerically; or a dict from a BatchNorm's name to its layer's, checked too.
        unpaired: what happens to a BatchNorm that stands behind no layer: `"raise"`, or `"freeze"` from the second
            experience on.
        truncate: as for K-FAC Laplace.
        refresh_every: as for K-FAC Laplace; what is kept is of the gradient by merged matrices.
        include: shell-style patterns of layer names to cover; default all but heads of one task.
        exclude: patterns of layers or parameters to leave alone; excluded BatchNorms are not merged.
        seed: of the generator that draws samples and labels; the global random state is never touched.
        record_batch_size: samples in a mini-batch of the passes over the data.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.

    Errors while training begins, before any step: those of K-FAC Laplace, and `ModelError` naming each BatchNorm that
    cannot be merged. In training, from the second experience on, `DataError` for a mini-batch of one sample.
    """

    method: ExtendedKroneckerLaplace

    def __init__(
        self,
        strength: str | float | Sequence[float] = "balanced",
        *,
        adaptive: bool = True,
        mode: str = "online",
        fisher: str = "sampled",
        damping: float = 0.0,
        n_samples: int | None = None,
        reparameterise: bool = True,
        inter_example: bool = True,
        batchnorm: str = "merge",
        pairs: str | Mapping[str, str] = "auto",
        unpaired: str = "raise",
        truncate: float | None = None,
        refresh_every: int = 1,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
        record_batch_size: int = 128,
    ) -> None:
        method = ExtendedKroneckerLaplace(
            strength,
            adaptive=adaptive,
            mode=mode,
            fisher=fisher,
            damping=damping,
            n_samples=n_samples,
            reparameterise=reparameterise,
            inter_example=inter_example,
            batchnorm=batchnorm,
            pairs=pairs,
            unpaired=unpaired,
            truncate=truncate,
            refresh_every=refresh_every,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        super().__init__(method, record_batch_size=record_batch_size)

    def _start(self, strategy: Any, size: int) -> None:
        self.method.criterion = strategy._criterion
        self.method.listen(False)
        # Of a piece of an online stream, only what is there now.
        dataset = strategy.experience.dataset.eval()
        chosen = self.method.some(len(dataset)).tolist()
        with own_forward(strategy) as forward:
            self.method.start(
                strategy.model,
                strategy.optimizer,
                heads=own_heads(strategy.model),
                samples=size,
                batches=mini_batches(strategy, dataset, self._groups(chosen)),
                forward=forward,
            )
        if self.record_batch_size == 1 and self.method.normalises(strategy.model):
            self.method.abandon()
            raise ConfigurationError(
                "record_batch_size=1: factors are made of mini-batches with BatchNorm, give 2 or more"
            )

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Attend to the forward pass of the training step, and to no other plugin's."""
        self.method.listen(True)

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Attend no more."""
        self.method.listen(False)
