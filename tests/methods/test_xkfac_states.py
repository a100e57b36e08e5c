"""XK-FAC where things go wrong or change: refusals, models with branches, states of other settings, steps that fail."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from avalanche_gradproj.errors import ConfigurationError, ModelError, StateError
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from avalanche_gradproj.methods.xkfac_balance import Balance

CLASSES, N = 3, 24


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def network(width=6):
    return nn.Sequential(
        nn.Linear(4, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, CLASSES),
    )


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, 4, generator=generator) + 0.5, torch.randint(CLASSES, (N,), generator=generator)
    return list(zip(x.split(8), y.split(8), strict=True))


def train(xkfac, model, seed, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    with xkfac.experience(model, optimizer, samples=N, batches=batches(seed)):
        for x, y in batches(seed) * 2:
            optimizer.zero_grad()
            xkfac.objective(F.cross_entropy(model(x), y)).backward()
            optimizer.step()
    xkfac.consolidate(model, batches(seed))


def penalty_at_the_centre(xkfac, model):
    """Of the weights and statistics that were just learned, in evaluation: 0 if they are the centre."""
    model.eval()
    with xkfac.experience(model, samples=N, batches=batches(9)):
        return xkfac.penalty().item()


class Branches(nn.Module):
    """A branch of its own for each task, with or without a bias before its BatchNorm."""

    def __init__(self, bias=True):
        super().__init__()
        self.first, self.out, self.task = nn.Linear(4, 8), nn.Linear(8, CLASSES), 0
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(2)
        )

    def forward(self, x):
        return self.out(self.branches[self.task](torch.relu(self.first(x))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{}, {"pairs": {"branches.0.1": "branches.0.0", "branches.1.1": "branches.1.0"}}])
def test_a_branch_that_is_not_called_keeps_its_pair_and_its_weights(bias, settings):
    model = Branches(bias)
    xkfac = ExtendedKroneckerLaplace(1.0, adaptive=False, **settings)
    train(xkfac, model, 0)
    model.task = 1
    assert penalty_at_the_centre(xkfac, model) == pytest.approx(0, abs=1e-20)
    before = {name: value.clone() for name, value in model.branches[0].state_dict().items()}
    for seed in (1, 2):
        train(xkfac, model, seed)
    for name, value in model.branches[0].state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-12, atol=1e-12)
    layers = xkfac._memory.forms[0].layers
    assert {"branches.0.0", "branches.1.0"} <= layers.keys()
    assert all(layers[f"branches.{task}.0"].centre.shape == (1, 8, 9) for task in range(2))


def test_a_layer_that_changes_sides_is_refused():
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.turned = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), False

        def forward(self, x):
            return (
                self.b(self.norm(self.a(x)))[:, :CLASSES]
                if not self.turned
                else self.norm(self.b(self.a(x)))[:, :CLASSES]
            )

    model, xkfac = Turning(), ExtendedKroneckerLaplace()
    train(xkfac, model, 0)
    model.turned = True
    with pytest.raises(ModelError, match=r"'norm' was merged with layer 'a', and now it stands behind layer 'b'"):
        xkfac.start(model, samples=N, batches=batches(1))


def test_a_refused_start_changes_nothing():
    model = network()
    xkfac = ExtendedKroneckerLaplace(adaptive=False, reparameterise=False)
    train(xkfac, model, 0)
    before = str(xkfac.state_dict())
    with pytest.raises(StateError, match="no BatchNorm '4'"):
        xkfac.start(nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)), batches=batches(1))
    assert str(xkfac.state_dict()) == before
    assert penalty_at_the_centre(xkfac, model) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    ("made", "other", "match"),
    [
        ({"batchnorm": "track"}, {}, "batchnorm='track'"),
        ({}, {"batchnorm": "freeze"}, "batchnorm='merge'"),
        ({}, {"strength": 1.0}, "strength='balanced'"),
        ({"strength": 1.0}, {}, "strength='balanced'"),
    ],
)
def test_states_of_other_settings_are_refused(made, other, match):
    one, another = ExtendedKroneckerLaplace(**made), ExtendedKroneckerLaplace(**other)
    train(one, network(), 0)
    before = str(another.state_dict())
    with pytest.raises(StateError, match=match):
        another.load_state_dict(one.state_dict())
    assert str(another.state_dict()) == before


def test_a_state_of_another_model_is_refused_by_name():
    held = ExtendedKroneckerLaplace(batchnorm="freeze")
    train(held, network(), 0)
    fresh = ExtendedKroneckerLaplace(batchnorm="freeze")
    fresh.load_state_dict(held.state_dict())
    fresh._plan._batchnorm = "merge"  # holds what the state says
    with pytest.raises(StateError, match="no BatchNorm '1'"):
        fresh.start(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), samples=N, batches=batches())


def test_a_step_that_is_not_finite_leaves_no_trace_in_the_scales():
    balance, plain = Balance(), Balance()
    for step, (loss, penalty) in enumerate([(1.0, 0.2), (float("nan"), 0.2), (2.0, float("inf")), (1.5, 0.4)]):
        found = balance.scales(torch.tensor(loss), torch.tensor(penalty))
        assert all(torch.isfinite(scale) for scale in found)
        if step in (0, 3):
            expected = plain.scales(torch.tensor(loss), torch.tensor(penalty))
    # A step in which either term was not finite is missing from both means.
    of_loss, of_penalty = 0.95 * 1.0 + 0.05 * 1.5, 0.95 * 0.2 + 0.05 * 0.4
    assert found[0].item() == pytest.approx(2 * of_loss / (of_loss + of_penalty))
    assert found[0].item() == pytest.approx(expected[0].item())
    assert [scale.item() for scale in Balance().scales(torch.tensor(-2.0), torch.tensor(2.0))] == [1.0, 1.0]
    assert [scale.item() for scale in Balance().scales(torch.tensor(0.0), torch.tensor(0.0))] == [1.0, 1.0]


def test_a_batch_norm_is_excluded_whole_or_not_at_all():
    with pytest.raises(ConfigurationError, match=r"'1\.bias' and not all of BatchNorm '1'"):
        ExtendedKroneckerLaplace(exclude=["1.bias"]).start(network(), batches=batches())
    model = network()
    xkfac = ExtendedKroneckerLaplace(exclude=["1.bias", "1.weight"])
    train(xkfac, model, 0)
    weight, norm = model[0].weight.clone(), model[1].weight.clone()
    xkfac.start(model, samples=N, batches=batches(1))
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[1].weight, norm)
    assert xkfac.report()["1.weight"].treatment == "left alone"


class Counting(DataLoader):
    opened = 0

    def __iter__(self):
        type(self).opened += 1
        return super().__iter__()


@pytest.mark.parametrize("batchnorm", ["merge", "freeze", "track"])
def test_no_strength_does_nothing(batchnorm):
    """Neither to BatchNorms nor to the random state, which loaders use."""
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    results = []
    for xkfac in (None, ExtendedKroneckerLaplace(0.0, batchnorm=batchnorm)):
        torch.manual_seed(0)
        model, loader = network(), Counting(TensorDataset(x, y), batch_size=8, shuffle=True)
        Counting.opened = 0
        for _ in range(3):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            if xkfac is not None:
                xkfac.start(model, optimizer, samples=N, batches=loader)
            for a, b in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(a), b)
                (loss if xkfac is None else xkfac.objective(loss)).backward()
                optimizer.step()
            if xkfac is not None:
                xkfac.finish()
                xkfac.consolidate(model, loader)
        assert Counting.opened == 3
        results.append(nn.utils.parameters_to_vector([*model.parameters(), *model.buffers()]))
    assert torch.equal(*results)


class Noisy(Dataset):
    """Draws from the global random state."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.randn(4), index % CLASSES


