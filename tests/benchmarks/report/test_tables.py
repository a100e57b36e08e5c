from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from benchmarks.report.latex import escape, latex
from benchmarks.report.study import Study
from benchmarks.report.summary import METRICS, summarise
from benchmarks.report.tables import csv_table, markdown
from benchmarks.report.writing import write
from tests.benchmarks.report.examples import joint, result, small


def test_csv_reads_back_to_the_same_numbers() -> None:
    study = small()
    lines = list(csv.DictReader(io.StringIO(csv_table(study))))
    numbers = ["mean", "std", "ci_low", "ci_high"]
    assert list(lines[0]) == ["protocol", "label", "seeds", "metric", *numbers, "changed", "diverged", "failed"]
    assert len(lines) == 5 * len(METRICS)
    for protocol in study.protocols:
        for row in summarise(study.of(protocol)):
            for key, found in row.figures.items():
                (line,) = [
                    each
                    for each in lines
                    if (each["protocol"], each["label"], each["metric"]) == (protocol, row.label, key)
                ]
                read = [float(line[name]) if line[name] else None for name in numbers]
                assert read == [found.mean, found.std, found.low, found.high]
                assert int(line["seeds"]) == found.count


def test_csv_keeps_awkward_labels() -> None:
    label = 'a, "b"\nc'
    study = Study("x", "", [result(label, 0) | {"label": label}])
    assert next(csv.DictReader(io.StringIO(csv_table(study))))["label"] == label


def test_markdown_has_everything_and_rows_of_one_width() -> None:
    text = markdown(small())
    assert "python -m benchmarks compare digits-split pmnist-gpm" in text
    assert "GPM 93.91" in text  # a note of the protocol
    assert "Left out: halrp: needs task labels" in text
    assert "Failed: ogd, seed 1: NonFiniteError: &lt;loss>" in text
    assert "2 run(s) not finished" in text
    assert "Published for gpm: ACC 93.91 ± 0.16" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    naive = next(line for line in text.splitlines() if line.startswith("| naive"))
    # Mean of 80, 81, 82 on the first of three experiences: (81 + 90 + 97) / 3, deviation 1 / 3.
    # The interval: t(.975, 2) = 4.302653 times 1 / 3 / sqrt 3 is .828.
    assert "| 89.33 ± 0.33 [88.51, 90.16] |" in naive


def test_markdown_keeps_awkward_labels_in_their_cells() -> None:
    study = Study("x", "", [result("a", 0) | {"label": "a|b <script>\nc"}])
    assert "| a\\|b &lt;script> c |" in markdown(study)


def test_a_single_run_has_no_spread() -> None:
    text = markdown(Study("x", "", [result("a", 3)]))
    assert "±" not in next(line for line in text.splitlines() if line.startswith("| a "))
    assert "One run, seed 3" in latex(Study("x", "", [result("a", 3)]))


def bad_runs() -> Study:
    """All with fewer epochs, one label with a threshold besides; one run diverged, two failed."""
    few = {"epochs": "1"}
    runs = [
        *(result("naive", seed, changed=few, diverged=seed == 1) for seed in range(3)),
        *(result("gpm", seed, changed={**few, "threshold": "0.5"}) for seed in range(2)),
    ]
    failures = [("digits-split", "gpm", 2, "boom"), ("digits-split", "ogd_x", 0, "boom")]
    return Study("x", "", runs, failures=failures)


def test_latex_says_what_a_reader_has_to_know() -> None:
    text = latex(bad_runs())
    assert "Changed from the protocol: epochs=1." in text
    assert "over seeds 0, 1, 2 (not the same for all: gpm 0, 1)" in text or "over seeds 0, 1 (not the same" in text
    assert "Diverged, but in the figures: 1 of naive." in text
    assert r"Runs that failed and are left out: 1 of gpm, 1 of ogd\_x." in text
    assert r"gpm (threshold=0.5) & 2 & " in text
    assert r"naive & 3 (1 diverged) & $89.33 \pm 0.33$" in text
    # Below it the interval, in a cell of its own for each figure.
    row = text.splitlines().index(next(line for line in text.splitlines() if line.startswith("naive")))
    below = text.splitlines()[row + 1]
    assert below.startswith(r" &  & {\scriptsize $[88.51, 90.16]$} & {\scriptsize $[-14.74, -12.26]$}")
    assert below.count("&") == text.splitlines()[row].count("&")
    assert "failed" not in latex(Study("x", "", [result("a", 0), result("a", 1)]))


