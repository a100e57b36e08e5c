"""Samples of the Laplace penalty: which are drawn, how many of them count, their sampled labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from avalanche_gradproj.errors import ConfigurationError, DataError
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from tests.methods.kfac_setup import data, learn, move, network

pytestmark = pytest.mark.usefixtures("double")


def test_sampled_labels_are_others_in_each_experience():
    model, x = network(), data(6)[0]
    held = []
    for seed in (0, 0, 1):
        laplace = KroneckerLaplace(seed=seed)
        for _ in range(2):
            laplace.start(model)
            laplace.finish()
            laplace.consolidate(model, [x])
        held.append([form.layers["3"].terms[0].left.matrix for form in laplace._memory.forms])
    assert not torch.equal(*held[0])
    assert all(torch.equal(one, other) for one, other in zip(held[0], held[1], strict=True))
    assert not torch.equal(held[0][0], held[2][0])


def test_experiences_of_no_strength_count_as_the_last_one():
    model, laplace = network(), KroneckerLaplace([1.0, 0.0])
    learn(laplace, model, data(), samples=100)
    learn(laplace, model, data(), samples=50)
    move(model)
    laplace.start(model)
    expected = laplace.penalty().item()
    laplace.start(model, samples=50)
    assert laplace.penalty().item() == expected


def test_a_plain_loop_draws_samples_and_keeps_the_weight():
    model, laplace, (x, y) = network(), KroneckerLaplace(n_samples=5, fisher="exact"), data(30)
    with laplace.experience(model):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(DataError, match=r"6 samples came and n_samples=5.*draw"):
        laplace.consolidate(model, x.split(3))
    assert laplace.experiences == 0
    chosen = laplace.draw(30)
    laplace.consolidate(model, x[chosen].split(3))
    assert laplace._memory.forms[0].weight == 30
    laplace.start(model, samples=40)  # what is said there counts
    laplace.finish()
    laplace.consolidate(model, [x[laplace.draw(30)]])
    laplace.start(model)
    laplace.finish()
    laplace.consolidate(model, [x[:5]])  # nothing drawn: what came
    assert [form.weight for form in laplace._memory.forms] == [30, 40, 5]


def test_samples_default_to_those_seen_and_to_those_of_the_last_experience():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data(12))
    assert laplace._memory.forms[0].weight == 12
    move(model)
    values = {}
    for samples in (None, 12, 24):
        laplace.start(model, samples=samples)
        values[samples] = laplace.penalty().item()
    assert values[None] == values[12] == pytest.approx(2 * values[24])
    with pytest.raises(ConfigurationError, match="samples=0"):
        laplace.start(model, samples=0)


def test_drawn_samples_depend_on_seed_and_experience_alone():
    laplace, again = KroneckerLaplace(n_samples=5), KroneckerLaplace(n_samples=5)
    before = torch.get_rng_state()
    first = laplace.draw(30)
    assert torch.equal(first, again.draw(30))
    assert len(set(first.tolist())) == 5
    assert not torch.equal(first, KroneckerLaplace(n_samples=5, seed=1).draw(30))
    assert torch.equal(before, torch.get_rng_state())
    assert laplace.required_samples() == 5
    with pytest.raises(DataError, match="n_samples<=4"):
        laplace.draw(4)
    learn(laplace, network(), data(5))
    assert not torch.equal(first, laplace.draw(30))