def test_the_random_state_is_given_back():
    model, loader = network(), DataLoader(Noisy(), batch_size=8, shuffle=True)
    xkfac = ExtendedKroneckerLaplace()
    before = torch.get_rng_state()
    xkfac.start(model, samples=N, batches=loader)
    assert torch.equal(torch.get_rng_state(), before)
    xkfac.finish()
    xkfac.consolidate(model, [x for x, _ in batches()])
    before = torch.get_rng_state()
    xkfac.start(model, samples=N, batches=loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_leaves_training_inside_stays_in_evaluation():
    model, xkfac = network(), ExtendedKroneckerLaplace(batchnorm="freeze")
    train(xkfac, model, 0)
    model.train()
    with xkfac.experience(model, samples=N, batches=batches(1)):
        model.eval()
    assert not any(module.training for module in model.modules())


class Skipping(nn.Module):
    """A block that training may leave out."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.block, self.own = (
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
        )
        self.out, self.skips = nn.Linear(4, CLASSES), False

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        return self.out(h if self.training and self.skips else h + torch.relu(self.own(self.block(h))))


def test_a_block_that_a_step_leaves_out_has_its_running_statistics():
    model, xkfac = Skipping(), ExtendedKroneckerLaplace(adaptive=False, reparameterise=False)
    train(xkfac, model, 0)
    model.skips = True
    model.train()
    model.zero_grad()
    x, _ = batches(1)[0]
    with xkfac.experience(model, samples=N, batches=batches(1)):
        model(x)
        xkfac.penalty().backward()
    assert torch.isfinite(model.block.weight.grad).all()
    torch.testing.assert_close(model.block.weight.grad, torch.zeros(4, 4), rtol=0, atol=1e-12)  # at its centre


def test_held_batch_norms_are_held_whatever_mode_training_begins_in():
    model, xkfac = network(), ExtendedKroneckerLaplace(batchnorm="freeze")
    train(xkfac, model, 0)
    before = model[1].running_mean.clone()
    model.eval()
    with xkfac.experience(model, samples=N, batches=batches(1)):
        model.train()
        model(batches(1)[0][0] + 3.0)
    assert torch.equal(model[1].running_mean, before)


def test_a_given_pair_that_keeps_no_statistics_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ConfigurationError, match=r"BatchNorm '1' and layer '0'.*no running statistics"):
        ExtendedKroneckerLaplace(pairs={"1": "0"}).start(model, samples=N, batches=batches())


def test_maximum_pooling_between_layer_and_batch_norm_is_no_pair():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3), nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.out(self.norm(F.max_pool1d(self.conv(x[:, None]), 2)).flatten(1))

    with pytest.raises(ConfigurationError, match="'norm' and layer 'conv'"):
        ExtendedKroneckerLaplace(pairs={"norm": "conv"}).start(Pooled(), samples=N, batches=batches())


def test_what_cannot_work_is_refused_before_training():
    with pytest.raises(ConfigurationError, match="n_samples=1"):
        ExtendedKroneckerLaplace(n_samples=1).start(network(), samples=N, batches=batches())
    ExtendedKroneckerLaplace(n_samples=1, batchnorm="freeze").start(network(), samples=N, batches=batches())
    with pytest.raises(StateError, match="outside of an experience"):
        ExtendedKroneckerLaplace().objective(torch.tensor(1.0))


@pytest.mark.parametrize("mask", [-1000.0, -1e11, float("-inf")])
def test_masked_logits_hide_no_skip_connection(mask):
    """Also where most of them are masked, by large numbers."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.out = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

        def forward(self, x):
            h = self.layer(x)
            logits = self.out(torch.relu(self.norm(h)) + h)
            return torch.cat([torch.full_like(logits[:, :2], mask), logits[:, 2:]], 1)

    with pytest.raises(ModelError, match=r"BatchNorm 'norm'.*used elsewhere"):
        ExtendedKroneckerLaplace().start(Skip(), samples=N, batches=batches())


def test_functional_dropout_hides_no_pair():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return F.dropout(self.net(x), 0.5)

    xkfac = ExtendedKroneckerLaplace()
    xkfac.start(Dropping(), samples=N, batches=batches())
    assert xkfac._plan.found == {"net.1": "net.0", "net.4": "net.3"}
