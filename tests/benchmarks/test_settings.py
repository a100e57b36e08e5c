"""Settings from texts: types, bounds, unknown names, and the names that changed settings give to folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.assignments import check
from benchmarks.folders import run_folder
from benchmarks.jobs import make_job
from benchmarks.methods import METHODS
from benchmarks.protocols import PROTOCOLS, resolve
from benchmarks.settings import InputError, parse_assignments, values


def test_texts_become_values_of_the_declared_types():
    protocol, settings, used = resolve(
        "pmnist-gpm",
        "gpm",
        {"epochs": "2", "lr": "1e-3", "threshold": "0.9, 0.95,1", "n_samples": "7", "include": "1,3", "x": "1"},
    )
    assert (protocol.epochs, protocol.lr) == (2, 0.001)
    assert (settings.threshold, settings.n_samples, settings.include) == ((0.9, 0.95, 1.0), 7, ("1", "3"))
    assert resolve("pmnist-gpm", "gpm", {"n_samples": "all"})[1].n_samples == "all"
    assert "x" not in used
    assert PROTOCOLS["pmnist-gpm"].epochs == 5


@pytest.mark.parametrize(
    ("key", "text", "fragments"),
    [
        ("epochs", "2.5", ["epochs", "'2.5'", "an integer"]),
        ("lr", "fast", ["lr", "'fast'", "a number"]),
        ("lr", "nan", ["lr", "a number"]),
        ("lr", "0", ["lr", "more than 0"]),
        ("threshold", "0.9,1.5", ["threshold", "1.5", "at most 1"]),
        ("threshold", "0.9,", ["threshold", "list of numbers"]),
        ("n_samples", "3,x", ["n_samples", "an integer or a comma-separated list of integers or one of all"]),
        ("rank_rule", "mine", ["rank_rule", "paper, official"]),
        ("epochs", "", ["epochs", "an integer"]),
    ],
)
def test_what_does_not_fit_is_named(key, text, fragments):
    with pytest.raises(InputError) as caught:
        resolve("pmnist-gpm", "gpm", {key: text})
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_fields_that_do_not_apply_cannot_be_set():
    for protocol, key in (
        ("pmnist-gpm", "patience"),
        ("cifar100-gpm", "hidden"),
        ("digits-permuted", "classes_per_experience"),
    ):
        with pytest.raises(InputError, match=f"unknown setting '{key}'"):
            check((protocol,), ("naive",), {key: "3"})


def test_a_key_of_one_chosen_method_is_enough():
    check(("digits-split",), ("naive", "gpm"), {"threshold": "0.9"})
    with pytest.raises(InputError, match="did you mean 'threshold'"):
        check(("digits-split",), ("naive", "gpm"), {"treshold": "0.9"})


@pytest.mark.parametrize("texts", [["lr"], ["=3"], ["lr=1", "lr=2"]])
def test_assignments_need_a_key_and_a_value_once(texts):
    with pytest.raises(InputError):
        parse_assignments(texts)


def test_every_protocol_has_values_for_every_method_and_says_where_from():
    for protocol in PROTOCOLS.values():
        assert set(protocol.methods) == set(METHODS)
        for name, method in METHODS.items():
            assert type(protocol.methods[name]) is method.settings
        assert protocol.sources
        assert {"epochs", "lr", "train_batch"} <= set(values(protocol))


def name(protocol, method, **changes):
    job = make_job(protocol, method, 1, torch.device("cpu"), changes)
    return run_folder(Path("results"), job, "0123456789").path.as_posix()


def test_changed_settings_give_other_file_names():
    plain = name("digits-split", "ewc")
    assert plain == "results/runs/digits-split/ewc-seed1-01234567"
    assert name("digits-split", "ewc", threshold="0.5") == plain  # another method's
    assert name("digits-split", "ewc", epochs=str(PROTOCOLS["digits-split"].epochs)) == plain  # not a change
    changed = name("digits-split", "ewc", ewc_lambda="2")
    assert changed != plain
    assert changed == name("digits-split", "ewc", ewc_lambda="2.0")
    assert changed != name("digits-split", "ewc", ewc_lambda="2", epochs="1")
