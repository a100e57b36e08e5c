"""The Laplace penalty against dense matrices, its recursion, its state, and training in a plain loop."""

from __future__ import annotations

import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError, StateError
from avalanche_gradproj.linalg import kronecker
from avalanche_gradproj.methods.kfac import KroneckerLaplace

CLASSES = 3


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES))


def wide():
    """Factors of few large eigenvalues."""
    return nn.Sequential(nn.Linear(4, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, CLASSES))


@pytest.fixture
def small_is_cheap(monkeypatch):
    """Truncate the factors of a small network too."""
    monkeypatch.setattr(kronecker, "OPERATION_COST", 0)


def thin(laplace):
    """How many factors are truncated."""
    terms = [term for form in laplace._memory.forms for layer in form.layers.values() for term in layer.terms]
    return sum(factor.rest is not None for term in terms for factor in (term.left, term.right))


def convolutional():
    body = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (2, 3, 3)), body, nn.Linear(16, CLASSES, bias=False))


def data(n=12, features=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def learn(laplace, model, batch, *, steps=3, samples=None, lr=0.1):
    """One experience of a plain loop; returns the penalties that were met."""
    optimizer, met = torch.optim.SGD(model.parameters(), lr=lr), []
    with laplace.experience(model, optimizer, samples=samples):
        for _ in range(steps):
            optimizer.zero_grad()
            penalty = laplace.penalty()
            met.append(penalty.item())
            (F.cross_entropy(model(batch[0]), batch[1]) + penalty).backward()
            optimizer.step()
    laplace.consolidate(model, [batch])
    model.zero_grad()
    return met


def move(model, seed=1):
    """Move every parameter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def matrix_of(layer):
    """[blocks][out, d] with the bias last, from a Linear or a convolution."""
    weight = layer.weight.detach().numpy().copy()
    groups = getattr(layer, "groups", 1)
    weight = weight.reshape(groups, weight.shape[0] // groups, -1)
    if layer.bias is None:
        return weight
    return np.concatenate([weight, layer.bias.detach().numpy().reshape(groups, -1, 1)], axis=2)


def snapshot(model):
    return {name: matrix_of(m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def reference(model, forms, centres, samples, damping):
    """The penalty by np.kron: forms are what the method holds, centres what this test noted."""
    total = 0.0
    for form, centre in zip(forms, centres, strict=True):
        for name, module in model.named_modules():
            if name in form.layers:
                (term,) = form.layers[name].terms
                for block, delta in enumerate(matrix_of(module) - centre[name]):
                    matrix = np.kron(term.left.matrix[block].numpy(), term.right.matrix[block].numpy())
                    v = delta.reshape(-1)
                    total += form.weight / samples / 2 * (v @ matrix @ v + damping * v @ v)
        for name, own in form.diagonal.items():
            d = (model.get_parameter(name).detach() - centre[name]).numpy().reshape(-1)
            total += form.weight / samples / 2 * (d @ ((own.values.numpy().reshape(-1) + damping) * d))
    return total


def noted(model):
    """Centres of matrices and of the parameters of norm layers."""
    return snapshot(model) | {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [network, convolutional])
@pytest.mark.parametrize("mode", ["separate", "online"])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_value_and_gradient_against_the_dense_matrix(make, mode, damping):
    model, features = make(), 4 if make is network else 18
    laplace = KroneckerLaplace([2.0, 0.5], mode=mode, damping=damping, fisher="exact")
    centres = []
    for t, size in enumerate((12, 6)):
        learn(laplace, model, data(size, features, seed=t), samples=10 * size)
        centres.append(noted(model))
    forms = laplace._memory.forms
    assert [form.weight for form in forms] == ([240.0, 30.0] if mode == "separate" else [270.0])
    centres = centres if mode == "separate" else centres[1:]
    move(model)
    laplace.start(model, samples=50)
    value = laplace.penalty()
    expected = reference(model, forms, centres, 50, damping)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert value.item() > 0.01
    model.zero_grad()
    (3 * value).backward()  # a scaled loss scales its gradient
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        for index in range(0, flat.numel(), 3):
            kept, slope = flat[index].item(), []
            for step in (1e-4, -1e-4):
                flat[index] = kept + step
                slope.append(reference(model, forms, centres, 50, damping))
            flat[index] = kept
            assert parameter.grad.view(-1)[index].item() == pytest.approx(
                3 * (slope[0] - slope[1]) / 2e-4, rel=1e-6, abs=1e-9
            )


def test_autograd_agrees_through_the_sum_with_the_loss():
    model, (x, y) = network(), data()
    laplace = KroneckerLaplace(fisher="exact")
    learn(laplace, model, (x, y))
    form, centre = laplace._memory.forms[0], noted(model)
    move(model)
    laplace.start(model, samples=12)
    (F.cross_entropy(model(x), y) + laplace.penalty()).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total = F.cross_entropy(model(x), y)
    for name in ("0", "3"):
        layer, (term,) = model.get_submodule(name), form.layers[name].terms
        delta = torch.cat([layer.weight, layer.bias[:, None]], 1) - torch.from_numpy(centre[name][0])
        total = total + 0.5 * torch.trace(term.left.matrix[0] @ delta @ term.right.matrix[0] @ delta.T)
    for name in ("1.weight", "1.bias"):
        delta = model.get_parameter(name) - centre[name]
        total = total + 0.5 * (form.diagonal[name].values * delta.square()).sum()
    total.backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


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


@pytest.mark.usefixtures("small_is_cheap")
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_truncated_factors_against_the_dense_matrix(mode):
    model, laplace, centres = wide(), KroneckerLaplace([2.0, 0.5], mode=mode, truncate=0.9, fisher="exact"), []
    for t in range(2):
        learn(laplace, model, data(seed=t), samples=12)
        centres.append(snapshot(model))
    assert thin(laplace) >= 2
    assert "eigenvectors" in laplace.report()["0.weight"].reason + laplace.report()["3.weight"].reason
    move(model)
    expected = 0.0
    for form, centre in zip(laplace._memory.forms, centres[-len(laplace._memory.forms) :], strict=True):
        for name, layer in form.layers.items():
            dense = []
            for factor in (layer.terms[0].left, layer.terms[0].right):
                matrix = factor.matrix[0].numpy()
                thick = matrix if factor.rest is None else matrix @ matrix.T + factor.rest.item() * np.eye(factor.size)
                dense.append(thick)
            delta = matrix_of(model.get_submodule(name))[0] - centre[name][0]
            expected += form.weight / 20 / 2 * np.sum(delta * (dense[0] @ delta @ dense[1]))
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)  # without its diagonal terms
    laplace.start(model, samples=20)
    assert laplace.penalty().item() == pytest.approx(expected, rel=1e-9)
    assert expected > 0.01


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


def test_compiled_models_are_refused_before_training():
    model = network()
    with pytest.raises(ModelError, match=r"layer '_orig_mod\.0'.*torch\.compile.*model\._orig_mod"):
        KroneckerLaplace().start(torch.compile(model, backend="eager"))
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(ModelError, match=r"layer '0\._orig_mod'"):
        KroneckerLaplace().start(model)
    KroneckerLaplace(exclude=["0._orig_mod"]).start(model)
    KroneckerLaplace(0.0).start(model)


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


def test_the_penalty_is_differentiable_once():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    move(model)
    laplace.start(model)
    (first,) = torch.autograd.grad(laplace.penalty(), model[0].weight, create_graph=True)
    assert first.any()
    assert not first.requires_grad  # a constant to whoever differentiates again


def test_an_experience_without_strength_moves_the_centre_of_the_online_mode_alone():
    for mode in ("separate", "online"):
        model, laplace = network(), KroneckerLaplace([1.0, 0.0], mode=mode)
        learn(laplace, model, data())
        learn(laplace, model, data(seed=1))
        laplace.start(model)
        assert (laplace.penalty().item() == 0) == (mode == "online")
        assert len(laplace._memory.forms) == 1


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


def test_penalty_holds_the_weights_where_the_old_data_needs_them():
    """Stronger penalties leave less of the old loss behind, at the price of the new one."""
    old, new = data(60, seed=0), data(60, seed=5)
    rises = []
    for strength in (0.0, 1.0, 5.0):
        torch.manual_seed(0)
        model, laplace = network(), KroneckerLaplace(strength)
        learn(laplace, model, old, steps=300, lr=0.3)
        before = F.cross_entropy(model(old[0]), old[1]).item()
        met = learn(laplace, model, new, steps=300, lr=0.05)
        rises.append(F.cross_entropy(model(old[0]), old[1]).item() - before)
        assert met[0] == 0
        assert (met[-1] > 0) == (strength > 0)
    assert rises[0] > 2 * rises[1] > 2 * rises[2] > 0


@pytest.mark.usefixtures("small_is_cheap")
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_restart_and_pickle_continue_bit_for_bit(mode):
    results, kwargs = [], {"mode": mode, "truncate": 0.9, "damping": 0.01}
    for how in ("never stopped", "state", "pickle"):
        torch.manual_seed(0)
        model = wide()
        laplace = KroneckerLaplace(2.0, **kwargs)
        for t in range(2):
            learn(laplace, model, data(seed=t))
        assert thin(laplace) >= 2
        if how == "state":
            buffer = io.BytesIO()
            torch.save(laplace.state_dict(), buffer)
            buffer.seek(0)
            held, laplace = laplace.bytes_held, KroneckerLaplace(2.0, **kwargs)
            laplace.load_state_dict(torch.load(buffer, weights_only=True))
            assert laplace.bytes_held == held
        if how == "pickle":
            laplace = pickle.loads(pickle.dumps(laplace))
        assert thin(laplace) >= 2
        learn(laplace, model, data(seed=2))
        results.append([*model.state_dict().values(), torch.tensor(laplace.bytes_by_experience)])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def damaged(state, how):
    layer = state["forms"][0]["layers"]["0"]
    if how == "mode":
        state["mode"] = "online"
    elif how == "experiences":
        state["experiences"] = "two"
    elif how == "forms":
        state["forms"] = [{"weight": 1.0}]
    elif how == "shape":
        layer["terms"][0]["left"]["matrix"] = torch.ones(1, 4, 4)
    elif how == "finite":
        layer["terms"][0]["right"]["matrix"][0, 0, 0] = float("nan")
    elif how == "other model":
        layer["centre"] = torch.zeros(1, 5, 7)
        layer["terms"][0]["right"]["matrix"] = torch.eye(7)[None]
    return state


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("mode", "mode='online'"),
        ("experiences", "'experiences' is 'two'"),
        ("forms", "damaged"),
        ("shape", "layer '0'"),
        ("finite", "layer '0'.*NaN"),
        ("other model", "layer '0' is"),
    ],
)
def test_states_refused_by_name(how, match):
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    held = str(laplace.state_dict())
    with pytest.raises(StateError, match=match):
        laplace.load_state_dict(damaged(laplace.state_dict(), how))
    assert str(laplace.state_dict()) == held


def test_online_state_with_and_without_truncation_do_not_mix():
    model, laplace = network(), KroneckerLaplace(mode="online")
    learn(laplace, model, data())
    with pytest.raises(StateError, match=r"truncate=0\.9"):
        KroneckerLaplace(mode="online", truncate=0.9).load_state_dict(laplace.state_dict())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES)), "layer '3'"),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), "layer '3'"),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.Tanh(), nn.Linear(5, CLASSES)), "'1.weight'"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, CLASSES)), "layer '0'"),
    ],
)
def test_another_model_is_refused_by_name(make, match):
    laplace = KroneckerLaplace()
    learn(laplace, network(), data())
    with pytest.raises(StateError, match=match):
        laplace.start(make())


def test_rows_that_a_head_grows_are_free():
    for mode in ("separate", "online"):
        torch.manual_seed(0)
        model, laplace = nn.Sequential(nn.Linear(4, 2)), KroneckerLaplace(mode=mode, fisher="exact", damping=0.1)
        learn(laplace, model, (data()[0], data()[1] % 2), samples=12)
        old = model[0]
        values = []
        for scale in (0.0, 5.0):
            model[0] = nn.Linear(4, 4)
            with torch.no_grad():
                model[0].weight[:2], model[0].bias[:2] = old.weight + 0.1, old.bias
                model[0].weight[2:] = scale
            laplace.start(model, samples=12)
            value = laplace.penalty()
            value.backward()
            values.append(value.item())
            assert model[0].weight.grad[:2].all()
            assert not model[0].weight.grad[2:].any()
            assert not model[0].bias.grad[2:].any()
            laplace.finish()
        assert values[0] == values[1] > 0
        learn(laplace, model, data(12, seed=1), samples=12)
        move(model)
        laplace.start(model, samples=12)
        model.zero_grad()
        laplace.penalty().backward()
        assert model[0].weight.grad.all()


def test_parameters_that_take_no_gradient_are_left_alone():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    move(model)
    laplace.start(model)
    everything = laplace.penalty().item()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    laplace.finish()
    laplace.start(model)
    value = laplace.penalty()
    assert 0 < value.item() < everything
    model.zero_grad()
    value.backward()
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None
    assert laplace.report()["0.weight"].treatment == "left alone"
    learn(laplace, model, data(seed=1))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    learn(laplace, model, data(seed=2))


def test_half_precision_weights_and_autocast():
    torch.set_default_dtype(torch.float32)
    model, laplace = network(), KroneckerLaplace(5.0)
    learn(laplace, model, data())
    move(model)
    laplace.start(model)
    value = laplace.penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = laplace.penalty()
    assert again.dtype == torch.float32
    assert torch.equal(value, again)
    laplace.finish()
    half = network().to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    laplace.start(half)
    low = laplace.penalty()
    low.backward()
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(value.item(), rel=0.05)
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in half.parameters())


def test_two_penalties_of_one_step_do_not_disturb_each_other():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    move(model)
    laplace.start(model)
    first = laplace.penalty()
    first.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    first = laplace.penalty()
    kept = [p.detach().clone() for p in model.parameters()]
    move(model, seed=2)
    laplace.penalty()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    first.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_an_error_leaves_the_factors_as_they_were():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    held = str(laplace.state_dict())
    bad = data(seed=1)[0]
    bad[3] = float("nan")
    with pytest.raises(NonFiniteError):
        laplace.consolidate(model, [data()[0], bad])
    with pytest.raises(DataError, match="no sample"):
        laplace.consolidate(model, [])
    assert str(laplace.state_dict()) == held


def test_wrong_moments_and_wrong_losses():
    laplace = KroneckerLaplace()
    with pytest.raises(StateError, match="outside of an experience"):
        laplace.penalty()
    with pytest.raises(StateError, match="no model yet"):
        laplace.report()
    laplace.criterion = nn.MSELoss()
    with pytest.raises(ConfigurationError, match="MSELoss"):
        laplace.start(network())
    with pytest.raises(ModelError, match="no layer is covered"):
        KroneckerLaplace().start(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ConfigurationError, match="nowhere"):
        KroneckerLaplace(exclude=["nowhere"]).start(network())
    KroneckerLaplace(0.0, exclude=["3"]).start(network())


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


def test_a_layer_that_is_never_called_is_warned_of_and_has_no_term():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.spare = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.first(x) + (self.spare(x) if self.training else 0)

    model, laplace = Spare(), KroneckerLaplace(mode="online")
    with pytest.warns(UserWarning, match="layer 'spare' was trained but never called"):
        learn(laplace, model, data())
    assert "none yet" in laplace.report()["spare.weight"].reason
    model.eval()
    learn(laplace, model, data(seed=1))
    model.spare.requires_grad_(False)
    learn(laplace, model, data(seed=2))


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


def test_report_names_every_parameter_and_the_bytes():
    model, laplace = network(), KroneckerLaplace(fisher="empirical", mode="online", exclude=["3"])
    learn(laplace, model, data())
    report = laplace.report()
    assert {row.parameter: row.treatment for row in report} == {
        "0.weight": "penalised",
        "0.bias": "penalised",
        "1.weight": "penalised",
        "1.bias": "penalised",
        "3.weight": "left alone",
        "3.bias": "left alone",
    }
    assert report["0.bias"].layer == "0"
    assert report["1.bias"].reason == "diagonal"
    assert report["3.bias"].reason == "excluded"
    text = str(report)
    assert "true labels" in text
    assert "cross terms" in text
    assert f"experience 0: {8 * (25 + 25 + 25 + 4 * 5)} bytes" in text


def test_no_reference_to_the_model_is_kept():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    kept = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert kept() is None