def test_csv_says_what_a_reader_has_to_know() -> None:
    lines = list(csv.DictReader(io.StringIO(csv_table(bad_runs()))))
    found = {(line["label"], line["changed"], line["diverged"], line["failed"]) for line in lines}
    assert found == {("naive", "epochs=1", "1", "0"), ("gpm", "epochs=1, threshold=0.5", "0", "1")}


def test_versions_of_libraries_that_differ_are_warned_of_and_other_packages_named() -> None:
    runs = [result("a", 0, libraries={"numpy": "1"}), result("b", 0, libraries={"numpy": "2"}, origin="mine 1.0 abc")]
    text = markdown(Study("x", "", runs))
    assert "**Warning**: numpy differs between runs: 1 (a); 2 (b)." in text
    assert "b is of another package: mine 1.0 abc." in text
    alike = [result("a", 0, libraries={"numpy": "1", "quadprog": "not installed"}), result("b", 0)]
    assert "Warning" not in markdown(Study("x", "", alike))


def test_markdown_counts_runs_that_diverged() -> None:
    text = markdown(bad_runs())
    assert "| naive | 3 (1 diverged) | 89.33" in text
    assert "(not the same for all: " in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50 % of_it & #1 {x} $y$", r"50 \% of\_it \& \#1 \{x\} \$y\$"),
        ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"),
        ("a\nb", "a b"),
    ],
)
def test_latex_is_escaped(text: str, expected: str) -> None:
    assert escape(text) == expected


def test_latex_is_whole() -> None:
    label = "a_b 50% {& $ #"
    study = Study("x", "python 100 %\nrm", [*small().results, result("a", 0) | {"label": label, "protocol": "my_own"}])
    text = latex(study)
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert "% rm" in text.splitlines()
    bare = re.sub(r"\\[\\%&#_{}$]", lambda found: "\\\\" if found[0] == "\\\\" else "", code)
    assert "%" not in bare
    assert "#" not in bare
    assert "_" not in bare
    assert bare.count("$") % 2 == 0
    depth = 0
    for mark in bare:
        depth += (mark == "{") - (mark == "}")
        assert depth >= 0
    assert depth == 0
    assert re.findall(r"\\begin\{(\w+)\}", code) == ["table", "tabular"] * 3
    assert re.findall(r"\\end\{(\w+)\}", code) == ["tabular", "table"] * 3
    assert code.count(r"\toprule") == code.count(r"\midrule") == code.count(r"\bottomrule") == 3
    for tabular in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", bare, flags=re.DOTALL):
        columns, body = tabular
        lines = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert lines
        assert {line.count("&") for line in lines} == {len(columns) - 1}
    assert r"$89.33 \pm 0.33$" in code
    assert r"a\_b 50\% \{\& \$ \#" in code
    assert "my\\_own" in code


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_files_are_the_same_twice(tmp_path: Path, test: str) -> None:
    first = write(tmp_path / "a", small(), test=test)  # type: ignore[arg-type]
    second = write(tmp_path / "b" / "c", small(), test=test)  # type: ignore[arg-type]
    assert [path.name for path in first[:4]] == ["report.html", "table.md", "table.csv", "table.tex"]
    assert {path.parent for path in first[4:]} == {tmp_path / "a" / "plots"}
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file()) == sorted(first)


@pytest.mark.parametrize(
    "study",
    [
        Study("none", "", []),
        Study("failed", "x", [], failures=[("digits-split", "gpm", 0, "no")], left_out={"other": {"a": "b"}}),
        Study("one", "x", [result("naive", 0)]),
        Study("joint", "x", [joint(0), joint(1)]),
        Study("unknown", "x", [result("naive", 0, protocol="no <such> thing")]),
        Study("bare", "x", [{"protocol": "p", "label": "l", "seed": 0}]),
        Study(
            "holes",
            "x",
            [
                result("a", seed, acc=value, bwt=None, train_seconds=float("nan"), peak_memory_kind=None, versions=None)
                for seed, value in enumerate([None, float("nan"), 50.0])
            ]
            + [result("b", seed) for seed in range(3)],
        ),
    ],
    ids=lambda study: study.title,
)
def test_there_is_a_report_whatever_there_is_not(study: Study, tmp_path: Path) -> None:
    for test in ("t", "wilcoxon"):
        for path in write(tmp_path, study, test=test):  # type: ignore[arg-type]
            text = path.read_text(encoding="utf-8")
            assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", text.lower()), path.name
            assert "None" not in text
