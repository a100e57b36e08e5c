"""The protocols of GPM (arXiv 2103.09762) and of the methods that follow it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from benchmarks.method_settings import (
    AgemSettings,
    EwcSettings,
    GemSettings,
    GpmSettings,
    LogdSettings,
    OgdSettings,
    ReplaySettings,
    XkfacSettings,
)
from benchmarks.protocol_records.common import GPM_CODE, HERE, settings_of_methods
from benchmarks.record import Expected, Normalisation, Protocol

PMNIST_GPM = Protocol(
    name="pmnist-gpm",
    summary="permuted MNIST of GPM: 10 permutations, one shared output layer",
    source="mnist",
    expected=Expected(height_width=(28, 28), channels=1, n_classes=10),
    split="permutations",
    model="mlp",
    normalisation=Normalisation(mean=(0.1307,), std=(0.3081,)),
    n_experiences=10,
    hidden=100,
    epochs=5,
    lr=0.01,
    train_batch=10,
    test_batch=64,
    valid_share=0.1,
    valid_rule="first",
    methods=settings_of_methods(
        ewc=EwcSettings(ewc_lambda=10.0),
        replay=ReplaySettings(mem_size=1000),
        gpm=GpmSettings(threshold=(0.95, 0.99, 0.99), threshold_step=0.0, n_samples=300, rank_rule="official"),
        gem=GemSettings(gem_patterns=100),
        agem=AgemSettings(agem_patterns=100),
        ogd=OgdSettings(n_gradients=100, ogd_max_mb=8000),
        logd=LogdSettings(patterns_per_exp=100, n_components=3, variant="official"),
    ),
    sources=MappingProxyType(
        {
            "n_experiences, permutations": f"{GPM_CODE}, dataloader/pmnist.py; the first permuted too",
            "model, hidden": f"{GPM_CODE}, main_pmnist.py: 784-100-100-10, ReLU, no bias",
            "epochs, lr, train_batch, test_batch": f"{GPM_CODE}, main_pmnist.py; constant rate, last weights",
            "validation": f"{GPM_CODE}: the first 10 % of the training images, not used",
            "normalisation": f"{GPM_CODE}: mean .1307, std .3081",
            "threshold, n_samples, rank_rule": f"{GPM_CODE}: .95, .99, .99 constant; 300 samples",
            "all other methods": f"{HERE}, not searched",
        }
    ),
    notes=(
        "published (arXiv:2211.00789, Table 1): GPM 93.91 +- .16, BWT -3",
        "the official code, run once with its default seed 2: 93.20, BWT -3.82",
    ),
)

CIFAR100_GPM = Protocol(
    name="cifar100-gpm",
    summary="split CIFAR-100 of GPM: 10 experiences of 10 classes in label order, AlexNet, a head each",
    source="cifar100",
    expected=Expected(height_width=(32, 32), channels=3, n_classes=100),
    split="classes",
    model="alexnet",
    normalisation=Normalisation(mean=(125.3 / 255, 123.0 / 255, 113.9 / 255), std=(63.0 / 255, 62.1 / 255, 66.7 / 255)),
    n_experiences=10,
    classes_per_experience=10,
    epochs=200,
    lr=0.01,
    train_batch=64,
    test_batch=64,
    valid_share=0.05,
    valid_rule="random",
    patience=6,
    lr_factor=2.0,
    lr_min=1e-5,
    methods=settings_of_methods(
        ewc=EwcSettings(ewc_lambda=100.0),
        replay=ReplaySettings(mem_size=2000),
        gpm=GpmSettings(
            threshold=0.97,
            threshold_step=0.003,
            n_samples=(24, 100, 100, 125, 125),
            rank_rule="official",
        ),
        gem=GemSettings(gem_patterns=200),
        agem=AgemSettings(agem_patterns=200),
        ogd=OgdSettings(n_gradients=20, ogd_max_mb=8000),
        logd=LogdSettings(patterns_per_exp=200, n_components=3, variant="official"),
        xkfac=XkfacSettings(batchnorm="track"),  # its BatchNorms keep no statistics that could be merged or frozen
    ),
    sources=MappingProxyType(
        {
            "experiences": f"{GPM_CODE}, dataloader/cifar100.py: classes in label order",
            "model": f"{GPM_CODE}: AlexNet without biases, BatchNorm without running statistics",
            "normalisation": f"{GPM_CODE}: mean 125.3, 123.0, 113.9, std 63.0, 62.1, 66.7, over 255",
            "epochs, lr, train_batch, test_batch": f"{GPM_CODE}, main_cifar100.py",
            "validation": f"{GPM_CODE}: 5 % at random (250 of 5000)",
            "patience, lr_factor, lr_min": f"{GPM_CODE}: on the validation loss; best weights restored",
            "threshold, threshold_step, n_samples, rank_rule": f"{GPM_CODE}: .97 + .003 t",
            "all other methods": f"{HERE}, not searched",
        }
    ),
    notes=(
        "published (arXiv:2211.00789, Table 1): GPM 72.48 +- .40, BWT -0.9; EWC 68.80; joint 79.58",
        "BatchNorm uses each test batch's own statistics, so test images are shuffled, once and for all",
    ),
)

CIFAR100_SUPERCLASS = replace(
    CIFAR100_GPM,
    name="cifar100-superclass-gpm",
    summary="CIFAR-100 superclasses of GPM: 20 experiences of 5 classes, LeNet, a head each",
    expected=Expected(height_width=(32, 32), channels=3, n_classes=100, coarse=True),
    split="superclasses",
    model="lenet",
    normalisation=Normalisation(),
    n_experiences=20,
    classes_per_experience=None,
    epochs=50,
    methods=settings_of_methods(
        ewc=EwcSettings(ewc_lambda=100.0),
        replay=ReplaySettings(mem_size=2000),
        gpm=GpmSettings(threshold=0.98, threshold_step=0.001, n_samples=(24, 100, 125, 125), rank_rule="official"),
        gem=GemSettings(gem_patterns=100),
        agem=AgemSettings(agem_patterns=100),
        ogd=OgdSettings(n_gradients=20, ogd_max_mb=8000),
        logd=LogdSettings(patterns_per_exp=100, n_components=3, variant="official"),
    ),
    sources=MappingProxyType(
        {
            "experiences": f"{GPM_CODE}: superclasses in alphabetical order (task order 0)",
            "model": f"{GPM_CODE}: LeNet without biases, Kaiming-uniform weights",
            "normalisation": f"{GPM_CODE}: none but the division by 255",
            "epochs, lr, train_batch, test_batch": f"{GPM_CODE}, main_cifar_superclass.py",
            "validation": f"{GPM_CODE}: 5 % at random (125 of 2500)",
            "patience, lr_factor, lr_min": f"{GPM_CODE}: on the validation loss; best weights restored",
            "threshold, threshold_step, n_samples, rank_rule": f"{GPM_CODE}: .98 + .001 t",
            "all other methods": f"{HERE}, not searched",
        }
    ),
    notes=(
        "the official loader reads colour planes as if they were interleaved and trains on scrambled images; "
        "here the images are right, so the numbers are not comparable with published ones",
    ),
)
