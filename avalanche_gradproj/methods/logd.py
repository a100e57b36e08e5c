"""The update of Layerwise Optimization by Gradient Decomposition (Tang et al.; CVPR 2021, arXiv 2105.07561).

In a block of parameters with gradients g_1 .. g_K of K old experiences and g of the mini-batch: s is the shared
gradient, V an orthonormal basis of the specific gradients g_k - mean (all of them, or leading principal components)
and P = I - V V^T. The update is the w closest to g with V^T w = 0 and s^T w >= 0.

Nothing of the size of a block is decomposed: w = g + sum_k c_k g_k, and c follows from the (K + 1) x (K + 1) matrix of
inner products, for all blocks at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from avalanche_gradproj.errors import ConfigurationError, choice
from avalanche_gradproj.linalg.gram import gram_matrix, orthonormal_coefficients, principal_coefficients

VARIANTS = ("paper", "official")

#: A specific direction shorter than this times the longest old gradient is rounding: squared, as in a Gram matrix.
DEPENDENT = 1e-12

#: The shared gradient lies among the specific ones, and constrains nothing, where s^T P s is not above this times
#: s^T s.
VOID = 1e-10


def check_arguments(n_components: int | None, variant: str, margin: float) -> None:
    """Check the arguments that all forms of the update share.

    Raises:
        ConfigurationError: for one that is out of range or unknown.
    """
    choice("variant", variant, VARIANTS)
    if n_components is not None and (
        isinstance(n_components, bool) or not isinstance(n_components, int) or n_components < 1
    ):
        raise ConfigurationError(f"n_components={n_components!r}: give a positive integer, or None for all directions")
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not number or not math.isfinite(margin) or margin < 0:
        raise ConfigurationError(f"margin={margin!r}: give a finite number that is not negative")


@torch.no_grad()
def logd_update(
    gradient: Tensor,
    old_gradients: Tensor,
    *,
    n_components: int | None = None,
    variant: str = "paper",
    margin: float = 0.5,
) -> Tensor:
    """Return the update of one block, or of a batch of blocks of equal size.

    Paper: `w = P g` if `s^T P g >= 0`, else `w = P g - (s^T P g / s^T P s) P s`, with s the mean; where `s^T P s`
    vanishes the constraint on s says nothing more, and `w = P g`.

    Official code: s is the sum and there is a margin m. With K = 1, `w = g - min(s.g / s.s, -m) s`; with more,
    `w = P g` if `s.Pg > 0`, else `w = P g - min(s.Pg / s.Ps, -m) s + (s.Pg / s.Ps) V V^T s`. Departures here:
    directions that the specific gradients do not have are dropped instead of filled with arbitrary ones, and where
    `s.Ps` vanishes `w = P g`, as no ratio exists.

    A block whose gradients are not all finite is returned as it came.

    Args:
        gradient: g [..., p].
        old_gradients: g_1 .. g_K [..., K, p], of the same type, on the same device; K may exceed p, or be 0.
        n_components: leading principal components of the specific gradients that are removed; None for all directions.
        variant: `"paper"` or `"official"`.
        margin: m, of the official variant alone.

    Returns:
        w [..., p], a new tensor.

    Raises:
        ConfigurationError: for arguments out of range or shapes that do not fit.
    """
    check_arguments(n_components, variant, margin)
    expected = (*gradient.shape[:-1], old_gradients.shape[-2] if old_gradients.ndim > 1 else "K", *gradient.shape[-1:])
    if tuple(old_gradients.shape) != expected:
        raise ConfigurationError(
            f"old_gradients has shape {tuple(old_gradients.shape)} and gradient {tuple(gradient.shape)}: give "
            "[..., K, p] and [..., p]"
        )
    if old_gradients.shape[-2] == 0:
        return gradient.clone()
    gram = gram_matrix(torch.cat([old_gradients, gradient.unsqueeze(-2)], dim=-2))
    coefficients, finite = update_coefficients(gram, n_components=n_components, variant=variant, margin=margin)
    moved = gradient + (coefficients.to(old_gradients.dtype).unsqueeze(-2) @ old_gradients).squeeze(-2)
    return torch.where(finite[..., None], moved, gradient)


def update_coefficients(
    gram: Tensor, *, n_components: int | None = None, variant: str = "paper", margin: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return c of `w = g + sum_k c_k g_k` for a batch of blocks; see `logd_update`.

    Args:
        gram: [..., K + 1, K + 1], inner products of g_1 .. g_K, g in float64, K >= 1.
        n_components: as in `logd_update`.
        variant: as in `logd_update`.
        margin: as in `logd_update`.

    Returns:
        c [..., K], zero in blocks with an inner product that is not finite, and which blocks are finite [...].
    """
    finite = torch.isfinite(gram).flatten(-2).all(dim=-1)
    gram = torch.where(finite[..., None, None], gram, 0.0)
    old, cross = gram[..., :-1, :-1], gram[..., :-1, -1]
    count = old.shape[-1]
    weight = 1.0 / count if variant == "paper" else 1.0  # of each g_k in s
    with_mean = old.mean(dim=-1)
    basis = _specific_basis(old, with_mean, n_components)
    along_g = _apply(basis.mT, cross)  # V^T g
    along_s = _apply(basis.mT, with_mean * (count * weight))  # V^T s
    s_g, s_s = weight * cross.sum(dim=-1), weight * weight * old.sum(dim=(-2, -1))
    s_p_g, s_p_s = s_g - (along_s * along_g).sum(dim=-1), s_s - along_s.square().sum(dim=-1)
    void = s_p_s <= torch.clamp(_rounding(old, basis), min=VOID) * s_s
    ratio = torch.where(void, 0.0, s_p_g / torch.where(void, 1.0, s_p_s))
    if variant == "paper":
        along = shared = -ratio.clamp(max=0.0)
    else:
        conflict = ~void if count == 1 else ~void & ~(s_p_g > 0)
        shared = torch.where(conflict, -ratio.clamp(max=-margin), 0.0)
        along = torch.where(conflict, -ratio, 0.0)
    removed = _apply(basis, along_g + along[..., None] * along_s)
    coefficients = shared[..., None] * weight - removed
    return torch.where(finite[..., None], coefficients, 0.0), finite


def _specific_basis(old: Tensor, with_mean: Tensor, n_components: int | None) -> Tensor:
    """Return the coefficients [..., K, r], on the old gradients, of the basis V of the specific ones."""
    count = old.shape[-1]
    if count == 1:
        return old[..., :0]
    specific = old - with_mean.unsqueeze(-1) - with_mean.unsqueeze(-2) + with_mean.mean(dim=-1)[..., None, None]
    floor = DEPENDENT * old.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
    if n_components is None or n_components >= count - 1:  # K specific gradients have K - 1 directions
        basis = orthonormal_coefficients(specific, floor)
    else:
        basis = principal_coefficients(specific, n_components, floor)
    return basis - basis.mean(dim=-2, keepdim=True)


def _rounding(old: Tensor, basis: Tensor) -> Tensor:
    """Bound the share of s^T s that rounding may leave of s^T P s [...], where the specific gradients hold all of s.

    Errors of inner products grow by the squared length of the coefficients: by the condition of the specific gradients.
    """
    if basis.shape[-1] == 0:
        return old.new_zeros(old.shape[:-2])
    longest = basis.square().sum(dim=-2).amax(dim=-1)
    return 8.0 * torch.finfo(old.dtype).eps * old.diagonal(dim1=-2, dim2=-1).amax(dim=-1) * longest


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
