"""cover: exactly one treatment for every parameter, and no pattern that silently does nothing."""

from collections import Counter

import pytest
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, ModelError
from avalanche_gradproj.layers.select import cover

IN_PROJ = {"block.attention.in_proj_weight", "block.attention.in_proj_bias"}


class Block(nn.Module):
    """Attention and a small network."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))


class Model(nn.Module):
    """One of everything: plain parameters, norms, an embedding, convolutions, attention, a head with two layers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(nn.init.ones_(nn.Linear(1, 1).weight.detach()))
        self.embedding = nn.Embedding(5, 4)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2, bias=False))
        self.block = Block()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


UNITS = [
    "features.0",
    "features.2",
    *(f"block.attention.{part}_proj" for part in ("q", "k", "v", "out")),
    "block.mlp.0",
    "block.mlp.2",
    "fc",
]
NO_MATRIX = {
    "scale",
    "embedding.weight",
    "features.1.weight",
    "features.1.bias",
    "block.attention.bias_k",
    "block.attention.bias_v",
    "block.norm.weight",
    "block.norm.bias",
}
HEAD = {f"head.{index}.{part}" for index in (0, 1, 2) for part in ("weight", "bias")}


def names(coverage):
    return [unit.name for unit in coverage.units]


def check_partition(model, coverage):
    """Each parameter is covered, frozen or left alone; each row of a covered one belongs to one unit at most."""
    covered, rows = set(), Counter()
    everything = dict(model.named_parameters())
    for unit in coverage.units:
        for part in unit.slices:
            assert everything[part.name] is part.parameter
            covered.add(part.name)
            rows.update((part.name, row) for row in range(part.start, part.stop))
    assert not rows or max(rows.values()) == 1
    treatments = Counter([*covered, *coverage.frozen, *coverage.alone])
    assert treatments == Counter(list(everything))
    assert coverage.parameters == everything
    return covered


OPTIONS = {
    "defaults": {},
    "head": {"heads": ["head"]},
    "train": {"heads": ["head"], "uncovered": "train"},
    "include": {"include": ["block"], "heads": ["head"]},
    "include head": {"include": ["fc", "head"], "heads": ["head"]},
    "include part of a head": {"include": ["fc", "head.2"], "heads": ["head"]},
    "exclude": {"exclude": ["features.*", "scale"], "heads": ["head"]},
    "exclude attention": {"exclude": ["block.attention"]},
    "exclude a projection": {"exclude": ["*.out_proj"]},
    "both": {"include": ["block"], "exclude": ["block.mlp.0", "*.bias_k"], "uncovered": "train"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_has_exactly_one_treatment(options):
    model = Model()
    check_partition(model, cover(model, **options))


def test_defaults_cover_every_matrix_and_freeze_the_rest():
    coverage = cover(Model(), heads=["head"])
    assert names(coverage) == UNITS
    assert set(coverage.frozen) == NO_MATRIX
    assert coverage.alone == dict.fromkeys(HEAD, "task head")


def test_without_heads_the_last_layers_are_covered():
    coverage = cover(Model())
    assert names(coverage) == [*UNITS, "head.0", "head.2"]
    assert set(coverage.frozen) == NO_MATRIX | {"head.1.weight", "head.1.bias"}


def test_uncovered_train_and_raise():
    coverage = cover(Model(), heads=["head"], uncovered="train")
    assert coverage.frozen == []
    assert {name for name, why in coverage.alone.items() if why == "uncovered='train'"} == NO_MATRIX
    with pytest.raises(ModelError, match=r"'scale'.*uncovered='raise'"):
        cover(Model(), heads=["head"], uncovered="raise")
    rest = ["scale", "embedding", "*norm", "features.1", "*.bias_[kv]"]
    assert names(cover(Model(), heads=["head"], uncovered="raise", exclude=rest)) == UNITS


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (["features"], ["features.0", "features.2"]),
        (["features.*"], ["features.0", "features.2"]),
        (["features.0", "fc"], ["features.0", "fc"]),
        (["block.mlp"], ["block.mlp.0", "block.mlp.2"]),
        (["*.k_proj"], ["block.attention.k_proj"]),
        (["block.attention"], UNITS[2:6]),
        (["*.?_proj"], UNITS[2:5]),
        (["*"], [*UNITS, "head.0", "head.2"]),
        (["head"], ["head.0", "head.2"]),
        (["head.2"], ["head.2"]),
        (["f"], None),
        (["eatures.0"], None),
    ],
)
def test_include(include, expected):
    if expected is None:
        with pytest.raises(ConfigurationError):
            cover(Model(), include=include, heads=["head"])
        return
    coverage = cover(Model(), include=include, heads=["head"])
    assert names(coverage) == expected
    if "fc" not in expected:
        assert coverage.alone["fc.weight"] == "not in include"
    if "head.0" not in expected:
        assert coverage.alone["head.0.weight"] == "task head"


