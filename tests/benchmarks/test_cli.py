"""The command line: bad input is one line and exit code 2 and writes nothing; failures and interruptions."""

from __future__ import annotations

import importlib.util
import json
import shlex

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import plan, sources
from benchmarks import run as run_module
from benchmarks.cli import app
from benchmarks.request import parse_data
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
    "compare": ["no protocol"],
    "compare digits-split --grid gpm.threshhold=0.9,0.95": ["unknown setting of gpm 'threshhold'", "'threshold'"],
    "compare digits-split --grid gmp.threshold=0.9,0.95": ["'gmp.threshold'", "did you mean 'gpm'"],
    "compare digits-split --methods naive --grid gpm.threshold=0.9,0.95": ["gpm is not among what is to be run"],
    "compare digits-split --grid gpm.threshold": ["key=value,value"],
    "compare digits-split --grid gpm.threshold=0.9,,0.95": ["empty value"],
    "compare digits-split --grid gpm.threshold=0.9,0.9": ["gpm.threshold=0.9 twice"],
    "compare digits-split --grid epochs=1,2 --grid epochs=3": ["'epochs' twice"],
    "compare digits-split --grid epochs=1,two": ["epochs", "'two'", "an integer"],
    "compare digits-split --grid digits-split.epochs=1,0": ["--grid digits-split.epochs=0: ", "at least 1"],
    "compare digits-split --set epochs=1 --grid epochs=1,2": ["--set epochs and --grid epochs", "leave one out"],
    "compare digits-split --set gpm.lr=1 --grid lr=1,2": [
        "--grid lr has no effect on gpm",
        "--set gpm.lr comes before",
    ],
    "compare digits-split --methods gpm --set gpm.threshold=2": ["--set gpm.threshold=2.0: ", "at most 1"],
    "compare digits-split --methods gpm --grid gpm.threshold=0.9,1.5": ["--grid gpm.threshold=1.5: ", "at most 1"],
    "compare digits-split --methods gpm --set epochs=1 --grid threshold=0.9,x": ["--grid threshold=x: 'x' is not"],
    "compare digits-split --methods gpm --set epochs=0 --grid threshold=0.9": ["--set epochs=0: ", "at least 1"],
    "compare digits-split --jobs 0": ["--jobs 0"],
    "compare digits-split --threads 0": ["--threads 0"],
    "compare digits-split --backend spark": ["'spark'", "local, ray or dask"],
    "compare digits-split --backend dask --address tcp://127.0.0.1:1": ["tcp://127.0.0.1:1", "does not answer"],
    "compare digits-split --address tcp://127.0.0.1:1": ["tcp://127.0.0.1:1", "cluster"],
    "compare digits-split --test anova": ["--test 'anova'", "t or wilcoxon"],
    "compare digits-split --columns acc,forgeting": ["--columns", "'forgeting'", "did you mean 'forgetting'"],
    "compare digits-split --columns acc,acc": ["--columns", "'acc' twice"],
    "compare digits-split --columns ,": ["--columns is empty", "acc, bwt"],
    "report nowhere --columns train_second": ["--columns", "'train_second'", "did you mean 'train_seconds'"],
    "compare digits-split --name runs --methods naive": ["--name 'runs'"],
    "compare digits-split --name a/b --methods naive": ["--name 'a/b'"],
    "compare --file missing.yaml": ["missing.yaml", "cannot be read"],
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


def test_without_a_command_there_is_help(tmp_path):
    result = CliRunner().invoke(app, [], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "error" not in result.output
    for name, command in typer.main.get_command(app).commands.items():
        line = command.help.split("\n\n")[0].replace("\n", " ")
        assert f" {name} " in result.output
        assert line in result.output
    asked = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert (asked.exit_code, asked.output.strip()) == (0, result.output.strip())


def test_the_help_of_compare_says_what_holds_without_each_option():
    found = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "300"})
    assert found.exit_code == 0
    options = [
        parameter.opts[0]
        for parameter in typer.main.get_command(app).commands["compare"].params
        if parameter.opts[0][0] == "-"
    ]
    lines = {option: [line for line in found.output.splitlines() if f" {option} " in line] for option in options}
    assert len(options) > 15
    assert [option for option, (line, *_) in lines.items() if "[default: " not in line] == []


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
    plan.load.cache_clear()
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


