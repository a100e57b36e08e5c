"""The command line: `list`, `run`, `compare`, `spread`, `speed`, and those of `commands.py`.

Whatever the user gets wrong ends in one line on standard error and exit code 2, before anything is trained or
overwritten. Exit code 1 means that a run failed, or that its report could not be written, 130 that the
user interrupted.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from benchmarks import commands, options
from benchmarks.interruption import not_lost
from benchmarks.settings import InputError

_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130
_ALL_METHODS = options.ALL_METHODS


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


app = typer.Typer(cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Compare methods for continual learning under the protocols of the papers, or on your own images.

    Exit codes: 2, the input is wrong, and nothing was trained or overwritten;
    1, a run failed or a report could not be written; 130, you interrupted.
    """
    if context.invoked_subcommand is None:
        # As an option of typer's, some versions of it would end with exit code 0.
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit(_BAD_INPUT)


def _complain(message: str) -> int:
    """Print one line on standard error."""
    typer.echo("error: " + " ".join(message.split()), err=True)
    return _BAD_INPUT


@contextlib.contextmanager
def _interruptible(out: Path, kept: bool) -> Iterator[None]:
    """Turn Ctrl-C into a message and exit code 130, and keep Avalanche's warnings off the terminal."""
    with warnings.catch_warnings():
        # Not a filter: Avalanche's deprecation marks switch filters off.
        show = warnings.showwarning
        warnings.showwarning = lambda message, category, file, *rest: (
            None if "avalanche" in Path(file).parts else show(message, category, file, *rest)
        )
        try:
            with not_lost():
                yield
        except KeyboardInterrupt:
            what = f"what has finished is in {out}; the same command goes on from there"
            nothing = "nothing is kept; with --out DIR what has finished is, and the same command goes on from there"
            typer.echo(f"interrupted: {what if kept else nothing}", err=True)
            raise typer.Exit(_INTERRUPTED) from None


@app.command("list")
def list_protocols(
    name: Annotated[
        str | None, typer.Argument(help="Show every figure of this protocol, or every setting of this method.")
    ] = None,
) -> None:
    """List the protocols and methods, one protocol's figures and where they are from, or one method's settings."""
    from benchmarks import listing

    listing.show(name)


@app.command()
def run(
    protocol: Annotated[str, typer.Argument(help="Name of the protocol; see `list`.")],
    *,
    method: Annotated[str, typer.Option(help="Name of the method; see `list`.")],
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and permutations.")] = 0,
    data: options.Data = None,
    device: options.Device = "cpu",
    set_: options.Set = None,
    out: options.Out = Path("results"),
    threads: options.Threads = None,
    wandb: options.Wandb = None,
) -> None:
    """Train one method on one protocol, and print where the result is."""
    from benchmarks.request import Description

    description = Description(
        protocols=[protocol],
        methods=[method],
        seeds=[seed],
        data=data,
        device=device,
        set=set_,
        threads=threads,
        wandb=wandb,
        name=f"{protocol}-{method}",
    )
    outcome, planned = carry_out(description, out, "run")
    tell_failures(outcome, planned)
    typer.echo(planned.runs[0].folder.result)


