"""find_pairs, its numerical check: what zeros, gates and averages would hide."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.layers.norm import batch_norms
from avalanche_gradproj.layers.pairs import find_pairs
from avalanche_gradproj.layers.select import cover
from tests.layers.pairs_setup import BOTH, Net, X, chain, look, skip


def test_a_skip_connection_is_seen_through_a_head_of_zeros():
    """Merging would change nothing at present, whatever was merged."""
    model = Net(skip)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert look(model, X).found == {}
    model = Net(chain)
    nn.init.zeros_(model.head.weight)
    assert look(model, X).found == BOTH


@pytest.mark.parametrize("gate", [torch.sqrt, torch.log1p, lambda p: torch.relu(1 + p), lambda p: 1 / torch.sqrt(p)])
def test_a_gate_by_a_parameter_of_zero_hides_no_skip_connection(gate):
    """Open or closed at zero: what is wrong at the given weights is wrong."""
    model = Net(lambda m, x: skip(m, x) * (gate(m.gate) if gate is not torch.sqrt else 1 + gate(m.gate)))
    model.gate = nn.Parameter(torch.zeros(()))
    model.other_gate = model.gate
    assert look(model, X).found == {}


def test_parameters_that_cannot_be_replaced_stay_as_they_are():
    model = Net(chain)
    model.flat = nn.Parameter(torch.zeros(1).expand(6))
    model.offloaded = nn.Parameter(torch.zeros(2, device="meta"))
    model.signed = nn.Parameter(torch.tensor([-0.0, 0.0]))
    model.sparse = nn.Parameter(
        torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0), (3,), check_invariants=True)
    )
    kept, versions = dict(model.named_parameters()), [p._version for p in model.parameters()]
    units, norms = cover(model, exclude=["flat", "offloaded", "signed", "sparse"]).units, batch_norms(model)
    assert find_pairs(model, units, norms, lambda: model(X)).found == BOTH
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    assert [p._version for p in model.parameters()] == versions
    assert torch.signbit(model.signed).tolist() == [True, False]


@pytest.mark.parametrize(
    "between",
    [
        lambda h: F.avg_pool1d(h, 2),
        lambda h: F.avg_pool1d(h, 3, 1, 1, count_include_pad=False),
        lambda h: h.mean(2, keepdim=True),
    ],
    ids=["fewer positions", "as many positions", "one position"],
)
def test_an_average_commutes_with_the_map_and_is_refused(between):
    model = Net(lambda m, x: m.head(m.norm(between(m.first(x))).mean(2)), first=nn.Conv1d(2, 6, 3))
    x = torch.randn(4, 2, 8)
    with pytest.raises(ConfigurationError, match=r"BatchNorm 'norm' and layer 'first'.*stands between the two"):
        look(model, x, given={"norm": "first"})
    same = Net(lambda m, x: m.head(m.norm(m.first(x) + 0.0).mean(2)), first=nn.Conv1d(2, 6, 3))
    assert look(same, x, given={"norm": "first"}).found == {"norm": "first"}
