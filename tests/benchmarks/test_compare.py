"""Comparisons: runs are kept, found again, go on after a kill, and fail alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import backends, runner
from benchmarks import run as run_module
from benchmarks.backends import Failure
from benchmarks.folders import NEEDED
from benchmarks.report import writing
from benchmarks.trace import FORMAT
from tests.benchmarks.comparing import QUICK, compare, counting, results

ROOT = Path(__file__).parents[2]


def test_finished_runs_are_never_repeated(tmp_path, monkeypatch):
    done = counting(monkeypatch)
    compare(tmp_path, "digits-split", "--methods", "naive", "--seeds", "0,1", *QUICK)
    assert len(done) == 2
    before = results(tmp_path)
    result = compare(tmp_path, "digits-split", "--methods", "naive,replay", "--seeds", "0,1,2", *QUICK)
    assert done[2:] == [("digits-split", m, s) for s, m in ((0, "replay"), (1, "replay"), (2, "naive"), (2, "replay"))]
    assert "2 of 6 runs had finished before and are kept" in result.stderr
    assert before.items() <= results(tmp_path).items()
    # another comparison, with its own report, finds the same runs
    compare(tmp_path, "digits-split", "--methods", "replay", "--seeds", "2", "--name", "mine", *QUICK)
    assert len(done) == 6
    assert "| replay | 1 |" in (tmp_path / "results" / "mine" / "table.md").read_text()


@pytest.mark.parametrize("change", ["code", "versions", "data", "settings", "damage"])
def test_what_determines_a_result_makes_it_another_run(tmp_path, monkeypatch, change):
    done = counting(monkeypatch)
    command = ["digits-split", "--methods", "naive", "--seeds", "0", *QUICK]
    compare(tmp_path, *command)
    (name,) = results(tmp_path)
    if change == "code":
        monkeypatch.setattr("benchmarks.folders.code_digest", lambda: "other")
    elif change == "versions":
        monkeypatch.setattr("benchmarks.resources.versions", lambda: {"torch": "99"})
    elif change == "data":
        for user in ("plan", "runner"):
            monkeypatch.setattr(f"benchmarks.{user}.data_digest", lambda data: "other")
    elif change == "settings":
        command += ["--set", "lr=0.2"]
    else:
        (file,) = (tmp_path / "results").rglob("result.json")
        file.write_text(file.read_text()[:100])
    compare(tmp_path, *command)
    assert len(done) == 2
    if change != "damage":
        assert name in results(tmp_path)
    assert len(list((tmp_path / "results" / "runs").rglob("result.json"))) == (1 if change == "damage" else 2)


def test_results_of_another_version_are_kept_and_never_mixed(tmp_path):
    mark = tmp_path / "results" / "runs" / "format.json"
    mark.parent.mkdir(parents=True)
    mark.write_text('{"format": 77}')
    result = compare(tmp_path, "digits-split", "--methods", "naive", "--seeds", "0", *QUICK, code=2)
    assert "format 77" in result.stderr
    assert "give another folder" in result.stderr
    assert [file.name for file in (tmp_path / "results").rglob("*")] == ["runs", "format.json"]


def test_a_failing_run_leaves_the_others(tmp_path, monkeypatch):
    real = run_module.run

    def run(job, *rest):
        if job.method == "ewc":
            raise ValueError("two\nlines")
        return real(job, *rest)

    monkeypatch.setattr(run_module, "run", run)
    command = ("digits-split", "--methods", "naive,ewc,replay", "--seeds", "0", *QUICK)
    result = compare(tmp_path, *command, code=1)
    assert sorted(name.split("-")[0] for name in results(tmp_path)) == ["naive", "replay"]
    assert "ValueError: two lines" in result.stderr
    (trace,) = (tmp_path / "results" / "runs").rglob("error.txt")
    assert "Traceback" in trace.read_text()
    assert "in run" in trace.read_text()
    for file in ("table.md", "report.html"):
        assert "ValueError: two lines" in (tmp_path / "results" / "digits-split" / file).read_text()
    monkeypatch.undo()
    compare(tmp_path, *command)
    assert not trace.exists()
    assert len(results(tmp_path)) == 3


def test_an_interruption_keeps_what_finished_and_writes_a_report(tmp_path, monkeypatch):
    real = run_module.run

    def run(job, *rest):
        if job.method == "replay":
            raise KeyboardInterrupt
        return real(job, *rest)

    monkeypatch.setattr(run_module, "run", run)
    result = compare(tmp_path, "digits-split", "--methods", "naive,replay", "--seeds", "0", *QUICK, code=130)
    assert "interrupted" in result.stderr
    assert [name.split("-")[0] for name in results(tmp_path)] == ["naive"]
    assert "| naive | 1 |" in (tmp_path / "results" / "digits-split" / "table.md").read_text()


def test_a_grid_gives_a_row_for_each_point_and_runs_nothing_twice(tmp_path, monkeypatch):
    done = counting(monkeypatch)
    grid = ("--grid", "gpm.threshold=0.9,0.99", "--grid", "gpm.n_samples=30,40")
    compare(tmp_path, "digits-split", "--methods", "naive,gpm", "--seeds", "0", *grid, *QUICK)
    assert [method for _, method, _ in done] == ["naive", "gpm", "gpm", "gpm", "gpm"]
    text = (tmp_path / "results" / "digits-split" / "table.md").read_text()
    for threshold in ("0.9", "0.99"):
        for samples in (30, 40):
            assert f"gpm threshold={threshold} n_samples={samples}" in text
    found = {
        (r["hyper_parameters"]["threshold"], r["hyper_parameters"]["n_samples"])
        for r in results(tmp_path).values()
        if r["method"] == "gpm"
    }
    assert found == {(0.9, 30), (0.9, 40), (0.99, 30), (0.99, 40)}


def test_a_value_written_in_two_ways_is_refused(tmp_path, monkeypatch):
    """Two rows of the same runs would count as two methods in the tests."""
    done = counting(monkeypatch)
    command = ("digits-split", "--methods", "gpm", "--seeds", "0", "--grid", "gpm.threshold=0.9,0.90", *QUICK)
    result = compare(tmp_path, *command, "--set", "n_samples=20", code=2)
    for fragment in ("gpm threshold=0.9", "gpm threshold=0.90", "give every value once"):
        assert fragment in result.stderr
    assert not done
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_report_that_cannot_be_written_takes_the_place_of_nothing(tmp_path, monkeypatch, interrupted):
    """Failures are told and the exit code is theirs, not that of bad input; the runs are there."""
    real = run_module.run

    def run(job, *rest):
        if job.method == "replay":
            raise KeyboardInterrupt if interrupted else ValueError("boom")
        return real(job, *rest)

    def full(*rest, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "run", run)
    monkeypatch.setattr(writing, "write", full)
    command = ("digits-split", "--methods", "naive,replay", "--seeds", "0", *QUICK)
    result = compare(tmp_path, *command, code=130 if interrupted else 1)
    assert "the runs are kept, but no report: no space is left" in result.stderr
    assert ("interrupted" if interrupted else "failed: digits-split replay seed 0: ValueError: boom") in result.stderr
    assert [name.split("-")[0] for name in results(tmp_path)] == ["naive"]


def test_the_last_words_of_a_worker_are_kept(tmp_path, monkeypatch):
    def execute(work, items, options):
        yield 0, Failure("worker died", "its process ended with signal 9", "Killed: last words")

    monkeypatch.setattr(backends, "execute", execute)
    result = compare(tmp_path, "digits-split", "--methods", "naive", "--seeds", "0", *QUICK, code=1)
    (file,) = (tmp_path / "results" / "runs").rglob("error.txt")
    assert file.read_text() == "Killed: last words"
    assert "signal 9" in result.stderr
    assert "error.txt" in "".join(result.stderr.split())


def test_without_an_extra_the_advice_is_to_install_it():
    """As a plain installation of the package is: without what the command line is made with."""
    code = (
        "import sys, runpy; sys.modules['typer'] = None\n"
        "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == "error: typer is not installed: pip install 'avalanche-gradproj[benchmarks]'\n"


def test_settings_of_one_method_or_protocol_alone(tmp_path):
    settings = ("--set", "epochs=1", "--set", "replay.epochs=2", "--set", "digits-permuted.n_experiences=3")
    compare(
        tmp_path, "digits-split", "digits-permuted", "--methods", "naive,replay", "--seeds", "0", *settings,
        "--set", "train_limit=40", "--set", "digits-split.n_experiences=2",
    )  # fmt: skip
    found = {
        (r["protocol"], r["method"]): (r["hyper_parameters"]["epochs"], len(r["accuracy_matrix"]))
        for r in results(tmp_path).values()
    }
    assert found == {
        ("digits-split", "naive"): (1, 2),
        ("digits-split", "replay"): (2, 2),
        ("digits-permuted", "naive"): (1, 3),
        ("digits-permuted", "replay"): (2, 3),
    }


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, monkeypatch):
    command = ("digits-split", "--methods", "naive,replay", "--seeds", "0", *QUICK)
    real = runner.write_json

    def full(path, result):
        if result["method"] == "replay":
            raise OSError(28, "No space left on device")
        real(path, result)

    monkeypatch.setattr(runner, "write_json", full)
    result = compare(tmp_path, *command, code=1)
    assert "no space is left" in result.stderr
    assert "repeat the command" in result.stderr
    assert [name.split("-")[0] for name in results(tmp_path)] == ["naive"]
    assert list((tmp_path / "results").rglob("checkpoint.pt"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "results").write_text("mine")
    result = compare(tmp_path, "digits-split", "--methods", "naive", "--seeds", "0", *QUICK, code=2)
    assert "--out" in result.stderr
    assert (tmp_path / "results").read_text() == "mine"


def test_two_processes_do_not_do_the_same_run(tmp_path):
    """The second waits for the first, and takes its result."""
    folder = tmp_path / "results" / "runs" / "digits-split" / "x"
    folder.mkdir(parents=True)
    item = runner.Item("digits-split", "naive", 0, "cpu", {}, None, str(folder), "k", 1)
    code = f"from benchmarks.runner import *; print('begun', flush=True); print(work({item!r}))"
    with runner._alone(item.files):
        other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "begun\n"
        time.sleep(1.5)
        assert other.poll() is None
        result = dict.fromkeys(NEEDED, 1) | {"key": "k", "format": FORMAT}
        item.files.result.write_text(json.dumps(result))
    assert other.communicate(timeout=60)[0] == "None\n"
    assert json.loads(item.files.result.read_text()) == result


def test_a_missing_shared_folder_is_named(tmp_path):
    item = runner.Item("digits-split", "naive", 0, "cpu", {}, None, str(tmp_path / "a" / "b" / "c"), "k", 1)
    assert "share" in runner.work(item)
    assert not (tmp_path / "a").exists()


def test_a_killed_process_goes_on_with_the_same_result(tmp_path):
    """Killed for good (SIGKILL) in the middle of its third experience, in another process."""
    settings = ["--set", "train_limit=300", "--set", "epochs=20", "--set", "n_experiences=4"]
    command = ["digits-permuted", "--methods", "agem", "--seeds", "0", *settings, "--threads", "1"]
    start = [sys.executable, "-m", "benchmarks", "compare", *command, "--out", str(tmp_path / "results")]
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            notes = list((tmp_path / "results").rglob("status.json"))
            if notes and json.loads(notes[0].read_text())["experience"] == 2:
                break
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert list((tmp_path / "results").rglob("checkpoint.pt"))
    assert not list((tmp_path / "results").rglob("result.json"))
    compare(tmp_path, *command)
    compare(tmp_path / "whole", *command)
    ((_, resumed),) = results(tmp_path).items()
    ((_, whole),) = results(tmp_path / "whole").items()
    assert (resumed["sessions"], whole["sessions"]) == (2, 1)
    for key in ("accuracy_matrix", "loss_matrix", "initial_accuracies", "key"):
        assert resumed[key] == whole[key]
    assert [e["epochs"] for e in resumed["experiences"]] == [e["epochs"] for e in whole["experiences"]]
    folders = [next((path / "results" / "runs").rglob("csv")) for path in (tmp_path, tmp_path / "whole")]
    for name in ("training_results.csv", "eval_results.csv"):
        assert (folders[0] / name).read_text() == (folders[1] / name).read_text()
    assert not list((tmp_path / "results").rglob("checkpoint.pt"))
    assert not list((tmp_path / "results").rglob("status.json"))
