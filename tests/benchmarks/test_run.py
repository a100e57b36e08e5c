"""Whole runs: deterministic, complete, equal to a plain loop, and the best weights before the method."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import evaluate, resources
from benchmarks.build import build_stream
from benchmarks.files import write_json, write_text
from benchmarks.jobs import make_job
from benchmarks.methods import find_method
from benchmarks.models import build_model
from benchmarks.run import run
from benchmarks.settings import InputError, apply
from benchmarks.sources import read_digits
from tests.processes import run_to_end

CPU = torch.device("cpu")
TIMES = ("train_seconds", "wall_seconds", "peak_memory_mb")
METHODS = ("naive", "ewc", "replay", "gem", "agem", "joint", "gpm", "ogd", "logd", "kfac", "xkfac")


def once(protocol, method, seed=0, report=None, **changes):
    changes = {
        "epochs": "1",
        "train_limit": "100",
        "n_experiences": "3",
        "n_samples": "50",
        "n_gradients": "50",
    } | changes
    job = make_job(protocol, method, seed, CPU, changes)
    return run(job, read_digits(), *([report] if report else []))


@pytest.mark.parametrize(
    ("protocol", "method"),
    [(protocol, method) for protocol in ("digits-split", "digits-permuted") for method in METHODS]
    + [("digits-bn", method) for method in ("ewc", "kfac", "xkfac", "kfac-merged", "kfac-fixed-bn")],
)
def test_the_same_command_gives_the_same_result(protocol, method):
    first, second, other = (once(protocol, method, seed) for seed in (0, 0, 1))
    for key in TIMES:
        assert first.pop(key) > 0
        second.pop(key)
    for result in (first, second):
        assert all(each.pop("train_seconds") > 0 for each in result["experiences"])
    assert json.dumps(first) == json.dumps(second)
    assert first["accuracy_matrix"] != other["accuracy_matrix"]
    assert np.shape(first["accuracy_matrix"]) == ((1, 3) if method == "joint" else (3, 3))
    assert (first["bwt"] is None) == (method == "joint")
    assert first["acc"] == pytest.approx(np.mean(first["accuracy_matrix"][-1]))
    assert bool(first["method_report"]) == (method in ("gpm", "ogd", "logd") or "kfac" in method)


def test_a_naive_run_equals_a_plain_loop():
    result = once("digits-permuted", "naive", seed=3, train_batch="1000", epochs="4")
    changes = {"train_limit": "100", "n_experiences": "3"}
    protocol = apply(make_job("digits-permuted", "naive", 3, CPU, {}).protocol, changes)
    stream = build_stream(protocol, read_digits(), 3)
    torch.manual_seed(3)
    model = build_model("mlp", stream, 100)
    for i in range(3):
        x, y = stream.train[i].as_tensors()
        for _ in range(4):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
        for j in range(3):
            x, y = stream.test[j].as_tensors()
            accuracy = 100 * (model(x).argmax(1) == y).double().mean().item()
            # Sums of gradients in another order may tip a sample.
            assert result["accuracy_matrix"][i][j] == pytest.approx(accuracy, abs=0.6)


def test_forgetting_is_there_to_be_prevented():
    result = once("digits-permuted", "naive", epochs="4", train_limit="0", n_experiences="5")
    assert result["bwt"] < -20
    assert min(result["accuracy_matrix"][i][i] for i in range(5)) > 80


def test_settings_reach_the_plugins():
    """Each in its place: two numbers that change places would train all the same."""

    def plugin(method, **changes):
        job = make_job("pmnist-logd", method, 7, CPU, changes)
        return find_method(method).plugins(job.settings, job.seed)[0]

    gem = plugin("gem", gem_patterns="11", memory_strength="0.25")
    assert (gem.patterns_per_experience, gem.memory_strength) == (11, 0.25)
    agem = plugin("agem", agem_patterns="30", agem_sample_size="21")
    assert (agem.patterns_per_experience, agem.sample_size) == (30, 21)
    logd = plugin("logd", patterns_per_exp="9", n_components="2", margin="0.75", blocks="network", selection="random")
    core = logd.method
    assert (core.memory.size, core.memory.selection, core.memory.seed) == (9, "random", 7)
    assert (core.n_components, core.variant, core.margin, core.blocks) == (2, "official", 0.75, "network")
    assert plugin("logd", n_components="all", variant="paper").method.n_components is None
    ogd = plugin("ogd", n_gradients="13", target="ave", ogd_max_mb="3").method
    assert (ogd.n_gradients, ogd.target, ogd.max_bytes, ogd.seed) == (13, "ave", 3_000_000, 7)
    assert plugin("ogd").method.max_bytes is None
    kfac = plugin("kfac", mode="separate", fisher="exact", n_factor_samples="5", truncate="0.9", damping="0.1").method
    assert (kfac.mode, kfac.fisher, kfac.n_samples, kfac.truncate, kfac.damping) == ("separate", "exact", 5, 0.9, 0.1)
    assert plugin("kfac").method.truncate is None
    changed = {"strength": "2", "adaptive": "false", "mode": "separate", "fisher": "exact", "n_factor_samples": "7"}
    changed |= {"factor_batch": "9", "truncate": "0.8", "damping": "0.2", "reparameterise": "false"}
    found = plugin("xkfac", inter_example="false", batchnorm="track", **changed)
    xkfac = found.method
    assert (xkfac.strength, xkfac.balanced, xkfac.adaptive, xkfac.mode) == ((2.0,), False, False, "separate")
    assert (xkfac.fisher, xkfac.n_samples, xkfac.truncate, xkfac.damping) == ("exact", 7, 0.8, 0.2)
    assert (xkfac.reparameterise, xkfac.inter_example, xkfac.batchnorm) == (False, False, "track")
    assert found.record_batch_size == 9
    assert plugin("xkfac").method.balanced
    assert plugin("xkfac").method.truncate is None


def test_a_run_leaves_no_test_images_behind():
    assert not evaluate._PUT_TOGETHER
    job = make_job("digits-permuted", "naive", 0, CPU, {"epochs": "1", "train_limit": "100", "n_experiences": "3"})
    seen = []
    run(job, read_digits(), lambda *args: seen.append(len(evaluate._PUT_TOGETHER)))
    assert max(seen) == 3  # while it lasted, each test set was put together once
    assert not evaluate._PUT_TOGETHER


def test_progress_is_told_in_order():
    calls = []
    once("digits-split", "naive", report=lambda *position: calls.append(position), epochs="2")
    assert calls[0] == (0, 3, 0, 2)
    assert calls[-1] == (2, 3, 2, 2)
    assert all(before < after for before, after in pairwise(calls))


def test_a_run_leaves_the_deterministic_setting_as_it_was():
    assert not torch.are_deterministic_algorithms_enabled()
    once("digits-split", "naive")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"acc": 1.5})
    assert json.loads(path.read_text()) == {"acc": 1.5}
    with pytest.raises(TypeError):
        write_json(path, {"acc": object()})
    assert json.loads(path.read_text()) == {"acc": 1.5}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "result.json"
    write_text(path, "old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"benchmarks.files.os.{step}", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


FREED = """
import torch
from benchmarks import resources

