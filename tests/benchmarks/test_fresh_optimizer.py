"""Optimizers that begin every experience anew."""

from __future__ import annotations

import pytest
import torch

from benchmarks.build import build_strategy, build_stream
from benchmarks.jobs import load_data, make_job

SHORT = {"n_experiences": "3", "epochs": "2", "train_batch": "25", "hidden": "5"}


#: An experience has 2 epochs of 60 images: 6 steps.
@pytest.mark.parametrize(("reset", "expected"), [("true", [6, 6, 6]), ("false", [6, 12, 18])])
def test_steps_that_adam_counts(mnist_like, reset, expected):
    job = make_job("pmnist-kfac", "kfac", 0, torch.device("cpu"), SHORT | {"reset_optimizer": reset})
    data = load_data(job.protocol, mnist_like)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    stream = build_stream(job.protocol, data, 0)
    strategy, _ = build_strategy(job, stream, model)
    counted = []
    for experience in stream.benchmark.train_stream:
        strategy.train(experience)
        counted += [int(strategy.optimizer.state[model[1].weight]["step"])]
    assert counted == expected


def test_the_results_say_so():
    said = {
        reset: make_job("pmnist-kfac", "kfac", 0, torch.device("cpu"), {"reset_optimizer": reset}).hyper_parameters
        for reset in ("true", "false")
    }
    assert said["true"]["optimizer"] == "Adam, its state forgotten between experiences"
    assert said["false"]["optimizer"] == "Adam, its state kept between experiences"
    assert said["true"]["reset_optimizer"] is True
