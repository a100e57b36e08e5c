"""OGD's memory: restarts, damaged states, its bound, gradients that are dropped, errors."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, NonFiniteError, StateError
from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent
from tests.methods.ogd_setup import Network, data, train, two_experiences


def test_restart_is_bit_exact(tmp_path):
    torch.manual_seed(0)
    model, ogd = Network(), OrthogonalGradientDescent(10)
    optimizer = two_experiences(ogd, model)
    torch.save(ogd.state_dict(), tmp_path / "state.pt")
    fresh, twin = OrthogonalGradientDescent(10), copy.deepcopy(model)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    x, y = data(2, torch.float32)
    for method, net, opt in ((ogd, model, optimizer), (fresh, twin, other)):
        with method.experience(net, opt):
            train(net, opt, x, y, method)
        method.consolidate(net, [(x, y)])
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(ogd.vectors, fresh.vectors)
    assert ogd.draw(40).equal(fresh.draw(40))


def test_damaged_and_foreign_states_are_refused():
    torch.manual_seed(0)
    ogd = OrthogonalGradientDescent(10)
    two_experiences(ogd, Network())
    good, held = ogd.state_dict(), ogd.vectors.clone()
    shapes = good["memory"]["shapes"]
    for memory, message in (
        (None, "damaged"),
        ({"shapes": shapes, "vectors": held[:, 1:]}, "expected \\[count"),
        ({"shapes": shapes | {"hidden.weight": [16, 12]}, "vectors": held}, "'hidden.weight' it holds \\[16, 12\\]"),
        ({"shapes": {"a": [2]}, "vectors": torch.ones(1, 2)}, "'scale' it holds nothing"),
    ):
        with pytest.raises(StateError, match=message):
            ogd.load_state_dict({**good, "memory": memory})
    with pytest.raises(StateError, match="'experiences' is None"):
        ogd.load_state_dict({**good, "experiences": None})
    assert torch.equal(ogd.vectors, held)
    fresh = OrthogonalGradientDescent(10)
    fresh.load_state_dict(good)
    with pytest.raises(StateError, match=r"'scale', which is not covered in this model \(it has no such"):
        fresh.start(nn.Linear(3, 2))
    fresh = OrthogonalGradientDescent(10, exclude=["norm"])
    fresh.load_state_dict(good)
    with pytest.raises(StateError, match=r"'norm.weight', which is not covered in this model \(excluded\)"):
        fresh.start(Network())


def test_max_bytes_bounds_what_is_held_and_says_what_is_lost():
    torch.manual_seed(0)
    model = Network()
    one = 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigurationError, match=rf"holds 9 gradients of .*give max_bytes>={10 * one}"):
        OrthogonalGradientDescent(10, max_bytes=10 * one - 1).start(model)
    ogd = OrthogonalGradientDescent(10, max_bytes=15 * one + 3)
    x, y = data(0, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ogd.consolidate(model, [(x, y)])
    first = ogd.vectors.clone()
    for expected in (5, 10):
        x, y = data(expected, torch.float32)
        with pytest.warns(
            UserWarning, match=f"so that {expected} of 10 gradients of experience .* were not stored"
        ) as found:
            ogd.consolidate(model, [(x, y)])
        assert len(found) == 1
        assert ogd.bytes_held == 15 * one + 15 * 15 * 8  # the bound is on the matrix
        assert len(ogd.vectors) == 15
    assert torch.equal(ogd.vectors[:10], first)
    assert ogd.experiences == 3


def test_dependent_gradients_are_dropped():
    torch.manual_seed(0)
    model, (x, y) = Network(), data(0, torch.float32)
    x, y = x[:5].repeat(8, 1, 1, 1), y[:5].repeat(8)
    ogd = OrthogonalGradientDescent(40)
    for _ in range(2):
        ogd.consolidate(model, [(x, y)])
        assert len(ogd.vectors) == 5


def test_all_skips_logits_that_depend_on_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x):
            return self.layer(x).masked_fill(torch.tensor([False, True, False, True]), -1000.0)

    model, x = Masked(), torch.randn(9, 5)
    ogd = OrthogonalGradientDescent(6, target="all")
    ogd.consolidate(model, [(x, torch.zeros(9, dtype=torch.long))])
    rows = ogd.vectors.reshape(6, -1)
    weights = rows[:, :20].reshape(6, 4, 5)
    assert not weights[:, [1, 3]].any()
    assert len(rows) == 6
    spanned = torch.cat([x[:3], torch.ones(3, 1)], 1)  # three samples, two logits each
    assert (
        np.linalg.matrix_rank(
            np.concatenate([spanned.numpy(), torch.cat([weights[:, 0], rows[:, 20:21]], 1).numpy()]), tol=1e-5
        )
        == 3
    )


def test_errors_leave_the_memory_as_it_was():
    torch.manual_seed(0)
    model, (x, y) = Network(), data(0, torch.float32)
    ogd = OrthogonalGradientDescent(10)
    ogd.consolidate(model, [(x, y)])
    held = ogd.vectors.clone()
    bad = x.clone()
    bad[3] = float("nan")
    for batches, error, message in (
        ([(x[:8], y[:8])], DataError, "8 gradients came and 10 are needed"),
        ([(x[:8], y[:8]), (x[8:], y[8:] + 4)], DataError, "the model has 4 logits"),
        ([(x[8:12], y[8:12]), (bad, y)], NonFiniteError, "infinity or a NaN"),
        ([x], DataError, "expected a tuple"),
        ([], DataError, "0 gradients came"),
    ):
        with pytest.raises(error, match=message):
            ogd.consolidate(model, batches)
        assert torch.equal(ogd.vectors, held)
        assert ogd.experiences == 1
    with pytest.raises(DataError, match="has 9 samples and n_gradients=10"):
        ogd.draw(9)
    assert len(OrthogonalGradientDescent(10, target="all").draw(9)) == 9
