"""Pages that are made when the site is built: the protocols from their records, and CONTRIBUTING.md.

Links to them lead, in the sources, to what they are made of, so that they work where the repository is read as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: What a page in docs/ links to, and the page of the site that is made of it.
GENERATED = {"../CONTRIBUTING.md": "contributing.md", "../benchmarks/protocols.py": "protocols.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; called by MkDocs."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "protocols.md", content=protocols_page()))
    files.append(File.generated(config, "contributing.md", content=contributing_page()))
    return files


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Let links lead to the generated pages; called by MkDocs."""
    del given
    for source, page in GENERATED.items():
        markdown = markdown.replace(f"]({source}", f"]({page}")
    return markdown


def on_page_content(html: str, **given: Any) -> str:
    """Docstrings end the line before an example in two colons, as help() shows them; called by MkDocs."""
    del given
    return html.replace("::</p>", ":</p>")


def contributing_page() -> str:
    """CONTRIBUTING.md as a page here: its links start at the top of the repository."""
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")


def protocols_page() -> str:
    """All protocols with every setting, its value and the source of each figure."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.protocols import PROTOCOLS
    finally:
        sys.path.remove(str(ROOT))
    parts = [
        "# Protocols",
        "What `python -m benchmarks run` and `compare` can run: stream, network, schedule, and for each method its "
        "hyper-parameters, with the source of each figure. Everything in a table of settings can be changed with "
        "`--set key=value`, what is fixed cannot. `python -m benchmarks list NAME` shows the same in a terminal.",
        _table(("protocol", "what"), [(f"[{p.name}](#{p.name})", p.summary) for p in PROTOCOLS.values()]),
    ]
    for protocol in PROTOCOLS.values():
        parts += _section(protocol)
    return "\n\n".join(parts) + "\n"


def _section(protocol: Any) -> list[str]:
    from benchmarks.fixed import figures
    from benchmarks.settings import values

    settings = [(f"`{key}`", _plain(value)) for key, value in values(protocol).items()]
    methods = [
        (name, "<br>".join(f"`{key}={_plain(value)}`" for key, value in chosen.items()))
        for name, record in protocol.methods.items()
        if (chosen := values(record))
    ]
    parts = [
        f"## {protocol.name}",
        protocol.summary[:1].upper() + protocol.summary[1:] + ".",
        _table(("fixed", "value"), list(figures(protocol).items())),
        _table(("setting", "value"), settings),
        _table(("method", "settings"), methods),
    ]
    if protocol.sources:
        parts.append(_table(("figures", "source"), list(protocol.sources.items())))
    if protocol.notes:
        parts.append("\n".join(f"- {note}" for note in protocol.notes))
    return parts


def _plain(value: Any) -> str:
    """A value as it is given with `--set`."""
    if isinstance(value, list):
        return ",".join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = [(left.replace("|", "\\|"), str(right).replace("|", "\\|")) for left, right in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in cells)])
