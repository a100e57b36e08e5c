"""Reference results: collected, chosen, held against new runs, put into documents; with numbers worked out by hand."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import cli, commands, gather, readme, reference, verify
from benchmarks import compare as comparison
from benchmarks.cli import app
from benchmarks.digest import code_digest
from benchmarks.settings import InputError
from tests.benchmarks.small_runs import await_second_run


def result(protocol="digits-permuted", method="naive", seed=0, acc=90.0, bwt=-5.0, **more):
    return {
        "format": 2,
        "protocol": protocol,
        "method": method,
        "seed": seed,
        "changed": {},
        "hyper_parameters": {"epochs": 4, "outputs": "heads" if protocol == "digits-split" else None},
        "accuracy_matrix": [[acc]],
        "acc": acc,
        "bwt": bwt,
        "forward_transfer": 1.0,
        "train_seconds": 1.23456789,
        "bytes_held": None,
        "growth": None,
        "loss_matrix": [[0.123456789]],
        "method_report": None,
        "key": "abc",
    } | more


def write(folder, *results):
    for number, own in enumerate(results):
        path = folder / str(number) / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(own))
    return folder


def test_collecting_keeps_finished_runs_of_unchanged_settings(tmp_path):
    changed = result(method="ewc", changed={"epochs": "1"})
    old = result(method="gpm", format=1)
    folder = write(tmp_path / "a", result(), result(seed=1, acc=91.0), changed, old, {"format": 2})
    (folder / "broken.json").write_text("{")
    files = reference.collect([folder], tmp_path / "kept")
    assert [file.name for file in files] == ["naive-seed0.json", "naive-seed1.json"]
    kept = reference.read(tmp_path / "kept")
    assert [own["acc"] for own in kept] == [90.0, 91.0]
    assert kept[0]["loss_matrix"] == [[0.123457]]
    assert kept[0]["train_seconds"] == 1.23457
    assert "key" not in kept[0]
    assert reference.as_text(kept[0]) == files[0].read_text()


def test_two_runs_that_differ_cannot_both_be_the_reference(tmp_path):
    folder = write(tmp_path / "a", result(), result(acc=91.0))
    with pytest.raises(InputError, match="two runs of naive-seed0"):
        reference.collect([folder], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    reference.collect([write(tmp_path / "b", result(), result(train_seconds=9.0))], tmp_path / "kept")


def test_an_empty_folder_and_a_damaged_reference_are_named(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "naive-seed0.json").write_text("{}")
    with pytest.raises(InputError, match="no finished run"):
        reference.collect([tmp_path], tmp_path / "kept")
    with pytest.raises(InputError, match=r"x/naive-seed0\.json is not of format 2"):
        reference.read(tmp_path)


def test_choosing():
    everything = [result(), result(seed=1), result(method="gpm"), result(protocol="digits-split")]
    assert reference.choose(everything, ["digits-permuted"], ["naive"], [1]) == [everything[1]]
    assert reference.choose(everything, [], [], []) == everything
    for arguments, name in (
        ((["digit-split"], [], []), "digits-split"),
        (([], ["gmp"], []), "gpm"),
        (([], [], [7]), "0"),
    ):
        with pytest.raises(InputError, match=name):
            reference.choose(everything, *arguments)


SPREAD = [result(seed=seed, acc=acc, bwt=bwt) for seed, acc, bwt in ((0, 90.0, -5.0), (1, 92.0, -7.0), (2, 94.0, -6.0))]


@pytest.mark.parametrize(
    ("acc", "bwt", "agrees"),
    [(99.9, -5.0, True), (77.7, -5.0, False), (77.9, -5.0, True), (90.0, -11.2, False), (90.0, 1.0, True)],
)
def test_a_run_agrees_within_what_two_seeds_differ_by(acc, bwt, agrees):
    """Sample deviations over seeds: 2 of ACC, 1 of BWT; Student's t of two degrees of freedom is 4.3027 at 97.5 %."""
    verdict = verify.judge(result(acc=acc, bwt=bwt, accuracy_matrix=[[acc + 1]]), SPREAD)
    assert verdict.allowed == (pytest.approx(2 * 4.3027 * 2**0.5, rel=1e-4), pytest.approx(4.3027 * 2**0.5, rel=1e-4))
    assert verdict.agrees is agrees
    assert not verdict.equal


def test_equal_runs_agree_and_a_small_spread_has_a_floor():
    same = [result(seed=seed, acc=50.0, bwt=None) for seed in (0, 1)]
    assert verify.judge(same[1], same).equal
    near = verify.judge(result(acc=50.2, bwt=None, accuracy_matrix=[[1.0]]), same)
    assert (near.allowed[0], near.agrees, near.bwt) == (0.3, True, None)
    assert not verify.judge(result(acc=50.4, bwt=None, accuracy_matrix=[[1.0]]), same).agrees


