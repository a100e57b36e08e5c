"""BatchNorms that are held, or that a model itself keeps in evaluation mode."""

import pytest
import torch
from torch import nn

from avalanche_gradproj.layers.norm import held_statistics, kept_in_evaluation, tracked_norms, untracked_norms


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


class Keeping(nn.Module):
    """Keeps one of two BatchNorms in evaluation mode, and does more than that in `train`."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.merged = nn.BatchNorm1d(2), nn.BatchNorm1d(2), False

    def train(self, mode=True):
        super().train(mode)
        self.second.eval()
        self.merged = not mode
        return self


@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_that_stay_in_evaluation_are_found_and_the_model_is_as_before(training):
    inner = Keeping().train(training)
    outer = nn.Sequential(inner, nn.BatchNorm1d(2), nn.Dropout(0.5))
    outer.training = training
    outer[1].eval()  # by somebody, not by the model
    outer[2].train(not training)
    modes = [module.training for module in outer.modules()]
    assert kept_in_evaluation(outer) == [inner.second]
    assert [module.training for module in outer.modules()] == modes
    assert inner.merged == (not training)


def test_modes_come_back_where_the_models_own_train_raises():
    class Refusing(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            if mode:
                raise RuntimeError("not now")
            return self

    own = Refusing(nn.BatchNorm1d(2)).eval()
    with pytest.raises(RuntimeError, match="not now"):
        kept_in_evaluation(own)
    assert not any(module.training for module in own.modules())
