"""Review of comparisons and their results: each test says what should hold and, so far, does not."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import cli, folders, gather, plan, readme, reference, request, resources, runner, verify
from benchmarks import compare as comparison
from benchmarks import run as run_module
from benchmarks.board import Board
from benchmarks.files import write_json
from benchmarks.jobs import make_job
from benchmarks.methods import METHODS
from benchmarks.request import Description
from benchmarks.run import run
from benchmarks.settings import InputError
from benchmarks.sources import read_digits
from benchmarks.trace import Session

CPU = torch.device("cpu")
SHORT = {"epochs": "1", "train_limit": "40", "n_experiences": "2"}
QUICK = [word for key, text in SHORT.items() for word in ("--set", f"{key}={text}")]
ONE = ("digits-split", "--methods", "naive", "--seeds", "0", *QUICK)
fails = partial(pytest.mark.xfail, strict=True)


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def described(tmp_path, **entries):
    entries = {"protocols": ["digits-split"], "methods": ["gpm"], "seeds": [0]} | entries
    return request.make_request(Description(**entries), tmp_path / "results", "compare", ())


def from_file(tmp_path, text):
    file = tmp_path / "study.yaml"
    file.write_text("protocols: [digits-split]\nmethods: [gpm]\nseeds: [0]\n" + text)
    return request.merged(request.read_file(file), Description(), file)


def kept(tmp_path, *results):
    for number, own in enumerate(results):
        path = tmp_path / "kept" / str(number) / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**reference.read()[0], **own}))
    return tmp_path / "kept"


@fails(reason="the default of --threads depends on --jobs, and the key on the threads: all is trained again")
def test_more_jobs_find_the_finished_runs(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        keys = {plan.prepare(described(tmp_path, jobs=jobs)).runs[0].folder.key for jobs in (1, 2)}
    finally:
        torch.set_num_threads(before)
    assert len(keys) == 1


@fails(reason="--set gpm.threshold hides --grid threshold; the rows are called 0.9 and 0.95 and are both 0.5")
def test_labels_say_what_was_run_or_the_grid_is_refused(tmp_path):
    with contextlib.suppress(InputError):
        planned = plan.prepare(described(tmp_path, set=["gpm.threshold=0.5"], grid=["threshold=0.9,0.95"]))
        assert all(own.label == f"gpm threshold={own.job.settings.threshold}" for own in planned.runs)


@fails(reason="a grid of one value that is a list becomes two values, and texts with commas fall apart")
@pytest.mark.parametrize(("text", "points"), [("[[0.9, 0.95]]", 1), ("['0.9,0.95', '0.97,0.99']", 2)])
def test_lists_in_a_files_grid_stay_lists(tmp_path, text, points):
    given = from_file(tmp_path, f"grid: {{gpm.threshold: {text}}}")
    assert len(plan.prepare(request.make_request(given, tmp_path / "r", "compare", ())).runs) == points


@fails(reason="PyYAML raises ValueError and RecursionError too: a traceback; a key that is there twice is not seen")
@pytest.mark.parametrize(
    "text",
    ["set: {lr: 2024-02-30}", "jobs: 1" + "0" * 5000, "device: " + "[" * 3000, "set: {epochs: 1, epochs: 3}"],
    ids=["date", "number", "deep", "twice"],
)
def test_whatever_is_wrong_in_a_file_is_an_input_error(tmp_path, text):
    with pytest.raises(InputError):
        from_file(tmp_path, text)


@fails(reason="one file is joined to the other, and then 'two files for all protocols' is an error")
def test_data_on_the_command_line_comes_before_the_files(tmp_path):
    both = request.merged(Description(protocols=["npz-split"], data=["a.npz"]), Description(data=["b.npz"]), tmp_path)
    assert request.make_request(both, tmp_path, "compare", ()).data == {"": Path("b.npz")}


@fails(reason="a worker never holds its own code and versions against the key")
def test_a_worker_of_another_version_refuses_the_run(tmp_path, monkeypatch):
    asked = described(tmp_path, methods=["naive"], set=QUICK[1::2])
    planned = plan.prepare(asked)
    monkeypatch.setattr(resources, "versions", lambda: {"torch": "99"})  # as a machine of a cluster may have
    comparison.carry_out(asked, planned, outcome := comparison.Outcome())
    assert not outcome.done


@fails(
    reason="the images are read again for the runs (another path here, another process with --jobs) and not digested"
)
def test_a_file_that_changes_after_the_key_was_made_is_noticed(tmp_path, mnist_like, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = described(tmp_path, protocols=["npz-split"], methods=["naive"], set=["epochs=1"], data=[mnist_like.name])
    planned = plan.prepare(asked)
    np.savez(mnist_like, **{key: 255 - part if key == "x_train" else part for key, part in np.load(mnist_like).items()})
    comparison.carry_out(asked, planned, outcome := comparison.Outcome())
    assert not outcome.done


@fails(reason="data_digest caches its arguments: images of four protocols stay in memory, and count as each run's peak")
def test_images_of_a_protocol_that_is_done_are_let_go(tmp_path, mnist_like):
    plan.prepare(described(tmp_path, protocols=["npz-split"], methods=["naive"], data=[str(mnist_like)]))
    seen = weakref.ref(plan.load("npz-split", mnist_like))
    plan.load.cache_clear()
    assert seen() is None


@fails(reason="only runs of the same seed are told apart; seed 0 of one code and seed 1 of another make one mean")
@pytest.mark.parametrize(
    "gathering", [partial(gather.study, title="t"), reference.collect], ids=["report", "reference"]
)
def test_runs_of_different_code_are_not_one_row(tmp_path, gathering, monkeypatch):
    monkeypatch.setattr(reference.collect, "__defaults__", (tmp_path / "target",))
    folder = kept(tmp_path, {"seed": 0, "code": "a"}, {"seed": 1, "code": "b"})
    with pytest.raises(InputError):
        gathering([folder])


@fails(reason="a result does not say which images it is of: report, reference and verify cannot see a difference")
def test_a_result_names_its_data():
    job = make_job("digits-split", "naive", 0, CPU, SHORT)
    assert folders.data_digest(read_digits()) in json.dumps(run(job, read_digits()))


@fails(reason="'0 of 0 runs agree with their reference', exit code 0")
def test_verifying_nothing_is_no_success(tmp_path):
    assert call("verify", "digits-split", "--methods", "kfac-merged", "--out", tmp_path).exit_code == 2


@fails(reason="every protocol is handed all of --data, and refuses what is for the others")
def test_verify_takes_data_for_several_protocols(tmp_path, monkeypatch):
    def carry_out(description, out, command):
        plan._check_lists(request.make_request(description, out, command, ()))
        return comparison.Outcome(), None

    monkeypatch.setattr(cli, "carry_out", carry_out)
    names = ("pmnist-bn", "pmnist-logd")
    found = call("verify", *names, *(w for n in names for w in ("--data", f"{n}=x.npz")), "--methods", "naive")
    assert "--data names" not in found.stderr


@fails(reason="verify leaves at the first failed run: no table, and the other protocols are not done")
def test_a_failed_run_leaves_the_verdicts_of_the_others(tmp_path, monkeypatch):
    (own,) = reference.choose(reference.read(), ["digits-split"], ["naive"], [0])
    outcome = comparison.Outcome(done=[(None, own)], failures=[("digits-split ewc seed 0", "boom")])
    planned = plan.Plan((None, None), {}, 1)
    monkeypatch.setattr(cli, "carry_out", lambda *rest: (outcome, planned))
    assert "1 of" in call("verify", "digits-split", "--methods", "naive,ewc", "--out", tmp_path).stdout


@fails(reason="settings are not compared: a reference of other settings 'agrees', or differs without a reason")
def test_verify_sees_other_settings():
    own = reference.choose(reference.read(), ["digits-split"], ["naive"], [])
    now = {**own[0], "hyper_parameters": {**own[0]["hyper_parameters"], "epochs": 99}}
    assert not verify.judge(now, own).agrees


@fails(reason="a diverged run writes NaN, which is no JSON (jq, browsers, pandas' ujson refuse it)")
def test_the_result_of_a_diverged_run_is_json(tmp_path):
    call("compare", *ONE, "--set", "lr=1e30", "--out", tmp_path)
    json.loads(next(tmp_path.rglob("result.json")).read_text(), parse_constant=pytest.fail)


@fails(reason="any OSError counts as the folder's: no traceback, and the advice to give another --out")
def test_a_file_that_a_method_misses_is_not_blamed_on_the_folder(tmp_path, monkeypatch):
    def missing(*rest):
        raise FileNotFoundError(2, "No such file or directory", "prior.pt")

    monkeypatch.setattr(run_module, "run", missing)
    found = call("compare", *ONE, "--out", tmp_path)
    assert "prior.pt" in found.stderr
    assert "--out" not in found.stderr
    assert list(tmp_path.rglob("error.txt"))


@fails(reason="a method that calls sys.exit(0) ends the whole comparison, successfully")
def test_a_method_that_leaves_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "run", lambda *rest: sys.exit(0))
    assert call("compare", *ONE, "--out", tmp_path).exit_code == 1


@fails(reason="whether a run has finished is asked before its lock is taken, not after")
def test_a_run_that_finished_while_its_lock_was_waited_for_is_kept(tmp_path, monkeypatch):
    item = runner.Item("digits-split", "naive", 0, "cpu", SHORT, None, str(tmp_path / "p" / "x"), "k", 1)
    real = runner._alone

    @contextlib.contextmanager
    def late(files):
        write_json(files.result, {"format": 2, "key": "k", "mine": 1})
        with real(files) as free:
            yield free

    monkeypatch.setattr(runner, "_alone", late)
    assert runner.work(item) is None
    assert item.files.read()["mine"] == 1


@fails(reason="only --out itself is tried: everything is trained, then the report cannot be written, exit code 2")
def test_a_report_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "digits-split").write_text("mine")
    assert call("compare", *ONE, "--out", tmp_path).exit_code == 2
    assert not list(tmp_path.rglob("result.json"))


@fails(reason="`report` checks neither its name nor its folder, and gather.py trusts every file: tracebacks")
@pytest.mark.parametrize("what", ["name", "runs", "unwritable", "foreign"])
def test_report_refuses_what_it_cannot_do(tmp_path, what):
    folder = kept(tmp_path, {}, *([{"method": None}] if what == "foreign" else []))
    name = {"name": "../evil", "runs": "runs"}.get(what, "fine")
    found = call("report", folder, "--name", name, "--out", "/proc/x" if what == "unwritable" else tmp_path / "r" / "s")
    assert found.exit_code == 2


@fails(reason="`changed` holds what was typed, also where it is the protocol's own value: `reference` leaves it out")
def test_a_setting_at_its_default_is_not_changed():
    default = str(make_job("digits-split", "naive", 0, CPU, {}).protocol.lr)
    job = make_job("digits-split", "naive", 0, CPU, SHORT | {"lr": default})
    assert run(job, read_digits())["changed"].keys() == SHORT.keys()


@fails(reason="the probe of one process is removed by another: 'cannot be written', exit code 2")
def test_comparisons_that_start_at_once_do_not_trip_over_the_probe(tmp_path, monkeypatch):
    real = Path.touch
    monkeypatch.setattr(Path, "touch", lambda self, *rest: (real(self, *rest), self.unlink()))
    folders.claim(tmp_path, "x")


@fails(reason="fcntl is imported at the top: no run at all on Windows")
def test_without_fcntl_there_is_no_lock_but_a_run():
    code = "import sys; sys.modules['fcntl'] = None; import benchmarks.runner"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


@fails(reason="pickle raises ValueError here (RecursionError and RuntimeError elsewhere): the run fails")
def test_a_checkpoint_that_cannot_be_stored_costs_no_run(tmp_path, monkeypatch):
    plugin = SupervisedPlugin()
    plugin.pointer = ctypes.pointer(ctypes.c_int(1))
    own = type(METHODS["naive"])("naive", "", METHODS["naive"].settings, lambda settings, seed: [plugin])
    monkeypatch.setitem(METHODS, "naive", own)
    run(make_job("digits-split", "naive", 0, CPU, SHORT), read_digits(), session=Session(tmp_path, "key"))


@fails(reason="the watcher and the main thread refresh at once: bars that nobody removes, or a KeyError")
def test_two_refreshes_make_one_bar(tmp_path, monkeypatch):
    own = plan.Planned("naive", make_job("digits-split", "naive", 0, CPU, {}), folders.RunFolder(tmp_path, "k"))
    board = Board([own], 1, console=Console(file=io.StringIO(), force_terminal=True))
    write_json(own.folder.status, dict.fromkeys(("experience", "experiences", "epoch", "epochs"), 1) | {"began": 9e12})
    real = board._progress.add_task
    monkeypatch.setattr(board._progress, "add_task", lambda *a, **k: (time.sleep(0.1), real(*a, **k))[1])
    other = threading.Thread(target=board.refresh)
    other.start()
    board.refresh()
    other.join()
    assert len(board._progress.tasks) == 2


@fails(reason="what a kill leaves beside a result (checkpoint, parts of files) is never removed: hundreds of MB")
def test_a_finished_run_keeps_no_checkpoint(tmp_path):
    call("compare", *ONE, "--out", tmp_path)
    file = next(tmp_path.rglob("result.json"))
    for name in ("checkpoint.pt", ".checkpoint.pt.1.2"):
        (file.parent / name).write_text("")
    call("compare", *ONE, "--out", tmp_path)
    assert not list(file.parent.glob("*checkpoint*"))


@fails(reason="key and format make any file a result: a traceback at every further comparison")
def test_a_result_that_lost_entries_is_damaged(tmp_path):
    own = folders.RunFolder(tmp_path, "k")
    write_json(own.result, {"key": "k", "format": 2})
    assert own.read() is None


@fails(reason="a place without its end swallows all up to the end of the next; alone, it is passed over")
@pytest.mark.parametrize("rest", ["KEEP\n<!-- reference: digits-split -->\n<!-- end of reference -->", "KEEP"])
def test_a_place_without_an_end_is_refused(rest):
    with pytest.raises(InputError):
        readme.fill(f"<!-- reference: digits-split -->\n{rest}", reference.read())
