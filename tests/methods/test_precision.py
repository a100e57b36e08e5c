"""Mixed and half precision: weights stay protected as far as their type can say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avalanche_gradproj.methods.gpm import GradientProjectionMemory


def leak(model, start, bases):
    """Worst share of a layer's change in its old basis."""
    worst = 0.0
    for name, layer in (("0", model[0]), ("2", model[2])):
        change = torch.cat([(layer.weight - start[name][0]).flatten(1), (layer.bias - start[name][1])[:, None]], 1)
        change = change.detach().double()
        worst = max(worst, float((change @ bases[name][0].double()).norm() / change.norm()))
    return worst


@pytest.mark.parametrize("route", ["auto", "inputs"])
def test_autocast_leaks_no_more_than_float32(route):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 200), nn.ReLU(inplace=True), nn.Linear(200, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gpm = GradientProjectionMemory(0.95, 0.0, 60, route=route)
    for t in range(2):
        x, y = torch.randn(60, 4) @ torch.randn(4, 12), torch.randint(5, (60,))
        start = {n: (m.weight.detach().clone(), m.bias.detach().clone()) for n, m in (("0", model[0]), ("2", model[2]))}
        gpm.start(model, optimizer)
        with gpm.active():
            for i in range(0, 60, 6):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x[i : i + 6]).float(), y[i : i + 6])
                loss.backward()
                gpm.transform()
                optimizer.step()
                gpm.after_step()
        if t > 0:
            assert leak(model, start, gpm.bases) < 1e-5  # before the correction at the end of an experience
        gpm.finish()
        gpm.consolidate(model, [x])


def test_half_precision_weights():
    """A bfloat16 weight is known to 3 digits: the change is projected in float32 and rounded once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 5)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gpm = GradientProjectionMemory(0.95, 0.0, 60)
    for t in range(2):
        x, y = (torch.randn(60, 4) @ torch.randn(4, 12)).to(torch.bfloat16), torch.randint(5, (60,))
        start = {n: (m.weight.detach().clone(), m.bias.detach().clone()) for n, m in (("0", model[0]), ("2", model[2]))}
        with gpm.experience(model, optimizer):
            for _ in range(20):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x).float(), y).backward()
                gpm.transform()
                optimizer.step()
                gpm.after_step()
        if t > 0:
            assert leak(model, start, gpm.bases) < 0.1
        gpm.consolidate(model, [x])
        assert all(block.dtype == torch.float32 for blocks in gpm.bases.values() for block in blocks)
