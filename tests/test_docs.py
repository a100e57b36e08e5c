"""The documentation runs: every Python block, every command's options, the site without a warning or a broken link."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import shlex
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer

from benchmarks import plan
from benchmarks.cli import app
from benchmarks.fixed import figures
from benchmarks.methods import METHODS
from benchmarks.protocols import PROTOCOLS
from benchmarks.request import make_request
from benchmarks.study_file import read_file
from tests.processes import run_to_end

ROOT = Path(__file__).parents[1]
EXAMPLES = [ROOT / "examples" / name for name in ("l2_anchor", "mean_gradient")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Languages of blocks; only `python` is run.
LANGUAGES = {"", "bash", "python", "text", "toml", "yaml"}
#: Methods that the pages give as examples of somebody else's.
OTHERS = {"mine", "l2-anchor", "mean-gradient"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Language, line and text of each fenced block."""
    found, fence, start = [], None, 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if fence is None and line.lstrip().startswith("```"):
            fence, start = line.strip().removeprefix("```"), number
        elif fence is not None and line.strip() == "```":
            found.append((fence, start, "\n".join(lines[start : number - 1]) + "\n"))
            fence = None
    assert fence is None, f"{name_of(page)}:{start}: a block is not closed"
    return found


def split_mnist(n_experiences: int, *, return_task_id: bool = False, **rest: Any) -> Any:
    """Stands in for Avalanche's, which downloads: random images of the same size, 150 an experience."""
    from avalanche.benchmarks import tensors_benchmark

    draw, size = torch.Generator().manual_seed(0), 10 // n_experiences
    parts = []
    for task in range(n_experiences):
        images = torch.rand(150, 1, 28, 28, generator=draw)
        parts.append((images, torch.randint(task * size, (task + 1) * size, (150,), generator=draw)))
    tasks = list(range(n_experiences)) if return_task_id else [0] * n_experiences
    return tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=tasks)


