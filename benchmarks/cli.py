"""The command line: `list`, `run`, `compare`, `spread`, `speed`, and those of `commands.py`.

Whatever the user gets wrong ends in one line on standard error and exit code 2, before anything is trained or
overwritten. Exit code 1 means that a run failed, 130 that the user interrupted.
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

from benchmarks import commands
from benchmarks.settings import InputError

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
Threads = Annotated[int | None, typer.Option(help="Threads of each run; else the machine's, divided among the jobs.")]
Wandb = Annotated[str | None, typer.Option(metavar="PROJECT", help="Log to Weights & Biases as well.")]


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
            typer.echo(f"interrupted: what has finished is in {out}; the same command goes on from there", err=True)
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
    threads: Threads = None,
    wandb: Wandb = None,
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
    file: Annotated[Path | None, typer.Option(help="YAML file that says the same as these options.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Names of methods, separated by commas; without it those that can run of {_ALL_METHODS}."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas.  [default: 0,1,2]")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V,...", help="Try several values of a setting (gpm.threshold=0.9,0.95)."),
    ] = None,
    set_: Set = None,
    data: Data = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: cpu]")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time.  [default: 1]")] = None,
    threads: Threads = None,
    backend: Annotated[str | None, typer.Option(help="local, ray or dask.  [default: local]")] = None,
    address: Annotated[str | None, typer.Option(help="Address of the Ray or Dask cluster.")] = None,
    gpu_share: Annotated[float | None, typer.Option(help="Fraction of a GPU for each run on a cluster.")] = None,
    wandb: Wandb = None,
    test: Annotated[str | None, typer.Option(help="Paired test of the report: t or wilcoxon.  [default: t]")] = None,
    name: Annotated[str | None, typer.Option(help="Folder of the report below --out.")] = None,
    out: Out = Path("results"),
) -> None:
    """Train several methods with several seeds, print a table for each protocol, and write a report."""
    from benchmarks.report import terminal
    from benchmarks.request import Description, merged
    from benchmarks.study_file import read_file

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
    )
    description = given if file is None else merged(read_file(file), given, file)
    outcome, planned = carry_out(description, out, "compare")
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
def speed() -> None:
    """Measure what the methods add to a training step."""
    from benchmarks import speed as measurements

    measurements.main()


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


def carry_out(description: Any, out: Path, command: str) -> tuple[Any, Any]:
    """Check a description, do its runs, and return what became of them with the plan."""
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
    with _interruptible(out):
        comparison.carry_out(request, planned, outcome)
    return outcome, planned


def tell_failures(outcome: Any, planned: Any) -> None:
    """Say what failed, and end with the exit code that tells so."""
    for own, message in outcome.failures:
        typer.echo(f"failed: {own}: {message}", err=True)
    if outcome.failures:
        typer.echo(f"{len(outcome.done)} of {len(planned.runs)} runs have finished and are kept", err=True)
        raise typer.Exit(_FAILED)
