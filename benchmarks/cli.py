"""The command line: `list`, `run`, `compare`, `spread`, `speed`.

Whatever the user gets wrong ends in one line on standard error and exit code 2, before anything is trained or
overwritten. Exit code 1 means that a run failed, 130 that the user interrupted.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from benchmarks.settings import InputError, parse_assignments

_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130
_ALL_METHODS = "naive,ewc,replay,gem,agem,gpm,ogd,logd,kfac,xkfac,halrp,joint"

Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="[PROTOCOL=]FILE", help="Images as a Keras-convention .npz file."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the protocol or the method."),
]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


class OneLineErrors(TyperGroup):
    """Prints what is wrong with the arguments on one line."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command; see typer."""
        standalone = extra.pop("standalone_mode", True)
        extra["standalone_mode"] = False  # typer would print a box of several lines
        if not standalone:
            return super().main(*args, **extra)
        try:
            code = super().main(*args, **extra)
        except InputError as error:
            code = _complain(str(error))
        except Exception as error:
            # Errors of the argument parser, told by what they have: their class is click's or typer's own copy.
            if type(error).__name__ == "Abort":  # how some versions of typer pass on Ctrl-C
                sys.exit(_INTERRUPTED)
            if not hasattr(error, "format_message"):
                raise
            code = _complain(error.format_message() or "nothing to do: try --help")
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(cls=OneLineErrors, add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def _complain(message: str) -> int:
    """Print one line on standard error."""
    typer.echo("error: " + " ".join(message.split()), err=True)
    return _BAD_INPUT


@contextlib.contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Turn Ctrl-C into a message and exit code 130, and keep Avalanche's warnings off the terminal."""
    with warnings.catch_warnings():
        # Not a filter: Avalanche's deprecation marks switch filters off.
        show = warnings.showwarning
        warnings.showwarning = lambda message, category, file, *rest: (
            None if "avalanche" in Path(file).parts else show(message, category, file, *rest)
        )
        try:
            yield
        except KeyboardInterrupt:
            typer.echo(f"interrupted: the runs that had finished are in {out}", err=True)
            raise typer.Exit(_INTERRUPTED) from None


@app.command("list")
def list_protocols(
    protocol: Annotated[str | None, typer.Argument(help="Show every figure of this protocol.")] = None,
) -> None:
    """List the protocols and methods, or one protocol's figures and where they are from."""
    from benchmarks import listing

    listing.show(protocol)


@app.command()
def run(
    protocol: Annotated[str, typer.Argument(help="Name of the protocol; see `list`.")],
    *,
    method: Annotated[str, typer.Option(help="Name of the method; see `list`.")],
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and permutations.")] = 0,
    data: Data = None,
    device: Device = "cpu",
    set_: Set = None,
    out: Out = Path("results"),
) -> None:
    """Train one method on one protocol and write one JSON file."""
    from benchmarks import compare as comparison
    from benchmarks.progress import Bars

    request = _request((protocol,), (method,), (seed,), data=data, device=device, assignments=set_, out=out)
    job = comparison.prepare(request)[0]
    outcome = comparison.Outcome()
    with _interruptible(out), Bars(1) as bars:
        comparison.one(job, comparison.data_for(request, protocol), out, bars, outcome)
    for file, message in outcome.failures:
        typer.echo(f"failed: {file}: {message}", err=True)
    if outcome.failures:
        raise typer.Exit(_FAILED)
    typer.echo(out / job.file_name)


@app.command()
def compare(
    protocols: Annotated[list[str], typer.Argument(help="Names of protocols; see `list`.")],
    *,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Names of methods, separated by commas; without it those that can run of {_ALL_METHODS}."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    data: Data = None,
    device: Device = "cpu",
    set_: Set = None,
    out: Out = Path("results"),
) -> None:
    """Train several methods with several seeds, and write and print a table for each protocol."""
    from benchmarks import compare as comparison
    from benchmarks.progress import Bars
    from benchmarks.report import terminal as report

    names = None if methods is None else _names(methods)
    request = _request(tuple(protocols), names, _seeds(seeds), data=data, device=device, assignments=set_, out=out)
    outcome = comparison.Outcome()
    jobs = comparison.prepare(request)
    for name in request.protocols:
        for method, reason in request.left_out(name).items():
            typer.echo(f"left out on {name}: {method}: {reason}", err=True)
    with _interruptible(out), Bars(len(jobs)) as bars:
        comparison.compare(request, jobs, bars, outcome)
    console = Console()
    for name, rows in outcome.tables.items():
        console.print(report.rich_table(name, rows))
    for file, message in outcome.failures:
        typer.echo(f"failed: {file}: {message}", err=True)
    if outcome.failures:
        raise typer.Exit(_FAILED)


@app.command()
def spread(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs that differ in task_order.")],
    *,
    methods: Annotated[str | None, typer.Option(help="Names of methods, separated by commas; all without it.")] = None,
) -> None:
    """Show how much the final accuracy of a task depends on the order of the tasks."""
    from benchmarks import spread as over_orders

    found = over_orders.spreads(over_orders.read(folders), None if methods is None else _names(methods))
    console = Console()
    console.print(over_orders.table(found))
    console.print(over_orders.EXPLANATION, highlight=False)


@app.command()
def speed() -> None:
    """Measure what the methods add to a training step."""
    from benchmarks import speed as measurements

    measurements.main()


def _names(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of names."""
    return tuple(name.strip() for name in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of seeds."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--seeds {text!r}: expected integers separated by commas") from None


def _request(
    protocols: tuple[str, ...],
    methods: tuple[str, ...] | None,
    seeds: tuple[int, ...],
    *,
    data: list[str] | None,
    device: str,
    assignments: list[str] | None,
    out: Path,
) -> Any:
    """Put the arguments into a request; the command line is rebuilt from them, as a reader would type it.

    Without methods all are taken that can run.
    """
    from benchmarks.compare import Request, parse_data
    from benchmarks.resources import check_device

    words = ["python", "-m", "benchmarks", "compare", *protocols]
    words += [] if methods is None else ["--methods", ",".join(methods)]
    words += ["--seeds", ",".join(str(seed) for seed in seeds)]
    words += [word for text in data or () for word in ("--data", text)]
    words += ["--device", device] if device != "cpu" else []
    words += [word for text in assignments or () for word in ("--set", text)]
    return Request(
        protocols=protocols,
        methods=_names(_ALL_METHODS) if methods is None else methods,
        every=methods is None,
        seeds=seeds,
        data=parse_data(data or ()),
        device=check_device(device),
        assignments=parse_assignments(assignments or ()),
        out=out,
        command=shlex.join(words),
    )
