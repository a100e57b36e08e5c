"""plan_tasks: exactly one treatment for every parameter, or a refusal with a remedy; put_in_place: the same outputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from avalanche_gradproj.errors import ConfigurationError, ModelError
from avalanche_gradproj.layers.task_plan import TaskPlan, plan_tasks, put_in_place
from avalanche_gradproj.layers.tasks import OwnLayer, PerturbedLayer, Selection, TaskLayer, task_layers

INSIDE, EXCLUDED, NOT_IN = "parameter of a module with others inside", "excluded", "not in include"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.gain * self.norm(self.conv(x))


class Model(nn.Module):
    """One of everything that is allowed."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 3, 6, 6))
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), Block(), nn.Flatten())
        self.fc = nn.Linear(64, 5)
        self.norm = nn.LayerNorm(5)
        self.still = nn.BatchNorm1d(5, affine=False)
        self.last = nn.Linear(5, 4, bias=False)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.last(self.still(self.norm(self.fc(self.features(x + self.position))))))


ALL = "features.0 features.3.conv fc last"
OWN = "features.1 features.2 features.3.norm norm still"

#: options: perturbed layers, own ones, the head, and what is frozen besides the plain parameters (None: not at all)
OPTIONS = {
    "defaults": ({}, ALL, OWN, "out", {}),
    "head": ({"head": "fc"}, "features.0 features.3.conv last out", OWN, "fc", {}),
    "heads": ({"heads": ["out"]}, ALL, OWN, None, {}),
    "several heads": ({"heads": ["last", "out"]}, "features.0 features.3.conv fc", OWN, None, {}),
    "heads and head": ({"heads": ["out"], "head": "fc"}, "features.0 features.3.conv last", OWN, "fc", {}),
    "a module is a head": (
        {"heads": ["features.3"]},
        "features.0 fc last out",
        "features.1 features.2 norm still",
        None,
        {"features.3": None},
    ),
    "heads are no prefixes": ({"heads": ["o", "features.3.c"]}, f"{ALL} out", OWN, None, {}),
    "include": (
        {"include": ["features"]},
        "features.0 features.3.conv",
        OWN,
        "out",
        {"fc": NOT_IN, "last": NOT_IN},
    ),
    "include and head": (
        {"include": ["*.conv", "f?"], "head": "last"},
        "features.3.conv fc",
        OWN,
        "last",
        {"features.0": NOT_IN, "out": NOT_IN},
    ),
    "exclude": ({"exclude": ["fc"]}, "features.0 features.3.conv last", OWN, "out", {"fc": EXCLUDED}),
    "exclude the last": ({"exclude": ["out"]}, "features.0 features.3.conv fc", OWN, "last", {"out": EXCLUDED}),
    "exclude norms": (
        {"exclude": ["*norm", "still", "features.[12]"]},
        ALL,
        "",
        "out",
        dict.fromkeys(["features.1", "features.2", "features.3.norm", "norm"], EXCLUDED),
    ),
    "exclude a module": (
        {"exclude": ["features.3"]},
        "features.0 fc last",
        "features.1 features.2 norm still",
        "out",
        {"features.3": EXCLUDED},
    ),
    "exclude by a wildcard": ({"exclude": ["features.*"]}, "fc last", "norm still", "out", {"features": EXCLUDED}),
    "exclude parameters": (
        {"exclude": ["position", "*.gain"]},
        ALL,
        OWN,
        "out",
        {"position": EXCLUDED, "features.3.gain": EXCLUDED},
    ),
    "excluded wins": (
        {"include": ["features", "last", "out"], "exclude": ["features.0"]},
        "features.3.conv last",
        OWN,
        "out",
        {"features.0": EXCLUDED, "fc": NOT_IN},
    ),
}


