"""How much HALRP adds to a model, and to which layers: counted by hand from what a saved model holds."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.methods.halrp import LowRankPerturbation
from tests.methods.test_halrp import assert_same, batches, learn, network, outputs, sgd

BASE = sum(value.numel() for value in network().state_dict().values())
FIXED = 2 * 4 + 1 + 8 + 4 + 2 + 4 + 5 + 8 + 5 + 18  # norm layer; scales and bias of 1 and 5; head


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def numbers(model, tasks):
    """Count what a saved model holds of each task: bits and shapes are no numbers."""
    counts = dict.fromkeys(tasks, 0)
    for name, value in model.state_dict().items():
        found = re.search(r"(?:tasks|heads)\.(\d+)\.", name)
        if found and int(found[1]) in counts and not name.endswith(("_bits", "_shape")):
            counts[int(found[1])] += value.numel()
    return counts


def size(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return len(buffer.getvalue())


def learned(count, *, known=True, epochs=2, after=lambda *_: None, **settings):
    """Learn some tasks; `remaining` is given where it is known."""
    model, halrp = network(), LowRankPerturbation(**{"approximation_rate": 1.0, **settings})
    optimizer = sgd(model)
    for task in range(count):
        learn(halrp, model, optimizer, task, remaining=count - task if known else None, epochs=epochs)
        after(halrp, model)
    return halrp, model


def check(halrp, model):
    """The records say what a count by hand does."""
    counts = numbers(model, halrp.tasks[1:])
    records = halrp.ledger.records
    assert counts == {task: record.numbers for task, record in records.items()}
    assert halrp.growth == pytest.approx(sum(counts.values()) / BASE)
    assert halrp.ledger.base == BASE
    assert halrp.growth <= (1e9 if halrp.max_growth is None else halrp.max_growth)
    notes = halrp.report().notes
    for task, record in records.items():
        own = {n: v for n, v in model.state_dict().items() if f".tasks.{task}." in n}
        kept = sum(value.numel() for name, value in own.items() if name.endswith("_values"))
        assert record.zeros == record.dense - kept
        assert record.stored_bytes == sum(value.nbytes for value in own.values())
        assert record.dense == record.ranks["1"] * (4 + 2) + record.ranks["5"] * (5 + 8)
        line = next(line for line in notes if line.startswith(f"task {task}:"))
        assert f"{record.numbers} numbers ({100 * counts[task] / BASE:.2f} % of the base)" in line
        assert f"{record.zeros} of {record.dense} entries" in line
        assert f"ranks 1 {record.ranks['1']}, 5 {record.ranks['5']}" in line
    assert f"growth over the base: {100 * halrp.growth:.2f} %" in notes or not records


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("max_growth", [4.2, 6.0, None])
def test_growth_by_hand_after_every_task(max_growth, known):
    """Six tasks; where their number is not known, half of what is left is a task's."""
    count = 6 if known else 3
    shares = []

    def after(halrp, model):
        check(halrp, model)
        used = halrp.growth * BASE
        shares.append(used)

    halrp, _ = learned(count, known=known, max_growth=max_growth, after=after, epochs=1)
    own = [record.numbers for record in halrp.ledger.records.values()]
    if max_growth is None:
        assert all(record.zeros == 0 for record in halrp.ledger.records.values())
        return
    left = int(max_growth * BASE)
    for used, task in zip(own, range(1, count), strict=True):
        part = left // (count - task if known else 2)
        most = FIXED + halrp.ledger.records[task].dense
        assert used <= part
        assert used >= min(part, most) - 15  # a pruned direction's other half goes with it
        left -= used
    assert max(own) - min(own) <= 30 or not known


@pytest.mark.parametrize("threshold", [0.0, 0.15, 100.0])
def test_the_threshold_prunes_whatever_the_bound(threshold):
    halrp, model = learned(3, max_growth=None, prune_threshold=threshold)
    check(halrp, model)
    values = torch.cat([v for name, v in model.state_dict().items() if name.endswith("_values")])
    assert (values.abs() > threshold).all()
    zeros = [record.zeros for record in halrp.ledger.records.values()]
    assert all(count > 0 for count in zeros) is (threshold > 0)
    if threshold == 100.0:
        assert len(values) == 0
        assert all(torch.isfinite(value).all() for value in outputs(halrp, model, [0, 1, 2]).values())