def test_tables_of_documents_hold_means_and_deviations():
    text = "a\n<!-- reference: digits-permuted methods=gpm,naive -->\nold\n<!-- end of reference -->\nz\n"
    kept = [*SPREAD, result(method="gpm", acc=95.5, bytes_held=18_448)]
    filled = readme.fill(text, kept)
    assert "| naive | 3 | 92.00 ± 2.00 | -6.00 ± 1.00 | 1.00 ± 0.00 | 1.2 ± 0.0 | - |" in filled
    assert "| gpm | 1 | 95.50 | -5.00 | 1.00 | 1.2 | 18 |" in filled
    assert filled.index("| gpm") < filled.index("| naive")
    assert "old" not in filled
    assert filled.startswith("a\n<!-- reference: digits-permuted methods=gpm,naive -->\n\n| method")
    assert filled.endswith("|\n<!-- end of reference -->\nz\n")
    assert readme.fill(filled, kept) == filled
    with_heads = readme.fill(text.replace("permuted", "split").replace("gpm,", ""), [result(protocol="digits-split")])
    assert "| naive | 1 | 90.00 | -5.00 | - |" in with_heads
    grown = readme.fill(text, [*kept, result(method="gpm", seed=1, acc=95.5, growth=0.25)])
    assert "| ACC % | BWT % | FWT % | growth % | training s |" in grown
    assert "| gpm | 2 | 95.50 ± 0.00 | -5.00 ± 0.00 | 1.00 ± 0.00 | 25.0 | 1.2 ± 0.0 | 18 |" in grown
    for wrong in ("nothing", "digits-permuted methods=ewc"):
        with pytest.raises(InputError, match=wrong.split("=")[-1]):
            readme.fill(f"<!-- reference: {wrong} -->\n<!-- end of reference -->", kept)


def test_what_earlier_versions_did_not_count_is_told_from_nothing():
    text = "<!-- reference: digits-permuted -->\n<!-- end of reference -->"
    kept = [result(), result(method="ewc"), result(method="agem", bytes_held=27_200)]
    filled = readme.fill(text, kept)
    assert "| naive | 1 | 90.00 | -5.00 | 1.00 | 1.2 | - |" in filled
    assert "| ewc | 1 | 90.00 | -5.00 | 1.00 | 1.2 | not counted |" in filled
    assert "| agem | 1 | 90.00 | -5.00 | 1.00 | 1.2 | 27 |" in filled


def test_the_readme_is_up_to_date():
    root = reference.FOLDER.parents[1]
    for name in readme.DOCUMENTS:
        text = (root / name).read_text(encoding="utf-8")
        assert "<!-- reference: " in text
        assert readme.fill(text, reference.read()) == text, "run `python -m benchmarks readme`"


def test_every_reference_is_of_the_protocols_own_settings():
    import torch

    from benchmarks.jobs import make_job

    for own in reference.read():
        job = make_job(own["protocol"], own["method"], own["seed"], torch.device("cpu"), {})
        now = json.loads(json.dumps(job.hyper_parameters))
        assert verify.same_settings(now, own["hyper_parameters"]), own["method"]


def test_gathering_tells_runs_of_changed_settings_apart(tmp_path):
    folder = write(tmp_path / "a", result(), result(changed={"lr": "1"}), result(seed=1))
    (folder / "status.json").write_text('{"experience": 1}')
    found = gather.study([folder], "mine")
    assert [(own["label"], own["seed"]) for own in found.results] == [("naive", 0), ("naive", 1), ("naive lr=1", 0)]
    again = [folder, write(tmp_path / "b", result(acc=70.0))]
    with pytest.raises(InputError, match="2 results of digits-permuted naive 0, and none of them is of the code"):
        gather.study(again, "mine")
    # A folder within another one is no second result, and after a change of the code its own results are taken.
    assert len(gather.study([folder, folder / "0"], "mine").results) == 3
    now = write(tmp_path / "c", *(result(seed=seed, acc=60.0 + seed, code=code_digest()) for seed in (0, 1)))
    taken = gather.study([folder, now], "mine").results
    assert [own["acc"] for own in taken if own["label"] == "naive"] == [60.0, 61.0]
    with pytest.raises(InputError, match="2 of them are"):
        gather.study([now, write(tmp_path / "d", result(code=code_digest()))], "mine")
    with pytest.raises(InputError, match="no folder"):
        gather.study([tmp_path / "e"], "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no result of format 2"):
        gather.study([tmp_path / "empty"], "mine")