def frozen_by(model, reasons):
    reasons = {**dict.fromkeys(["position", "features.3.gain"], INSIDE), **reasons}
    found = {}
    for name, _ in model.named_parameters():
        for part, reason in reasons.items():
            if f"{name}.".startswith(f"{part}."):
                found[name] = reason
    return {name: reason for name, reason in found.items() if reason is not None}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_plan_and_what_it_makes_of_the_model(case):
    options, perturbed, own, head, reasons = case
    model, x = Model(), torch.randn(3, 3, 6, 6)
    before, reference = dict(model.named_parameters()), copy.deepcopy(model)
    plan = plan_tasks(model, **{**options, "heads": iter(options.get("heads", ()))})
    layers = [*own.split(), *([head] if head else [])]
    assert plan == TaskPlan(perturbed.split(), layers, head, frozen_by(model, reasons), {})
    assert not task_layers(model)  # planning changes nothing
    model.norm.eval()
    selection = Selection()
    made = put_in_place(model, plan, selection)
    assert list(made) == [*perturbed.split(), *layers]
    assert made == {name: task_layers(model)[name] for name in made}
    assert len(task_layers(model)) == len(made)
    for name, layer in made.items():
        assert type(layer) is (PerturbedLayer if name in plan.perturbed else OwnLayer)
        assert layer.selection is selection
        assert [module.training for module in (layer, layer.base)] == [name != "norm"] * 2
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        layer, _, own_name = name.rpartition(".")
        assert after.pop(f"{layer}.base.{own_name}" if layer in made else name) is parameter
    assert not after
    assert torch.equal(model(x), reference(x))


def test_what_takes_no_gradient_is_left_alone_but_for_layers_with_statistics():
    model = Model()
    for module in (model.features, model.norm, model.last):
        module.requires_grad_(False)
    model.position.requires_grad_(False)
    plan = plan_tasks(model)
    alone = {n for n, p in model.named_parameters() if not p.requires_grad} - {
        f"features.{name}.{part}" for name in ("1", "3.norm") for part in ("weight", "bias")
    }
    expected = TaskPlan(["fc"], ["features.1", "features.3.norm", "still", "out"], "out", {})
    assert plan == TaskPlan(*list(vars(expected).values())[:4], dict.fromkeys(alone, "takes no gradient"))