WITH_PYTHON = [page for page in PAGES if any(language == "python" for language, _, _ in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """From the first to the last, in one namespace; some network and seconds are saved by the stand-in above."""
    monkeypatch.setattr("avalanche.benchmarks.SplitMNIST", split_mnist)
    for example in EXAMPLES:
        monkeypatch.syspath_prepend(example / "src")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "page"}
    for language, line, text in blocks(page):
        if language == "python":
            # Errors name the page and the line in it.
            exec(compile("\n" * line + text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_known_languages(page):
    for language, line, _ in blocks(page):
        assert language in LANGUAGES, f"{name_of(page)}:{line}: {language}"


def test_files_that_say_the_same_are_read(tmp_path):
    """Every YAML block is a comparison that could be carried out."""
    found = [block for page in PAGES for language, _, block in blocks(page) if language == "yaml"]
    assert found
    for block in found:
        (tmp_path / "study.yaml").write_text(block)
        request = make_request(read_file(tmp_path / "study.yaml"), tmp_path / "results", "compare", ("naive",))
        runs = plan.prepare(request).runs
        assert len({run.folder.key for run in runs}) == len(runs) > 1


def commands(page: Path) -> list[list[str]]:
    """The words after `python -m benchmarks` of every command: in blocks, indented text and code within a line."""
    text = page.read_text(encoding="utf-8")
    code = [line for _, _, block in blocks(page) for line in block.splitlines()]
    code += [line for line in text.splitlines() if line.startswith("    ")]
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    code += re.findall(r"`([^`]+)`", outside)
    found = []
    for line in code:
        call = re.search(r"python3? -m benchmarks(?:\s+(.*))?$", line.split(" #")[0].strip(), flags=re.S)
        if call is not None:
            found.append(shlex.split(call.group(1) or ""))
    return found


COMMANDS = [(page, words) for page in PAGES for words in commands(page) if words]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda part: part.name if isinstance(part, Path) else None)
def test_commands_exist(page, words):
    known = typer.main.get_command(app).commands
    assert words[0] in known, f"{name_of(page)}: there is no command {words[0]!r}"
    options = {option: parameter for parameter in known[words[0]].params for option in parameter.opts}
    rest = words[1:]
    for position, word in enumerate(rest):
        option, given = word.partition("=")[::2] if word.startswith("--") else ("", "")
        if option:
            assert option in options, f"{name_of(page)}: {words[0]} has no option {option}"
        before = rest[position - 1] if position else ""
        value = given or word
        if (option or before) in ("--method", "--methods") and (given or not option):
            assert set(value.split(",")) <= {*METHODS, *OTHERS}, f"{name_of(page)}: {value}"
        # What is in capitals stands for something.
        elif words[0] in ("run", "compare", "list") and not option and not before.startswith("--") and word.islower():
            others = METHODS if words[0] == "list" else ()
            assert word in (*PROTOCOLS, *others), f"{name_of(page)}: there is no protocol {word!r}"


def test_commands_are_found():
    assert len({words[0] for _, words in COMMANDS}) > 3
    assert ["compare", "digits-permuted", "--methods", "naive,l2-anchor", "--set", "strength=0.003"] in [
        words for _, words in COMMANDS
    ]


def test_contributing_shows_the_examples_as_they_are():
    shown = {text for _, _, text in blocks(ROOT / "CONTRIBUTING.md")}
    projects = []
    for example in EXAMPLES:
        name = example.name
        for file in (f"src/{name}.py", f"tests/test_{name}.py"):
            assert (example / file).read_text(encoding="utf-8") in shown, f"{file} has changed: copy it"
        projects.append((example / "pyproject.toml").read_text(encoding="utf-8"))
    assert projects[0] in shown, "pyproject.toml has changed: copy it"
    renamed = projects[0].replace("l2-anchor", "mean-gradient").replace("l2_anchor", "mean_gradient")
    assert projects[1] == renamed, "that of the second has other names alone, so it says"


def links(page: Path) -> list[str]:
    """Where the links of a page lead to; what stands in code is none."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "", text)
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.M)


def places(page: Path) -> set[str]:
    """What `#` can name in a page: its headings, as code hosts and the site write them."""
    outside = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.*)$", outside, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere_in_the_repository():
    """Also where nothing is built: pages that the site alone has are named by what they are made of."""
    relative, broken = 0, []
    for page in PAGES:
        for link in links(page):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            relative += 1
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            inside = target.exists() and target.is_relative_to(ROOT)
            # Anchors of the reference are of docstrings, and there on the site alone.
            anchored = parts.fragment and target.suffix == ".md" and target.parent.name != "api"
            if not inside or (anchored and parts.fragment not in places(target)):
                broken.append(f"{name_of(page)}: {link}")
    assert relative > 30
    assert not broken


@pytest.mark.parametrize("method", ["gpm", "ogd", "logd", "kfac", "xkfac", "halrp"])
def test_method_pages_are_complete(method):
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / f"{method}.md").read_text(encoding="utf-8"), re.M)
    assert "What it computes" in headings
    assert any(heading.startswith("Departures") for heading in headings)
    assert any("cost" in heading.lower() for heading in headings)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run_to_end(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Links(HTMLParser):
    """Names of places in a page, where it leads to, and what a browser loads for it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.places |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif "src" in given or (tag == "link" and given.get("rel") != "canonical"):
            self.loaded.append(given.get("src") or given.get("href", ""))


def test_the_site_has_no_broken_links_and_loads_nothing_from_elsewhere(site):
    # The page for what is not found has links from the top of a server.
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 15
    broken = defaultdict(list)
    for page, content in pages.items():
        for link in [*content.links, *content.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in content.loaded:
                    broken[page.name].append(f"loaded from elsewhere: {link}")
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            lost = target in pages and parts.fragment and unquote(parts.fragment) not in pages[target].places
            if not target.is_file() or lost:
                broken[page.name].append(link)
    assert not broken
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?https?:", styles)


def test_the_site_shows_what_is_generated(site):
    protocols = Links(site / "protocols.html").places
    assert set(PROTOCOLS) <= protocols
    text = html.unescape((site / "protocols.html").read_text(encoding="utf-8"))
    for protocol in PROTOCOLS.values():
        assert all(f"<td>{value}</td>" in text for value in figures(protocol).values()), protocol.name
    assert "avalanche_gradproj.plugins.gpm.GPMPlugin" in Links(site / "api" / "plugins.html").places
    assert "what-a-contribution-shows" in Links(site / "contributing.html").places
    assert not (site / "hooks.py").exists()
