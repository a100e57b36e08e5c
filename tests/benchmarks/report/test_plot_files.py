"""Plots as files of their own: whole without the page, named so that they can be found, and never in the way."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.report.heatmaps import NUMBERED
from benchmarks.report.look import REFERENCE, styles
from benchmarks.report.plot_files import plot_files, write_plots
from benchmarks.report.plots import draw
from benchmarks.report.study import Study
from benchmarks.report.writing import write
from tests.benchmarks.report.examples import joint, large, result, small, with_bases

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return plot_files(draw(small()))


def parsed(text: str) -> ElementTree.Element:
    """The root of a file."""
    return ElementTree.fromstring(text.encode())


def words(root: ElementTree.Element) -> list[str]:
    """What is written in a drawing."""
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def strokes(root: ElementTree.Element) -> set[str]:
    """Colours of the lines of a drawing."""
    return {colour for each in root.iter() for colour in re.findall(r"stroke: (#\w+)", each.get("style", ""))}


def groups(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """The parts of a drawing that matplotlib calls so."""
    return (group for group in root.iter(f"{SVG}g") if name in group.get("id", ""))


def test_names_say_what_is_in_them(files: dict[str, str]) -> None:
    labels = ("gpm-threshold-0-9", "naive", "joint")
    assert set(files) == {
        *(f"{name}-accuracy-curve.svg" for name in ("digits-split", "pmnist-gpm")),
        *(f"{name}-first-experience-curve.svg" for name in ("digits-split", "pmnist-gpm")),
        *(
            f"{name}-accuracy-against-{what}.svg"
            for name in ("digits-split", "pmnist-gpm")
            for what in ("time", "memory")
        ),
        *(f"digits-split-accuracy-matrix-{label}.svg" for label in labels),
        *(f"pmnist-gpm-accuracy-matrix-{label}.svg" for label in ("naive", "gpm")),
        "digits-split-free-share-gpm-threshold-0-9.svg",
        "pmnist-gpm-free-share-gpm.svg",
    }


def test_every_file_stands_alone(files: dict[str, str]) -> None:
    for name, text in files.items():
        root = parsed(text)
        assert root.tag == f"{SVG}svg", name
        width, height = (float(root.get(side, "").removesuffix("pt")) for side in ("width", "height"))
        assert [float(part) for part in root.get("viewBox", "").split()] == [0, 0, width, height]
        elements = list(root.iter())
        assert not {each.tag.removeprefix(SVG) for each in elements} & {"style", "script", "image", "foreignObject"}
        assert not any(each.get("class") for each in elements)  # nothing that a style sheet would have to say
        ids = [each.get("id") for each in elements if each.get("id")]
        assert len(ids) == len(set(ids))
        targets = [each.get(LINK, "") for each in elements if LINK in each.attrib]
        targets += [f"#{target}" for target in re.findall(r"url\(#([^)]*)\)", text)]
        assert {target.removeprefix("#") for target in targets} <= set(ids)
        assert all(each.get(LINK) for each in root.iter(f"{SVG}use"))
        assert set(re.findall(r"font-family: ([^;\"]*)", text)) | set(re.findall(r"font: \S+ ('[^;\"]*)", text)) == {
            "'DejaVu Sans', Verdana, sans-serif"
        }, name
        # Outside the names of the two vocabularies there is no address.
        assert set(re.findall(r'"(https?:[^"]*)"', text)) == {SVG[1:-1], LINK[1:].partition("}")[0]}
        first = next(each for each in elements if each.tag == f"{SVG}path")
        assert "fill: #ffffff" in first.get("style", "")  # a white ground, wherever it is shown
        # What the page's style sheet says of all drawings, without which corners are pointed and cells have seams.
        assert (root.get("stroke-linejoin"), root.get("stroke-linecap")) == ("round", "butt")
        assert all(mesh.get("shape-rendering") == "crispEdges" for mesh in groups(root, "QuadMesh"))
        assert root.find(f"{SVG}title") is not None
        assert root.findtext(f"{SVG}desc")


def test_every_file_has_its_series(files: dict[str, str]) -> None:
    looks = styles(["naive", "gpm threshold=0.9", "joint", "gpm"])
    for protocol, labels in (("digits-split", ["naive", "gpm threshold=0.9"]), ("pmnist-gpm", ["naive", "gpm"])):
        for kind in ("accuracy-curve", "first-experience-curve"):
            root = parsed(files[f"{protocol}-{kind}.svg"])
            assert set(labels) <= set(words(root)), (protocol, kind)
            assert {looks[label].colour.lower() for label in labels} <= strokes(root)
            assert ("joint" in words(root)) is (protocol == "digits-split")
            assert (REFERENCE["color"] in strokes(root)) is (protocol == "digits-split")
            assert len(list(groups(root, "PolyCollection"))) == len(labels)  # bands
            assert {"1", "2", "3", "after experience"} <= set(words(root))
        for kind, axis in (("time", "training time (s)"), ("memory", "peak memory (MiB)")):
            root = parsed(files[f"{protocol}-accuracy-against-{kind}.svg"])
            assert {*labels, axis, "ACC (%)"} <= set(words(root))
            assert {looks[label].colour.lower() for label in labels} <= strokes(root)
    root = parsed(files["digits-split-free-share-gpm-threshold-0-9.svg"])
    assert {"conv", "linear", "free share (%)"} <= set(words(root))
    for label, cells in (("naive", 9), ("joint", 3)):
        root = parsed(files[f"digits-split-accuracy-matrix-{label}.svg"])
        assert label in words(root)
        assert [len(mesh) for mesh in groups(root, "QuadMesh")] == [cells]
    assert "81.0" in words(parsed(files["digits-split-accuracy-matrix-naive.svg"]))  # of seeds 0, 1, 2


def test_a_colour_bar_keeps_its_cells_whole() -> None:
    drawn = draw(large(methods=2, experiences=NUMBERED + 1, seeds=1))
    root = parsed(plot_files(drawn)["digits-split-accuracy-matrix-method0.svg"])
    meshes = list(groups(root, "QuadMesh"))
    assert len(meshes) == 2
    assert all(mesh.get("shape-rendering") == "crispEdges" for mesh in meshes)


@pytest.mark.filterwarnings("ignore:Glyph 7")
def test_awkward_labels_make_names_and_stay_in_the_drawing() -> None:
    labels = ["a b", "a=b", "A-B", '<b>&"x href="#y', "ä", "bell\x07", "x" * 300, "x" * 299 + "y"]
    made = plot_files(draw(Study("x", "", [result(label, 0) for label in labels])))
    matrices = [name for name in made if "matrix" in name]
    assert len(matrices) == len(labels)
    assert matrices[:3] == [f"digits-split-accuracy-matrix-a-b{end}.svg" for end in ("", "-2", "-3")]
    assert all(re.fullmatch(r"[a-z0-9-]{1,130}\.svg", name) for name in made)
    titles = [parsed(made[name]).findtext(f"{SVG}title", "") for name in matrices]
    assert titles[3] == 'Accuracy matrix of <b>&"x href="#y'
    assert '<b>&"x href="#y' in words(parsed(made[matrices[3]]))
    assert titles[5] == "Accuracy matrix of bell\N{REPLACEMENT CHARACTER}"


def test_plots_of_an_earlier_report_go_and_everything_else_stays(tmp_path: Path) -> None:
    folder = tmp_path / "plots"
    before = write(tmp_path, Study("x", "", [with_bases("gpm", 0), result("naive", 0)]))
    gone = {folder / f"digits-split-{kind}-gpm.svg" for kind in ("free-share", "accuracy-matrix")}
    assert gone <= set(before)
    mine = {
        folder / "mine.svg": b"<svg/>",
        folder / "copy.svg": (folder / "digits-split-free-share-gpm.svg").read_bytes(),
        folder
        / "digits-split-free-share-ogd.svg": b"<svg>edited</svg>\n<!-- python -m benchmarks, 0123456789abcdef -->\n",
        folder / "notes.txt": b"x",
        folder / "below" / "digits-split-free-share-gpm.svg": b"x",
    }
    for path, content in mine.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    edited = folder / "digits-split-accuracy-matrix-naive.svg"
    edited.write_text(edited.read_text().replace("naive", "plain training"))
    after = write(tmp_path, Study("x", "", [result("ogd", 0)]))
    assert not any(path.exists() for path in gone)
    assert {path: path.read_bytes() for path in mine} == mine
    assert "plain training" in edited.read_text()
    assert {path for path in folder.iterdir() if path.is_file()} == {
        *(path for path in after if path.parent == folder),
        *(path for path in mine if path.parent == folder),
        edited,
    }


def test_nothing_is_made_without_plots_and_the_same_study_gives_the_same_files(tmp_path: Path) -> None:
    write_plots(tmp_path / "none", {})
    assert list(tmp_path.iterdir()) == []
    runs = {seed: Study("x", "", [result("naive", seed), joint(seed)]) for seed in (0, 1)}
    for name in ("a", "b"):
        write_plots(tmp_path / name, draw(runs[0]))
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second
    assert plot_files(draw(runs[1])).keys() == first.keys()  # other numbers, the same names: a paper's figures are kept


def test_a_plot_that_cannot_be_written_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plots(tmp_path, draw(Study("x", "", [result("naive", 0)])))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("benchmarks.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_plots(tmp_path, draw(Study("x", "", [result("naive", 1)])))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