class Twice(nn.Module):
    """The same layers at several places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.rest = nn.Sequential(nn.Linear(4, 4), self.first, nn.Sequential(self.norm, self.first))
        self.again = self.rest[2]
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.again(self.rest(self.norm(self.first(x)))))


def test_a_shared_layer_is_replaced_wherever_it_is_and_loaded_once_for_all():
    def wrapped():
        model = Twice()
        return model, put_in_place(model, plan_tasks(model), Selection())

    model, made = wrapped()
    assert list(made) == ["first", "rest.0", "norm", "head"]
    assert model.first is model.rest[1] is model.rest[2][1] is model.again[1] is made["first"]
    assert model.norm is model.rest[2][0] is made["norm"]
    assert not any(isinstance(inner, TaskLayer) for layer in made.values() for inner in layer.base.modules())
    x = torch.randn(3, 4)
    first = model(x)
    for layer in made.values():
        layer.first.fill_(0)
        layer.tasks["1"] = copy.deepcopy(layer.base)
        for parameter in layer.tasks["1"].parameters():
            parameter.data.add_(0.1)
    made["first"].selection.choose(1)
    second = model(x)
    assert not torch.allclose(first, second)
    fresh, layers = wrapped()
    fresh.load_state_dict(model.state_dict())
    assert layers["first"].selection.tasks == [0, 1]
    for task, expected in ((0, first), (1, second)):
        layers["first"].selection.choose(task)
        assert torch.equal(fresh(x), expected)


def around(layer, **more):
    """Layers beside the one under test."""
    return nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": layer, **more, "head": nn.Linear(4, 2)})


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x).abs()


def tied():
    model = around(nn.Linear(4, 4), other=nn.Linear(4, 4))
    model["other"].weight = model["odd"].weight
    return model


def lazily():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return around(nn.LazyLinear(4))


UNFIT = {
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "LSTM": lambda: nn.LSTM(4, 4),
    "GRU": lambda: nn.GRU(4, 4),
    "LSTMCell": lambda: nn.LSTMCell(4, 4),
    "Embedding": lambda: nn.Embedding(4, 4),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3),
    "Bilinear": lambda: nn.Bilinear(4, 4, 4),
    "Odd": lambda: Odd(4, 4),
    "reparametrised": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "reparametrised, no bias": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, bias=False)),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_layer_that_cannot_be_perturbed_is_refused_unless_excluded(kind):
    model = around(UNFIT[kind]())
    with pytest.raises(ModelError, match=rf"'odd'.*{kind.partition(',')[0]}.*exclude=\['odd'\]"):
        plan_tasks(model)
    names = [name for name, _ in model.named_parameters() if name.startswith("odd.")]
    assert plan_tasks(model, exclude=["odd"]) == TaskPlan(["plain"], ["head"], "head", dict.fromkeys(names, EXCLUDED))


REFUSED = {
    "lazy": (lazily, {}, ModelError, r"'odd\.weight' is lazy"),
    "tied": (tied, {}, ModelError, r"'odd\.weight' and 'other\.weight' is tied.*exclude=\['odd', 'other'\]"),
    "one layer": (lambda: nn.Linear(4, 4), {}, ModelError, "is one Linear: put it into an nn.Sequential"),
    "one convolution": (lambda: nn.Conv1d(4, 4, 1), {}, ModelError, "is one Conv1d"),
    "head alone": (lambda: nn.Sequential(nn.Linear(4, 4)), {}, ModelError, "no layer is left to be perturbed"),
    "all excluded": (Model, {"exclude": ["features.*", "fc", "last"]}, ModelError, "no layer is left to be perturbed"),
    "all heads": (Model, {"heads": ["features", "fc", "last", "out"]}, ModelError, "no layer is left"),
    "no head": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1)), {}, ModelError, "neither heads .* nor a Linear layer"),
    "a convolution as head": (Model, {"head": "features.0"}, ConfigurationError, "'features.0' is no Linear .*'fc'"),
    "unknown head": (Model, {"head": "fcc"}, ConfigurationError, "'fcc' is no Linear layer .*'fc', 'last', 'out'"),
    "excluded head": (Model, {"head": "fc", "exclude": ["fc"]}, ConfigurationError, "'fc' is no Linear layer"),
    "half a layer": (Model, {"exclude": ["fc.bias"]}, ConfigurationError, r"'fc\.bias' and not all .*give 'fc'"),
    "half of all": (Model, {"exclude": ["*.bias"]}, ConfigurationError, r"'features\.0\.bias' and not all"),
    "half a norm": (Model, {"exclude": ["norm.weight"]}, ConfigurationError, "not all of layer 'norm'"),
    "no match, exclude": (Model, {"exclude": ["fc", "fcs"]}, ConfigurationError, "exclude: the pattern 'fcs'.*'fc'"),
    "no match, include": (Model, {"include": ["fcs"]}, ConfigurationError, "include: the pattern 'fcs'.*'fc'"),
    "one string": (Model, {"include": "fc"}, ConfigurationError, r"is one string.*\['fc'\]"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    make, options, error, message = case
    with pytest.raises(error, match=message):
        plan_tasks(make(), **options)


def test_tied_layers_pass_when_both_are_excluded():
    assert plan_tasks(tied(), exclude=["odd", "other"]).perturbed == ["plain"]


def test_attention_in_part_without_gradients_is_no_less_refused():
    """It uses its output projection's weight itself, so that nothing may stand in the projection's place."""
    model = around(nn.MultiheadAttention(4, 2))
    model["odd"].in_proj_weight.requires_grad_(False)
    model["odd"].in_proj_bias.requires_grad_(False)
    with pytest.raises(ModelError, match="'odd' is a MultiheadAttention"):
        plan_tasks(model)


@pytest.mark.parametrize("held", [nn.ParameterList, lambda values: nn.ParameterDict({"0": values[0]})])
def test_a_collection_of_vectors_is_no_layer(held):
    model = around(held([nn.Parameter(torch.ones(4))]))
    plan = plan_tasks(model)
    assert (plan.own, list(plan.frozen)) == (["head"], ["odd.0"])
    put_in_place(model, plan, Selection())
    assert len(model["odd"]) == 1
