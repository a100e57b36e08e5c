"""The protocols as records: stream, network, schedule, hyper-parameters, and where each figure is from.

`resolve` joins a protocol and a method with what the user changed. The `sources` of a protocol say for each
figure whether it is the official code's, a paper's or a choice made here; `python -m benchmarks list NAME`
shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from benchmarks.methods import (
    EwcSettings,
    GpmSettings,
    NoSettings,
    ReplaySettings,
    find_method,
)
from benchmarks.record import Expected, Normalisation, Protocol
from benchmarks.settings import apply, settable, unknown

_CODE = "official GPM code"
_HERE = "chosen here"


def _methods(ewc: EwcSettings, replay: ReplaySettings, gpm: GpmSettings) -> Mapping[str, Any]:
    """Settings of every method; the ones without any need none."""
    table = {"naive": NoSettings(), "ewc": ewc, "replay": replay, "joint": NoSettings(), "gpm": gpm}
    return MappingProxyType(table)


_DIGITS_SOURCES = {
    "data": "scikit-learn's digits, every fifth image for test",
    "model, hidden, lr, epochs, train_batch": f"{_HERE}: fine-tuning forgets, a run takes about a second",
    "ewc_lambda, mem_size, threshold, n_samples": f"{_HERE}, after a few trials, not a search",
}

_DIGITS_SPLIT = Protocol(
    name="digits-split",
    summary="scikit-learn digits, 5 experiences of 2 classes, a head each",
    source="digits",
    expected=Expected(),
    split="classes",
    model="mlp",
    normalisation=Normalisation(scale=16.0),
    n_experiences=5,
    classes_per_experience=2,
    hidden=100,
    epochs=10,
    lr=0.1,
    train_batch=10,
    methods=_methods(
        EwcSettings(ewc_lambda=100.0),
        ReplaySettings(mem_size=100),
        GpmSettings(threshold=0.97, threshold_step=0.003, n_samples=125),
    ),
    sources=MappingProxyType(_DIGITS_SOURCES),
)

_DIGITS_PERMUTED = replace(
    _DIGITS_SPLIT,
    name="digits-permuted",
    summary="scikit-learn digits, 5 permutations of the 64 pixels, one shared output layer",
    split="permutations",
    classes_per_experience=None,
    epochs=4,
    methods=_methods(
        EwcSettings(ewc_lambda=100.0),
        ReplaySettings(mem_size=200),
        GpmSettings(threshold=(0.95, 0.99, 0.99), threshold_step=0.0, n_samples=300),
    ),
)

_NPZ_SPLIT = replace(
    _DIGITS_SPLIT,
    name="npz-split",
    summary="your images (--data FILE.npz) split by class, a head for each experience",
    source="npz",
    normalisation=Normalisation(),
    classes_per_experience=0,
    lr=0.01,
    sources=MappingProxyType({"all figures": f"{_HERE}, a start for your own data; change them with --set"}),
)

_NPZ_PERMUTED = replace(
    _DIGITS_PERMUTED,
    name="npz-permuted",
    summary="your images (--data FILE.npz) under permutations of the pixels, one shared output layer",
    source="npz",
    normalisation=Normalisation(),
    lr=0.01,
    sources=_NPZ_SPLIT.sources,
)

_PMNIST_GPM = Protocol(
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
    methods=_methods(
        EwcSettings(ewc_lambda=10.0),
        ReplaySettings(mem_size=1000),
        GpmSettings(threshold=(0.95, 0.99, 0.99), threshold_step=0.0, n_samples=300, rank_rule="official"),
    ),
    sources=MappingProxyType(
        {
            "n_experiences, permutations": f"{_CODE}, dataloader/pmnist.py; the first permuted too",
            "model, hidden": f"{_CODE}, main_pmnist.py: 784-100-100-10, ReLU, no bias",
            "epochs, lr, train_batch, test_batch": f"{_CODE}, main_pmnist.py; constant rate, last weights",
            "validation": f"{_CODE}: the first 10 % of the training images, not used",
            "normalisation": f"{_CODE}: mean .1307, std .3081",
            "threshold, n_samples, rank_rule": f"{_CODE}: .95, .99, .99 constant; 300 samples",
            "ewc_lambda, mem_size": f"{_HERE}, not searched",
        }
    ),
    notes=(
        "published (arXiv:2211.00789, Table 1): GPM 93.91 +- .16, BWT -3",
        "the official code, run once with its default seed 2: 93.20, BWT -3.82",
    ),
)

_CIFAR100_GPM = Protocol(
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
    methods=_methods(
        EwcSettings(ewc_lambda=100.0),
        ReplaySettings(mem_size=2000),
        GpmSettings(
            threshold=0.97,
            threshold_step=0.003,
            n_samples=(24, 100, 100, 125, 125),
            rank_rule="official",
        ),
    ),
    sources=MappingProxyType(
        {
            "experiences": f"{_CODE}, dataloader/cifar100.py: classes in label order",
            "model": f"{_CODE}: AlexNet without biases, BatchNorm without running statistics",
            "normalisation": f"{_CODE}: mean 125.3, 123.0, 113.9, std 63.0, 62.1, 66.7, over 255",
            "epochs, lr, train_batch, test_batch": f"{_CODE}, main_cifar100.py",
            "validation": f"{_CODE}: 5 % at random (250 of 5000)",
            "patience, lr_factor, lr_min": f"{_CODE}: on the validation loss; best weights restored",
            "threshold, threshold_step, n_samples, rank_rule": f"{_CODE}: .97 + .003 t",
            "ewc_lambda, mem_size": f"{_HERE}, not searched",
        }
    ),
    notes=(
        "published (arXiv:2211.00789, Table 1): GPM 72.48 +- .40, BWT -0.9; EWC 68.80; joint 79.58",
        "BatchNorm uses each test batch's own statistics, so test images are shuffled, once and for all",
    ),
)

_CIFAR100_SUPERCLASS = replace(
    _CIFAR100_GPM,
    name="cifar100-superclass-gpm",
    summary="CIFAR-100 superclasses of GPM: 20 experiences of 5 classes, LeNet, a head each",
    expected=Expected(height_width=(32, 32), channels=3, n_classes=100, coarse=True),
    split="superclasses",
    model="lenet",
    normalisation=Normalisation(),
    n_experiences=20,
    classes_per_experience=None,
    epochs=50,
    methods=_methods(
        EwcSettings(ewc_lambda=100.0),
        ReplaySettings(mem_size=2000),
        GpmSettings(threshold=0.98, threshold_step=0.001, n_samples=(24, 100, 125, 125), rank_rule="official"),
    ),
    sources=MappingProxyType(
        {
            "experiences": f"{_CODE}: superclasses in alphabetical order (task order 0)",
            "model": f"{_CODE}: LeNet without biases, Kaiming-uniform weights",
            "normalisation": f"{_CODE}: none but the division by 255",
            "epochs, lr, train_batch, test_batch": f"{_CODE}, main_cifar_superclass.py",
            "validation": f"{_CODE}: 5 % at random (125 of 2500)",
            "patience, lr_factor, lr_min": f"{_CODE}: on the validation loss; best weights restored",
            "threshold, threshold_step, n_samples, rank_rule": f"{_CODE}: .98 + .001 t",
            "ewc_lambda, mem_size": f"{_HERE}, not searched",
        }
    ),
    notes=(
        "the official loader reads colour planes as if they were interleaved and trains on scrambled images; "
        "here the images are right, so the numbers are not comparable with published ones",
    ),
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _DIGITS_SPLIT,
        _DIGITS_PERMUTED,
        _PMNIST_GPM,
        _CIFAR100_GPM,
        _CIFAR100_SUPERCLASS,
        _NPZ_SPLIT,
        _NPZ_PERMUTED,
    )
}


def find_protocol(name: str) -> Protocol:
    """Look a protocol up.

    Args:
        name: its name.

    Returns:
        The protocol.

    Raises:
        InputError: if there is none of that name, with the nearest one.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def resolve(
    protocol_name: str, method_name: str, assignments: Mapping[str, str]
) -> tuple[Protocol, Any, dict[str, str]]:
    """Join a protocol and a method with what the user changed.

    Args:
        protocol_name: the protocol.
        method_name: the method.
        assignments: what came with `--set`; keys that neither of the two knows are left to the caller.

    Returns:
        The changed protocol, the changed settings of the method, and those assignments that belong to either.

    Raises:
        InputError: if a name is unknown or a value does not fit.
    """
    protocol = find_protocol(protocol_name)
    settings = protocol.methods[find_method(method_name).name]
    known = {*settable(protocol), *settable(settings)}
    used = {key: text for key, text in assignments.items() if key in known}
    return apply(protocol, used), apply(settings, used), used


def check_assignments(
    protocol_names: tuple[str, ...], method_names: tuple[str, ...], assignments: Mapping[str, str]
) -> None:
    """Refuse keys that none of the chosen protocols and methods knows.

    Args:
        protocol_names: the chosen protocols.
        method_names: the chosen methods.
        assignments: what came with `--set`.

    Raises:
        InputError: at the first such key, with the nearest ones that exist.
    """
    known: set[str] = set()
    for protocol in map(find_protocol, protocol_names):
        known.update(settable(protocol))
        for method in method_names:
            known.update(settable(protocol.methods[find_method(method).name]))
    for key in assignments:
        if key not in known:
            raise unknown("setting", key, known)