memory = resources.PeakMemory(torch.device("cpu"))
memory.start()
before, kind = memory.stop()
memory.start()
block = torch.ones(64 * 2**20 // 4)
del block
print(kind, memory.stop()[0] - before)
"""


def test_peak_memory_sees_what_was_freed_again():
    """In a process of its own: one that has run many tests may have that much at hand."""
    ended = run_to_end([sys.executable, "-c", FREED])
    assert ended.returncode == 0, ended.stderr
    kind, more = ended.stdout.split()
    if kind != "resident_during_run":
        pytest.skip("the high-water mark cannot be reset here")
    assert 50 < float(more) < 90


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "mps"])
def test_devices_that_are_not_there_are_refused(device):
    with pytest.raises(InputError, match=device):
        resources.check_device(device)


def test_operations_without_a_deterministic_version_are_noted_once():
    import warnings

    found, others = [], []
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: others.append(str(message))
        for _ in range(2):  # a second run in the same process has to be told, too
            with resources.noting_nondeterminism(found):
                for _ in range(2):
                    warnings.warn("cumsum_cuda_kernel does not have a deterministic implementation, but", stacklevel=1)
                warnings.warn("something else", stacklevel=1)
    assert found == ["cumsum_cuda_kernel"]
    assert others == ["something else"] * 2


def test_forward_transfer_worked_out_by_hand():
    matrix = [[90.0, 30.0, 20.0], [70.0, 80.0, 40.0], [75.0, 50.0, 60.0]]
    assert evaluate.forward_transfer(matrix, [10.0, 25.0, 15.0]) == pytest.approx(((30 - 25) + (40 - 15)) / 2)
    assert evaluate.forward_transfer([[90.0]], [10.0]) is None
    assert evaluate.forward_transfer([[90.0, 80.0]], [10.0, 10.0]) is None


def test_initial_accuracies_and_losses_are_those_of_the_untrained_network():
    result = once("digits-permuted", "naive", seed=3)
    job = make_job("digits-permuted", "naive", 3, CPU, {"train_limit": "100", "n_experiences": "3"})
    stream = build_stream(job.protocol, read_digits(), 3)
    torch.manual_seed(3)
    model = build_model("mlp", stream, 100)
    for position, wanted in enumerate(result["initial_accuracies"]):
        x, y = stream.test[position].as_tensors()
        assert 100 * (model(x).argmax(1) == y).double().mean().item() == pytest.approx(wanted)
    assert np.shape(result["loss_matrix"]) == (3, 3)


def test_epoch_curves_are_means_over_the_batches_before_their_step():
    """One batch an epoch: its loss is that of the network at the beginning of the epoch."""
    result = once("digits-permuted", "naive", seed=3, train_batch="1000", epochs="3")
    job = make_job("digits-permuted", "naive", 3, CPU, {"train_limit": "100", "n_experiences": "3"})
    stream = build_stream(job.protocol, read_digits(), 3)
    torch.manual_seed(3)
    model = build_model("mlp", stream, 100)
    x, y = stream.train[0].as_tensors()
    for loss, accuracy in result["experiences"][0]["epochs"]:
        outputs = model(x)
        own = nn.functional.cross_entropy(outputs, y)
        assert own.item() == pytest.approx(loss, rel=1e-5)
        assert 100 * (outputs.argmax(1) == y).double().mean().item() == pytest.approx(accuracy)
        model.zero_grad()
        own.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)


def test_readings_of_gpm_after_each_experience():
    result = once("digits-permuted", "gpm")
    shares = [own["free_share"] for own in result["experiences"]]
    assert len(shares) == 3
    for earlier, later in pairwise(shares):
        assert all(later[layer] < earlier[layer] <= 1 for layer in later)
    lines = [line.split() for line in result["method_report"].splitlines() if " projected " in line]
    assert {words[0].removesuffix(".weight"): float(words[-2]) for words in lines} == {
        layer: pytest.approx(100 * share, abs=0.05) for layer, share in shares[-1].items()
    }
    ranks = {words[0]: (int(words[-3]), int(words[1].split("x")[1])) for words in lines}
    assert result["bytes_held"] == result["experiences"][-1]["bytes_held"]
    assert result["bytes_held"] >= sum(4 * rank * inputs for rank, inputs in ranks.values())
    assert (result["added_parameters"], result["growth"], result["diverged"]) == (0, None, False)


def test_readings_of_methods_that_keep_nothing_or_grow():
    plain = once("digits-split", "naive")
    assert (plain["bytes_held"], plain["experiences"][0]["free_share"], plain["method_report"]) == (None, None, None)
    grown = once("digits-split", "halrp", max_growth="0.5", epochs="2")
    base = sum(p.numel() for p in build_model("mlp", digits_split(3), 100).parameters())
    assert grown["growth"] > 0
    assert grown["added_parameters"] == pytest.approx(grown["growth"] * base, rel=0.05)


def digits_split(experiences):
    job = make_job("digits-split", "naive", 0, CPU, {"n_experiences": str(experiences)})
    return build_stream(job.protocol, read_digits(), 0)
