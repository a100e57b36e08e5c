"""Comparisons from a YAML file: it says what the options say, and what is wrong in it is named."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.cli import app
from tests.benchmarks.comparing import QUICK, compare, counting


def test_a_file_says_what_the_options_say(tmp_path, monkeypatch):
    done = counting(monkeypatch)
    file = tmp_path / "study.yaml"
    file.write_text(
        "protocols: [digits-split]\nmethods: [naive, gpm]\nseeds: [0, 1]\n"
        "set: {epochs: 1, train_limit: 40, n_experiences: 2, n_samples: 20}\n"
        "grid:\n  gpm.threshold: [0.9, [0.9, 0.95]]\ncolumns: [forgetting, acc]\n"
    )
    compare(tmp_path, "--file", str(file))
    assert len(done) == 6
    text = (tmp_path / "results" / "study" / "table.md").read_text()
    assert "--grid 'gpm.threshold=0.9;0.9,0.95;'" in text
    assert "| method | seeds | forgetting (%) | ACC (%) |" in text
    compare(tmp_path, "--file", str(file), "--columns", "bwt")
    assert "| method | seeds | BWT (%) |" in (tmp_path / "results" / "study" / "table.md").read_text()
    compare(
        tmp_path, "digits-split", "--methods", "naive,gpm", "--seeds", "0,1", *QUICK, "--set", "n_samples=20",
        "--grid", "gpm.threshold=0.9;0.9,0.95",
    )  # fmt: skip
    assert len(done) == 6
    compare(
        tmp_path,
        "--file",
        str(file),
        "--seeds",
        "0",
        "--methods",
        "naive",
        "--grid",
        "lr=0.1",
        "--set",
        "epochs=2",
        code=2,
    )


def test_a_file_may_say_where_results_go_and_which_test(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"protocols: [digits-split]\nmethods: [naive]\nseeds: [0]\nout: {tmp_path / 'there'}\ntest: wilcoxon\n"
        "set: {epochs: 1, train_limit: 40, n_experiences: 2}\ncolumns: [acc]\n"
    )
    found = CliRunner().invoke(app, ["compare", "--file", str(file)])
    assert found.exit_code == 0, found.output
    text = (tmp_path / "there" / "study" / "table.md").read_text()
    assert "--test wilcoxon --columns acc" in text
    compare(tmp_path, "--file", str(file))  # which gives --out: what is on the command line comes first
    assert (tmp_path / "results" / "study" / "table.md").is_file()


BAD_FILES = {
    "protocols: [digits-split]\nmethod: [naive]": ["unknown entry", "'method'", "'methods'"],
    "- digits-split": ["list", "expected entries"],
    "protocols: [digits-split\n": ["no YAML"],
    "protocols: [digits-split]\nseeds: [zero]": ["seeds", "list of int"],
    "protocols: [digits-split]\ngrid: {gpm.threshold: 0.9}": ["gpm.threshold", "a list of values"],
    "protocols: [digits-split]\nset: [epochs]": ["set", "key: value"],
    "protocols: [digits-split]\ncolumns: [acc, 3]": ["columns", "list of str"],
    "protocols: [digits-split]\ncolumns: [acc, bwd]": ["study.yaml: columns: unknown column 'bwd'", "'bwt'"],
    "protocols: [digits-split]\njobs: two": ["jobs", "a number"],
    "protocols: [digits-split]\njobs: 0": ["error: study.yaml: jobs 0: expected at least 1"],
    "protocols: [digits-split]\ntest: anova": ["error: study.yaml: test 'anova': expected"],
    "protocols: [digits-split]\nset: {epochs: 0}": ["error: study.yaml: set epochs=0: expected at least 1"],
    "protocols: [digits-split]\nmethods: [gpm]\ngrid: {gpm.threshold: [0.9, 1.5]}": [
        "error: study.yaml: grid gpm.threshold=1.5: expected at most 1"
    ],
    "protocols: [digits-split]\nset: {lr: 1}\ngrid: {lr: [1, 2]}": [
        "error: study.yaml: set lr and grid lr of study.yaml are both given"
    ],
    "protocols: [digits-split]\nset: {gpm.lr: 1}\ngrid: {lr: [1, 2]}": ["set gpm.lr of study.yaml comes before"],
    "methods: [naive]": ["no protocol"],
}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--set", "epochs=0"], "error: --set epochs=0: expected at least 1"),
        (["--grid", "lr=0,1"], "error: --grid lr=0"),
        (["--jobs", "0"], "error: --jobs 0: expected at least 1"),
        (["--set", "epochs=1"], "error: study.yaml: grid gpm.threshold=1.5: expected at most 1"),
    ],
)
def test_errors_name_the_option_where_it_comes_before_the_file(tmp_path, options, expected):
    file = tmp_path / "study.yaml"
    file.write_text(
        "protocols: [digits-split]\nmethods: [naive, gpm]\njobs: 1\nset: {epochs: 2}\ngrid: {gpm.threshold: [1.5]}\n"
    )
    result = compare(tmp_path, "--file", str(file), *options, code=2)
    assert result.stderr.startswith(expected)


@pytest.mark.parametrize("text", BAD_FILES)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    result = compare(tmp_path, "--file", str(file), code=2)
    assert result.stderr.count("\n") == 1
    for fragment in BAD_FILES[text]:
        assert fragment in result.stderr
    assert not (tmp_path / "results").exists()
