"""What the user asks a comparison for, from the command line or from a file that says the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks import assignments
from benchmarks.protocols import PROTOCOLS
from benchmarks.settings import InputError


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        protocols: their names.
        methods: their names.
        seeds: one run each.
        data: protocol name to the user's file; the key "" stands for every protocol that needs one.
        device: where to train.
        assignments: what came with `--set`.
        out: the folder of all results.
        command: the command line, written into the report.
        every: the methods are all there are, not a choice: those that do not suit a protocol are left out.
        grid: key to the texts of its values.
        name: of the report's folder below `out`; None joins the names of the protocols.
        threads: of each run; None divides the machine's among the jobs.
        jobs: runs at a time.
        backend: where they run: `local`, `ray` or `dask`.
        address: of the cluster; None lets the library find it.
        gpu_share: fraction of a GPU that a run takes on a cluster.
        wandb: name of a project of Weights & Biases, None to leave it out.
        test: paired test of the report, `t` or `wilcoxon`.
        columns: figures of the report's tables for people; none takes those that there are.
    """

    protocols: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    data: Mapping[str, Path]
    device: torch.device
    assignments: Mapping[str, str]
    out: Path
    command: str
    every: bool = False
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    name: str | None = None
    threads: int | None = None
    jobs: int = 1
    backend: str = "local"
    address: str | None = None
    gpu_share: float = 1.0
    wandb: str | None = None
    test: str = "t"
    columns: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return self.out / (self.name or "+".join(self.protocols))


def parse_data(texts: Sequence[str]) -> dict[str, Path]:
    """Read `--data [PROTOCOL=]FILE`.

    Args:
        texts: what came with the option.

    Returns:
        Protocol name, or "" for all, to file.

    Raises:
        InputError: if the same protocol gets two files.
    """
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        key, path = (name, rest) if equals and name in PROTOCOLS else ("", text)
        if key in files:
            raise InputError(f"--data gives two files for {key or 'all protocols'}: {str(files[key])!r} and {path!r}")
        files[key] = Path(path)
    return files


@dataclass(frozen=True)
class Description:
    """A comparison as texts: what the command line has, and what a file may have.

    Attributes:
        protocols: names.
        methods: names; None takes all that can run.
        seeds: numbers.
        set: `key=value` texts.
        grid: `key=value,value` texts.
        data: `[PROTOCOL=]FILE` texts.
        device: `cpu`, `cuda` or `cuda:N`.
        jobs: runs at a time.
        threads: of each run.
        backend: `local`, `ray` or `dask`.
        address: of the cluster.
        gpu_share: fraction of a GPU for each run.
        name: of the report's folder.
        wandb: project.
        test: `t` or `wilcoxon`.
        columns: figures of the report's tables, by their names in `table.csv`.
        out: folder of the results.
    """

    protocols: list[str] | None = None
    methods: list[str] | None = None
    seeds: list[int] | None = None
    set: list[str] | None = None
    grid: list[str] | None = None
    data: list[str] | None = None
    device: str | None = None
    jobs: int | None = None
    threads: int | None = None
    backend: str | None = None
    address: str | None = None
    gpu_share: float | None = None
    name: str | None = None
    wandb: str | None = None
    test: str | None = None
    columns: list[str] | None = None
    out: str | None = None


def merged(file: Description, given: Description, path: Path) -> Description:
    """Let the command line come before a file.

    Args:
        file: what the file says.
        given: what the command line says.
        path: of the file.

    Returns:
        Both; the name is the file's own unless one is given. The lists of `set`, `grid` and `data` are joined.

    Raises:
        InputError: if both name protocols.
    """
    if file.protocols and given.protocols:
        raise InputError(f"protocols are given both in {path.name} and on the command line: leave one out")
    joined: dict[str, Any] = {}
    for own in fields(Description):
        ours, theirs = getattr(given, own.name), getattr(file, own.name)
        if own.name in ("set", "grid", "data") and ours and theirs:
            keys = {_key(own.name, text) for text in ours}
            joined[own.name] = [*(text for text in theirs if _key(own.name, text) not in keys), *ours]
        else:
            joined[own.name] = theirs if ours is None else ours
    joined["name"] = joined["name"] or path.stem
    return Description(**joined)


def _key(kind: str, text: str) -> str:
    """What a `key=value` text, or a `[PROTOCOL=]FILE`, is about."""
    name, equals, _ = text.partition("=")
    return name if equals and (kind != "data" or name in PROTOCOLS) else ""


def make_request(description: Description, out: Path, command: str, every: tuple[str, ...]) -> Request:
    """Turn texts into values.

    Args:
        description: what was given.
        out: the folder of all results.
        command: `run` or `compare`, for the command line, which is rebuilt as a reader would type it.
        every: the methods to take where none are given.

    Returns:
        The request.

    Raises:
        InputError: if something cannot be read, or there is no protocol.
    """
    from benchmarks.report.columns import check
    from benchmarks.resources import check_device
    from benchmarks.settings import parse_assignments

    if not description.protocols:
        raise InputError("no protocol was given; see `list`")
    seeds = description.seeds if description.seeds is not None else [0, 1, 2]
    test = description.test or "t"
    if test not in ("t", "wilcoxon"):
        raise InputError(f"--test {test!r}: expected t or wilcoxon")
    return Request(
        protocols=tuple(description.protocols),
        methods=every if description.methods is None else tuple(description.methods),
        every=description.methods is None,
        seeds=tuple(seeds),
        data=parse_data(description.data or ()),
        device=check_device(description.device or "cpu"),
        assignments=parse_assignments(description.set or ()),
        grid=assignments.parse_grid(description.grid or ()),
        out=out,
        command=_command(description, seeds, command),
        name=description.name,
        threads=description.threads,
        jobs=1 if description.jobs is None else description.jobs,
        backend=description.backend or "local",
        address=description.address,
        gpu_share=1.0 if description.gpu_share is None else description.gpu_share,
        wandb=description.wandb,
        test=test,
        columns=check(description.columns),
    )


def _command(description: Description, seeds: Sequence[int], command: str) -> str:
    """Write the command line that gives these results; how the runs are spread does not belong to it."""
    words = ["python", "-m", "benchmarks", command, *(description.protocols or ())]
    one = command == "run"
    if description.methods is not None:
        words += ["--method" if one else "--methods", ",".join(description.methods)]
    words += ["--seed" if one else "--seeds", ",".join(str(seed) for seed in seeds)]
    for option, texts in (("--data", description.data), ("--set", description.set), ("--grid", description.grid)):
        words += [word for text in texts or () for word in (option, text)]
    words += ["--device", description.device] if description.device not in (None, "cpu") else []
    words += ["--threads", str(description.threads)] if description.threads is not None else []
    words += ["--test", description.test] if description.test not in (None, "t") else []
    words += ["--columns", ",".join(description.columns)] if description.columns else []
    return shlex.join(words)
