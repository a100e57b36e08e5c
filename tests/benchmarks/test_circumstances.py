"""Comparisons under awkward circumstances: other versions and data, foreign files, kills, divergence, two at once."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
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

from benchmarks import cli, folders, gather, plan, readme, reference, request, resources, runner, study_file, verify
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
from tests.processes import run_to_end

CPU = torch.device("cpu")
SHORT = {"epochs": "1", "train_limit": "40", "n_experiences": "2"}
QUICK = [word for key, text in SHORT.items() for word in ("--set", f"{key}={text}")]
ONE = ("digits-split", "--methods", "naive", "--seeds", "0", *QUICK)


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def described(tmp_path, **entries):
    entries = {"protocols": ["digits-split"], "methods": ["gpm"], "seeds": [0]} | entries
    return request.make_request(Description(**entries), tmp_path / "results", "compare", ())


def from_file(tmp_path, text):
    file = tmp_path / "study.yaml"
    file.write_text("protocols: [digits-split]\nmethods: [gpm]\nseeds: [0]\n" + text)
    return request.merged(study_file.read_file(file), Description(), file)


def kept(tmp_path, *results):
    for number, own in enumerate(results):
        path = tmp_path / "kept" / str(number) / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**reference.read()[0], **own}))
    return tmp_path / "kept"


def test_more_jobs_find_the_finished_runs(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        keys = {plan.prepare(described(tmp_path, jobs=jobs)).runs[0].folder.key for jobs in (1, 2)}
    finally:
        torch.set_num_threads(before)
    assert len(keys) == 1


def test_labels_say_what_was_run_or_the_grid_is_refused(tmp_path):
    with contextlib.suppress(InputError):
        planned = plan.prepare(described(tmp_path, set=["gpm.threshold=0.5"], grid=["threshold=0.9,0.95"]))
        assert all(own.label == f"gpm threshold={own.job.settings.threshold}" for own in planned.runs)


@pytest.mark.parametrize(("text", "points"), [("[[0.9, 0.95]]", 1), ("['0.9,0.95', '0.97,0.99']", 2)])
def test_lists_in_a_files_grid_stay_lists(tmp_path, text, points):
    given = from_file(tmp_path, f"grid: {{gpm.threshold: {text}}}")
    assert len(plan.prepare(request.make_request(given, tmp_path / "r", "compare", ())).runs) == points


@pytest.mark.parametrize("what", ["date", "number", "deep", "twice"])
def test_whatever_is_wrong_in_a_file_is_an_input_error(tmp_path, what):
    texts = {"date": "set: {lr: 2024-02-30}", "number": "jobs: 1" + "0" * 5000, "deep": "device: " + "[" * 3000}
    with pytest.raises(InputError):
        from_file(tmp_path, texts.get(what, "set: {epochs: 1, epochs: 3}"))


def test_data_on_the_command_line_comes_before_the_files(tmp_path):
    both = request.merged(Description(protocols=["npz-split"], data=["a.npz"]), Description(data=["b.npz"]), tmp_path)
    assert request.make_request(both, tmp_path, "compare", ()).data == {"": Path("b.npz")}


def test_a_worker_of_another_version_refuses_the_run(tmp_path, monkeypatch):
    asked = described(tmp_path, methods=["naive"], set=QUICK[1::2])
    planned = plan.prepare(asked)
    monkeypatch.setattr(resources, "versions", lambda: {"torch": "99"})  # as a machine of a cluster may have
    comparison.carry_out(asked, planned, outcome := comparison.Outcome())
    assert not outcome.done


def test_a_file_that_changes_after_the_key_was_made_is_noticed(tmp_path, mnist_like, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = described(tmp_path, protocols=["npz-split"], methods=["naive"], set=["epochs=1"], data=[mnist_like.name])
    planned = plan.prepare(asked)
    np.savez(mnist_like, **{key: 255 - part if key == "x_train" else part for key, part in np.load(mnist_like).items()})
    comparison.carry_out(asked, planned, outcome := comparison.Outcome())
    assert len(outcome.done) == 1  # of the images that the key was made from, which are still in memory
    (planned.runs[0].folder.path / "result.json").unlink()
    plan.load.cache_clear()  # another process reads the file anew
    comparison.carry_out(asked, planned, outcome := comparison.Outcome())
    assert not outcome.done
    assert "other code, versions or data" in outcome.failures[0][1]


def test_images_of_a_protocol_that_is_done_are_let_go(tmp_path, mnist_like):
    plan.prepare(described(tmp_path, protocols=["npz-split"], methods=["naive"], data=[str(mnist_like)]))
    seen = weakref.ref(plan.load("npz-split", mnist_like))
    plan.load.cache_clear()
    assert seen() is None


@pytest.mark.parametrize("gathering", [partial(gather.study, title="t"), reference.collect], ids=["report", "kept"])
def test_runs_of_different_code_are_not_one_row(tmp_path, gathering, monkeypatch):
    monkeypatch.setattr(reference.collect, "__defaults__", (tmp_path / "target",))
    folder = kept(tmp_path, {"seed": 0, "code": "a"}, {"seed": 1, "code": "b"})
    with pytest.raises(InputError):
        gathering([folder])


def test_a_result_names_its_data():
    job = make_job("digits-split", "naive", 0, CPU, SHORT)
    assert folders.data_digest(read_digits()) in json.dumps(run(job, read_digits()))


def test_verifying_nothing_is_no_success(tmp_path):
    assert call("verify", "digits-split", "--methods", "kfac-merged", "--out", tmp_path).exit_code == 2


def test_verify_takes_data_for_several_protocols(tmp_path, monkeypatch):
    def carry_out(description, out, command):
        plan._check_lists(request.make_request(description, out, command, ()))
        return comparison.Outcome(), None

    monkeypatch.setattr(cli, "carry_out", carry_out)
    names = ("pmnist-bn", "pmnist-logd")
    found = call("verify", *names, *(w for n in names for w in ("--data", f"{n}=x.npz")), "--methods", "naive")
    assert "--data names" not in found.stderr


def test_a_failed_run_leaves_the_verdicts_of_the_others(tmp_path, monkeypatch):
    (own,) = reference.choose(reference.read(), ["digits-split"], ["naive"], [0])
    outcome = comparison.Outcome(done=[(None, own)], failures=[("digits-split ewc seed 0", "boom")])
    planned = plan.Plan((None, None), {}, 1)
    monkeypatch.setattr(cli, "carry_out", lambda *rest, **options: (outcome, planned))
    assert "1 of" in call("verify", "digits-split", "--methods", "naive,ewc", "--out", tmp_path).stdout


def test_verify_sees_other_settings():
    own = reference.choose(reference.read(), ["digits-split"], ["naive"], [])
    now = {**own[0], "hyper_parameters": {**own[0]["hyper_parameters"], "epochs": 99}}
    assert not verify.judge(now, own).agrees


@pytest.mark.parametrize(
    ("now", "then", "same"),
    [
        ({"lr": 0.1, "strength": 2.0}, {"lr": 0.1, "strength": 2.0}, True),
        ({"lr": 0.1, "strength": 2.0, "refresh_every": 1}, {"lr": 0.1, "strength": 2.0}, True),  # came later
        ({"lr": 0.1, "strength": 2.0, "refresh_every": 4}, {"lr": 0.1, "strength": 2.0}, False),
        ({"lr": 0.1, "eigenbasis": False}, {"lr": 0.1}, True),
        ({"lr": 0.1, "eigenbasis": True}, {"lr": 0.1}, False),
        ({"lr": 0.1, "reset_optimizer": False}, {"lr": 0.1}, True),
        ({"lr": 0.1, "reset_optimizer": True}, {"lr": 0.1}, False),
        ({"lr": 0.1, "strength": 1.0}, {"lr": 0.1}, False),
        ({"lr": 0.1, "strength": 1.0}, {"lr": 0.1, "strength": 2.0}, False),
        ({"lr": 0.1, "epochs": 1}, {"lr": 0.1}, False),
        ({"lr": 0.1}, {"lr": 0.1, "gone": 1}, False),
    ],
)
def test_settings_that_came_after_a_reference_have_to_be_at_their_defaults(now, then, same):
    assert verify.same_settings(now, then) is same


def test_the_result_of_a_diverged_run_is_json(tmp_path):
    call("compare", *ONE, "--set", "lr=1e30", "--out", tmp_path)
    json.loads(next(tmp_path.rglob("result.json")).read_text(), parse_constant=pytest.fail)


def test_a_file_that_a_method_misses_is_not_blamed_on_the_folder(tmp_path, monkeypatch):
    def missing(*rest):
        raise FileNotFoundError(2, "No such file or directory", "prior.pt")

    monkeypatch.setattr(run_module, "run", missing)
    found = call("compare", *ONE, "--out", tmp_path)
    assert "prior.pt" in found.stderr
    assert "--out" not in found.stderr
    assert list(tmp_path.rglob("error.txt"))


def test_a_method_that_leaves_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "run", lambda *rest: sys.exit(0))
    assert call("compare", *ONE, "--out", tmp_path).exit_code == 1


def test_a_run_that_finished_while_its_lock_was_waited_for_is_kept(tmp_path, monkeypatch):
    item = runner.Item("digits-split", "naive", 0, "cpu", SHORT, None, str(tmp_path / "p" / "x"), "k", 1)
    real = runner._alone

    @contextlib.contextmanager
    def late(files):
        write_json(files.result, dict.fromkeys(folders.NEEDED, 0) | {"format": 2, "key": "k", "mine": 1})
        with real(files) as free:
            yield free

    monkeypatch.setattr(runner, "_alone", late)
    assert runner.work(item) is None
    assert item.files.read()["mine"] == 1


def test_a_report_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "digits-split").write_text("mine")
    assert call("compare", *ONE, "--out", tmp_path).exit_code == 2
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("what", ["name", "runs", "unwritable", "foreign"])
def test_report_refuses_what_it_cannot_do(tmp_path, what):
    folder = kept(tmp_path, {}, *([{"method": None}] if what == "foreign" else []))
    name = {"name": "../evil", "runs": "runs"}.get(what, "fine")
    found = call("report", folder, "--name", name, "--out", "/proc/x" if what == "unwritable" else tmp_path / "r" / "s")
    assert found.exit_code == 2


def test_a_setting_at_its_default_is_not_changed():
    default = str(make_job("digits-split", "naive", 0, CPU, {}).protocol.lr)
    job = make_job("digits-split", "naive", 0, CPU, SHORT | {"lr": default})
    assert run(job, read_digits())["changed"].keys() == SHORT.keys()


def test_comparisons_that_start_at_once_do_not_trip_over_the_probe(tmp_path, monkeypatch):
    real = Path.touch
    monkeypatch.setattr(Path, "touch", lambda self, *rest: (real(self, *rest), self.unlink()))
    folders.claim(tmp_path, "x")


def test_without_fcntl_there_is_no_lock_but_a_run():
    code = "import sys; sys.modules['fcntl'] = None; import benchmarks.runner"
    assert run_to_end([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_checkpoint_that_cannot_be_stored_costs_no_run(tmp_path, monkeypatch):
    plugin = SupervisedPlugin()
    plugin.pointer = ctypes.pointer(ctypes.c_int(1))
    own = type(METHODS["naive"])("naive", "", METHODS["naive"].settings, lambda settings, seed: [plugin])
    monkeypatch.setitem(METHODS, "naive", own)
    run(make_job("digits-split", "naive", 0, CPU, SHORT), read_digits(), session=Session(tmp_path, "key"))


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


def test_a_finished_run_keeps_no_checkpoint(tmp_path):
    call("compare", *ONE, "--out", tmp_path)
    file = next(tmp_path.rglob("result.json"))
    for name in ("checkpoint.pt", ".checkpoint.pt.1.2"):
        (file.parent / name).write_text("")
    call("compare", *ONE, "--out", tmp_path)
    assert not list(file.parent.glob("*checkpoint*"))


def test_a_result_that_lost_entries_is_damaged(tmp_path):
    write_json(tmp_path / "result.json", {"key": "k", "format": 2})
    assert folders.RunFolder(tmp_path, "k").read() is None


@pytest.mark.parametrize("rest", ["KEEP\n<!-- reference: digits-split -->\n<!-- end of reference -->", "KEEP"])
def test_a_place_without_an_end_is_refused(rest):
    with pytest.raises(InputError):
        readme.fill(f"<!-- reference: digits-split -->\n{rest}", reference.read())
