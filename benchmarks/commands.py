"""Commands around results that are there: `report`, `reference`, `verify`, `readme`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.settings import InputError

Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of results.")]

Columns = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME,...",
        help="Figures of table.md and table.tex, by their names in table.csv, which always has all.",
        show_default="those that there are",
    ),
]


def reference(folders: Folders) -> None:
    """Take finished runs of unchanged settings over as reference results."""
    from benchmarks import reference as kept

    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is no folder; expected one with results")
    try:
        written = kept.collect(folders)
    except OSError as error:
        raise InputError(f"{str(kept.FOLDER)!r} cannot be written: {error.strerror or error}") from error
    typer.echo(f"{len(written)} reference results in {kept.FOLDER}")


def readme() -> None:
    """Make the tables of README.md anew from the reference results."""
    from benchmarks import readme as documents
    from benchmarks import reference as kept

    try:
        changed = documents.update(kept.FOLDER.parents[1], kept.read())
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read or written: {error.strerror or error}") from error
    typer.echo("\n".join(f"changed: {path.name}" for path in changed) or "nothing to change")


def report(
    folders: Folders,
    *,
    name: Annotated[str, typer.Option(help="Folder of the report below --out.")] = "report",
    test: Annotated[str, typer.Option(help="Paired test: t or wilcoxon.")] = "t",
    columns: Columns = None,
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("results"),
) -> None:
    """Write a report of all finished runs below some folders, also of the reference results."""
    from benchmarks import cli, gather
    from benchmarks.files import explain
    from benchmarks.folders import claim
    from benchmarks.report import writing
    from benchmarks.report.columns import check

    if test not in ("t", "wilcoxon"):
        raise InputError(f"--test {test!r}: expected t or wilcoxon")
    chosen = check(None if columns is None else cli.read_names(columns))
    study = gather.study(folders, name)
    claim(out, name)
    try:
        files = writing.write(out / name, study, test=test, columns=chosen)  # type: ignore[arg-type]
    except OSError as error:
        raise InputError(f"no report: {explain(error, out / name)}") from error
    # Plots are many: their folder stands for them.
    for path in dict.fromkeys(file if file.parent == out / name else file.parent for file in files):
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
    out: Annotated[
        Path | None, typer.Option(help="Keep the runs there (and those that are there already); else they are dropped.")
    ] = None,
) -> None:
    """Do reference runs again, and say whether they agree within their spread."""
    from benchmarks import cli
    from benchmarks import reference as kept
    from benchmarks import verify as verifying
    from benchmarks.protocols import find_protocol

    everything = kept.read()
    names = list(protocols or ())
    if not names:
        names = [p for p in dict.fromkeys(r["protocol"] for r in everything) if find_protocol(p).source == "digits"]
    numbers = cli.read_seeds(seeds)
    chosen = kept.choose(everything, names, cli.read_names(methods) if methods else (), numbers)
    if not chosen:
        raise InputError(f"there is no reference of {methods or 'any method'} with seeds {seeds} on {', '.join(names)}")
    verdicts: list[Any] = []
    failed: list[str] = []
    # A folder of their own: a run that is there already would be held against itself.
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            own = [result for result in chosen if result["protocol"] == name]
            for part in _by_seeds(own):
                again = _again(name, part, data, jobs)
                outcome, _ = cli.carry_out(again, out or Path(folder), "compare", kept=out is not None)
                failed += [f"{planned}: {message}" for planned, message in outcome.failures]
                for _, result in outcome.done:
                    same = [r for r in everything if (r["protocol"], r["method"]) == (name, result["method"])]
                    verdicts.append(verifying.judge(result, same))
    Console().print(verifying.table(verdicts))
    wrong = [own for own in verdicts if not own.agrees]
    typer.echo(f"{len(verdicts) - len(wrong)} of {len(verdicts) + len(failed)} runs agree with their reference")
    for line in failed:
        typer.echo(f"failed: {line}", err=True)
    if wrong or failed:
        raise typer.Exit(1)


def _by_seeds(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Put methods with the same seeds together: a comparison does every method with every seed."""
    seeds: dict[str, list[int]] = {}
    for result in results:
        seeds.setdefault(result["method"], []).append(result["seed"])
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(sorted(seeds[result["method"]])), []).append(result)
    return list(groups.values())


def _again(name: str, own: list[dict[str, Any]], data: list[str] | None, jobs: int) -> Any:
    """Describe the comparison that does reference runs of one protocol again."""
    from benchmarks.protocols import PROTOCOLS, find_protocol
    from benchmarks.request import Description

    others = {*PROTOCOLS} - {name}
    mine = [text for text in data or () if text.partition("=")[0] not in others]
    if find_protocol(name).source == "digits":
        mine = []  # the file is for the other protocols
    return Description(
        protocols=[name],
        methods=list(dict.fromkeys(result["method"] for result in own)),
        seeds=sorted({result["seed"] for result in own}),
        data=mine or None,
        jobs=jobs,
        threads=own[0]["threads"],
        name=f"verify-{name}",
    )


ALL = (report, reference, verify, readme)
