"""The page in a real browser: nothing too wide, nothing cut off, nothing loaded, readable in grey."""

from __future__ import annotations

import html
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.html import page
from benchmarks.report.page_style import CSS
from benchmarks.report.plot_files import plot_files
from benchmarks.report.plots import draw
from tests.benchmarks.report.examples import large, small
from tests.processes import run_to_end

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(_BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]

#: Looks at the finished page, and writes what it finds into it.
_MEASURE = """<script>
window.addEventListener("load", () => {
  const found = {figures: 0, empty: [], wide: [], cut: [], covered: [], resources: [], tables: []};
  const name = (element) => element.id || element.className || element.tagName;
  const view = document.documentElement.clientWidth;
  found.view = view;
  found.page = document.documentElement.scrollWidth;
  for (const figure of document.querySelectorAll("figure")) {
    const box = figure.querySelector("svg").getBoundingClientRect();
    found.figures += 1;
    if (box.width < 50 || box.height < 20) found.empty.push(figure.textContent.slice(0, 40));
  }
  for (const element of document.querySelectorAll("body *")) {
    const frame = element.closest(".scroll");
    if (frame && frame !== element || element.closest("svg") && element.tagName !== "svg") continue;
    const box = element.getBoundingClientRect();
    if (box.right > view + 0.5 || box.left < -0.5) found.wide.push(name(element));
  }
  for (const frame of document.querySelectorAll(".scroll"))
    if (frame.scrollWidth > frame.clientWidth + 1) found.tables.push(frame.textContent.slice(0, 40));
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    const boxes = [];
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (!box.width) continue;
      if (box.left < frame.left - 0.5 || box.right > frame.right + 0.5 || box.top < frame.top - 0.5
          || box.bottom > frame.bottom + 0.5) found.cut.push(text.textContent);
      for (const [other, words] of boxes)
        if (Math.min(box.right, other.right) - Math.max(box.left, other.left) > 1
            && Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top) > 4)
          found.covered.push(text.textContent + " / " + words);
      boxes.push([box, text.textContent]);
    }
  }
  for (const entry of performance.getEntriesByType("resource")) found.resources.push(entry.name);
  const note = document.createElement("pre");
  note.id = "measured";
  note.textContent = JSON.stringify(found);
  document.body.append(note);
});
</script>"""


@contextmanager
def served(text: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a page to this machine alone: its address, and the list of what is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/report.html" else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode() if self.path == "/report.html" else b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/report.html", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def browse(folder: Path, address: str, *arguments: str, width: int = 1280, height: int = 900) -> tuple[str, str]:
    """Open a page without a window; a browser that hangs as it starts is started once more.

    Returns:
        What the browser wrote to its standard output, and its log.
    """
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1 "
        "--no-proxy-server --virtual-time-budget=4000 --enable-logging=stderr"
    )
    command = [str(_BROWSER), *quiet.split(), f"--window-size={width},{height}", *arguments, address]
    try:
        done = run_to_end([*command, f"--user-data-dir={folder / 'profile'}"], limit=100)
    except AssertionError:
        done = run_to_end([*command, f"--user-data-dir={folder / 'another profile'}"], limit=100)
    return done.stdout, done.stderr


def measure(folder: Path, text: str, width: int) -> dict[str, Any]:
    """Open a copy of a page that measures itself."""
    with served(text.replace("</body>", f"{_MEASURE}</body>")) as (address, asked):
        out, log = browse(folder, address, "--dump-dom", width=width)
    found = re.search(r'<pre id="measured">(.*?)</pre>', out, flags=re.DOTALL)
    assert found, f"the page did not come up: {log[-2000:]}"
    console = re.findall(r".*CONSOLE.*", log)
    return {**json.loads(html.unescape(found[1])), "console": console, "asked": sorted(set(asked))}


