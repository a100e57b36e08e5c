from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from benchmarks.report.html import page
from benchmarks.report.study import Study
from tests.benchmarks.report.examples import joint, large, result, small

#: Elements that have no end.
_VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Checks that elements are closed in order, and collects what there is."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.words: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} ends without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)
            self.words.setdefault(self.open[-1], []).append(data)


def read(text: str) -> Reader:
    """Parse a page."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def small_page() -> str:
    return page(small())


def test_the_page_is_well_formed_and_loads_nothing(small_page: str) -> None:
    _loads_nothing(small_page)


def _loads_nothing(text: str) -> None:
    """Look for whatever a browser would fetch, or run."""
    found = read(text)
    names = {tag for tag, _ in found.elements}
    assert not names & {"script", "img", "iframe", "object", "embed", "image", "foreignobject", "base"}
    for tag, attributes in found.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                assert (value or "").startswith("#") or value == "data:,", (tag, key, value)
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")
    assert "@import" not in text
    assert "http" not in text
    assert text.count("data:,") == text.count("data:") == 1


def test_ids_are_unique_and_links_lead_somewhere(small_page: str) -> None:
    found = read(small_page)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for tag, a in found.elements if tag == "a"]
    assert len(targets) == 3
    assert {(target or "")[1:] for target in targets} <= set(ids)
    labelled = [a["aria-labelledby"] for tag, a in found.elements if tag == "svg"]
    assert labelled
    assert set(labelled) <= set(ids)


def test_tables_and_figures_can_be_read_aloud(small_page: str) -> None:
    found = read(small_page)
    assert all(a.get("scope") in ("col", "row") for tag, a in found.elements if tag == "th")
    names = ("table", "caption", "figure", "figcaption")
    count = {name: sum(tag == name for tag, _ in found.elements) for name in names}
    assert count["table"] == count["caption"] > 0
    assert count["figure"] == count["figcaption"] > 0
    assert all(a.get("role") == "img" for tag, a in found.elements if tag == "svg")
    assert ("html", {"lang": "en"}) in found.elements


def test_everything_of_the_study_is_there(small_page: str) -> None:
    text = " ".join("".join(read(small_page).text).split())
    for part in (
        "A study",
        "python -m benchmarks compare digits-split pmnist-gpm",
        "scikit-learn digits, 5 experiences of 2 classes, a head each",
        "gpm threshold=0.9",
        "89.33 ± 0.33",
        "[88.51, 90.16]",  # 268 / 3 ± 4.302653 x (1 / 3) / sqrt 3
        "NonFiniteError: <loss> is & stays NaN",
        "needs task labels",
        "2 runs not finished",
        "93.91 ± 0.16",
        "arXiv:2211.00789",
        "0123456789ab",
        "peak resident memory of the process during the run",
    ):
        assert part in text, part
    assert "hidden" not in text  # settings that are None do not apply
    assert "Paired tests" in text
    assert "Holm" in text


def test_what_is_not_there_has_no_heading() -> None:
    text = page(Study("x", "", [result("naive", 0)]))
    for words in (
        "Failed runs",
        "Methods left out",
        "Figures from elsewhere",
        "Paired tests on",
        "Contents",
        "Not complete",
    ):
        assert words not in text


def test_everything_is_escaped() -> None:
    label = '<b>&"x'
    nasty = '<script>alert("1")</script>'
    runs = [
        result(label, seed, method=nasty, hyper_parameters={nasty: nasty}, device=nasty, versions={nasty: nasty},
               code=nasty, peak_memory_kind=nasty, protocol=name, changed={nasty: nasty}, sessions=2,
               nondeterministic=[nasty])
        for seed in range(2) for name in (nasty, "other")
    ]  # fmt: skip
    study = Study(nasty, nasty, runs, [(nasty, nasty, 0, nasty)], {nasty: {nasty: nasty}})
    text = page(study)
    found = read(text)
    assert not {"script", "b"} & {tag for tag, _ in found.elements}
    assert "&lt;b&gt;&amp;&quot;x" in text
    assert nasty in "".join(found.text)
    assert label in "".join(found.text)


@pytest.mark.parametrize(
    ("change", "heavy"),
    [
        ({"code": "another"}, True),
        ({"versions": {"torch": "1"}}, True),
        ({"device": "cuda"}, False),
        ({"threads": 2}, False),
    ],
)
def test_runs_of_different_circumstances_are_warned_of(change: dict[str, Any], heavy: bool) -> None:
    text = page(Study("x", "", [result("naive", 0), result("gpm", 0, **change)]))
    assert ("not of one code and one set of versions" in text) is heavy
    assert ("not made under the same circumstances" in text) is not heavy
    assert 'class="warning"' in text
    assert 'class="warning"' not in page(Study("x", "", [result("naive", 0), result("gpm", 0)]))


def test_the_highest_mean_is_not_sold_as_the_best() -> None:
    # a and b: differences 1, 2, 3 as in the test of statistics, not told apart; c: far away, evenly.
    runs = [
        result(label, seed, acc=value)
        for label, values in {"a": (71, 82, 93), "b": (70, 80, 90), "c": (10.0, 21.01, 32.02)}.items()
        for seed, value in enumerate(values)
    ]
    text = page(Study("x", "", [*runs, *(joint(seed) for seed in range(3))]))
    rows = {name: re.search(rf'<th scope="row">{name}</th><td>3</td><td>(.*?)</td>', text) for name in ("a", "b", "c")}
    assert all(rows.values())
    assert "▲" in rows["a"][1]  # type: ignore[index]
    assert "≈" in rows["b"][1]  # type: ignore[index]
    assert "mark" not in rows["c"][1]  # type: ignore[index]
    assert "does not mean equal" in text
    assert "≈" not in page(Study("x", "", runs), test="wilcoxon")  # three pairs cannot tell anything


def test_published_figures_of_another_protocol_say_so() -> None:
    text = page(Study("x", "", [result("halrp", 0, protocol="cifar100-halrp")]))
    row = text[text.index('<th scope="row">halrp</th><td class="figure">67.37') :]
    assert row.index("<td>no</td>") < row.index("a new Adam for every experience")


def test_the_same_study_gives_the_same_page(small_page: str) -> None:
    assert page(small()) == small_page


def test_a_table_of_contents_only_for_several_protocols(small_page: str) -> None:
    assert "<nav" in small_page
    assert "<nav" not in page(Study("x", "", [result("naive", 0)]))


def test_a_matrix_of_tests_for_as_many_labels_as_fit() -> None:
    def labels(count: int) -> Study:
        return Study("x", "", [result(f"m{k}", s, acc=50.0 + k + k * s / 9) for k in range(count) for s in range(2)])

    assert 'class="matrix"' in page(labels(3))
    many = page(labels(17))
    assert 'class="matrix"' not in many
    assert "All 136 pairs" in many


def test_a_large_study_is_well_formed() -> None:
    text = page(large(methods=4, experiences=13, seeds=2))
    _loads_nothing(text)
    found = read(text)
    assert sum(tag == "svg" for tag, _ in found.elements) == 4 + 1 + 4
