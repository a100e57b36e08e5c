"""Comparisons from a YAML file: it says what the options say, and what is wrong in it is named."""

from __future__ import annotations

import pytest

from tests.benchmarks.comparing import QUICK, compare, counting


def test_a_file_says_what_the_options_say(tmp_path, monkeypatch):
    done = counting(monkeypatch)
    file = tmp_path / "study.yaml"
    file.write_text(
        "protocols: [digits-split]\nmethods: [naive, gpm]\nseeds: [0, 1]\n"
        "set: {epochs: 1, train_limit: 40, n_experiences: 2, n_samples: 20}\n"
        "grid:\n  gpm.threshold: [0.9, [0.9, 0.95]]\n"
    )
    compare(tmp_path, "--file", str(file))
    assert len(done) == 6
    text = (tmp_path / "results" / "study" / "table.md").read_text()
    assert "--grid 'gpm.threshold=0.9;0.9,0.95;'" in text
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


BAD_FILES = {
    "protocols: [digits-split]\nmethod: [naive]": ["unknown entry", "'method'", "'methods'"],
    "- digits-split": ["list", "expected entries"],
    "protocols: [digits-split\n": ["no YAML"],
    "protocols: [digits-split]\nseeds: [zero]": ["seeds", "list of int"],
    "protocols: [digits-split]\ngrid: {gpm.threshold: 0.9}": ["gpm.threshold", "a list of values"],
    "protocols: [digits-split]\nset: [epochs]": ["set", "key: value"],
    "protocols: [digits-split]\njobs: two": ["jobs", "a number"],
    "methods: [naive]": ["no protocol"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    result = compare(tmp_path, "--file", str(file), code=2)
    assert result.stderr.count("\n") == 1
    for fragment in BAD_FILES[text]:
        assert fragment in result.stderr
    assert not (tmp_path / "results").exists()