@pytest.fixture(scope="module")
def many() -> str:
    return page(large())


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("which", ["many", "small"])
def test_everything_has_its_place(which: str, width: int, many: str, tmp_path: Path) -> None:
    found = measure(tmp_path, many if which == "many" else page(small()), width)
    assert found["view"] == width
    assert found["figures"] == (18 if which == "many" else 15)
    assert found["page"] <= width
    assert found["asked"] == ["/report.html"]
    for problem in ("empty", "wide", "cut", "covered", "resources", "console"):
        assert found[problem] == [], problem
    if width == 1280:
        assert found["tables"] == []


def test_the_measuring_sees_what_is_wrong(tmp_path: Path) -> None:
    text = page(small())
    start = text.index("<figure>")
    wrong = (
        '<div id="broad" style="width: 3000px">x</div><img src="no-such-file.png" alt="">'
        '<img src="http://elsewhere.invalid/x.png" alt="">'
        "<script>console.error('oh no')</script>"
        '<figure><svg width="5pt" height="5pt"><text x="200" y="4">outside</text></svg></figure>'
        '<figure><svg width="90pt" height="50pt"><text x="5" y="20">one</text><text x="9" y="20">two</text></svg>'
        "</figure>"
    )
    found = measure(tmp_path, text[:start] + wrong + text[start:], 1280)
    assert found["page"] >= 3000
    assert "broad" in found["wide"]
    assert "outside" in found["cut"]
    assert "two / one" in found["covered"]
    assert len(found["empty"]) == 1
    assert any("no-such-file" in name for name in found["resources"])
    assert any("elsewhere" in name for name in found["resources"])
    assert "/no-such-file.png" in found["asked"]
    assert any("oh no" in line for line in found["console"])


def test_the_page_in_grey_is_still_a_page(many: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    shot = tmp_path / "page.png"
    grey = many.replace("</style>", "html { filter: grayscale(1); }</style>")
    with served(grey) as (address, _):
        browse(tmp_path, address, f"--screenshot={shot}", height=3000)
    pixels = numpy.asarray(image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1280, 3)
    assert (pixels.max(axis=2) - pixels.min(axis=2)).max() <= 2  # it is grey indeed
    levels = pixels[:, :, 0]
    assert (levels < 100).mean() > 0.01
    assert (levels > 245).mean() > 0.5
    # No screenful is blank.
    for top in range(0, 3000, 500):
        assert (levels[top : top + 500] < 128).mean() > 0.003
    # Heat maps keep several shades without colour.
    assert len(numpy.unique(levels)) > 40


@pytest.mark.parametrize("kind", ["seen", "matrix"])
def test_a_plot_alone_is_drawn_as_on_the_page(kind: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    plots = [plot for plot in draw(large(methods=6))["digits-split"] if plot.kind == kind][:1]
    (text,) = plot_files({"digits-split": plots}).values()
    begin = '<!DOCTYPE html><meta charset="utf-8">'
    contents = {
        "file.svg": text,
        "file.html": f'{begin}<body style="margin: 0">{text[text.index("<svg") :]}',
        "page.html": f'{begin}<style>{CSS}</style><body style="margin: 0; padding: 0">{plots[0].svg}',
    }
    shots = {}
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        shot = tmp_path / f"{name}.png"
        _, log = browse(tmp_path, (tmp_path / name).as_uri(), f"--screenshot={shot}", width=700, height=500)
        assert not re.findall(r".*CONSOLE.*", log)
        shots[name] = numpy.asarray(image.open(shot).convert("L")).astype(int)
    # What the page's style sheet says is in the file itself.
    assert (shots["file.html"] == shots["page.html"]).all()
    width, height = (int(float(side) * 4 / 3) for side in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    assert width < 700
    assert height < 500
    alone = shots["file.svg"]
    drawn = alone[:height, :width]
    # White around, ink within, several shades without colour, and nothing outside the frame.
    assert (drawn > 245).mean() > (0.1 if kind == "matrix" else 0.6)
    assert (drawn < 100).mean() > 0.01
    assert len(numpy.unique(drawn)) > 30
    assert (drawn[:3] > 245).all()
    assert (drawn[:, :3] > 245).all()
    assert (alone[height + 1 :] == 255).all()
    assert (alone[:, width + 1 :] == 255).all()