@pytest.mark.parametrize("what", ["libraries", "origin"])
def test_what_is_in_the_key_is_in_the_row(tmp_path, what):
    """Another NumPy draws other permutations, and another package of a method is another method."""
    folder = write(tmp_path / "a", result(**{what: "1"}), result(seed=1, **{what: "2"}))
    for gathering in (lambda: gather.study([folder], "x"), lambda: reference.collect([folder], tmp_path / "kept")):
        with pytest.raises(InputError, match=f"different {what}"):
            gathering()


def test_other_images_are_no_reference_and_do_not_agree(tmp_path):
    reference.collect([write(tmp_path / "a", result(data="mine"))], tmp_path / "kept")
    with pytest.raises(InputError, match=r"of other images \(theirs\)"):
        reference.collect([write(tmp_path / "b", result(method="gpm", data="theirs"))], tmp_path / "kept")
    (kept,) = reference.read(tmp_path / "kept")
    assert verify.judge(result(data="mine"), [kept]).agrees
    other = verify.judge(result(data="theirs"), [kept])
    assert not other.agrees
    console = Console(width=120, file=io.StringIO())
    console.print(verify.table([other]))
    assert "OTHER IMAGES" in console.file.getvalue()


def test_verifying_runs_what_has_a_reference_and_nothing_else(tmp_path, monkeypatch):
    known = [result(seed=0, threads=1), result(seed=1, threads=1), result(method="ewc", seed=1, threads=1)]
    asked = []

    def carry_out(description, out, command, kept):
        asked.append((description.methods, description.seeds))
        return comparison.Outcome(), None

    monkeypatch.setattr(reference, "read", lambda: known)
    monkeypatch.setattr(cli, "carry_out", carry_out)
    CliRunner().invoke(app, ["verify", "digits-permuted", "--seeds", "0,1", "--out", str(tmp_path)])
    assert asked == [(["naive"], [0, 1]), (["ewc"], [1])]


def digits():
    return sorted(
        {(own["protocol"], own["method"]) for own in reference.read() if own["protocol"].startswith("digits")}
    )


@pytest.mark.parametrize(("protocol", "method"), digits())
def test_the_digits_agree_with_their_reference(tmp_path, protocol, method):
    """A whole run of each: about a second."""
    arguments = ["verify", protocol, "--methods", method, "--seeds", "0", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, arguments, env={"COLUMNS": "150"})
    assert found.exit_code == 0, found.output
    assert f"{protocol} {method} seed 0" in found.stdout
    assert "1 of 1 runs agree" in found.stdout


def test_verify_fails_where_a_run_differs(tmp_path, monkeypatch):
    kept = [own for own in reference.read() if (own["protocol"], own["method"]) == ("digits-split", "naive")]
    wrong = [{**own, "acc": own["acc"] + 90, "accuracy_matrix": [[0.0]]} for own in kept]
    monkeypatch.setattr(reference, "read", lambda: wrong)
    found = CliRunner().invoke(app, ["verify", "digits-split", "--methods", "naive", "--out", str(tmp_path)])
    assert found.exit_code == 1
    assert "DIFFERS" in found.stdout
    assert "0 of 1 runs agree" in found.stdout


@pytest.mark.parametrize("out", [False, True])
def test_an_interrupted_verify_says_what_is_kept(tmp_path, out):
    """By Ctrl-C, as the runs go on."""
    kept, temporary = tmp_path / "kept", tmp_path / "temporary"
    temporary.mkdir()
    words = ["verify", "digits-split", "--methods", "naive,gem,logd", *(["--out", str(kept)] if out else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=reference.FOLDER.parents[1],
        env=os.environ | {"TMPDIR": str(temporary)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await_second_run(kept if out else temporary)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    last = told.splitlines()[-1]
    if out:
        assert last == f"interrupted: what has finished is in {kept}; the same command goes on from there"
        assert list(kept.rglob("result.json"))
    else:
        assert last.startswith("interrupted: nothing is kept; with --out DIR ")
        assert str(temporary) not in last
        assert not list(temporary.rglob("*.json"))


def test_verify_gives_a_file_to_the_protocols_that_take_one():
    own = [{"method": "naive", "seed": 0, "threads": 1}]
    given = ["mnist.npz", "pmnist-logd=other.npz"]
    assert commands._again("digits-split", own, given, 1).data is None
    assert commands._again("pmnist-bn", own, given, 1).data == ["mnist.npz"]
    assert commands._again("pmnist-logd", own, given[1:], 1).data == ["pmnist-logd=other.npz"]
