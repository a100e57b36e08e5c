from __future__ import annotations

import re

import pytest

from benchmarks.methods import METHODS
from benchmarks.protocols import PROTOCOLS
from benchmarks.published import PUBLISHED, Published, published
from benchmarks.report.protocol_facts import beside, published_text
from benchmarks.report.summary import summarise
from tests.benchmarks.report.examples import result, small


@pytest.mark.parametrize("record", PUBLISHED, ids=lambda record: f"{record.protocol}-{record.method}-{record.acc}")
def test_records_belong_to_something_and_say_where_they_are_from(record: Published) -> None:
    assert record.protocol in PROTOCOLS
    assert record.method in METHODS
    assert 0 < record.acc < 100
    assert record.source
    assert record.differences
    assert not re.search(r"/(work|home|root|tmp)\b", record.source + record.differences)


def test_figures_agree_with_the_notes_of_the_protocols() -> None:
    for name, figures in {
        "pmnist-gpm": ("93.91", "93.20", "-3.82"),
        "cifar100-gpm": ("72.48", "68.80", "79.58", "-0.9"),
        "pmnist-logd": ("82.17", "+4.62", "84.3"),
        "cifar100-logd": ("69.97", "70.56"),
        "cifar100-halrp": ("67.37",),
    }.items():
        notes = " ".join(PROTOCOLS[name].notes)
        numbers = {value for record in published(name) for value in (record.acc, record.bwt)}
        for figure in figures:
            assert figure in notes
            assert float(figure) in numbers


def test_only_the_protocols_own_method_on_its_own_settings_agrees() -> None:
    agreeing = {(record.protocol, record.method, record.acc) for record in PUBLISHED if record.agrees}
    assert agreeing == {
        ("pmnist-gpm", "gpm", 93.91),
        ("pmnist-gpm", "gpm", 93.20),
        ("cifar100-gpm", "gpm", 72.48),
        ("pmnist-logd", "logd", 82.17),
        ("pmnist-logd", "logd", 81.66),
    }


def test_bwt_divided_by_all_experiences_is_converted() -> None:
    for record in PUBLISHED:
        said = re.findall(r"BWT ([-+][\d.]+),? (?:there, )?divided by all 20", record.source + record.differences)
        for text in said:
            assert record.bwt == pytest.approx(float(text) * 20 / 19, abs=0.006)


def test_three_seeds_of_the_official_code_by_hand() -> None:
    values = (82.17, 81.58, 81.24)
    mean = sum(values) / 3
    (record,) = [each for each in PUBLISHED if "81.58" in each.source]
    assert record.acc == round(mean, 2)
    assert record.acc_std == round((sum((value - mean) ** 2 for value in values) / 2) ** 0.5, 2)


def test_a_changed_run_is_no_longer_the_same_protocol() -> None:
    own = [result("gpm", 0, protocol="pmnist-gpm")]
    changed = [result("gpm lr=1", 0, protocol="pmnist-gpm", changed={"lr": "1"})]
    rows = summarise({"gpm": own, "gpm lr=1": changed})
    found = [each for each in beside("pmnist-gpm", rows) if each.record.acc == 93.91]
    assert [each.row.label if each.row else None for each in found] == ["gpm", "gpm lr=1"]
    assert [each.agrees for each in found] == [True, False]
    assert found[1].differences.startswith("changed in this run: lr=1")


@pytest.mark.parametrize(("images", "same"), [("245cfb531b7d2321", True), (None, True), ("fashion", False)])
def test_a_figure_on_other_images_is_not_of_the_same_protocol(images: str | None, same: bool) -> None:
    """An archive of MNIST's shape may hold anything."""
    runs = [result("gpm", seed, protocol="pmnist-gpm", data=images) for seed in range(2)]
    found = [each for each in beside("pmnist-gpm", summarise({"gpm": runs})) if each.record.acc == 93.91]
    assert [each.agrees for each in found] == [same]
    assert ("other images" in found[0].differences) is not same


def test_methods_that_were_not_run_are_beside_nothing() -> None:
    found = beside("pmnist-gpm", summarise(small().of("pmnist-gpm")))
    assert {each.record.method for each in found if each.row is None} == {"ewc", "agem", "replay", "joint"}
    assert beside("unknown", []) == []


def test_published_figures_in_words() -> None:
    (bound,) = [each for each in PUBLISHED if each.bound]
    assert published_text(bound, "acc") == "above 90"
    assert published_text(bound, "bwt") == "-"
    (gpm,) = [each for each in PUBLISHED if each.acc == 72.48]
    assert (published_text(gpm, "acc"), published_text(gpm, "bwt")) == ("72.48 ± 0.40", "-0.9")
    (agem,) = [each for each in PUBLISHED if each.acc == 83.56]
    assert published_text(agem, "bwt") == "-14 ± 1"
