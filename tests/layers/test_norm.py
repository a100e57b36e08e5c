"""held_statistics: normalise with the running statistics, and leave them."""

import pytest
import torch
from torch import nn

from avalanche_gradproj.layers.norm import held_statistics, tracked_norms, untracked_norms


def model():
    return nn.Sequential(
        nn.Conv1d(2, 3, 1),
        nn.BatchNorm1d(3),
        nn.InstanceNorm1d(3, track_running_stats=True),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Dropout(0.5),
        nn.LayerNorm(4),
    )


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def test_names():
    assert list(tracked_norms(model())) == ["1", "2"]
    assert untracked_norms(model()) == ["3"]
    tracked = tracked_norms(nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm2d(2)), "b": nn.SyncBatchNorm(2)}))
    assert list(tracked) == ["a.0", "b"]


def test_statistics_stay_and_are_used_while_gradients_flow():
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(20, 3) * 2 + 1)
    before, x = buffers(norm), torch.randn(8, 3) + 5
    with held_statistics(norm):
        output = norm(x)
        output.sum().backward()
    expected = (x - before["running_mean"]) / (before["running_var"] + norm.eps).sqrt()
    torch.testing.assert_close(output, expected)
    assert all(torch.equal(value, before[name]) for name, value in buffers(norm).items())
    assert norm.weight.grad is not None
    norm(x)
    assert not torch.equal(norm.running_mean, before["running_mean"])


def test_only_tracking_layers_change_their_mode_and_get_it_back():
    net = model().train()
    net[2].eval()
    modes = [module.training for module in net.modules()]
    with held_statistics(net):
        assert [module.training for module in net] == [True, False, False, True, True, True]
        assert net.training
    assert [module.training for module in net.modules()] == modes
    assert net[1].training
    assert not net[2].training


def test_modes_come_back_after_an_exception():
    net = model().train()
    with pytest.raises(KeyError), held_statistics(net):
        raise KeyError
    assert all(module.training for module in net.modules())


def test_nested():
    net = model().train()
    with held_statistics(net):
        with held_statistics(net):
            pass
        assert not net[1].training
    assert net[1].training


def test_statistics_stay_held_when_somebody_calls_train():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 3))
    before = model[1].running_mean.clone()
    with held_statistics(model):
        model.train()
        model(torch.randn(8, 3) + 5)
    assert torch.equal(model[1].running_mean, before)
    assert model[1].training
    assert not model[1]._forward_pre_hooks
