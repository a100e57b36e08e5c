"""Steps in the eigenbasis of Kronecker factors inside Avalanche: epochs, pieces, growing heads, broken-off training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks.scenarios import class_incremental_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.training.supervised import OnlineNaive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import ConfigurationError, KFACLaplace, KFACLaplacePlugin
from avalanche_gradproj.testing import MethodCase, leftovers, strategy, stream
from benchmarks.method_records.curvature import CURVATURE
from benchmarks.method_settings import KfacSettings
from tests.plugins.kfac_setup import class_incremental, incremental

ADAM = MethodCase("kfac", KFACLaplacePlugin, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))


def plugin(eigenbasis=True, strength=2.0):
    return KFACLaplacePlugin(strength, mode="online", fisher="exact", eigenbasis=eigenbasis)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_weights_are_those_of_a_plain_loop_of_several_epochs():
    """Avalanche enters the context once an epoch: the optimizer remembers from one to the next."""
    own, kwargs = plugin(), {"train_mb_size": 48, "train_epochs": 3}
    learner, plain = strategy(ADAM, [own], **kwargs), strategy(ADAM, [], **kwargs).model
    laplace, optimizer = plugin().method, ADAM.optimizer(plain.parameters())
    plain.double()
    learner.model.double()
    for experience in stream().train_stream:
        x = torch.stack([experience.dataset[i][0] for i in range(48)]).double()
        y = torch.tensor([int(experience.dataset[i][1]) for i in range(48)])
        data = ClassificationDataset([TensorDataset(x, y)], data_attributes=[DataAttribute(y.tolist(), "targets")])
        whole = class_incremental_benchmark(
            {"train": data, "test": data}, class_order=list(range(4)), num_experiences=1
        )
        learner.train(whole.train_stream[0])
        with laplace.experience(plain, optimizer, samples=48):
            for _ in range(3):
                optimizer.zero_grad()
                (F.cross_entropy(plain(x), y) + laplace.penalty()).backward()
                optimizer.step()
        laplace.consolidate(plain, [x])
    assert (parameters(learner.model) - parameters(plain)).abs().max() < 1e-6


def test_a_shared_head_that_grows():
    """Gradient descent goes the same way in any basis, Adam another one."""

    def run(eigenbasis, adam):
        torch.manual_seed(0)
        learner = incremental([plugin(eigenbasis)])
        if adam:
            learner.optimizer = torch.optim.Adam(learner.model.parameters(), lr=0.01)
        for experience in class_incremental():
            learner.train(experience)
        return parameters(learner.model)

    torch.testing.assert_close(run(True, False), run(False, False), rtol=1e-3, atol=1e-4)
    assert (run(True, True) - run(False, True)).abs().max() > 0.01


def test_pieces_of_an_experience_share_the_optimizers_memory():
    model, own = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), plugin()
    learner = OnlineNaive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01), train_mb_size=8, plugins=[own]
    )
    pieces = split_online_stream(stream().train_stream, experience_size=16, access_task_boundaries=True)
    seen = []
    for piece in pieces:
        learner.train(piece)
        seen.append(int(learner.optimizer.state[model[0].weight]["step"]))
    assert seen == [2, 4, 6] * 3
    assert own.method.experiences == 3


def test_training_that_is_broken_off_leaves_weights_and_no_hooks():
    learner = strategy(ADAM, [plugin()])
    learner.train(stream().train_stream[0])
    before = []

    def raising(optimizer, args, kwargs):
        if len(before) == 2:
            raise KeyboardInterrupt
        before.append(parameters(learner.model))

    handle = learner.optimizer.register_step_pre_hook(raising)
    with pytest.raises(KeyboardInterrupt):
        learner.train(stream().train_stream[1])
    handle.remove()
    assert not leftovers(learner.model, learner)
    assert learner.plugins[0].method._training is None
    learner.train(stream().train_stream[1])


def test_the_strategy_and_the_benchmarks_take_it():
    model = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4))
    optimizer = torch.optim.Adam(model.parameters())
    learner = KFACLaplace(model=model, optimizer=optimizer, mode="online", eigenbasis=True, train_mb_size=8)
    assert learner.plugin.method.eigenbasis
    record = next(own for own in CURVATURE if own.name == "kfac")
    assert not KfacSettings().eigenbasis
    for chosen in (False, True):
        (own,) = record.plugins(KfacSettings(eigenbasis=chosen), 0)
        assert own.method.eigenbasis is chosen


def test_optimizers_that_evaluate_the_model_are_refused_before_training():
    model = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4))
    learner = KFACLaplace(
        model=model, optimizer=torch.optim.LBFGS(model.parameters()), mode="online", eigenbasis=True, train_mb_size=8
    )
    with pytest.raises(ConfigurationError, match="LBFGS"):
        learner.train(stream().train_stream[0])
