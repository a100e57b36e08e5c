"""What the table of layer types refuses, by name, and what it does not take for a matrix layer."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from avalanche_gradproj.errors import ModelError
from avalanche_gradproj.layers.rules import RULES, covered_type, units_of
from avalanche_gradproj.layers.select import cover


def legacy_weight_norm(layer, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(layer, **options)


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.5)


class Held(nn.Module):
    """An ordinary layer beside the one under test."""

    def __init__(self, odd):
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.odd = odd


REFUSED = {
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 4, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(4, 4, 3),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "weight_norm of a convolution": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "legacy weight_norm": lambda: legacy_weight_norm(nn.Linear(4, 4)),
    "legacy spectral_norm": lambda: spectral_norm(nn.Conv2d(4, 4, 3)),
    "pruned": lambda: pruned(nn.Linear(4, 4)),
    "packed attention": lambda: parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
    "separate attention": lambda: parametrizations.weight_norm(
        nn.MultiheadAttention(4, 2, kdim=3, vdim=3), "q_proj_weight"
    ),
    "legacy attention": lambda: legacy_weight_norm(nn.MultiheadAttention(4, 2), name="in_proj_weight"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_with_a_remedy(kind):
    model = Held(REFUSED[kind]())
    with pytest.raises(ModelError, match=r"'odd'.*exclude=\['odd'\]") as caught:
        cover(model)
    if kind.startswith("ConvTranspose"):
        assert kind in str(caught.value)
    with pytest.raises(ModelError, match="'odd'"):
        units_of("odd", model.odd)


@pytest.mark.parametrize("kind", REFUSED)
def test_excluded_it_passes_and_is_left_alone(kind):
    model = Held(REFUSED[kind]())
    coverage = cover(model, exclude=["odd"])
    assert [unit.name for unit in coverage.units] == ["plain"]
    odd = {name for name, _ in model.named_parameters() if name.startswith("odd.")}
    assert odd
    assert coverage.alone == dict.fromkeys(odd, "excluded")
    assert coverage.frozen == []


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("kind", ["out_proj", "k_proj_weight", "v_proj_weight", "bias", "pruned out_proj"])
def test_any_other_reparametrised_part_is_refused_too(kind):
    """Else the unit owns a tensor that is computed anew at each call and that no optimizer trains."""
    if kind == "bias":
        odd = nn.Linear(4, 4)
        parametrize.register_parametrization(odd, "bias", Double())
    elif "out_proj" in kind:
        odd = nn.MultiheadAttention(4, 2)
        (pruned if kind.startswith("pruned") else parametrizations.weight_norm)(odd.out_proj)
    else:
        odd = parametrizations.weight_norm(nn.MultiheadAttention(4, 2, kdim=3, vdim=3), kind)
    with pytest.raises(ModelError, match="odd"):
        cover(Held(odd))


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv2d(3, 2), nn.LazyBatchNorm2d])
def test_lazy_layers_are_refused_by_name(lazy):
    with pytest.raises(ModelError, match=r"'odd\.weight' is lazy.*run one batch"):
        cover(Held(lazy()))


def test_a_lazy_layer_alone():
    with pytest.raises(ModelError, match="odd"):
        units_of("odd", nn.LazyLinear(3))


def test_a_materialised_lazy_layer_is_an_ordinary_one():
    layer = nn.LazyLinear(3)
    layer(torch.randn(2, 4))
    assert [unit.name for unit in cover(Held(layer)).units] == ["plain", "odd"]


class Scaled(nn.Linear):
    """Computes something else with its weight."""

    def forward(self, x):
        return super().forward(x) / self.weight.norm()


class Named(nn.Linear):
    """Only constructed in another way."""

    def __init__(self):
        super().__init__(4, 4)


class Standardised(nn.Conv2d):
    """Another convolution, though the method called forward is that of nn.Conv2d."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def test_a_subclass_with_its_own_forward_is_not_covered():
    model = Held(Scaled(4, 4))
    assert covered_type(model.odd) is None
    assert units_of("odd", model.odd) == []
    assert cover(model).frozen == ["odd.weight", "odd.bias"]
    assert set(cover(model, uncovered="train").alone) == {"odd.weight", "odd.bias"}
    with pytest.raises(ModelError, match=r"'odd\.weight'"):
        cover(model, uncovered="raise")


def test_a_subclass_that_computes_the_same_is_covered():
    model = Held(Named())
    assert [unit.name for unit in cover(model).units] == ["plain", "odd"]
    assert covered_type(model.odd) is nn.Linear


def test_a_convolution_that_computes_otherwise_is_not_covered():
    model = Held(Standardised(4, 4, 3))
    assert [unit.name for unit in cover(model).units] == ["plain"]


@pytest.mark.parametrize(
    "module", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Embedding(3, 4), nn.Bilinear(2, 3, 4), nn.LSTM(3, 4), nn.ReLU()]
)
def test_other_modules_have_no_units(module):
    assert units_of("other", module) == []


@pytest.mark.parametrize("rule", list(dict.fromkeys(RULES.values())))
def test_a_rule_for_another_type_says_so(rule):
    with pytest.raises(TypeError, match=r"^here: .*ReLU"):
        rule("here", nn.ReLU())


class Tied(nn.Module):
    """A decoder that shares its weight with an encoder."""

    def __init__(self, first, second):
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.first, self.second = first, second
        second.weight = first.weight


TIED = {
    "two linear layers": lambda: Tied(nn.Linear(4, 4), nn.Linear(4, 4)),
    "embedding first": lambda: Tied(nn.Embedding(4, 4), nn.Linear(4, 4)),
    "embedding behind": lambda: Tied(nn.Linear(4, 4), nn.Embedding(4, 4)),
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_are_refused_and_both_named(kind):
    with pytest.raises(ModelError, match=r"'first\.weight'.*'second\.weight'.*untie"):
        cover(TIED[kind]())


def test_tied_weights_of_a_head_and_a_body_are_refused():
    with pytest.raises(ModelError, match=r"'first\.weight'.*'second\.weight'"):
        cover(TIED["two linear layers"](), heads=["second"])


def test_a_tied_bias_is_refused():
    model = Held(nn.Linear(4, 4))
    model.odd.bias = model.plain.bias
    with pytest.raises(ModelError, match=r"'plain\.bias'.*'odd\.bias'"):
        cover(model)


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_pass_only_when_both_are_excluded(kind):
    coverage = cover(TIED[kind](), exclude=["first", "second"])
    assert [unit.name for unit in coverage.units] == ["plain"]
    assert coverage.alone["first.weight"] == "excluded"
    linear = "second" if kind == "embedding first" else "first"
    other = "first" if linear == "second" else "second"
    with pytest.raises(ModelError, match="tied"):
        cover(TIED[kind](), exclude=[other])


def test_one_module_under_two_names_is_fine():
    model = Held(nn.Linear(4, 4))
    model.again = model.plain
    coverage = cover(model)
    assert [unit.name for unit in coverage.units] == ["plain", "odd"]
    assert coverage.frozen == []
    assert coverage.alone == {}
