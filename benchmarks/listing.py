"""What there is to run: protocols, methods, and every figure of a protocol, settable or not, with its source."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.fixed import figures
from benchmarks.settings import values

_IMAGES = {
    "digits": "embedded",
    "mnist": "--data mnist.npz, or downloaded",
    "cifar100": "--data cifar100.npz, or downloaded",
    "npz": "--data FILE.npz",
}


def show(protocol: str | None) -> None:
    """Print all protocols and methods, or one protocol's figures.

    Args:
        protocol: its name; None for all.

    Raises:
        InputError: if there is none of that name.
    """
    from benchmarks import external
    from benchmarks.methods import METHODS
    from benchmarks.protocols import PROTOCOLS, find_protocol

    console = Console()
    if protocol is None:
        table = Table("protocol", "what", "images")
        for record in PROTOCOLS.values():
            table.add_row(record.name, record.summary, _IMAGES[record.source])
        console.print(table)
        table = Table("method", "what")
        for method in METHODS.values():
            table.add_row(method.name, method.summary)
        for other in map(external.load, external.found()):
            what = f"cannot be used: {other.reason}" if other.method is None else other.summary
            # A package's own words are no markup.
            table.add_row(escape(other.name), escape(f"{what} ({other.brought_by})"))
        console.print(table)
        return
    found = find_protocol(protocol)
    console.print(f"[bold]{found.name}[/bold]: {found.summary}", highlight=False)
    table = Table("fixed", "value")
    for key, text in figures(found).items():
        table.add_row(key, text)
    console.print(table)
    table = Table("setting (--set)", "value")
    for key, value in values(found).items():
        table.add_row(key, str(value))
    brought = {other.name: other.method.settings() for other in map(external.load, external.found()) if other.method}
    for name, settings in {**found.methods, **brought}.items():
        for key, value in values(settings).items():
            table.add_row(f"{key} [dim]({name})[/dim]", escape(str(value)))
    console.print(table)
    table = Table("figures", "source")
    for key, text in found.sources.items():
        table.add_row(key, text)
    console.print(table)
    for note in found.notes:
        console.print(f"Note: {note}", highlight=False)
