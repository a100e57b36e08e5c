"""The protocols of HALRP (arXiv 2311.15161): task-incremental, LeNet with BatchNorm, Adam with a falling rate."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from benchmarks.method_settings import (
    AgemSettings,
    EwcSettings,
    GemSettings,
    GpmSettings,
    HalrpSettings,
    KfacSettings,
    LogdSettings,
    OgdSettings,
    ReplaySettings,
    XkfacSettings,
)
from benchmarks.protocol_records.common import HALRP_CODE, HERE, settings_of_methods
from benchmarks.record import Expected, Normalisation, Protocol

#: The orders of the groups of ten classes.
_ORDERS = {
    "A": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    "B": (1, 7, 4, 5, 2, 0, 8, 6, 9, 3),
    "C": (7, 0, 5, 1, 8, 4, 3, 6, 2, 9),
    "D": (5, 8, 2, 9, 0, 4, 3, 7, 6, 1),
    "E": (2, 9, 5, 4, 8, 0, 6, 1, 3, 7),
}

#: The orders of the superclasses.
_SUPERCLASS_ORDERS = {
    "A": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19),
    "B": (15, 12, 5, 9, 7, 16, 18, 17, 1, 0, 3, 8, 11, 14, 10, 6, 2, 4, 13, 19),
    "C": (17, 1, 19, 18, 12, 7, 6, 0, 11, 15, 10, 5, 13, 3, 9, 16, 4, 14, 2, 8),
    "D": (11, 9, 6, 5, 12, 4, 0, 10, 13, 7, 14, 3, 15, 16, 8, 1, 2, 19, 18, 17),
    "E": (6, 14, 0, 11, 12, 17, 13, 4, 9, 1, 7, 19, 8, 10, 3, 15, 18, 5, 2, 16),
}

_HALRP = HalrpSettings(importance="valid")
_EWC, _KFAC, _XKFAC = EwcSettings(ewc_lambda=1e4), KfacSettings(strength=10.0), XkfacSettings(10.0, adaptive=False)

_COMMON_NOTES = (
    "the official code makes a new Adam for every experience (here its state lasts, and new parameters have none) and "
    "multiplies all gradients by 10 before Adam, which matters to Adam's eps alone",
    "in the official code the learning rate falls in the warm-up too; here it stays at lr there",
)

CIFAR100_HALRP = Protocol(
    name="cifar100-halrp",
    summary="split CIFAR-100 of HALRP: 10 experiences of 10 classes in one of 5 orders, LeNet with BatchNorm",
    source="cifar100",
    expected=Expected(height_width=(32, 32), channels=3, n_classes=100),
    split="classes",
    model="lenet-bn",
    normalisation=Normalisation(mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276)),
    n_experiences=10,
    classes_per_experience=10,
    task_order="A",
    task_orders=MappingProxyType(_ORDERS),
    epochs=20,
    optimizer="adam",
    lr=0.001,
    train_batch=128,
    test_batch=128,
    valid_share=0.2,
    valid_rule="random",
    lr_decay=0.95,
    methods=settings_of_methods(
        ewc=_EWC,
        replay=ReplaySettings(mem_size=2000),
        gpm=GpmSettings(threshold=0.97, threshold_step=0.003, n_samples=(24, 100, 125, 125)),
        gem=GemSettings(gem_patterns=200),
        agem=AgemSettings(agem_patterns=200),
        ogd=OgdSettings(n_gradients=20, ogd_max_mb=8000),
        logd=LogdSettings(patterns_per_exp=200, n_components=3, variant="official"),
        kfac=_KFAC,
        xkfac=_XKFAC,
        halrp=_HALRP,
    ),
    sources=MappingProxyType(
        {
            "experiences, task_order": f"{HALRP_CODE}, run_cifar100.py: ten classes each in label order; orders A to E",
            "model": f"{HALRP_CODE}, models/lenet.py: biases everywhere, BatchNorm with running statistics",
            "normalisation": f"{HALRP_CODE}, loader_cifar100.py",
            "epochs, optimizer, lr, train_batch": f"{HALRP_CODE}, scripts/cifar100_splits100_LeNet_HALRP.sh; the "
            "warm-up is one of the epochs of an experience",
            "lr_decay": f"{HALRP_CODE}, run_cifar100.py: .95 to the power of batch / samples in each iteration",
            "validation": f"{HALRP_CODE}: 20 % at random (1000 of 5000), for the layers' importance alone",
            "approximation_rate, max_rank, l1, weight_decay, prune_threshold": f"{HALRP_CODE}, the same script",
            "max_growth": f"{HALRP_CODE}: one minus the second value of prune_value, .8",
            "prune": f"{HERE}; the official code prunes the factors of all experiences (prune=all)",
            "ewc_lambda, strength": f"{HERE}: the best accuracy on the first 3 experiences after 4 epochs each, seed "
            "0, of 10, 100, ..., 1e6 for EWC; 1, 10, 100 for K-FAC; balanced, 1, 10, 100 for XK-FAC",
            "all other methods": f"{HERE}, not searched",
        }
    ),
    notes=(
        "published: no figure was found",
        "the official code, run once for order A with its seed 111111: ACC 67.37, growth .205",
        "the official code goes through the training samples in the same order in every epoch; here they are shuffled, "
        "and the samples held back are others",
        *_COMMON_NOTES,
    ),
)

CIFAR100_SUPERCLASS_HALRP = replace(
    CIFAR100_HALRP,
    name="cifar100-superclass-halrp",
    summary="CIFAR-100 superclasses of HALRP: 20 experiences of 5 classes in one of 5 orders, LeNet with BatchNorm",
    expected=Expected(height_width=(32, 32), channels=3, n_classes=100, coarse=True),
    split="superclasses",
    n_experiences=20,
    classes_per_experience=None,
    task_orders=MappingProxyType(_SUPERCLASS_ORDERS),
    methods=settings_of_methods(
        ewc=_EWC,
        replay=ReplaySettings(mem_size=2000),
        gpm=GpmSettings(threshold=0.98, threshold_step=0.001, n_samples=(24, 100, 125, 125)),
        gem=GemSettings(gem_patterns=100),
        agem=AgemSettings(agem_patterns=100),
        ogd=OgdSettings(n_gradients=20, ogd_max_mb=8000),
        logd=LogdSettings(patterns_per_exp=100, n_components=3, variant="official"),
        kfac=_KFAC,
        xkfac=_XKFAC,
        halrp=_HALRP,
    ),
    sources=MappingProxyType(
        {
            **CIFAR100_HALRP.sources,
            "experiences, task_order": f"{HALRP_CODE}, run_cifar100.py: superclasses in alphabetical order; orders A "
            "to E",
            "epochs, optimizer, lr, train_batch": f"{HALRP_CODE}, scripts/cifar100_super100_LeNet_HALRP.sh; the "
            "warm-up is one of the epochs of an experience",
            "validation": f"{HALRP_CODE}: 20 % at random (500 of 2500), for the layers' importance alone",
            "ewc_lambda, strength": "as for cifar100-halrp, not searched here",
        }
    ),
    notes=("published: no figure was found", *CIFAR100_HALRP.notes[2:]),
)

PMNIST_HALRP = replace(
    CIFAR100_HALRP,
    name="pmnist-halrp",
    summary="permuted MNIST of HALRP: 10 permutations of 3 x 32 x 32 values, LeNet with BatchNorm, a head each",
    source="mnist",
    expected=Expected(height_width=(28, 28), channels=1, n_classes=10),
    split="permutations",
    permutation_rule="gpm",
    permuted_heads=True,
    image_shape=(3, 32, 32),
    normalisation=Normalisation(mean=(0.1307,), std=(0.3081,)),
    classes_per_experience=None,
    task_order=None,
    task_orders=MappingProxyType({}),
    epochs=12,
    valid_rule="first",
    lr_decay=0.5404,
    methods=settings_of_methods(
        ewc=EwcSettings(ewc_lambda=10.0),
        replay=ReplaySettings(mem_size=1000),
        gpm=GpmSettings(threshold=0.97, threshold_step=0.003, n_samples=125),
        gem=GemSettings(gem_patterns=100),
        agem=AgemSettings(agem_patterns=100),
        ogd=OgdSettings(n_gradients=20, ogd_max_mb=8000),
        logd=LogdSettings(patterns_per_exp=100, n_components=3, variant="official"),
        halrp=replace(_HALRP, l1=1e-6, weight_decay=1e-3, max_growth=0.6),
    ),
    sources=MappingProxyType(
        {
            "n_experiences, permutations": f"{HALRP_CODE}, loader_pmnist.py: drawn as in GPM's code, the first "
            "permuted too, over all 3072 values; here with the run's seed (there it is the network's alone "
            "that differs between runs)",
            "images": f"{HALRP_CODE}, loader_pmnist.py: resized to 32 x 32 (bilinear), the same in three channels",
            "model": CIFAR100_HALRP.sources["model"],
            "normalisation": f"{HALRP_CODE}, loader_pmnist.py: mean .1307, std .3081",
            "epochs, optimizer, lr, train_batch": f"{HALRP_CODE}, scripts/pmnist_LeNet_HALRP.sh; the warm-up is one "
            "of the epochs of an experience",
            "lr_decay": f"{HALRP_CODE}, run_pmnist.py: .95 for every 4000 samples, that is .95 to the power of 12 in "
            "an epoch of 48,000",
            "validation": f"{HALRP_CODE}, loader_pmnist.py: the first 20 %, for the layers' importance alone",
            "approximation_rate, max_rank, l1, weight_decay, prune_threshold": f"{HALRP_CODE}, the same script",
            "max_growth": f"{HALRP_CODE}: one minus the second value of prune_value, .4",
            "prune": CIFAR100_HALRP.sources["prune"],
            "all other methods": f"{HERE}, not searched",
        }
    ),
    notes=("published: no figure was found", *_COMMON_NOTES),
)
