"""LOGD's core: the update of each block, what is left alone, what is held and for how long."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import NonFiniteError
from avalanche_gradproj.methods.logd import logd_update
from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition
from tests.methods.logd_setup import CLASSES, FEATURES, KEPT, data, fresh, learned, reference


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("blocks", ["layer", "network", 2])
def test_transform_is_the_update_of_each_block(variant, blocks):
    model = fresh("norm", torch.float32)
    logd = learned(model, n_components=1, variant=variant, blocks=blocks)
    expected, (x, y) = reference(logd, model), data(9)
    F.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    logd.transform()
    names = list(gradients)
    parts = {
        "layer": [["1.weight", "1.bias"], ["2.weight", "2.bias"], ["5.weight", "5.bias"]],
        "network": [names],
        2: [names[0:2], names[2:4], names[4:6]],
    }[blocks]
    moved = 0.0
    for part in parts:
        old = torch.cat([expected[name].flatten(1) for name in part], dim=1)
        own = torch.cat([gradients[name].flatten() for name in part])
        update = logd_update(own.double(), old.double(), n_components=1, variant=variant)
        found = torch.cat([model.get_parameter(name).grad.flatten() for name in part])
        torch.testing.assert_close(found.double(), update, rtol=1e-4, atol=1e-5)
        moved += float((found - own).norm())
    assert moved > 1e-2


def test_a_parameter_without_gradient_gets_none():
    model = nn.ModuleDict({"body": nn.Linear(FEATURES, 5), "a": nn.Linear(5, CLASSES), "b": nn.Linear(5, CLASSES)})

    def forward(model, batch):
        return model["a"](model["body"](batch[0]))

    logd = learned(model, forward=forward, variant="official", blocks="network")
    x, y = data(9)
    F.cross_entropy(model["b"](model["body"](x)), y).backward()
    head, body = model["b"].weight.grad.clone(), model["body"].weight.grad.clone()
    logd.transform()
    assert model["a"].weight.grad is None
    assert torch.equal(model["b"].weight.grad, head)  # no old experience depends on it
    assert not torch.equal(model["body"].weight.grad, body)


def test_nothing_is_done_without_old_experiences():
    for logd in (learned(fresh("mlp").float(), 0), learned(fresh("mlp").float(), 2, patterns_per_exp=0)):
        model = fresh("mlp").float()
        logd.start(model)
        x, y = data(9)
        F.cross_entropy(model(x), y).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        logd.transform()
        logd.after_step()
        logd.finish()
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
        assert logd.bytes_held == 0


def test_memory_that_is_not_finite_is_named_at_the_end_and_spoils_no_step():
    model = fresh("norm", torch.float32)
    logd = learned(model)
    logd.memory._samples[1][0][0, 0] = torch.inf
    x, y = data(9)
    F.cross_entropy(model(x), y).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    logd.transform()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    with pytest.raises(NonFiniteError, match="block '1'"):
        logd.finish()
    assert logd._old is None
    logd.finish()


def test_report_and_bytes():
    model = fresh("norm", torch.float32)
    model[5].bias.requires_grad_(False)
    logd = learned(model, exclude=["2"])
    report = logd.report()
    assert report["1.weight"].treatment == "decomposed"
    assert report["1.weight"].layer == "1"
    assert report["2.bias"].reason == "excluded"
    assert report["5.bias"].reason == "takes no gradient"
    samples = 3 * KEPT * (FEATURES * 4 + 8)
    decomposed = sum(p.numel() for p in model[1].parameters()) + model[5].weight.numel()
    assert logd.bytes_held == samples + (3 + 2) * decomposed * 4
    F.cross_entropy(model(data(9)[0]), data(9)[1]).backward()
    logd.transform()  # the model is lent copies of the samples
    assert logd.bytes_held == 2 * samples + (3 + 2) * decomposed * 4
    assert len(pickle.dumps(logd)) < 20 * samples + 20_000
    logd.finish()
    assert logd.bytes_held == samples
    included = learned(model, include=["1.*"]).report()
    assert included["5.weight"].reason == "not in include"


def test_an_experience_that_is_broken_off_leaves_nothing():
    model = fresh("norm", torch.float32)
    logd = learned(model, selection="last")
    logd.finish()
    held = logd.bytes_held

    def training():
        with logd.experience(model):
            logd.observe(data(9))
            F.cross_entropy(model(data(9)[0]), data(9)[1]).backward()
            logd.transform()
            assert logd.bytes_held > held
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training()
    assert logd.bytes_held == held
    assert logd.experiences == 3


def test_draws_are_of_the_seed_and_the_experience_alone():
    state = torch.get_rng_state()
    logd = LayerwiseGradientDecomposition(KEPT, seed=3)
    first = logd.draw(20)
    assert torch.equal(first, logd.draw(20))
    assert len(set(first.tolist())) == KEPT
    assert not torch.equal(first, LayerwiseGradientDecomposition(KEPT, seed=4).draw(20))
    logd.consolidate(nn.Identity(), [data(0)])
    assert not torch.equal(first, logd.draw(20))
    last = LayerwiseGradientDecomposition(KEPT, selection="last").draw(20)
    assert last.tolist() == list(range(14, 20))
    assert torch.equal(state, torch.get_rng_state())
