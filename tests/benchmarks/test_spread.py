"""The spread over orders of the tasks, against numbers worked out by hand, and what cannot be compared."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.settings import InputError
from benchmarks.spread import read, spreads

#: Order -> groups of the experiences, and final accuracies of two seeds in the order of the experiences.
RUNS = {
    "A": ([0, 1, 2], [[80.0, 60.0, 40.0], [90.0, 60.0, 50.0]]),
    "B": ([2, 0, 1], [[41.0, 88.0, 70.0], [45.0, 92.0, 74.0]]),
    "C": ([1, 2, 0], [[62.0, 30.0, 86.0], [66.0, 30.0, 84.0]]),
}


def write(folder, method="naive", orders="ABC", seeds=(0, 1), **changes):
    folder.mkdir(exist_ok=True)
    for order in orders:
        groups, rows = RUNS[order]
        for seed in seeds:
            result = {
                "protocol": "cifar100-halrp",
                "method": method,
                "seed": seed,
                "hyper_parameters": {"epochs": 20, "task_order": order} | changes,
                "accuracy_matrix": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], rows[seed]],
                "task_order": order,
                "experience_groups": groups,
            }
            (folder / f"{method}-{order}-{seed}.json").write_text(json.dumps(result))
    return folder


def test_spread_worked_out_by_hand(tmp_path):
    """Means over seeds of groups 0, 1, 2: A 85, 60, 45; B 90, 72, 43; C 85, 64, 30. Disparities 5, 12, 15."""
    (found,) = spreads(read([write(tmp_path)]))
    assert (found.protocol, found.method, found.seeds) == ("cifar100-halrp", "naive", 2)
    assert dict(found.accuracies) == pytest.approx({"A": 190 / 3, "B": 205 / 3, "C": 179 / 3})
    assert found.mean == pytest.approx((190 + 205 + 179) / 9)
    assert found.aopd == pytest.approx(32 / 3)
    assert found.mopd == pytest.approx(15)


def test_folders_and_methods_are_joined(tmp_path):
    folders = [write(tmp_path / order, orders=order) for order in "AB"]
    write(tmp_path / "A", "gpm", "AC")
    naive, gpm = spreads(read(folders), ["naive", "gpm"])
    assert (naive.method, naive.aopd, naive.mopd) == ("naive", pytest.approx((5 + 12 + 2) / 3), pytest.approx(12))
    assert (gpm.method, set(gpm.accuracies), gpm.mopd) == ("gpm", {"A", "C"}, pytest.approx(15))


def test_the_command_prints_a_row_for_each_method(tmp_path):
    write(tmp_path, "gpm", "AB")
    result = CliRunner().invoke(app, ["spread", str(write(tmp_path))], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["naive", "2", "63.33", "68.33", "59.67", "63.78", "10.67", "15.00"] in rows
    assert ["gpm", "2", "63.33", "68.33", "-", "65.83", "6.33", "12.00"] in rows


def wrong(folder, case):
    """Make runs that cannot be compared."""
    if case == "one order":
        write(folder, orders="A")
    elif case == "a seed is missing":
        write(folder, orders="A")
        write(folder, orders="B", seeds=(1,))
    elif case == "other settings":
        write(folder, orders="A")
        write(folder, orders="B", epochs=19)
    elif case == "the same run twice":
        write(folder)
        (folder / "copy.json").write_text((folder / "naive-A-0.json").read_text())
    else:
        write(folder)
        file = folder / "naive-B-0.json"
        result = json.loads(file.read_text())
        if case == "no order":
            result |= {"protocol": "pmnist-halrp", "task_order": None, "experience_groups": None}
        elif case == "another protocol":
            result["protocol"] = "cifar100-superclass-halrp"
        elif case == "other groups":
            for seed in (0, 1):
                other = json.loads((folder / f"naive-B-{seed}.json").read_text()) | {"experience_groups": [7, 0, 1]}
                (folder / f"naive-B-{seed}.json").write_text(json.dumps(other))
            return
        elif case == "no run":
            result = {"acc": 3}
        file.write_text("{" if case == "no JSON" else json.dumps(result))


CASES = {
    "one order": ["naive", "task_order A alone", "at least two"],
    "a seed is missing": ["naive: order B lacks seed 0"],
    "other settings": ["naive: epochs is 20", "and 19 in", "only task_order and seed may differ"],
    "the same run twice": ["second run of order A, seed 0"],
    "no order": ["naive-B-0.json: pmnist-halrp has no task_order"],
    "another protocol": ["protocol is 'cifar100-halrp' in", "'cifar100-superclass-halrp'", "one protocol"],
    "other groups": ["order A has the groups of classes [0, 1, 2] and order B [0, 1, 7]"],
    "no run": ["naive-B-0.json is not the file of a run", "'protocol'"],
    "no JSON": ["naive-B-0.json is not readable as JSON"],
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_compared_is_refused(tmp_path, case):
    wrong(tmp_path, case)
    with pytest.raises(InputError) as caught:
        spreads(read([tmp_path]))
    for fragment in CASES[case]:
        assert fragment in str(caught.value)


def test_folders_without_runs_and_unknown_methods_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, fragment in (
        ([str(tmp_path / "empty")], "holds no JSON file"),
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(write(tmp_path / "runs")), "--methods", "naiv"], "unknown method 'naiv'"),
    ):
        result = CliRunner().invoke(app, ["spread", *arguments])
        assert result.exit_code == 2
        assert fragment in result.stderr
        assert result.stderr.count("\n") == 1