@app.command()
def compare(
    protocols: Annotated[list[str] | None, typer.Argument(help="Names of protocols; see `list`.")] = None,
    *,
    file: options.File = None,
    methods: options.Methods = None,
    seeds: options.Seeds = None,
    grid: options.Grid = None,
    set_: options.Set = None,
    data: options.Data = None,
    device: options.MaybeDevice = None,
    jobs: options.Jobs = None,
    threads: options.Threads = None,
    backend: options.Backend = None,
    address: options.Address = None,
    gpu_share: options.GpuShare = None,
    wandb: options.Wandb = None,
    test: options.Test = None,
    columns: commands.Columns = None,
    name: options.Name = None,
    out: options.MaybeOut = None,
) -> None:
    """Train several methods with several seeds, print a table for each protocol, and write a report."""
    from benchmarks.report import terminal
    from benchmarks.request import Description, merged
    from benchmarks.study_file import errors_of, read_file

    given = Description(
        protocols=protocols or None,
        methods=None if methods is None else list(read_names(methods)),
        seeds=None if seeds is None else read_seeds(seeds),
        set=set_ or None,
        grid=grid or None,
        data=data or None,
        device=device,
        jobs=jobs,
        threads=threads,
        backend=backend,
        address=address,
        gpu_share=gpu_share,
        name=name,
        wandb=wandb,
        test=test,
        columns=None if columns is None else list(read_names(columns)),
        out=None if out is None else str(out),
    )
    if file is None:
        outcome, planned = carry_out(given, out or options.OUT, "compare")
    else:
        content = read_file(file)
        with errors_of(file, content, given):
            both = merged(content, given, file)
            outcome, planned = carry_out(both, Path(both.out or options.OUT), "compare")
    console = Console()
    for protocol in dict.fromkeys(own.job.protocol.name for own, _ in outcome.done):
        chosen = [{**result, "method": own.label} for own, result in outcome.done if own.job.protocol.name == protocol]
        rows = terminal.rows(chosen, list(dict.fromkeys(result["method"] for result in chosen)))
        console.print(terminal.rich_table(protocol, rows))
    for path in outcome.files:
        if path.endswith(".html"):
            typer.echo(f"report: {path}", err=True)
    tell_failures(outcome, planned)


@app.command()
def spread(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs that differ in task_order.")],
    *,
    methods: Annotated[str | None, typer.Option(help="Names of methods, separated by commas; all without it.")] = None,
) -> None:
    """Show how much the final accuracy of a task depends on the order of the tasks."""
    from benchmarks import spread as over_orders

    found = over_orders.spreads(over_orders.read(folders), None if methods is None else read_names(methods))
    console = Console()
    console.print(over_orders.table(found))
    console.print(over_orders.EXPLANATION, highlight=False)


@app.command()
def speed(
    only: Annotated[str, typer.Option(help="words in the titles of the tables to measure; default all tables")] = "",
) -> None:
    """Measure what the methods add to a training step."""
    from benchmarks import speed as measurements

    measurements.main(only)


for _command in commands.ALL:
    app.command()(_command)


def read_names(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of names."""
    return tuple(name.strip() for name in text.split(","))


def read_seeds(text: str) -> list[int]:
    """Read a comma-separated list of seeds."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--seeds {text!r}: expected integers separated by commas") from None


def carry_out(description: Any, out: Path, command: str, *, kept: bool = True) -> tuple[Any, Any]:
    """Check a description, do its runs, and return what became of them with the plan; `kept`: `out` is to last."""
    from benchmarks import compare as comparison
    from benchmarks import plan
    from benchmarks.request import make_request

    request = make_request(description, out, command, read_names(_ALL_METHODS))
    comparison.options_of(request, request.threads)
    planned = plan.prepare(request)
    for protocol, reasons in planned.left_out.items():
        for label, reason in reasons.items():
            typer.echo(f"left out on {protocol}: {label}: {reason}", err=True)
    outcome = comparison.Outcome()
    try:
        with _interruptible(out, kept):
            comparison.carry_out(request, planned, outcome)
    except BaseException:
        if outcome.unwritten:
            typer.echo(f"error: {outcome.unwritten}", err=True)
        raise
    return outcome, planned


def tell_failures(outcome: Any, planned: Any) -> None:
    """Say what failed, and end with the exit code that tells so."""
    for own, message in outcome.failures:
        typer.echo(f"failed: {own}: {message}", err=True)
    if outcome.failures:
        typer.echo(f"{len(outcome.done)} of {len(planned.runs)} runs have finished and are kept", err=True)
    if outcome.unwritten:
        typer.echo(f"error: {outcome.unwritten}", err=True)
    if outcome.failures or outcome.unwritten:
        raise typer.Exit(_FAILED)
