"""The triangle that OGD's outer products need: restarts, states without it, damaged ones, the memory's bound."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from avalanche_gradproj.errors import NonFiniteError, StateError
from tests.methods.ogd_rank_one_setup import (
    DTYPES,
    OPTIMIZERS,
    Mixed,
    flat,
    learn,
    ogd_with,
    perceptron,
    projected,
    train,
)
from tests.methods.ogd_setup import data


@DTYPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restart_is_bit_exact(tmp_path, optimizer, dtype):
    torch.manual_seed(0)
    model, ogd = Mixed().to(dtype), ogd_with("factored")
    steps = OPTIMIZERS[optimizer](model.parameters())
    for t in range(2):
        learn(ogd, model, steps, t, dtype)
    torch.save(ogd.state_dict(), tmp_path / "state.pt")
    fresh, copied = ogd_with("factored"), pickle.loads(pickle.dumps(ogd))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    other, another = OPTIMIZERS[optimizer](twin.parameters()), OPTIMIZERS[optimizer](third.parameters())
    for loaded in (other, another):
        loaded.load_state_dict(copy.deepcopy(steps.state_dict()))
    for method, net, opt in ((ogd, model, steps), (fresh, twin, other), (copied, third, another)):
        method.start(net, opt)
        assert "factored" in projected(method)
        method.finish()
        learn(method, net, opt, 2, dtype)
    for method, net in ((fresh, twin), (copied, third)):
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.state_dict().items())
        assert torch.equal(ogd.vectors, method.vectors)
        assert torch.equal(ogd._memory.vectors.triangle, method._memory.vectors.triangle)


def test_a_state_without_a_triangle_loads_and_runs_dense():
    torch.manual_seed(0)
    model, ogd = perceptron(), ogd_with("factored")
    steps = OPTIMIZERS["momentum"](model.parameters())
    learn(ogd, model, steps, 0, torch.float32)
    state = ogd.state_dict()
    del state["memory"]["triangle"]
    old = ogd_with("factored")
    old.load_state_dict(state)
    assert old.bytes_held == ogd.bytes_held - 8 * len(ogd.vectors) ** 2
    learn(old, model, steps, 1, torch.float32)
    assert len(old.vectors) == 40
    assert "triangle" not in old.state_dict()["memory"]
    old.start(model, steps)
    assert "dense (the vectors that came are not known" in projected(old)


def test_a_damaged_triangle_is_refused_by_name():
    torch.manual_seed(0)
    ogd = ogd_with("factored")
    ogd.consolidate(perceptron(), [data(0, torch.float32)])
    state, before = ogd.state_dict(), ogd._memory.vectors
    good = state["memory"]["triangle"]
    full = good.clone()
    full[0, 3] = 0.1
    negative, infinite = good.clone(), good.clone()
    negative[4] *= -1
    infinite[7, 2] = float("nan")
    message = r"the state's triangle is damaged: .*expected a lower triangular \[20, 20"
    for bad in ("B", good[:5], good.long(), full, negative, infinite, 2 * good, good[0]):
        with pytest.raises(StateError, match=message):
            ogd.load_state_dict({**state, "memory": {**state["memory"], "triangle": bad}})
        assert ogd._memory.vectors is before
    ogd.load_state_dict(state)
    assert torch.equal(ogd._memory.vectors.triangle, good)


def test_memory_bound_and_errors_keep_vectors_and_triangle_together():
    torch.manual_seed(0)
    model = perceptron()
    one = 4 * sum(p.numel() for p in model.parameters())
    ogd = ogd_with("factored", 20, max_bytes=45 * one)
    ogd.consolidate(model, [data(0, torch.float32)])
    vectors, triangle = ogd.vectors.clone(), ogd._memory.vectors.triangle.clone()
    (x, y), bad = data(1, torch.float32), torch.full((40, 2, 4, 4), float("inf"))
    with pytest.raises(NonFiniteError):
        ogd.consolidate(model, [(x[:8], y[:8]), (bad, y)])
    assert torch.equal(ogd.vectors, vectors)
    assert torch.equal(ogd._memory.vectors.triangle, triangle)
    ogd.consolidate(model, [(x, y)])
    with pytest.warns(UserWarning, match="15 of 20 gradients"):
        ogd.consolidate(model, [data(2, torch.float32)])
    held = ogd._memory.vectors
    assert ogd.bytes_held == 45 * one + 45 * 45 * 8
    assert torch.equal(held.triangle[:20, :20], triangle)
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    start = flat(model)
    ogd.start(model, steps)
    assert "factored" in projected(ogd)
    train(ogd, model, steps, *data(3, torch.float32))
    change = flat(model) - start
    assert np.linalg.norm(held.rows.double().numpy() @ change) < 1e-5 * np.linalg.norm(change)
