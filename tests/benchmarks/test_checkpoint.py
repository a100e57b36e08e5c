"""A run that was stopped between any two experiences gives the result of one that was not, for every method."""

from __future__ import annotations

import pickle

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

from benchmarks import checkpoint, evaluate
from benchmarks.build import build_stream
from benchmarks.jobs import make_job
from benchmarks.methods import METHODS
from benchmarks.run import run
from benchmarks.sources import read_digits
from benchmarks.trace import Session

CPU = torch.device("cpu")
SHORT = {"epochs": "2", "train_limit": "80", "n_experiences": "4", "n_samples": "50", "n_gradients": "20"}
SAME = (
    "accuracy_matrix",
    "loss_matrix",
    "initial_accuracies",
    "bytes_held",
    "method_report",
    "growth",
    "added_parameters",
    "forward_transfer",
)


class StopError(BaseException):
    """Like Ctrl-C."""


def stopping_at(experience):
    def report(position, experiences, epoch, epochs):
        if (position, epoch) == (experience, 1):
            raise StopError

    return report


RUNS = [("digits-split", method) for method in METHODS if not METHODS[method].joint and "kfac-" not in method]
RUNS += [("digits-permuted", method) for method in ("gem", "agem", "logd", "ogd")]
RUNS += [("digits-bn", method) for method in ("ewc", "kfac", "xkfac", "kfac-fixed-bn", "kfac-unmerged")]


@pytest.mark.parametrize(("protocol", "method"), RUNS)
def test_stopped_runs_equal_whole_ones(tmp_path, protocol, method):
    changes = SHORT | ({"max_growth": "0.5"} if method == "halrp" else {})
    job = make_job(protocol, method, 3, CPU, changes)
    data = read_digits()
    whole = run(job, data)
    session = Session(tmp_path, "key")
    for experience in (1, 3):
        with pytest.raises(StopError):
            run(job, data, stopping_at(experience), session)
        assert not evaluate._PUT_TOGETHER
    torch.manual_seed(99)  # whatever the process did in between
    resumed = run(job, data, session=session)
    assert (whole["sessions"], resumed["sessions"]) == (1, 3)
    for key in SAME:
        assert resumed[key] == whole[key], key
    for one, other in zip(whole["experiences"], resumed["experiences"], strict=True):
        assert {**one, "train_seconds": 0} == {**other, "train_seconds": 0}


def test_a_checkpoint_holds_what_was_learned_and_no_images(tmp_path):
    job = make_job("digits-permuted", "replay", 0, CPU, SHORT)
    with pytest.raises(StopError):
        run(job, read_digits(), stopping_at(2), Session(tmp_path, "key"))
    size = (tmp_path / "checkpoint.pt").stat().st_size
    images = read_digits().x_train.numel()
    assert 4 * 17_000 < size < 4 * 17_000 + 100_000  # the network of 17,000 numbers, and little besides
    assert size > images  # else the bound above would say nothing about images


@pytest.mark.parametrize("damage", ["key", "cut", "other"])
def test_a_checkpoint_that_does_not_fit_is_not_used(tmp_path, damage):
    job = make_job("digits-split", "naive", 0, CPU, SHORT)
    data = read_digits()
    with pytest.raises(StopError):
        run(job, data, stopping_at(2), Session(tmp_path, "key"))
    path = tmp_path / "checkpoint.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "other":
        path.write_bytes(pickle.dumps({"content": 1}))
    with pytest.warns(UserWarning, match="starting over"):
        result = run(job, data, session=Session(tmp_path, "other" if damage == "key" else "key"))
    assert result["sessions"] == 1
    assert result["accuracy_matrix"] == run(job, data)["accuracy_matrix"]


class Unstorable(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.hidden = (number for number in range(3))
        next(self.hidden)


def test_a_plugin_that_cannot_be_stored_costs_the_checkpoint_not_the_run(tmp_path, monkeypatch):
    job = make_job("digits-split", "naive", 0, CPU, SHORT)
    method = METHODS["naive"]
    monkeypatch.setitem(
        METHODS, "naive", type(method)("naive", "", method.settings, lambda settings, seed: [Unstorable()])
    )
    with pytest.warns(UserWarning, match=r"starts over.*generator"):
        result = run(job, read_digits(), session=Session(tmp_path, "key"))
    assert len(result["accuracy_matrix"]) == 4
    assert not (tmp_path / "checkpoint.pt").exists()


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    job = make_job("digits-split", "naive", 0, CPU, SHORT)
    stream = build_stream(job.protocol, read_digits(), 0)
    known = checkpoint.known_objects(stream)

    class Learner:
        loss = 1

    checkpoint.save(tmp_path / "c", "k", {"strategy": Plain(), "data": stream.train[1]}, known)
    drawn = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    content = checkpoint.load(tmp_path / "c", "k", known, CPU)
    again = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2] == again[2]
    assert content["data"] is stream.train[1]


class Plain:
    """Stands for a strategy."""
