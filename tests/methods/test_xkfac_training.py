"""XK-FAC in training: no strength, the random state, modes, steps that fail or leave a block out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from avalanche_gradproj.methods.xkfac_balance import Balance
from tests.methods.xkfac_relu_setup import CLASSES, N, batches, network, train

pytestmark = pytest.mark.usefixtures("double")


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
