"""The Laplace penalty over experiences: both modes, strengths, centres, damping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.methods.kfac import KroneckerLaplace
from tests.methods.kfac_setup import CLASSES, data, learn, move, network, thin, wide

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.usefixtures("small_is_cheap")
@pytest.mark.parametrize("truncate", [None, 0.9])
def test_separate_and_online_are_one_after_one_experience(truncate):
    values = []
    for mode in ("separate", "online"):
        torch.manual_seed(0)
        model, laplace = wide(), KroneckerLaplace(2.0, mode=mode, truncate=truncate, damping=0.1)
        learn(laplace, model, data())
        assert (thin(laplace) >= 2) == (truncate is not None)
        move(model)
        laplace.start(model, samples=20)
        value = laplace.penalty()
        value.backward()
        values.append([value.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))


@pytest.mark.parametrize("equal", ["inputs", "outputs", "neither"])
def test_online_sums_exactly_where_all_factors_of_one_side_are_equal(equal):
    """A last layer with zero weights predicts alike everywhere: equal B. The same data: equal A."""
    model = nn.Sequential(nn.Linear(4, CLASSES))
    nn.init.zeros_(model[0].weight)
    laplace = KroneckerLaplace([1.0, 3.0], mode="online", fisher="exact")
    pairs = []
    for t in range(2):
        x, _ = data(8, seed=0 if equal == "inputs" else t)
        if t and equal != "outputs":
            nn.init.normal_(model[0].weight)
        alone = KroneckerLaplace(fisher="exact")
        for one in (laplace, alone):
            one.start(model, samples=8)
            one.finish()
            one.consolidate(model, [x])
        (term,) = alone._memory.forms[0].layers["0"].terms
        pairs.append(np.kron(term.left.matrix[0].numpy(), term.right.matrix[0].numpy()))
    (term,) = laplace._memory.forms[0].layers["0"].terms
    found = laplace._memory.forms[0].weight * np.kron(term.left.matrix[0].numpy(), term.right.matrix[0].numpy())
    expected = 8 * (1.0 * pairs[0] + 3.0 * pairs[1])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert (error < 1e-12) == (equal != "neither")


def test_strengths_are_of_experiences_and_the_last_one_holds_on():
    model = network()
    laplace = KroneckerLaplace([0.0, 2.0, 0.5])
    for t in range(4):
        learn(laplace, model, data(10, seed=t), samples=100)
    assert [form.weight for form in laplace._memory.forms] == [200.0, 50.0, 50.0]
    assert laplace.bytes_by_experience[0] == 0
    assert sum(laplace.bytes_by_experience) == laplace.bytes_held > 0


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_damping_counts_the_experiences_that_used_a_layer(mode):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(2)])
            self.heads, self.task = nn.ModuleList([nn.Linear(4, CLASSES) for _ in range(2)]), 0

        def forward(self, x):
            return self.heads[self.task](self.norms[self.task](x))

    model, values = Heads(), []
    laplace, again = (KroneckerLaplace([1.0, 3.0, 1.0], mode=mode, fisher="exact", damping=d) for d in (0.0, 0.7))
    start = [p.detach().clone() for p in model.parameters()]
    for task, size in ((0, 10), (1, 6), (1, 4)):
        model.task = task
        for one in (laplace, again):
            one.start(model, samples=size)
            one.finish()
            one.consolidate(model, [data(size)[0]])
    state = again.state_dict()
    again = KroneckerLaplace([1.0, 3.0, 1.0], mode=mode, fisher="exact", damping=0.7)
    again.load_state_dict(state)
    move(model)
    for one in (laplace, again):
        one.start(model, samples=5)
        values.append(one.penalty().item())
    squares = [(p.detach() - q).square().sum().item() for p, q in zip(model.parameters(), start, strict=True)]
    names = [name for name, _ in model.named_parameters()]
    expected = sum(
        (10 if name.split(".")[1] == "0" else 3 * 6 + 4) * 0.7 * square / (2 * 5)
        for name, square in zip(names, squares, strict=True)
    )
    assert values[1] - values[0] == pytest.approx(expected, rel=1e-9)


def test_a_bias_that_was_first_trained_alone_is_centred_with_its_layer():
    model, laplace = network(), KroneckerLaplace(mode="online", fisher="exact")
    model[0].weight.requires_grad_(False)
    learn(laplace, model, data())
    assert "0.bias" in laplace._memory.forms[0].diagonal
    model[0].weight.requires_grad_(True)
    learn(laplace, model, data(seed=1))
    assert "0" in laplace._memory.forms[0].layers
    laplace.start(model)
    assert laplace.penalty().item() == 0  # the last solution is the only centre
    before = model[0].bias.detach().clone()
    with torch.no_grad():
        model[0].bias += 1
    assert laplace.penalty().item() > 0
    laplace.finish()
    laplace.consolidate(model, [data(seed=2)[0]])
    assert torch.equal(laplace._memory.forms[0].diagonal["0.bias"].centre, before + 1)


def test_an_experience_without_strength_moves_the_centre_of_the_online_mode_alone():
    for mode in ("separate", "online"):
        model, laplace = network(), KroneckerLaplace([1.0, 0.0], mode=mode)
        learn(laplace, model, data())
        learn(laplace, model, data(seed=1))
        laplace.start(model)
        assert (laplace.penalty().item() == 0) == (mode == "online")
        assert len(laplace._memory.forms) == 1


def test_online_keeps_a_layer_that_an_experience_does_not_use():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.task = nn.ModuleList([nn.Linear(4, CLASSES) for _ in range(2)]), 0

        def forward(self, x):
            return self.heads[self.task](x)

    model, laplace = Heads(), KroneckerLaplace(mode="online", fisher="exact")
    learn(laplace, model, data(10), samples=10)
    (before,) = laplace._memory.forms[0].layers["heads.0"].terms
    model.task = 1
    model.zero_grad()
    learn(laplace, model, data(30, seed=1), samples=30)
    form = laplace._memory.forms[0]
    (after,) = form.layers["heads.0"].terms
    torch.testing.assert_close(40 * after.left.matrix, 10 * before.left.matrix)
    torch.testing.assert_close(after.right.matrix, before.right.matrix)
    assert "heads.1" in form.layers
