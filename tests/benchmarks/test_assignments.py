"""Settings and grids: what belongs to which run, and what is refused."""

from __future__ import annotations

import pytest

from benchmarks import assignments
from benchmarks.settings import InputError


def test_the_more_particular_comes_first():
    given = {"lr": "1", "digits-split.lr": "2", "gpm.lr": "3", "threshold": "0.5", "ewc.ewc_lambda": "7"}
    assert assignments.for_run("digits-split", "gpm", given) == {"lr": "3", "threshold": "0.5"}
    assert assignments.for_run("digits-split", "naive", given) == {"lr": "2"}
    assert assignments.for_run("digits-permuted", "ewc", given) == {"lr": "1", "ewc_lambda": "7"}
    backwards = dict(reversed(list(given.items())))
    assert assignments.for_run("digits-split", "gpm", backwards) == {"lr": "3", "threshold": "0.5"}


def test_points_are_all_combinations_in_order():
    grid = assignments.parse_grid(["a=1,2", "b=x,y"])
    assert assignments.points(grid) == [
        {"a": "1", "b": "x"},
        {"a": "1", "b": "y"},
        {"a": "2", "b": "x"},
        {"a": "2", "b": "y"},
    ]
    assert assignments.points({}) == [{}]


def test_values_may_be_lists():
    assert assignments.parse_grid(["t=0.9,0.95; 0.99,0.97 "]) == {"t": ("0.9,0.95", "0.99,0.97")}


def test_labels_name_what_varies_of_a_method():
    point = {"gpm.threshold": "0.9", "epochs": "2"}
    assert assignments.label("digits-split", "gpm", point) == "gpm epochs=2 threshold=0.9"
    assert assignments.label("digits-split", "naive", point) == "naive epochs=2"


@pytest.mark.parametrize(
    ("key", "fragments"),
    [
        ("treshold", ["unknown setting 'treshold'", "'threshold'"]),
        ("gpm.treshold", ["unknown setting of gpm 'treshold'", "'threshold'"]),
        ("digits-split.treshold", ["unknown setting of digits-split", "'threshold'"]),
        ("gpn.threshold", ["'gpn'", "'gpm'"]),
        ("ewc.ewc_lambda", ["ewc is not among what is to be run (digits-split, naive, gpm)"]),
        ("naive.threshold", ["unknown setting of naive 'threshold'"]),
    ],
)
def test_keys_that_nothing_knows_are_named(key, fragments):
    with pytest.raises(InputError) as caught:
        assignments.check(("digits-split",), ("naive", "gpm"), {key: "1"})
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_known_keys_pass():
    known = {"lr": "", "threshold": "", "gpm.threshold": "", "gpm.lr": "", "digits-split.threshold": ""}
    assignments.check(("digits-split",), ("naive", "gpm"), known)