@pytest.mark.parametrize(
    ("exclude", "gone", "alone"),
    [
        (["features"], {"features.0", "features.2"}, {"features.0.weight", "features.1.bias", "features.2.weight"}),
        (["block.attention"], set(UNITS[2:6]), IN_PROJ | {"block.attention.out_proj.bias", "block.attention.bias_k"}),
        (["block.attention.out_proj"], {UNITS[5]}, {"block.attention.out_proj.weight"}),
        (["block.attention.[qkv]_proj"], set(UNITS[2:5]), set()),
        (["scale", "*norm*"], set(), {"scale", "block.norm.weight"}),
        (["embedding.weight"], set(), {"embedding.weight"}),
        (["block"], set(UNITS[2:8]), IN_PROJ | {"block.mlp.2.weight", "block.norm.bias"}),
    ],
)
def test_exclude(exclude, gone, alone):
    coverage = cover(Model(), exclude=exclude, heads=["head"])
    assert names(coverage) == [name for name in UNITS if name not in gone]
    assert {coverage.alone.get(name) for name in alone} <= {"excluded"}
    assert not alone & set(coverage.frozen)


def test_excluded_wins_over_included():
    assert names(cover(Model(), include=["features"], exclude=["features.0"])) == ["features.2"]


@pytest.mark.parametrize("pattern", ["fc.weight", "fc.bias", "*.in_proj_weight", "features.0.*"])
def test_a_pattern_on_the_parameter_of_a_covered_layer_works_or_is_refused(pattern):
    """`exclude`: "these layers and parameters are left alone"."""
    try:
        coverage = cover(Model(), exclude=[pattern], heads=["head"])
    except (ConfigurationError, ModelError):
        return
    assert any(why == "excluded" for why in coverage.alone.values())


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_a_near_name(argument):
    with pytest.raises(ConfigurationError, match=rf"{argument}.*'featurs\.0'.*'features\.0'"):
        cover(Model(), **{argument: ["fc", "featurs.0"]})
    with pytest.raises(ConfigurationError, match=rf"{argument}.*one string.*\['fc'\]"):
        cover(Model(), **{argument: "fc"})


def test_nothing_to_cover():
    with pytest.raises(ModelError, match="no layer is covered"):
        cover(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    with pytest.raises(ModelError, match="no layer is covered"):
        cover(nn.Sequential(nn.Linear(3, 3)), heads=["0"])
    with pytest.raises(ModelError, match="no layer is covered"):
        cover(nn.Sequential(nn.Linear(3, 3)), exclude=["0"])


def test_parameters_without_gradient_are_left_alone():
    model = Model()
    model.features.requires_grad_(False)
    model.block.norm.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    coverage = cover(model, heads=["head"])
    check_partition(model, coverage)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    alone = {name for name, why in coverage.alone.items() if why == "takes no gradient"}
    assert alone == still - {"fc.bias"}  # part of a matrix that is trained
    assert names(coverage) == UNITS[2:]
    assert names(cover(model, heads=["head"], keep=UNITS)) == UNITS


def test_a_trained_bias_of_a_frozen_weight_is_not_forgotten():
    model = Model()
    model.fc.weight.requires_grad_(False)
    coverage = cover(model, heads=["head"])
    check_partition(model, coverage)
    assert "fc.bias" in coverage.frozen


def test_heads_are_modules_not_prefixes():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "head_of_body": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    assert names(cover(model, heads=["head"])) == ["head_of_body", "body"]


def test_heads_from_an_iterator():
    assert names(cover(Model(), heads=iter(["head"]))) == UNITS


def test_the_model_may_be_a_layer_itself():
    coverage = cover(nn.Linear(2, 3))
    assert [part.name for unit in coverage.units for part in unit.slices] == ["weight", "bias"]


def test_the_model_may_be_an_attention_layer_itself():
    model = nn.MultiheadAttention(4, 2)
    coverage = cover(model)
    check_partition(model, coverage)
    assert names(coverage) == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_two_attention_layers_side_by_side():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=3), nn.Linear(4, 4))
    coverage = cover(model)
    check_partition(model, coverage)
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert names(coverage) == [*(f"{index}.{part}" for index in (0, 1) for part in parts), "2"]
