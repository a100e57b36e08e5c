"""Commands around results that are there: `report`, `reference`, `verify`, `readme`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.settings import InputError

Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of results.")]


def reference(folders: Folders) -> None:
    """Take finished runs of unchanged settings over as reference results."""
    from benchmarks import reference as kept

    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is no folder; expected one with results")
    written = kept.collect(folders)
    typer.echo(f"{len(written)} reference results in {kept.FOLDER}")


def readme() -> None:
    """Make the tables of README.md anew from the reference results."""
    from benchmarks import readme as documents
    from benchmarks import reference as kept

    changed = documents.update(kept.FOLDER.parents[1], kept.read())
    typer.echo("\n".join(f"changed: {path.name}" for path in changed) or "nothing to change")


def report(
    folders: Folders,
    *,
    name: Annotated[str, typer.Option(help="Folder of the report below --out.")] = "report",
    test: Annotated[str, typer.Option(help="Paired test: t or wilcoxon.")] = "t",
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("results"),
) -> None:
    """Write a report of all finished runs below some folders, also of the reference results."""
    from benchmarks import gather
    from benchmarks.report import writing

    if test not in ("t", "wilcoxon"):
        raise InputError(f"--test {test!r}: expected t or wilcoxon")
    study = gather.study(folders, name)
    for path in writing.write(out / name, study, test=test):  # type: ignore[arg-type]
        typer.echo(path)


def verify(
    protocols: Annotated[list[str] | None, typer.Argument(help="Protocols; all that need no --data without.")] = None,
    *,
    methods: Annotated[str | None, typer.Option(help="Names of methods, separated by commas; all without.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    data: Annotated[
        list[str] | None, typer.Option(metavar="[PROTOCOL=]FILE", help="Images as a Keras-convention .npz file.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("results"),
) -> None:
    """Do reference runs again, and say whether they agree within their spread."""
    from benchmarks import cli
    from benchmarks import reference as kept
    from benchmarks import verify as verifying
    from benchmarks.protocols import find_protocol
    from benchmarks.request import Description

    everything = kept.read()
    names = list(protocols or ())
    if not names:
        names = [p for p in dict.fromkeys(r["protocol"] for r in everything) if find_protocol(p).source == "digits"]
    numbers = cli.read_seeds(seeds)
    chosen = kept.choose(everything, names, cli.read_names(methods) if methods else (), numbers)
    verdicts: list[Any] = []
    for name in names:
        own = [result for result in chosen if result["protocol"] == name]
        if not own:
            continue
        description = Description(
            protocols=[name],
            methods=list(dict.fromkeys(result["method"] for result in own)),
            seeds=numbers,
            data=data,
            jobs=jobs,
            threads=own[0]["threads"],
            name=f"verify-{name}",
        )
        outcome, planned = cli.carry_out(description, out, "compare")
        cli.tell_failures(outcome, planned)
        for _, result in outcome.done:
            same = [r for r in everything if (r["protocol"], r["method"]) == (name, result["method"])]
            if any(reference["seed"] == result["seed"] for reference in same):
                verdicts.append(verifying.judge(result, same))
    Console().print(verifying.table(verdicts))
    wrong = [own for own in verdicts if not own.agrees]
    typer.echo(f"{len(verdicts) - len(wrong)} of {len(verdicts)} runs agree with their reference")
    if wrong:
        raise typer.Exit(1)


ALL = (report, reference, verify, readme)
