"""What there is to run: protocols, methods, and every figure of a protocol, settable or not, with its source."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.fixed import figures
from benchmarks.settings import unknown, values

_IMAGES = {
    "digits": "embedded",
    "mnist": "--data mnist.npz, or downloaded",
    "cifar100": "--data cifar100.npz, or downloaded",
    "npz": "--data FILE.npz",
}


def show(name: str | None) -> None:
    """Print all protocols and methods, one protocol's figures, or one method's settings.

    Args:
        name: of a protocol or a method; None for all.

    Raises:
        InputError: if there is none of that name.
    """
    from benchmarks import external
    from benchmarks.methods import METHODS
    from benchmarks.protocols import PROTOCOLS, find_protocol

    console = Console()
    if name in METHODS or name in external.found():
        _show_method(console, name)
        return
    if name is not None and name not in PROTOCOLS:
        raise unknown("protocol or method", name, [*PROTOCOLS, *METHODS, *external.found()])
    if name is None:
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
    found = find_protocol(name)
    console.print(f"[bold]{found.name}[/bold]: {found.summary}", highlight=False)
    table = Table("fixed", "value")
    for key, text in figures(found).items():
        table.add_row(key, text)
    console.print(table)
    table = Table("setting (--set)", "value")
    for key, value in values(found).items():
        table.add_row(key, str(value))
    brought = {other.name: other.method.settings() for other in map(external.load, external.found()) if other.method}
    for method_name, settings in {**found.methods, **brought}.items():
        for key, value in values(settings).items():
            table.add_row(f"{key} [dim]({method_name})[/dim]", escape(str(value)))
    console.print(table)
    table = Table("figures", "source")
    for key, text in found.sources.items():
        table.add_row(key, text)
    console.print(table)
    for note in found.notes:
        console.print(f"Note: {note}", highlight=False)


def _show_method(console: Console, name: str) -> None:
    """Print where a method is from, its settings, and which protocols set them otherwise."""
    from benchmarks import external
    from benchmarks.methods import METHODS, find_method
    from benchmarks.protocols import PROTOCOLS

    method = find_method(name)
    console.print(f"[bold]{escape(name)}[/bold]: {escape(method.summary)}", highlight=False)
    if name not in METHODS:
        console.print(escape(f"from {external.load(name).brought_by}"), highlight=False)
    defaults = values(method.settings())
    table = Table("setting (--set)", "default", "other value in")
    for key, value in defaults.items():
        own = {p.name: values(p.methods[name])[key] for p in PROTOCOLS.values() if name in p.methods}
        others = [f"{protocol} ({other})" for protocol, other in own.items() if other != value]
        table.add_row(escape(key), escape(str(value)), escape(", ".join(others)))
    if defaults:
        console.print(table)
    else:
        console.print("It has no settings.")
    left = external.load(name).unset if name not in METHODS else ()
    if left:
        console.print(
            escape(f"Arguments that a command line cannot set, left at their defaults: {', '.join(left)}"),
            highlight=False,
        )
