"""find_pairs: the layer behind which each BatchNorm stands, or why there is none; nothing is left behind."""

import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.layers.norm import batch_norms
from avalanche_gradproj.layers.pairs import find_pairs
from avalanche_gradproj.layers.select import cover
from tests.layers.pairs_setup import (
    ALTERED,
    BOTH,
    ELSEWHERE,
    NOT_A_LAYER,
    Net,
    X,
    chain,
    check_untouched,
    look,
    skip,
    snapshot,
)


def test_mlp():
    found = look(Net(chain), X)
    assert (found.found, found.unpaired) == (BOTH, {})
    assert look(Net(chain), X, given=BOTH).found == BOTH


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_cnn(dimensions, inplace):
    conv, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
    body = nn.Sequential(conv(2, 4, 3, bias=False), norm(4), nn.ReLU(inplace), conv(4, 6, 1, groups=2), norm(6))
    model = nn.Sequential(body, nn.ReLU(inplace), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(3, 2, *[5] * dimensions)
    model.eval()(x)
    assert look(model, x).found == {"0.1": "0.0", "0.4": "0.3"}


def test_resnet():
    expected = {"bn1": "conv1"}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            for index in (1, 2):
                expected[f"layer{stage}.{block}.bn{index}"] = f"layer{stage}.{block}.conv{index}"
    expected.update({f"layer{stage}.0.downsample.1": f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)})
    assert len(expected) == 20
    found = look(resnet18(num_classes=4, zero_init_residual=True).float(), torch.randn(2, 3, 32, 32).float())
    assert found.found == expected
    assert not found.unpaired


def norm_twice(m, x):
    return m.head(m.norm(torch.tanh(m.norm(m.first(x)))))


def layer_twice(m, x):
    return m.head(m.norm(m.second(torch.tanh(m.second(m.first(x))))))


def two_norms(m, x):
    h = m.first(x)
    return m.head(torch.tanh(m.norm(h)) + torch.tanh(m.other(h)))


UNPAIRED = {
    "before the layer": (lambda m, x: m.head(m.second(m.norm(x.repeat(1, 2)))), "norm", NOT_A_LAYER),
    "skip connection": (skip, "norm", ELSEWHERE),
    "norm called twice": (norm_twice, "norm", "called it 2 times in one pass"),
    "layer called twice": (layer_twice, "norm", r"layer 'second' is used 2 times, by 1 "),
    "two norms": (two_norms, "norm", r"layer 'first' is used 1 times, by 2 "),
    "not called": (lambda m, x: m.head(m.norm(m.first(x))), "other", "did not call it"),
    "activation": (lambda m, x: m.head(m.norm(F.relu(m.first(x)))), "norm", NOT_A_LAYER),
    "activation in place": (lambda m, x: m.head(m.norm(m.first(x).relu_())), "norm", ELSEWHERE),
    "pooling": (lambda m, x: m.head(m.norm(F.max_pool1d(m.first(x), 3, 1, 1))), "norm", NOT_A_LAYER),
    "of a sum": (lambda m, x: m.head(m.norm(m.first(x) + m.second(m.first(x)))), "norm", NOT_A_LAYER),
}


@pytest.mark.parametrize(("how", "name", "why"), UNPAIRED.values(), ids=UNPAIRED)
def test_unpaired(how, name, why):
    found = look(Net(how), X)
    assert name not in found.found
    assert re.search(why, found.unpaired[name])
    assert found.found.keys() | found.unpaired.keys() == {"norm", "other"}
    assert not found.found.keys() & found.unpaired.keys()
    assert found.unseen == {key for key, reason in found.unpaired.items() if "did not call it" in reason}


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["as initialised", "zero scale"])
def test_a_skip_connection_is_seen_whatever_the_present_map_is(scale):
    """With fresh statistics and shifts merging would change nothing at present."""

    def how(m, x):
        h = m.first(x)
        return m.head(torch.tanh(m.other(m.second(m.norm(h) + h))))

    model = Net(how)
    nn.init.constant_(model.norm.weight, scale)
    found = look(model, X)
    assert found.found == {"other": "second"}  # the one that is wrong is told from the one that is right
    assert found.unpaired.keys() == {"norm"}


def test_no_running_statistics():
    model = Net(chain, norm=nn.BatchNorm1d(6, track_running_stats=False))
    found = look(model, X)
    assert found.found == {"other": "second"}
    assert "no running statistics" in found.unpaired["norm"]


def test_dropout_and_identity_are_nothing_in_evaluation():
    for module in (nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.Identity()):
        model = Net(lambda m, x: m.head(m.norm(m.between(m.first(x)))), between=module)
        assert look(model, X).found == {"norm": "first"}
    model = Net(lambda m, x: m.head(F.dropout(m.norm(m.first(x)), 0.5)))  # in evaluation too
    assert look(model, X).found == {"norm": "first"}


