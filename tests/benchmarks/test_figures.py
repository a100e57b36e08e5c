"""The figures against numbers worked out by hand, and evaluation against a loop over single samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import evaluate
from benchmarks.orders import permutations
from benchmarks.record import Normalisation
from benchmarks.report.terminal import Cell, one_line, rich_table, rows
from benchmarks.sampling import Sampling
from benchmarks.streams import permute, split_by_class

MATRIX = [
    [90.0, 12.0, 8.0],
    [70.0, 80.0, 10.0],
    [75.0, 50.0, 60.0],
]


def test_figures_of_a_matrix_worked_out_by_hand():
    assert evaluate.average_accuracy(MATRIX) == pytest.approx((75 + 50 + 60) / 3)
    assert evaluate.backward_transfer(MATRIX) == pytest.approx(((75 - 90) + (50 - 80)) / 2)
    assert evaluate.forgetting(MATRIX) == pytest.approx(((90 - 75) + (80 - 50)) / 2)


def test_forgetting_counts_from_the_best_row():
    later_better = [[50.0, 0.0, 0.0], [70.0, 60.0, 0.0], [40.0, 60.0, 90.0]]
    assert evaluate.backward_transfer(later_better) == pytest.approx((-10 + 0) / 2)
    assert evaluate.forgetting(later_better) == pytest.approx((30 + 0) / 2)


@pytest.mark.parametrize("matrix", [[[80.0]], [[80.0, 70.0, 60.0]]])
def test_without_earlier_rows_there_is_no_transfer(matrix):
    assert evaluate.backward_transfer(matrix) is None
    assert evaluate.forgetting(matrix) is None


def test_accuracies_equal_a_loop_over_single_samples(images):
    stream = permute(images, permutations(3, 20, 0), Normalisation(), Sampling())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 4), nn.Dropout(0.5))
    model.train()
    state = torch.get_rng_state()
    got, _ = evaluate.scores(model, stream, 5, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model[2].training
    for value, dataset in zip(got, stream.test, strict=True):
        correct = sum(
            int((model[1].weight @ image.reshape(-1) + model[1].bias).argmax()) == label
            for image, label in (dataset[i] for i in range(len(dataset)))
        )
        assert value == pytest.approx(100 * correct / len(dataset))


def test_mean_loss_weighs_samples_not_batches(images):
    stream = split_by_class(images, [[0, 1, 2, 3]], Normalisation(), Sampling(), labels="class")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 4))
    x, y = stream.test[0].as_tensors()
    wanted = nn.functional.cross_entropy(model(x), y).item()
    assert evaluate.mean_loss(model, stream.test[0], 0, 5, "cpu") == pytest.approx(wanted, rel=1e-6)


def test_table_cells_hold_mean_and_sample_deviation():
    base = {"method": "naive", "train_seconds": 1.0, "peak_memory_mb": None, "peak_memory_kind": "unavailable"}
    results = [base | {"acc": acc, "bwt": None} for acc in (90.0, 92.0, 97.0)]
    naive, missing = rows(results, ["naive", "ewc"])
    assert naive.cells[0] == Cell(pytest.approx(93.0), pytest.approx(13**0.5), 2)
    assert str(naive.cells[0]) == "93.00 ± 3.61"
    assert [str(cell) for cell in naive.cells[1:]] == ["-", "1.00 ± 0.00", "-"]
    assert (missing.seeds, [str(cell) for cell in missing.cells]) == (0, ["-"] * 4)


def test_growth_has_a_column_where_a_method_grows():
    base = {"train_seconds": 1.0, "peak_memory_mb": None, "peak_memory_kind": "unavailable", "acc": 90.0, "bwt": None}
    naive = [base | {"method": "naive", "growth": None}]
    grown = [base | {"method": "halrp", "growth": growth} for growth in (0.15, 0.25)]
    headers = ["method", "seeds", "ACC %", "BWT %", "training s", "memory MiB"]
    assert [column.header for column in rich_table("p", rows(naive, ["naive"])).columns] == headers
    table = rich_table("p", rows(naive + grown, ["naive", "halrp"]))
    assert [column.header for column in table.columns] == [*headers, "growth"]
    assert list(table.columns[-1].cells) == ["-", "0.200 ± 0.071"]
    keeps = [{**grown[0], "bytes_held": 1500}, {**grown[1], "bytes_held": 2500}]
    table = rich_table("p", rows(naive + keeps, ["naive", "halrp"]))
    assert [column.header for column in table.columns] == [*headers, "growth", "held kB"]
    assert list(table.columns[-1].cells) == ["-", "2.0 ± 0.7"]
    assert "growth" not in one_line(naive[0])
    assert "growth 0.150" in one_line(grown[0])