def test_run_says_where_its_result_is(tmp_path):
    result = invoke(tmp_path, "run", "digits-split", "--method", "naive", "--seed", "4", *QUICK)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "results").rglob("result.json")
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


def test_compare_writes_a_report_and_its_runs_equal_single_ones(tmp_path):
    arguments = ("--methods", "naive,replay", "--seeds", "0,1", *QUICK)
    result = invoke(tmp_path, "compare", "digits-split", "digits-permuted", *arguments)
    assert result.exit_code == 0, result.output
    assert "digits-permuted" in result.stdout
    folder = tmp_path / "results"
    assert len(list(folder.rglob("result.json"))) == 8
    text = (folder / "digits-split+digits-permuted" / "table.md").read_text()
    assert text.count("| naive | 2 |") == 2
    assert "compare digits-split digits-permuted --methods naive,replay --seeds 0,1 --set epochs=1" in text
    for file in ("report.html", "table.csv", "table.tex", "plots/digits-permuted-accuracy-curve.svg"):
        assert (folder / "digits-split+digits-permuted" / file).stat().st_size > 100
    alone = CliRunner().invoke(
        app, ["run", "digits-permuted", "--method", "replay", "--seed", "1", *QUICK, "--out", str(tmp_path / "b")]
    )
    assert alone.exit_code == 0, alone.output
    (path,) = (tmp_path / "b").rglob("result.json")
    together = folder / path.relative_to(tmp_path / "b")
    assert json.loads(path.read_text())["accuracy_matrix"] == json.loads(together.read_text())["accuracy_matrix"]


def test_columns_can_be_chosen_for_runs_that_are_there(tmp_path):
    arguments = ("--methods", "naive", "--seeds", "0,1", "--columns", "train_seconds, acc", *QUICK)
    result = invoke(tmp_path, "compare", "digits-split", *arguments)
    assert result.exit_code == 0, result.output
    heading = "| method | seeds | training (s) | ACC (%) |"
    assert heading in (tmp_path / "results" / "digits-split" / "table.md").read_text()
    again = invoke(tmp_path, "report", str(tmp_path / "results"), "--columns", "bwt", "--name", "mine")
    assert again.exit_code == 0, again.output
    folder = tmp_path / "results" / "mine"
    assert "| method | seeds | BWT (%) |" in (folder / "table.md").read_text()
    assert r"method & seeds & BWT (\%) \\" in (folder / "table.tex").read_text()
    assert "train_seconds" in (folder / "table.csv").read_text()
    names = ("report.html", "table.md", "table.csv", "table.tex", "plots")
    assert again.stdout.split() == [str(folder / name) for name in names]
    assert len(list((folder / "plots").iterdir())) == 5


def test_methods_that_do_not_suit_a_protocol_are_left_out_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.cli._ALL_METHODS", "naive,halrp")
    result = invoke(tmp_path, "compare", "digits-permuted", "--seeds", "0", *QUICK)
    assert result.exit_code == 0, result.output
    assert "left out on digits-permuted: halrp: one output layer" in result.stderr
    text = (tmp_path / "results" / "digits-permuted" / "table.md").read_text()
    assert "| naive | 1 |" in text
    assert "| halrp |" not in text
    assert "one output layer is shared" in text
    assert "compare digits-permuted --seeds 0 --set" in text


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
    files = parse_data(["pmnist-gpm=a.npz", "b=c.npz"])
    assert {key: str(path) for key, path in files.items()} == {"pmnist-gpm": "a.npz", "": "b=c.npz"}
    with pytest.raises(InputError, match="two files"):
        parse_data(["a.npz", "b.npz"])


def test_gem_without_its_solver_is_refused_before_training(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "quadprog" else real(name))
    found = invoke(tmp_path, "run", "digits-split", "--method", "gem")
    assert found.exit_code == 2
    assert "pip install quadprog" in found.stderr
    assert not (tmp_path / "results").exists()


def test_superclasses_of_the_original_archive(tmp_path):
    import pickle

    path = tmp_path / "train"
    fine = list(range(100)) * 2
    path.write_bytes(pickle.dumps({"fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}))
    assert sources._cifar_coarse(path).tolist() == [label // 5 for label in range(100)]
