"""Protocols that need no download: scikit-learn's digits, and the user's own images."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from benchmarks.method_settings import (
    AgemSettings,
    EwcSettings,
    GemSettings,
    GpmSettings,
    HalrpSettings,
    LogdSettings,
    OgdSettings,
    ReplaySettings,
)
from benchmarks.protocol_records.common import HERE, settings_of_methods
from benchmarks.record import Expected, Normalisation, Protocol

_DIGITS_SOURCES = {
    "data": "scikit-learn's digits, every fifth image for test",
    "model, hidden, lr, epochs, train_batch": f"{HERE}: fine-tuning forgets, a run takes about a second",
    "ewc_lambda, mem_size, threshold, n_samples": f"{HERE}, after a few trials, not a search",
    "max_growth": f"{HERE}: each further experience takes about .055 of so small a network at least",
}

DIGITS_SPLIT = Protocol(
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
    methods=settings_of_methods(
        ewc=EwcSettings(ewc_lambda=100.0),
        replay=ReplaySettings(mem_size=100),
        gpm=GpmSettings(threshold=0.97, threshold_step=0.003, n_samples=125),
        gem=GemSettings(gem_patterns=20, memory_strength=0.5),
        agem=AgemSettings(agem_patterns=20, agem_sample_size=20),
        ogd=OgdSettings(n_gradients=100),
        logd=LogdSettings(patterns_per_exp=20, n_components=3, variant="official"),
        halrp=HalrpSettings(max_growth=0.3),
    ),
    sources=MappingProxyType(_DIGITS_SOURCES),
)

DIGITS_PERMUTED = replace(
    DIGITS_SPLIT,
    name="digits-permuted",
    summary="scikit-learn digits, 5 permutations of the 64 pixels, one shared output layer",
    split="permutations",
    classes_per_experience=None,
    epochs=4,
    methods=settings_of_methods(
        ewc=EwcSettings(ewc_lambda=100.0),
        replay=ReplaySettings(mem_size=200),
        gpm=GpmSettings(threshold=(0.95, 0.99, 0.99), threshold_step=0.0, n_samples=300),
        gem=GemSettings(gem_patterns=40, memory_strength=0.5),
        agem=AgemSettings(agem_patterns=40, agem_sample_size=40),
        ogd=OgdSettings(n_gradients=100),
        logd=LogdSettings(patterns_per_exp=40, n_components=3, variant="official"),
    ),
)

NPZ_SPLIT = replace(
    DIGITS_SPLIT,
    name="npz-split",
    summary="your images (--data FILE.npz) split by class, a head for each experience",
    source="npz",
    normalisation=Normalisation(),
    classes_per_experience=0,
    lr=0.01,
    methods=MappingProxyType({**DIGITS_SPLIT.methods, "halrp": HalrpSettings(max_growth=1.0)}),
    sources=MappingProxyType({"all figures": f"{HERE}, a start for your own data; change them with --set"}),
)

NPZ_PERMUTED = replace(
    DIGITS_PERMUTED,
    name="npz-permuted",
    summary="your images (--data FILE.npz) under permutations of the pixels, one shared output layer",
    source="npz",
    normalisation=Normalisation(),
    lr=0.01,
    sources=NPZ_SPLIT.sources,
)
