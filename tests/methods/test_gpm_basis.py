"""GPM's memory against the procedure written out with numpy: dense, float64, one layer at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError, StateError
from avalanche_gradproj.methods.gpm import GradientProjectionMemory


class Bare(nn.Module):
    """Two linear layers with bias whose inputs a test can write down."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 5)
        self.two = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def reference_rows(model, x):
    """Inputs of both layers as columns, the constant 1 of the bias below."""
    x = x.numpy()
    first = np.vstack([x.T, np.ones(len(x))])
    weight, bias = model.one.weight.detach().numpy(), model.one.bias.detach().numpy()
    return {"one": first, "two": np.tanh(weight @ x.T + bias[:, None])}


def reference_update(basis, rows, threshold, rule):
    """The update of the paper (or of the official code in the first experience), column by column."""
    total = (rows**2).sum()
    if basis is None and rule == "official":
        values = np.linalg.svd(rows, full_matrices=False)[1]
        rank = int((np.cumsum(values**2 / total) < threshold).sum())
        return np.linalg.svd(rows, full_matrices=False)[0][:, :rank]
    if basis is None:
        basis = np.zeros((rows.shape[0], 0))
    residual = rows - basis @ (basis.T @ rows)
    left, values, _ = np.linalg.svd(residual, full_matrices=False)
    reached, count = ((basis.T @ rows) ** 2).sum() / total, 0
    while reached < threshold and basis.shape[1] + count < rows.shape[0]:
        reached += values[count] ** 2 / total
        count += 1
    return np.hstack([basis, left[:, :count]])


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("n", [4, 60], ids=["few rows", "many rows"])
def test_bases_over_three_experiences(rule, n):
    torch.manual_seed(0)
    model = Bare().double()
    thresholds = [0.6, 0.75]
    gpm = GradientProjectionMemory(thresholds, 0.1, n, rank_rule=rule)
    expected = {"one": None, "two": None}
    for t in range(3):
        x = torch.randn(n, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
        for layer in (model.one, model.two):  # as if trained in between
            layer.weight.data += 0.3 * torch.randn_like(layer.weight)
        gpm.consolidate(model, x.split(7))
        rows = reference_rows(model, x)
        for name, threshold in zip(("one", "two"), thresholds, strict=True):
            expected[name] = reference_update(expected[name], rows[name], min(1.0, threshold + 0.1 * t), rule)
            (found,) = gpm.bases[name]
            assert found.shape == expected[name].shape
            np.testing.assert_allclose(found.numpy() @ found.numpy().T, expected[name] @ expected[name].T, atol=1e-9)


def test_sample_counts_per_layer():
    """A layer's basis comes from the first n of its own, whatever the size of the mini-batches."""
    torch.manual_seed(0)
    model = Bare().double()
    x = torch.randn(30, 6, dtype=torch.float64)
    gpm = GradientProjectionMemory(0.9, 0.0, [11, 30])
    gpm.consolidate(model, x.split(8))
    rows = reference_rows(model, x)
    for name, n in (("one", 11), ("two", 30)):
        expected = reference_update(None, rows[name][:, :n], 0.9, "paper")
        (found,) = gpm.bases[name]
        np.testing.assert_allclose(found.numpy() @ found.numpy().T, expected @ expected.T, atol=1e-9)


def test_sample_counts_per_layer_of_attention_and_windows():
    """Where a layer's leading dimension is not the batch, the first samples are still found."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.window = nn.Linear(6, 4)

        def forward(self, x):
            y, _ = self.attention(x, x, x)
            return self.window(y.reshape(-1, 2, 6))  # two windows of two tokens a sample

    torch.manual_seed(0)
    model = Windows().double()
    x = torch.randn(20, 4, 6, dtype=torch.float64)
    few = GradientProjectionMemory(0.8, 0.0, [5] * 5)
    few.consolidate(model, x[:5].split(5))
    mixed = GradientProjectionMemory(0.8, 0.0, [5, 5, 5, 5, 20])
    mixed.consolidate(model, [x[:12], x[12:]])
    for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"):
        a, b = few.bases[name][0], mixed.bases[name][0]
        assert torch.allclose(a @ a.T, b @ b.T, atol=1e-9)
    only = GradientProjectionMemory(0.8, 0.0, [20, 20, 20, 20, 5])
    only.consolidate(model, [x[:12], x[12:]])
    a, b = few.bases["window"][0], only.bases["window"][0]
    assert torch.allclose(a @ a.T, b @ b.T, atol=1e-9)


def test_all_data_in_one_pass():
    torch.manual_seed(0)
    model = Bare().double()
    x = torch.randn(333, 6, dtype=torch.float64)
    gpm = GradientProjectionMemory(0.8, 0.0, None)
    gpm.consolidate(model, x.split(50))
    expected = reference_update(None, reference_rows(model, x)["one"], 0.8, "paper")
    (found,) = gpm.bases["one"]
    np.testing.assert_allclose(found.numpy() @ found.numpy().T, expected @ expected.T, atol=1e-9)
    assert torch.equal(gpm.draw(7), torch.arange(7))


def test_samples_are_drawn_by_an_own_generator():
    gpm = GradientProjectionMemory(n_samples=10, seed=3)
    before = torch.get_rng_state()
    first = gpm.draw(50)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, gpm.draw(50))
    assert len(set(first.tolist())) == 10
    gpm.experiences = 1
    assert not torch.equal(first, gpm.draw(50))
    assert not torch.equal(first, GradientProjectionMemory(n_samples=10, seed=4).draw(50))


def test_bad_input_leaves_the_bases_alone():
    torch.manual_seed(0)
    model = Bare()
    gpm = GradientProjectionMemory(0.9, 0.0, 20)
    gpm.consolidate(model, [torch.randn(20, 6)])
    before = gpm.state_dict()
    broken = torch.randn(20, 6)
    broken[3, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="'one'"):
        gpm.consolidate(model, [broken])
    with pytest.raises(DataError, match="7 samples"):
        gpm.consolidate(model, [torch.randn(7, 6)])
    with pytest.raises(DataError, match="n_samples=20"):
        gpm.draw(7)
    model.two.weight.data[0, 0] = float("nan")  # a broken weight shows in the next layer's input only
    gpm.consolidate(model, [torch.randn(20, 6)])
    model.one.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="'two'"):
        gpm.consolidate(model, [torch.randn(20, 6)])
    assert gpm.experiences == 2
    assert str(before["bases"]["one"]) == str([m[:, : before["bases"]["one"][0].shape[1]] for m in gpm.bases["one"]])


def test_wrong_numbers_of_values_and_other_models():
    model = Bare()
    with pytest.raises(ConfigurationError, match=r"threshold has 3 values and the model 2 covered layers \(one, two\)"):
        GradientProjectionMemory([0.9, 0.9, 0.9]).start(model)
    with pytest.raises(ConfigurationError, match="n_samples has 3 values"):
        GradientProjectionMemory(0.9, n_samples=[1, 2, 3]).start(model)
    gpm = GradientProjectionMemory(0.9, 0.0, 8)
    gpm.consolidate(model, [torch.randn(8, 6)])
    wider = Bare()
    wider.one = nn.Linear(7, 5)
    with pytest.raises(StateError, match=r"'one' has 1 block\(s\) of 8 input features here and 1 of 7 there"):
        gpm.start(wider)
    with pytest.raises(StateError, match="layer 'one' is not among"):
        gpm.start(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    other = GradientProjectionMemory(0.9, 0.0, 8)
    other.consolidate(nn.Sequential(nn.Linear(6, 5)), [torch.randn(8, 6)])
    with pytest.raises(StateError, match="for layer 'one' it holds nothing"):
        gpm.load_state_dict(other.state_dict())
    with pytest.raises(StateError, match="damaged"):
        gpm.load_state_dict({**gpm.state_dict(), "bases": {"one": 3}})
    with pytest.raises(StateError, match="seen no model"):
        GradientProjectionMemory().report()
    with pytest.raises(ModelError, match="no layer is covered"):
        GradientProjectionMemory().start(nn.BatchNorm1d(3))


def test_a_layer_that_recording_never_reaches_is_announced():
    class Auxiliary(Bare):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(6, 3)

        def forward(self, x):
            return super().forward(x) + (self.aux(x) if self.training else 0)

    model = Auxiliary()
    model(torch.randn(4, 6)).sum().backward()
    with pytest.warns(UserWarning, match="'aux' was trained but never called"):
        GradientProjectionMemory(0.9, n_samples=4).consolidate(model, [torch.randn(4, 6)])
