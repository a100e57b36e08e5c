"""Progress on the terminal, read from the folders of the runs; and the logs of a run."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.board import Board
from benchmarks.folders import RunFolder
from benchmarks.jobs import make_job
from benchmarks.logs import RunLogs
from benchmarks.plan import Planned
from benchmarks.trace import Trace


def planned(tmp_path, method, seed=0):
    import torch

    path = tmp_path / f"{method}{seed}"
    path.mkdir()
    job = make_job("digits-split", method, seed, torch.device("cpu"), {})
    return Planned(method, job, RunFolder(path, "k"))


def status(own, experience, epoch):
    note = {"experience": experience, "experiences": 5}
    own.folder.status.write_text(json.dumps(note | {"epoch": epoch, "epochs": 10}))


def screen():
    return Console(file=io.StringIO(), force_terminal=True, width=160)


def test_runs_done_running_failed_and_the_time_left(tmp_path):
    runs = [planned(tmp_path, method, seed) for method in ("naive", "ewc") for seed in (0, 1)]
    console = screen()
    status(runs[3], 1, 1)  # left by a process that was killed
    with Board(runs, jobs=2, kept=3, console=console) as board:
        assert not runs[3].folder.status.exists()
        status(runs[1], 2, 5)
        status(runs[2], 0, 0)
        runs[3].folder.status.write_text("[1]")  # of something else
        board.ended(runs[0], "naive seed 0: ACC 90.00", seconds=10.0)
        shown = console.file.getvalue()
        assert "4/7" in shown
        assert "2 running" in shown
        assert "digits-split naive seed 1" in shown
        assert "experience 3/5 epoch 5/10" in shown
        assert "digits-split ewc seed 1" not in shown
        # half of naive's 10 s, and two runs of ewc guessed at 10 s each, on two jobs
        assert board.seconds_left({runs[1].folder.path: 0.5}) == pytest.approx((5 + 10 + 10) / 2)
        runs[2].folder.status.unlink()
        board.ended(runs[2], "ewc seed 0: failed: for a reason")
        shown = console.file.getvalue()
        assert "1 failed" in shown
        assert "failed: for a reason" in shown
        assert "5/7" in shown


def test_without_a_terminal_there_is_a_line_for_each_run(tmp_path):
    console = Console(file=io.StringIO(), width=60)
    own = planned(tmp_path, "naive")
    with Board([own], jobs=1, console=console) as board:
        assert board.seconds_left({}) is None
        board.ended(own, "digits-split naive seed 0: ACC 90.00, BWT -1.00, training 1.0 s", seconds=1.0)
    assert console.file.getvalue() == "digits-split naive seed 0: ACC 90.00, BWT -1.00, training 1.0 s\n"


TRACE = Trace(
    matrix=[[90.0, 50.0], [80.0, 95.0]],
    losses=[[0.25, 1.5], [0.5, 0.125]],
    experiences=[{"epochs": [[1.0, 60.0], [0.5, 80.0]]}, {"epochs": [[0.75, 70.0], [0.25, 90.0]]}],
)


@pytest.mark.parametrize("task_labels", [True, False])
def test_logs_hold_every_figure(tmp_path, task_labels):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "old.csv").write_text("of an earlier session")
    logs = RunLogs(tmp_path, TRACE, task_labels=task_labels)
    logs.add(0)
    logs.add(1)
    logs.close()
    training = list(csv.DictReader((tmp_path / "csv" / "training_results.csv").open()))
    assert [(r["training_exp"], r["epoch"], r["training_accuracy"], r["training_loss"]) for r in training] == [
        ("0", "0", "0.6000", "1.0000"),
        ("0", "1", "0.8000", "0.5000"),
        ("1", "0", "0.7000", "0.7500"),
        ("1", "1", "0.9000", "0.2500"),
    ]
    evaluation = list(csv.DictReader((tmp_path / "csv" / "eval_results.csv").open()))
    columns = ("eval_exp", "training_exp", "eval_accuracy", "eval_loss", "forgetting")
    assert [tuple(row[column] for column in columns) for row in evaluation] == [
        ("0", "0", "0.9000", "0.2500", "0.0000"),
        ("1", "0", "0.5000", "1.5000", "0.0000"),
        ("0", "1", "0.8000", "0.5000", "0.1000"),
        ("1", "1", "0.9500", "0.1250", "0.0000"),
    ]
    assert not (tmp_path / "csv" / "old.csv").exists()
    scalars = read_scalars(tmp_path / "tensorboard")
    second = "Task001" if task_labels else "Task000"
    assert scalars[f"Top1_Acc_Exp/eval_phase/test_stream/{second}/Exp001"] == [(0, 0.5), (1, 0.95)]
    assert scalars["ExperienceForgetting/eval_phase/test_stream/Task000/Exp000"] == [(1, 0.1)]
    assert scalars["Top1_Acc_Stream/eval_phase/test_stream"] == [(0, 0.7), (1, 0.875)]
    assert scalars["Loss_Epoch/train_phase/train_stream/Task000"][:2] == [(0, 1.0), (1, 0.5)]


def read_scalars(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, round(event.value, 6)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_weights_and_biases_get_the_same_figures(tmp_path, monkeypatch):
    """Offline: the run's file is on the disk and closed."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"project": "p", "name": "n", "id": "abc", "config": {"lr": 0.1}}
    logs = RunLogs(tmp_path, TRACE, task_labels=True, wandb=settings)
    seen = []
    real = logs._wandb.log

    def log(values, **rest):
        seen.append((values, rest))
        real(values, **rest)

    monkeypatch.setattr(logs._wandb, "log", log)
    logs.add(0)
    logs.add(1)
    logs.close()
    assert ({"Top1_Acc_Stream/eval_phase/test_stream": 0.875}, {"step": 4}) in seen
    steps = [rest["step"] for _, rest in seen]
    assert steps == sorted(steps)  # smaller ones would be dropped
    assert list((tmp_path / "wandb").glob("offline-run-*-abc/*.wandb"))
