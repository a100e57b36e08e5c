"""LOGD's core: old gradients by either way, the memory, what is left alone, restarts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError, StateError
from avalanche_gradproj.methods.logd import logd_update
from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition

FEATURES, CLASSES, KEPT = 12, 4, 6


class Attentive(nn.Module):
    """Packed attention between two linear layers, with an activation in place after the first."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, CLASSES, bias=False)

    def forward(self, x):
        x = F.relu(self.first(x.view(-1, 4, 3)), inplace=True)
        return self.last(self.attention(x, x, x)[0].mean(1))


class Repeated(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(FEATURES, FEATURES)
        self.out = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.step(torch.tanh(self.step(x)))))


def convolutional(norm=False):
    layers = [nn.Conv2d(2, 4, 2, padding=1, groups=2), nn.BatchNorm2d(4) if norm else nn.Identity()]
    layers += [nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 4 * 3, CLASSES)]
    return nn.Sequential(nn.Unflatten(1, (2, 3, 2)), *layers)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(FEATURES, 7), nn.ReLU(), nn.Linear(7, CLASSES, bias=False)),
    "convolution": convolutional,
    "attention": Attentive,
    "repeated": Repeated,
}


def data(seed, size=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, FEATURES, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def learned(model, experiences=3, **kwargs):
    """LOGD with the memory of some experiences, and training of the next one begun."""
    settings = {"patterns_per_exp": KEPT, "criterion": F.cross_entropy, **kwargs}
    logd = LayerwiseGradientDecomposition(**settings)
    for seed in range(experiences):
        x, y = data(seed)
        chosen = logd.draw(len(x))
        logd.consolidate(model, [(x[chosen], y[chosen])])
    logd.start(model)
    return logd


def fresh(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]() if name in MODELS else convolutional(norm=True)
    return model.to(dtype)


def memory_of(logd, dtype=torch.float64):
    """The memory's inputs in the model's type."""
    logd.memory._keep([(x.to(dtype), y, t) for x, y, t in logd.memory._samples])


def reference(logd, model, criterion=F.cross_entropy):
    """Gradients of the old experiences, one backward pass each: parameter name -> [K, *shape]."""
    rows = []
    for k in range(len(logd.memory)):
        x, y, _ = logd.memory[k]
        one = copy.deepcopy(model)
        one.zero_grad()
        criterion(one(x), y).backward()
        rows.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in one.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def start_again(logd, model):
    memory_of(logd)
    logd.start(model)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_one_pass_equals_one_pass_each(name, reduction):
    def criterion(output, target):
        return F.cross_entropy(output, target, reduction=reduction)

    model = fresh(name)
    logd = learned(model.float(), criterion=criterion)
    model.double()
    start_again(logd, model)
    assert logd._old.single_pass, logd._old.reason
    assert "one pass over all of them" in str(logd.report())
    expected = reference(logd, model, criterion)
    logd._gradients.rows.fill_(torch.nan)
    logd._old.compute()
    for parameter, value in expected.items():
        found = logd._gradients.view(slice(0, 3), parameter)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12, msg=lambda text, n=parameter: f"{n}: {text}")
    logd._old._split = None
    logd._gradients.rows.fill_(torch.nan)
    logd._old.compute()
    for parameter, value in expected.items():
        torch.testing.assert_close(logd._gradients.view(slice(0, 3), parameter), value, rtol=1e-9, atol=1e-12)


class Standardised(nn.Module):
    """Samples meet in the middle: no layer says so."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.one(x)
        return self.two(x - x.mean(0))


class Elsewhere(nn.Module):
    """A weight is used outside of its layer."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.one(x) + F.linear(x.square(), self.one.weight)


