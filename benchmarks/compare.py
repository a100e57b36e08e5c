"""Carrying out a comparison: what has finished is kept, what failed is told, the report is written in any case."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from benchmarks import backends, plan, runner
from benchmarks.board import Board
from benchmarks.files import explain, write_text
from benchmarks.plan import Plan, Planned
from benchmarks.report import terminal, writing
from benchmarks.report.study import Study
from benchmarks.request import Request
from benchmarks.settings import InputError

Work = Callable[[runner.Item], "str | None"]


@dataclass
class Outcome:
    """What became of the runs.

    Attributes:
        done: label and result of each finished run, in the order in which they were asked for.
        failures: each failed run and what went wrong.
        unfinished: runs that neither finished nor failed.
        files: the report.
        unwritten: why there is no report, or not all of it; empty where there is.
    """

    done: list[tuple[Planned, dict[str, Any]]] = field(default_factory=list)
    failures: list[tuple[Planned, str]] = field(default_factory=list)
    unfinished: int = 0
    files: list[str] = field(default_factory=list)
    unwritten: str = ""


def options_of(request: Request, threads: int | None) -> backends.Options:
    """Read from a request how its runs are spread.

    Args:
        request: what to compare.
        threads: of each run; None if that is not known yet.

    Returns:
        The options, checked.

    Raises:
        InputError: if they cannot be carried out: an extra is missing, a cluster is not there.
    """
    if request.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb: wandb is not installed: pip install wandb")
    options = backends.Options(
        backend=request.backend,  # type: ignore[arg-type]
        jobs=request.jobs,
        threads=threads,
        address=request.address,
        gpu_share=request.gpu_share,
        cuda=request.device.type == "cuda",
    )
    backends.check(options)
    return options


def carry_out(
    request: Request, planned: Plan, outcome: Outcome, console: Console | None = None, work: Work = runner.work
) -> None:
    """Do all runs that have not finished, and write the report.

    Args:
        request: what to compare.
        planned: its runs, as `plan.prepare` returned them.
        outcome: filled while the runs go on, so that an interruption leaves what is known.
        console: where progress is shown; standard error by default.
        work: does one run.

    A report that cannot be written is told by `Outcome.unwritten`.
    """
    options = options_of(request, planned.threads)
    runs: list[Planned] = []
    for own in planned.runs:
        if own.folder.read() is not None:
            own.folder.clean()
        else:
            runs.append(own)
    kept = len(planned.runs) - len(runs)
    try:
        with Board(runs, request.jobs, kept, console) as board:
            if kept:
                board.say(f"{kept} of {kept + len(runs)} runs had finished before and are kept")
            items = [item_of(request, own, planned.threads) for own in runs]
            with closing(backends.execute(work, items, options)) as ends:
                for index, end in ends:
                    _note(runs[index], end, outcome, board)
    finally:
        # Whatever is under way, an interruption or an error, goes on: the report must not take its place.
        _collect(planned, outcome)
        try:
            outcome.files = _write(request, planned, outcome)
        except OSError as error:
            outcome.unwritten = f"the runs are kept, but no report: {explain(error, request.folder)}"


def item_of(request: Request, own: Planned, threads: int) -> runner.Item:
    """Put a run into plain values that travel to another process."""
    job = own.job
    data = plan.data_file(request, job.protocol.name)
    wandb = None
    if request.wandb is not None:
        config = {**job.hyper_parameters, "protocol": job.protocol.name, "method": job.method, "seed": job.seed}
        wandb = {"project": request.wandb, "name": str(own), "id": own.folder.key, "config": config}
    return runner.Item(
        protocol=job.protocol.name,
        method=job.method,
        seed=job.seed,
        device=str(job.device),
        changes=dict(job.changes),
        data=None if data is None else str(data.resolve()),
        folder=str(own.folder.path.resolve()),
        key=own.folder.key,
        threads=threads,
        wandb=wandb,
    )


def _note(own: Planned, end: Any, outcome: Outcome, board: Board) -> None:
    """Take down how a run ended."""
    result = own.folder.read()
    if result is not None:
        board.ended(own, f"{own}: {terminal.one_line(result)}", seconds=result["wall_seconds"])
        return
    if isinstance(end, backends.Failure):
        end = _keep_traceback(own, end)
    message = end or f"its result is not in {own.folder.path}: do all machines see this folder?"
    outcome.failures.append((own, message))
    board.ended(own, f"{own}: failed: {message}")


def _keep_traceback(own: Planned, failure: backends.Failure) -> str:
    """Write down the last words of a worker, which wrote nothing into the run's folder itself; return one line."""
    if not failure.traceback.strip():
        return failure.message
    try:
        write_text(own.folder.error, failure.traceback)
    except OSError:
        return failure.message
    return f"{failure.message} (traceback in {own.folder.error})"


def _collect(planned: Plan, outcome: Outcome) -> None:
    """Read all results, in the order in which they were asked for."""
    failed = {own.folder.key: message for own, message in outcome.failures}
    outcome.done, outcome.failures, outcome.unfinished = [], [], 0
    for own in planned.runs:
        result = own.folder.read()
        if result is not None:
            outcome.done.append((own, result))
        elif own.folder.key in failed:
            outcome.failures.append((own, failed[own.folder.key]))
        else:
            outcome.unfinished += 1


def study_of(request: Request, planned: Plan, outcome: Outcome) -> Study:
    """Put together what a report is made of."""
    return Study(
        title=request.folder.name,
        command=request.command,
        results=[{**result, "label": own.label} for own, result in outcome.done],
        failures=[(own.job.protocol.name, own.label, own.job.seed, message) for own, message in outcome.failures],
        left_out=planned.left_out,
        unfinished=outcome.unfinished,
    )


def _write(request: Request, planned: Plan, outcome: Outcome) -> list[str]:
    """Write the report, if there is something to report."""
    if not outcome.done and not outcome.failures:
        return []
    study = study_of(request, planned, outcome)
    files = writing.write(request.folder, study, test=request.test, columns=request.columns)  # type: ignore[arg-type]
    return [str(file) for file in files]