def test_all_tasks_are_pruned_again_within_the_bound():
    """Each to the same share of its entries, as often as it must be; the records are new then."""
    before = {}

    def after(halrp, model):
        check(halrp, model)
        records = dict(halrp.ledger.records)
        fixed, dense = len(records) * FIXED, sum(record.dense for record in records.values())
        room = int(halrp.max_growth * BASE) - fixed
        for task, record in records.items():
            kept = record.dense - record.zeros
            assert kept <= min(record.dense, room * record.dense // max(dense, 1))
            assert task not in before or record.zeros >= before[task]
            before[task] = record.zeros

    halrp, _ = learned(4, prune="all", max_growth=2.8, approximation_rate=0.9, after=after)
    assert all(record.zeros > 0 for record in halrp.ledger.records.values())


def test_all_tasks_are_pruned_again_to_make_room_for_a_new_one():
    halrp, model = learned(3, prune="all", max_growth=2 * (FIXED + 40) / BASE)
    check(halrp, model)


@pytest.mark.parametrize("prune", ["own", "all"])
def test_old_outputs_under_both_ways_of_pruning(prune):
    seen, changed = {}, set()

    def after(halrp, model):
        now = outputs(halrp, model, halrp.tasks)
        moved = [task for task, value in seen.items() if not torch.equal(value, now[task])]
        changed.update(moved)
        seen.update(now)

    learned(4, prune=prune, max_growth=2.8, approximation_rate=0.9, after=after)
    assert len(changed) == (2 if prune == "all" else 0)


def test_a_saved_model_grows_as_the_records_say():
    sizes, records = [], []

    def after(halrp, model):
        sizes.append((size(model), sum(value.nbytes for value in model.state_dict().values())))
        records.append(halrp.bytes_held)

    learned(4, max_growth=2.6, after=after)
    for (_, start), (_, end), held, more in zip(sizes, sizes[1:], records, records[1:], strict=False):
        assert end - start == more - held
    light, heavy = (learned(3, max_growth=growth) for growth in (2 * (FIXED + 25) / BASE, None))
    saved = sum(r.numbers for r in heavy[0].ledger.records.values()) - sum(
        r.numbers for r in light[0].ledger.records.values()
    )
    assert saved > 50
    assert size(heavy[1]) - size(light[1]) == pytest.approx(8 * saved, rel=0.5)


def test_a_task_that_is_learned_again_keeps_to_its_part():
    model, halrp = network(), LowRankPerturbation(approximation_rate=1.0, max_growth=3.0)
    optimizer = sgd(model)
    for task, remaining in ((0, 3), (1, 2), (2, 1), (1, 1), (0, 1), (2, 1)):
        before = outputs(halrp, model, halrp.tasks) if halrp.tasks else {}
        learn(halrp, model, optimizer, task, seed=task + remaining, remaining=remaining)
        before.pop(task, None)
        assert_same(before, outputs(halrp, model, list(before)))
        counts = numbers(model, halrp.tasks[1:])
        assert counts == {task: record.numbers for task, record in halrp.ledger.records.items()}
        assert halrp.growth <= 3.0


class Wide(nn.Module):
    """A hidden layer of some width, whose given bound is not a round number."""

    def __init__(self, width):
        super().__init__()
        self.first, self.hidden, self.out = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(torch.tanh(self.first(x)))))


def advised(width, remaining):
    """Return a model and the bound that a refusal asks for."""
    model = Wide(width)
    with pytest.raises(ConfigurationError, match=r"max_growth=0\.01 leaves \d+ numbers.*are \d+") as refused:
        LowRankPerturbation(max_growth=0.01).start(model, sgd(model), remaining=remaining)
    return float(re.search(r"give max_growth=([\d.]+) or more", str(refused.value))[1])


@pytest.mark.parametrize("remaining", [2, 4, None])
@pytest.mark.parametrize("width", [5, 11])
def test_a_refusal_gives_a_bound_that_suffices(width, remaining):
    model, bound = Wide(width), advised(width, remaining)
    halrp = LowRankPerturbation(max_growth=bound)
    optimizer = sgd(model)
    halrp.start(model, optimizer, remaining=remaining)
    halrp.finish()
    halrp.start(model, optimizer, remaining=None if remaining is None else remaining - 1, batches=batches(1))
    halrp.finish()
    assert 0 < halrp.growth <= bound


def test_a_refusal_gives_a_bound_that_suffices_for_every_width():
    for width in range(100, 140, 3):
        bound = advised(width, 4)
        model = Wide(width)
        LowRankPerturbation(max_growth=bound).start(model, sgd(model), remaining=4)


class OwnHeads(nn.Module):
    """A model that has its heads itself, of different widths."""

    def __init__(self, widths):
        super().__init__()
        self.hidden, self.task = nn.Linear(6, 6), 0
        self.heads = nn.ModuleList(nn.Linear(6, width) for width in widths)

    def forward(self, x):
        return self.heads[self.task](torch.tanh(self.hidden(x)))


@pytest.mark.parametrize(
    ("widths", "max_growth"),
    [
        ((3, 3, 3), 3.0),
        ((4, 3, 3), 2.6),
        pytest.param((3, 3, 15), 2.0),
    ],
)
def test_heads_of_different_widths_are_counted(widths, max_growth):
    model, halrp = OwnHeads(widths), LowRankPerturbation(max_growth=max_growth)
    optimizer, heads = sgd(model), {task: [f"heads.{task}"] for task in range(3)}
    base = 6 * 7 + 7 * widths[0]
    for task in range(3):
        model.task = task
        with contextlib.suppress(*[ConfigurationError] * (max(widths) > 4)):  # where one is too wide, it may be refused
            learn(halrp, model, optimizer, task, heads=heads, remaining=3 - task)
        assert halrp.ledger.base == base
        assert halrp.growth * base == pytest.approx(sum(numbers(model, halrp.tasks[1:]).values()))
        assert halrp.growth <= max_growth


@pytest.mark.parametrize(
    ("settings", "head"),
    [
        ({}, "7"),
        ({"head": "5"}, "5"),
        ({"include": ["1", "7"]}, "7"),
        pytest.param({"include": ["1", "5"]}, "7"),
    ],
)
def test_the_head_is_the_last_linear_layer(settings, head):
    model, halrp = network(), LowRankPerturbation(max_growth=None, **settings)
    optimizer = sgd(model)
    for task in (0, 1):
        learn(halrp, model, optimizer, task)
    assert {n.split(".")[0] for n, _ in model.named_parameters() if ".tasks.1.weight" in n} == {"2", head}
