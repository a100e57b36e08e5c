"""Hyper-parameters of the methods that can be compared: one record of settings each.

Plain values only, as in `record.py`: nothing of torch or Avalanche is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.settings import setting


@dataclass(frozen=True)
class NoSettings:
    """For methods without hyper-parameters."""


@dataclass(frozen=True)
class EwcSettings:
    """Elastic weight consolidation, as Avalanche has it (one penalty for each earlier experience).

    Attributes:
        ewc_lambda: weight of the penalty.
    """

    ewc_lambda: float = setting(1.0, minimum=0)


@dataclass(frozen=True)
class ReplaySettings:
    """Experience replay, as Avalanche has it (every batch doubled by as many samples of the memory).

    Attributes:
        mem_size: samples in the memory, all experiences together.
    """

    mem_size: int = setting(200, minimum=2)


@dataclass(frozen=True)
class GpmSettings:
    """Gradient projection memory.

    Attributes:
        threshold: share of the activations' energy that a layer's basis holds; one value, or one for each
            layer.
        threshold_step: what each experience adds to the threshold.
        n_samples: training samples that the bases are made of; one value, one for each layer, or `all`.
        rank_rule: `paper`, or `official` for the code's rank of the first experience.
        apply_to: what is projected: the gradient, the optimizer's step, or whichever is needed.
        uncovered: what happens to parameters of layers without a basis.
        batchnorm: what happens to tracked BatchNorm statistics after the first experience.
        include: patterns of the layers to cover; none means all.
        exclude: patterns of the layers to leave out.
        route: how the projected gradient is computed.
    """

    threshold: float | tuple[float, ...] = setting(0.97, minimum=0, maximum=1)
    threshold_step: float = setting(0.003, minimum=0, maximum=1)
    n_samples: int | tuple[int, ...] | Literal["all"] = setting(125, minimum=1)
    rank_rule: Literal["paper", "official"] = setting("paper")
    apply_to: Literal["auto", "gradient", "update"] = setting("auto")
    uncovered: Literal["freeze", "train", "raise"] = setting("freeze")
    batchnorm: Literal["freeze", "track"] = setting("freeze")
    include: tuple[str, ...] | None = setting(None, optional=True)
    exclude: tuple[str, ...] | None = setting(None, optional=True)
    route: str = setting("auto")


@dataclass(frozen=True)
class LogdSettings:
    """Layerwise optimization by gradient decomposition.

    Attributes:
        patterns_per_exp: samples kept of each experience.
        n_components: leading principal components of the specific gradients that are removed, or `all`.
        variant: `paper`, or `official` for the code's update with a margin.
        margin: of the official variant.
        blocks: `layer`, `network`, or a number of consecutive parameter tensors.
        selection: samples that are kept: `random`, or the `last` ones seen in training.
    """

    patterns_per_exp: int = setting(256, minimum=0)
    n_components: int | Literal["all"] = setting("all", minimum=1)
    variant: Literal["paper", "official"] = setting("paper")
    margin: float = setting(0.5, minimum=0)
    blocks: int | Literal["layer", "network"] = setting("layer", minimum=1)
    selection: Literal["random", "last"] = setting("random")


@dataclass(frozen=True)
class OgdSettings:
    """Orthogonal gradient descent.

    Attributes:
        n_gradients: gradients of logits kept of each experience.
        target: logits whose gradients are kept: `gtl` (the true class's), `all`, or `ave` (their mean).
        ogd_max_mb: megabytes of stored gradients at most; 0 sets no bound.
    """

    n_gradients: int = setting(200, minimum=0)
    target: Literal["gtl", "all", "ave"] = setting("gtl")
    ogd_max_mb: int = setting(0, minimum=0)


@dataclass(frozen=True)
class KfacSettings:
    """K-FAC Laplace.

    Attributes:
        strength: weight of an experience's curvature, 1 as the data make it.
        mode: `separate` keeps every experience's factors, `online` one pair a layer.
        fisher: labels of the curvature: `sampled`, `exact` or `empirical`.
        n_factor_samples: training samples that factors are made of, or `all`.
        truncate: share of a factor's squared norm that is kept in eigenvectors, 1 for all of it.
        damping: added to the curvature of every penalised parameter.
        refresh_every: steps in one of which all products of the penalty are formed, in the others a sample.
        eigenbasis: the optimizer steps in the eigenbasis of each layer's factors.
    """

    strength: float = setting(1.0, minimum=0)
    mode: Literal["separate", "online"] = setting("online")
    fisher: Literal["sampled", "exact", "empirical"] = setting("sampled")
    n_factor_samples: int | Literal["all"] = setting("all", minimum=1)
    truncate: float = setting(1.0, above=0, maximum=1)
    damping: float = setting(0.0, minimum=0)
    refresh_every: int = setting(1, minimum=1)
    eigenbasis: bool = setting(False)


@dataclass(frozen=True)
class XkfacSettings:
    """XK-FAC, and what is left of it without some of its parts.

    Attributes:
        strength: `balanced`, or the weight of an experience's curvature, 1 as the data make it.
        adaptive: scales that drive loss and penalty to similar values.
        mode: `separate` keeps every experience's factors, `online` one form a layer.
        fisher: labels of the curvature: `sampled`, `exact` or `empirical`.
        n_factor_samples: training samples that factors are made of, or `all`.
        factor_batch: samples of a mini-batch in the passes over the data: the curvature is that of such batches.
        truncate: share of a factor's squared norm that is kept in eigenvectors, 1 for all of it.
        damping: added to the curvature of every penalised parameter.
        refresh_every: steps in one of which all products of the penalty are formed, in the others a sample.
        reparameterise: merged weights as the layers' own at the start of an experience.
        inter_example: the curvature's term across samples.
        batchnorm: `merge` with layers, `freeze` after the first experience, or `track`.
    """

    strength: Literal["balanced"] | float = setting("balanced", minimum=0)
    adaptive: bool = setting(True)
    mode: Literal["separate", "online"] = setting("online")
    fisher: Literal["sampled", "exact", "empirical"] = setting("sampled")
    n_factor_samples: int | Literal["all"] = setting("all", minimum=1)
    factor_batch: int = setting(128, minimum=2)
    truncate: float = setting(1.0, above=0, maximum=1)
    damping: float = setting(0.0, minimum=0)
    refresh_every: int = setting(1, minimum=1)
    reparameterise: bool = setting(True)
    inter_example: bool = setting(True)
    batchnorm: Literal["merge", "freeze", "track"] = setting("merge")


@dataclass(frozen=True)
class HalrpSettings:
    """Hessian-aware low-rank perturbation.

    Attributes:
        warmup_epochs: epochs of a free copy before each experience after the first; they count among its epochs.
        approximation_rate: share of the total score that the kept directions of all layers hold.
        max_rank: most directions of a layer.
        l1: weight of the absolute values of the low-rank factors in the loss.
        weight_decay: weight of half the squared norm of what is trained in the loss.
        max_growth: numbers that all experiences together may add, as a share of those of the base network.
        prune_threshold: smaller values of the factors are set to zero, whatever the growth.
        prune: factors that make room: the experience's `own`, or those of `all` experiences.
        importance: the stream whose samples give the layers' importance: `train`, or `valid` where there is one.
    """

    warmup_epochs: int = setting(1, minimum=1)
    approximation_rate: float = setting(0.9, above=0, maximum=1)
    max_rank: int = setting(100, minimum=1)
    l1: float = setting(1e-4, minimum=0)
    weight_decay: float = setting(1e-4, minimum=0)
    max_growth: float = setting(0.2, above=0)
    prune_threshold: float = setting(1e-5, minimum=0)
    prune: Literal["own", "all"] = setting("own")
    importance: Literal["train", "valid"] = setting("train")


@dataclass(frozen=True)
class GemSettings:
    """Gradient episodic memory, as Avalanche has it.

    Attributes:
        gem_patterns: samples kept of each experience.
        memory_strength: what is added to the solution of the quadratic program (gamma).
    """

    gem_patterns: int = setting(256, minimum=1)
    memory_strength: float = setting(0.5, minimum=0)


@dataclass(frozen=True)
class AgemSettings:
    """Averaged gradient episodic memory, as Avalanche has it.

    Attributes:
        agem_patterns: samples kept of each experience.
        agem_sample_size: samples of the memory that a step looks at, all experiences together.
    """

    agem_patterns: int = setting(256, minimum=1)
    agem_sample_size: int = setting(256, minimum=1)
