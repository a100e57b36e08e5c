"""The validation schedule: rates, stopping and restored weights, on scripted losses and against a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from benchmarks import schedule
from benchmarks.orders import permutations
from benchmarks.record import Normalisation
from benchmarks.sampling import Sampling
from benchmarks.streams import permute

SETTINGS = {"lr": 0.4, "patience": 2, "lr_factor": 2.0, "lr_min": 0.15, "batch_size": 7}


class Witness(SupervisedPlugin):
    """Writes down rate and weights after each epoch, and the weights at the end of each experience."""

    def __init__(self):
        super().__init__()
        self.rates, self.weights, self.final = [], [], []

    def before_training_exp(self, strategy, **kwargs):
        self.rates.append([])
        self.weights.append([])

    def after_training_iteration(self, strategy, **kwargs):
        self.rates[-1].append(strategy.optimizer.param_groups[0]["lr"])

    def after_training_epoch(self, strategy, **kwargs):
        self.weights[-1].append(strategy.model[1].weight.detach().clone())

    def after_training_exp(self, strategy, **kwargs):
        self.final.append(strategy.model[1].weight.detach().clone())


def train(stream, epochs, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(20, 4))
    witness = Witness()
    plugin = schedule.ValidationSchedule(stream, **SETTINGS)
    strategy = SupervisedTemplate(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=99.0),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=1000,
        train_epochs=epochs,
        plugins=[plugin, witness],
        evaluator=EvaluationPlugin(),
    )
    strategy.train(stream.benchmark.train_stream)
    return witness


@pytest.fixture
def stream(images):
    return permute(images, permutations(2, 20, 0), Normalisation(), Sampling(valid_share=0.25))


def test_scripted_losses_give_the_rates_the_stop_and_the_best_weights(stream, monkeypatch):
    # Two without improvement halve the rate; the second time it would be .1 < .15, so the experience ends.
    first = [1.0, 0.8, 0.9, 0.85, 0.7, 0.75, 0.8]
    second = [0.9, 0.95, 0.9, 0.9, 0.9]  # equal is not better
    losses = iter(first + second)
    monkeypatch.setattr(schedule, "mean_loss", lambda *args: next(losses))
    witness = train(stream, epochs=50)
    assert next(losses, None) is None
    assert witness.rates[0] == [0.4] * 4 + [0.2] * 3
    assert witness.rates[1] == [0.4] * 3 + [0.2] * 2
    assert torch.equal(witness.final[0], witness.weights[0][4])
    assert torch.equal(witness.final[1], witness.weights[1][0])


def test_a_stop_after_the_last_epoch_does_not_reach_the_next_experience(stream, monkeypatch):
    losses = iter([1.0, 2.0, 2.0, 2.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr(schedule, "mean_loss", lambda *args: next(losses))
    witness = train(stream, epochs=5)
    assert [len(weights) for weights in witness.weights] == [5, 5]
    assert torch.equal(witness.final[0], witness.weights[0][0])
    assert torch.equal(witness.final[1], witness.weights[1][4])


def test_losses_that_are_no_numbers_leave_the_weights_of_the_start(stream, monkeypatch):
    monkeypatch.setattr(schedule, "mean_loss", lambda *args: float("nan"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 4))
    start = model[1].weight.detach().clone()
    witness = train(stream, epochs=50, model=model)
    assert len(witness.weights[0]) == 4
    assert torch.equal(witness.final[0], start)


def test_training_equals_a_plain_loop(stream):
    witness = train(stream, epochs=12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 4))
    for i in range(2):
        x, y = stream.train[i].as_tensors()
        valid_x, valid_y = stream.valid[i].as_tensors()
        rate, best, waited, kept = 0.4, float("inf"), 0, copy.deepcopy(model.state_dict())
        for _ in range(12):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(rate * parameter.grad)
                loss = nn.functional.cross_entropy(model(valid_x), valid_y).item()
            if loss < best:
                best, waited, kept = loss, 0, copy.deepcopy(model.state_dict())
                continue
            waited += 1
            if waited == 2:
                rate, waited = rate / 2, 0
                if rate < 0.15:
                    break
        model.load_state_dict(kept)
        torch.testing.assert_close(witness.final[i], model[1].weight, rtol=1e-4, atol=1e-5)


def test_without_validation_experiences_it_is_refused(images):
    stream = permute(images, permutations(2, 20, 0), Normalisation(), Sampling())
    with pytest.raises(ValueError, match="validation"):
        schedule.ValidationSchedule(stream, **SETTINGS)