class Scaled(nn.Sequential):
    """A parameter that is in no matrix layer."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, CLASSES))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Standardised, "influence each other"),
        (Elsewhere, "outside of its layer"),
        (Scaled, "'scale' is in no matrix layer"),
        (lambda: convolutional(norm=True), "BatchNorm in training mode"),
    ],
)
def test_where_one_pass_will_not_do_each_experience_gets_its_own(make, reason):
    torch.manual_seed(0)
    model = make()
    logd = learned(model)
    assert not logd._old.single_pass
    assert reason in str(logd.report())
    expected = reference(logd, model)
    logd._old.compute()
    for parameter, value in expected.items():
        torch.testing.assert_close(logd._gradients.view(slice(0, 3), parameter), value)


def test_batchnorm_put_into_training_mode_after_the_start():
    model = fresh("norm", torch.float32)
    model.eval()
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    logd = learned(model)
    assert logd._old.single_pass
    model.train()
    assert not logd._old.single_pass
    expected = reference(logd, model)
    logd._old.compute()
    for parameter in logd._gradients.parameters:
        found = logd._gradients.view(slice(0, 3), parameter)
        torch.testing.assert_close(found, expected[parameter])


def test_memory_passes_leave_statistics_gradients_and_modes():
    model = fresh("norm", torch.float32)
    logd = learned(model)
    x, y = data(9)
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    logd._old.compute()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert model[2].track_running_stats

    def fails(output, target):
        raise ZeroDivisionError

    logd._old._criterion = fails
    with pytest.raises(ZeroDivisionError):
        logd._old.compute()
    assert model[2].track_running_stats


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


def test_experiences_of_different_input_shapes():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(3), nn.Linear(3, CLASSES))
    logd = LayerwiseGradientDecomposition(2, criterion=F.cross_entropy)
    for size in (6, 9):
        logd.consolidate(model, [(torch.randn(2, size), torch.tensor([0, 1]))])
    logd.start(model)
    assert "differ in shape" in str(logd.report())
    logd._old.compute()
    assert bool((logd._gradients.rows[:2].norm(dim=1) > 0).all())


def test_state_goes_on_bit_for_bit(tmp_path):
    model = fresh("mlp").float()
    logd = learned(model)
    torch.save(logd.state_dict(), tmp_path / "state.pt")
    other = LayerwiseGradientDecomposition(KEPT, criterion=F.cross_entropy)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.experiences == 3
    assert torch.equal(other.draw(20), logd.draw(20))
    found = []
    for method in (logd, other):
        one = copy.deepcopy(model)
        method.start(one)
        F.cross_entropy(one(data(9)[0]), data(9)[1]).backward()
        method.transform()
        found.append([p.grad for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patterns_per_exp": 5}, "patterns_per_exp=5"),
        ({"experiences": "3"}, "experiences"),
        ({"samples": [[torch.zeros(2, 3), torch.zeros(2), None]]}, "experience 0"),
        ({"samples": [[torch.zeros(KEPT, 3), torch.zeros(KEPT), None]]}, f"({KEPT}, 3)"),
        ({"samples": [None]}, "experience 0"),
        ({"samples": []}, "learned 3 experiences and holds samples of 0: there is no memory for an old experience"),
        ({"experiences": 4}, "learned 4 experiences and holds samples of 3"),
    ],
)
def test_damaged_states_are_refused(change, named):
    logd = learned(fresh("mlp").float())
    before = str(logd.state_dict())
    with pytest.raises(StateError) as error:
        logd.load_state_dict({**logd.state_dict(), **change})
    assert named in str(error.value)
    assert str(logd.state_dict()) == before


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"patterns_per_exp": -1}, "patterns_per_exp=-1"),
        ({"patterns_per_exp": 2.0}, "patterns_per_exp=2.0"),
        ({"blocks": 0}, "blocks=0"),
        ({"blocks": True}, "blocks=True"),
        ({"blocks": "module"}, "blocks='module'"),
        ({"selection": "best"}, "selection='best'"),
        ({"memory_device": "nowhere"}, "memory_device='nowhere'"),
        ({"seed": None}, "seed=None"),
        ({"n_components": -1}, "n_components=-1"),
        ({"margin": "big"}, "margin='big'"),
    ],
)
def test_bad_arguments(kwargs, named):
    with pytest.raises(ConfigurationError) as error:
        LayerwiseGradientDecomposition(**kwargs)
    assert named in str(error.value)


def test_errors_before_training_begins():
    model = fresh("mlp").float()
    for kwargs, kind, named in (
        ({"blocks": 4}, ConfigurationError, "blocks=4"),
        ({"criterion": None}, ConfigurationError, "criterion=None"),
        ({"exclude": ["*"]}, ModelError, "no parameter"),
        ({"include": ["nothing"]}, ConfigurationError, "'nothing'"),
        ({"forward": lambda model, batch: model(batch[0], *batch[2])}, IndexError, "range"),
        ({"forward": lambda model, batch: model(batch[0], task=1)}, ModelError, "task labels"),
    ):
        with pytest.raises(kind, match=named.replace("*", ".")):
            learned(model, **kwargs)
    with pytest.raises(ModelError, match="lazy"):
        learned(nn.LazyLinear(3), 0)


def test_bad_data():
    logd = LayerwiseGradientDecomposition(KEPT)
    x, y = data(0)
    with pytest.raises(DataError, match="patterns_per_exp=6"):
        logd.draw(5)
    for batches, kind, named in (
        ([(x[:3], y[:3])], DataError, "3 samples came"),
        ([x], DataError, "targets"),
        ([(x, y.tolist())], DataError, "list"),
        ([(x * torch.inf, y)], NonFiniteError, "experience 0"),
    ):
        with pytest.raises(kind, match=named):
            logd.consolidate(nn.Identity(), batches)
    assert logd.experiences == len(logd.memory) == 0
