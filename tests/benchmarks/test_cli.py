"""The command line: bad input is one line and exit code 2 and writes nothing; failures and interruptions."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import compare as comparison
from benchmarks import run as run_module
from benchmarks import sources
from benchmarks.cli import app
from benchmarks.settings import InputError

QUICK = ["--set", "epochs=1", "--set", "train_limit=40", "--set", "n_experiences=2"]


def invoke(tmp_path, *arguments):
    return CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "results")])


BAD = {
    "run digits-splt --method naive": ["unknown protocol 'digits-splt'", "'digits-split'"],
    "run digits-split --method nave": ["unknown method 'nave'", "'naive'"],
    "run digits-split --method naive --set epoch=1": ["unknown setting 'epoch'", "'epochs'"],
    "run digits-split --method naive --set epochs=two": ["epochs", "'two'", "an integer"],
    "run digits-split --method naive --set epochs": ["key=value"],
    "run digits-split --method naive --set n_experiences=6": ["n_experiences=6", "5 experiences"],
    "run digits-split --method naive --seed one": ["--seed"],
    "run digits-split --method naive --seed=-1": ["seed -1"],
    "run digits-split --method naive --bogus": ["--bogus"],
    "run digits-split --method naive --data x.npz": ["takes no --data"],
    "run digits-split --method naive --device gpu": ["unknown device 'gpu'"],
    "run digits-split --method naive --device cuda:99": ["CUDA", "--device cpu"],
    "run digits-split": ["--method"],
    "run pmnist-gpm --method naive --data missing.npz": ["missing.npz", "does not exist"],
    "run npz-split --method naive": ["--data FILE.npz"],
    "compare digits-split --methods naive,naive": ["twice"],
    "compare digits-split --methods naive,emc": ["unknown method 'emc'", "'ewc'"],
    "compare digits-split --seeds 0,x": ["--seeds", "'0,x'"],
    "compare digits-split --methods joint --set train_batch=3": ["train_batch=3", "5"],
    "compare digits-split --data pmnist-gpm=x.npz": ["pmnist-gpm"],
    "compare digits-split nothing": ["unknown protocol 'nothing'"],
    "comparison digits-split": ["comparison"],
    "run digits-split --method gpm --set route=nowhere": ["route", "nowhere"],
    "run digits-split --method gpm --set threshold=0.9,0.9,0.9,0.9": ["threshold has 4 values", "2 covered layers"],
    "run digits-split --method gpm --set include=nothing": ["include", "'nothing'", "matches no layer"],
    "compare digits-split --methods naive,gpm --set exclude=trunk,heads": [
        "gpm on digits-split",
        "no layer is covered",
    ],
    "run digits-split --method gpm --set n_samples=100000": ["n_samples=100000", "experiences of"],
    "run digits-split --method gpm --set train_limit=20": ["n_samples=", "experiences of 20 samples"],
    "run digits-split --method logd --set patterns_per_exp=100000": ["patterns_per_exp=100000", "experiences of"],
    "run digits-permuted --method logd --set blocks=5": ["logd on digits-permuted", "blocks=5", "3 decomposed"],
    "run digits-split --method logd --set blocks=big": ["blocks", "'big'", "an integer or one of layer, network"],
    "run digits-split --method logd --set n_components=0": ["n_components=0", "at least 1"],
    "run digits-split --method logd --set variant=both": ["variant", "'both'", "paper, official"],
    "run digits-split --method gem --set gem_patterns=100000": ["gem on digits-split", "gem_patterns=100000"],
    "run digits-split --method agem --set agem_patterns=100000": ["agem on digits-split", "agem_patterns=100000"],
    "run digits-split --method agem --set agem_sample_size=3": ["agem_sample_size=3", "4 old experiences"],
    "run digits-split --method ogd --set ogd_max_mb=1": ["ogd on digits-split", "max_bytes=1000000", "holds 15"],
    "run digits-split --method ogd --set n_gradients=100000": ["n_gradients=100000", "experiences of"],
    "run digits-split --method naive --set max_angle=90": ["unknown setting 'max_angle'"],
    "run rmnist-logd --method naive --set max_angle=500": ["max_angle=500", "at most 360"],
    "run digits-permuted --method halrp": ["halrp on digits-permuted", "no task labels", "choose one of digits-split"],
    "compare digits-permuted --methods naive,halrp": ["halrp on digits-permuted", "no task labels"],
    "compare digits-permuted --set max_rank=3": ["halrp on digits-permuted", "no task labels"],
    "run digits-split --method halrp --set warmup_epochs=10": ["warmup_epochs=10", "fewer than epochs=10"],
    "run digits-split --method halrp --set importance=valid": ["importance=valid", "expected importance=train"],
    "run digits-split --method halrp --set max_growth=0.2": ["halrp on digits-split", "max_growth=0.2", "or more"],
    "run digits-split --method naive --set task_order=B": ["unknown setting 'task_order'"],
    "run cifar100-halrp --method naive --set task_order=F": ["task_order", "'F'", "one of A, B, C, D, E"],
    "run digits-split --method naive --seed 4294967296": ["seed 4294967296", "expected 0 to"],
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, command):
    monkeypatch.setattr(run_module, "run", lambda *args: pytest.fail("something was trained"))
    result = invoke(tmp_path, *shlex.split(command))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    for fragment in BAD[command]:
        assert fragment in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bad_archive_is_refused_before_anything_is_written(tmp_path, arrays):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    result = invoke(tmp_path, "run", "pmnist-gpm", "--method", "naive", "--data", str(path))
    assert result.exit_code == 2
    assert "'x_train' has shape [24, 5, 4]; expected uint8 [n, 28, 28]" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_without_network_and_file_the_advice_is_a_file(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise RuntimeError("Error downloading\nseveral lines " + 300 * "x")

    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    comparison._load.cache_clear()
    result = invoke(tmp_path, "run", "pmnist-gpm", "--method", "naive")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 400
    assert "--data FILE.npz" in result.stderr


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "results").write_text("mine")
    result = invoke(tmp_path, "run", "digits-split", "--method", "naive", *QUICK)
    assert result.exit_code == 2
    assert (tmp_path / "results").read_text() == "mine"


def test_run_writes_one_file_and_says_where(tmp_path):
    result = invoke(tmp_path, "run", "digits-split", "--method", "naive", "--seed", "4", *QUICK)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "results").rglob("*.*")
    assert result.stdout.replace("\n", "") == str(path)
    content = json.loads(path.read_text())
    assert (content["seed"], content["hyper_parameters"]["epochs"]) == (4, 1)
    assert content["hyper_parameters"]["lr"] == 0.1


def test_own_images_can_be_used(tmp_path, arrays):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    data = ("--data", str(path), "--set", "n_experiences=2", "--set", "epochs=1")
    for protocol in ("npz-split", "npz-permuted"):
        result = invoke(tmp_path, "run", protocol, "--method", "naive", *data)
        assert result.exit_code == 0, result.output


def test_compare_writes_tables_and_the_files_equal_single_runs(tmp_path):
    arguments = ("--methods", "naive,replay", "--seeds", "0,1", *QUICK)
    result = invoke(tmp_path, "compare", "digits-split", "digits-permuted", *arguments)
    assert result.exit_code == 0, result.output
    assert "digits-permuted" in result.stdout
    folder = tmp_path / "results"
    assert len(list(folder.rglob("*.json"))) == 8
    (table,) = (folder / "digits-split").glob("table*.md")
    text = table.read_text()
    assert "| naive | 2 |" in text
    assert "compare digits-split digits-permuted --methods naive,replay --seeds 0,1 --set epochs=1" in text
    alone = CliRunner().invoke(
        app, ["run", "digits-permuted", "--method", "replay", "--seed", "1", *QUICK, "--out", str(tmp_path / "b")]
    )
    assert alone.exit_code == 0, alone.output
    (path,) = (tmp_path / "b").rglob("*.json")
    together = folder / path.relative_to(tmp_path / "b")
    assert json.loads(path.read_text())["accuracy_matrix"] == json.loads(together.read_text())["accuracy_matrix"]


def test_methods_that_do_not_suit_a_protocol_are_left_out_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.cli._ALL_METHODS", "naive,halrp")
    result = invoke(tmp_path, "compare", "digits-permuted", "--seeds", "0", *QUICK)
    assert result.exit_code == 0, result.output
    assert "left out on digits-permuted: halrp: one output layer" in result.stderr
    (table,) = (tmp_path / "results" / "digits-permuted").glob("table*.md")
    text = table.read_text()
    assert "| naive | 1 |" in text
    assert "| halrp |" not in text
    assert "Left out: halrp: one output layer" in text
    assert "compare digits-permuted --seeds 0 --set" in text


def failing_for(method, error):
    real = run_module.run

    def runner(job, data, report):
        if job.method == method:
            raise error
        return real(job, data, report)

    return runner


def test_a_failing_run_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.compare, "__defaults__", (failing_for("ewc", ValueError("two\nlines")),))
    arguments = ("--methods", "naive,ewc,replay", "--seeds", "0", *QUICK)
    result = invoke(tmp_path, "compare", "digits-split", *arguments)
    assert result.exit_code == 1
    folder = tmp_path / "results" / "digits-split"
    assert sorted(path.name.split("-")[0] for path in folder.glob("*.json")) == ["naive", "replay"]
    assert "ValueError: two lines" in result.stderr
    (trace,) = folder.glob("ewc*.error.txt")
    assert "Traceback" in trace.read_text()
    (table,) = folder.glob("table*.md")
    assert "| ewc | 0 | - |" in table.read_text()
    assert "ValueError: two lines" in table.read_text()


def test_an_interruption_keeps_the_finished_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.compare, "__defaults__", (failing_for("replay", KeyboardInterrupt()),))
    arguments = ("--methods", "naive,replay", "--seeds", "0", *QUICK)
    result = invoke(tmp_path, "compare", "digits-split", *arguments)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert [path.name.split("-")[0] for path in (tmp_path / "results").rglob("*.json")] == ["naive"]


def test_lists_name_everything():
    listing = CliRunner().invoke(app, ["list"], env={"COLUMNS": "200"})
    assert listing.exit_code == 0
    for word in (
        "digits-split",
        "pmnist-gpm",
        "cifar100-logd",
        "rmnist-logd",
        "pmnist-ogd",
        "naive",
        "gem",
        "agem",
        "logd",
        "ogd",
    ):
        assert word in listing.stdout
    one = CliRunner().invoke(app, ["list", "cifar100-gpm"], env={"COLUMNS": "200"})
    assert one.exit_code == 0
    assert "patience" in one.stdout
    assert "official GPM code" in one.stdout


def test_data_can_be_given_for_each_protocol():
    files = comparison.parse_data(["pmnist-gpm=a.npz", "b=c.npz"])
    assert {key: str(path) for key, path in files.items()} == {"pmnist-gpm": "a.npz", "": "b=c.npz"}
    with pytest.raises(InputError, match="two files"):
        comparison.parse_data(["a.npz", "b.npz"])


def test_superclasses_of_the_original_archive(tmp_path):
    import pickle

    path = tmp_path / "train"
    fine = list(range(100)) * 2
    path.write_bytes(pickle.dumps({"fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}))
    assert sources._cifar_coarse(path).tolist() == [label // 5 for label in range(100)]