def test_tokens():
    model, x = Net(lambda m, x: m.head(F.relu(m.norm(m.first(x).transpose(1, 2))).mean(2))), torch.randn(2, 4, 3)
    assert NOT_A_LAYER in look(model, x).unpaired["norm"]
    found = look(model, x, given={"norm": "first"})
    assert found.found == {"norm": "first"}
    assert found.unpaired.keys() == {"other"}
    # As many tokens as channels: the BatchNorm's channels are not the layer's outputs.
    square = Net(lambda m, x: m.head(torch.tanh(m.norm(m.first(x)))).mean(1))
    assert ELSEWHERE in look(square, torch.randn(2, 6, 3)).unpaired["norm"]


WRONG = {
    "swapped": ({"norm": "second", "other": "first"}, chain, ["norm", "second", ALTERED]),
    "no such norm": ({"nrm": "first"}, chain, ["nrm", "norm, other"]),
    "no norm": ({"head": "first"}, chain, ["head", "norm, other"]),
    "no such layer": ({"norm": "frist"}, chain, ["frist", "first, second, head"]),
    "a norm": ({"norm": "other"}, chain, ["other", "first, second, head"]),
    "a layer twice": ({"norm": "first", "other": "first"}, chain, ["first", "2 BatchNorms"]),
    "channels": ({"norm": "head"}, chain, ["norm", "head", "6 channels", "5 outputs"]),
    "skip connection": ({"norm": "first"}, skip, ["norm", "first", ELSEWHERE]),
    "activation": ({"norm": "first"}, UNPAIRED["activation"][0], ["norm", "first", ALTERED]),
}


@pytest.mark.parametrize(("given", "how", "words"), WRONG.values(), ids=WRONG)
def test_wrong_pairs_given(given, how, words):
    with pytest.raises(ConfigurationError) as caught:
        look(Net(how), X, given=given)
    assert all(word in str(caught.value) for word in ("pairs", *words))


def test_pairs_given_leave_the_others_unpaired():
    found = look(Net(chain), X, given={"other": "second"})
    assert found.found == {"other": "second"}
    assert found.unpaired == {"norm": "it is not among the pairs given"}
    assert look(Net(chain), X, given={}).unpaired.keys() == {"norm", "other"}


@pytest.mark.parametrize("uses", [False, True], ids=["right", "skip"])
@pytest.mark.parametrize("kind", ["dict", "tuple", "nested", "list with None"])
def test_several_outputs(kind, uses):
    def how(m, x):
        h = m.first(x)
        y = m.head(torch.tanh(m.norm(h)))
        also = y + m.second(h).sum(1, keepdim=True) if uses else y.exp()
        every = {"dict": {"y": y, "also": also}, "tuple": (y, also), "list with None": [None, y, also]}
        return every.get(kind, {"y": [y], "also": ({"z": also}, None)})

    assert look(Net(how), X).found == ({} if uses else {"norm": "first"})


@pytest.mark.parametrize("uses", [False, True], ids=["right", "skip"])
@pytest.mark.parametrize("value", [float("-inf"), -1e11, -1e3])
def test_masked_logits(value, uses):
    def how(m, x):
        y = (skip if uses else lambda m, x: m.head(F.relu(m.norm(m.first(x)))))(m, x)
        return y.masked_fill(torch.tensor([False, True, False, True, False]), value)

    assert look(Net(how), X).found == ({} if uses else {"norm": "first"})


def test_infinities_that_vanish_are_a_difference():
    def how(m, x):
        h = m.first(x)
        return torch.where(h == F.linear(x, m.first.weight, m.first.bias), float("-inf"), 0 * m.norm(h))

    assert ELSEWHERE in look(Net(how), X).unpaired["norm"]


def test_models_that_take_task_labels_run_through_run():
    def how(m, x, task_labels):
        return m.head(m.norm(input=m.first(input=x))) * (task_labels + 1)[:, None]

    assert look(Net(how), X, torch.arange(7)).found == {"norm": "first"}


@pytest.mark.parametrize("fails", [None, 1, 2, 3, 4, 5])
def test_nothing_is_left_behind(fails):
    """Also after an exception, while looking (1), in plain passes (2, 4), in merged ones (3, 5)."""
    model = Net(chain, between=nn.Dropout(0.5))
    model.other.eval()
    model.norm.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.norm(torch.randn(5, 6))
    before, calls = snapshot(model), []

    def run():
        torch.rand(3), np.random.random(3), random.random()  # noqa: NPY002
        calls.append(any(module.training for module in model.modules()) or torch.is_grad_enabled())
        y = model(X)
        if len(calls) == fails:
            raise KeyError("broken")
        return y

    if fails is None:
        assert find_pairs(model, cover(model).units, batch_norms(model), run).found == BOTH
    else:
        with pytest.raises(KeyError, match="broken"):
            find_pairs(model, cover(model).units, batch_norms(model), run)
    assert calls == [False] * (fails or 5)
    check_untouched(model, before)
