"""Where runs are kept, and what makes two runs the same.

Below the folder of results, `runs/` holds a folder for each run and every comparison a folder with its report. A run's
folder is named after its key, the digest of everything that determines the result: finished runs are found again by any
comparison, and runs of other code, other versions or other data are never taken for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.digest import code_digest
from benchmarks.files import explain, write_json
from benchmarks.jobs import Job, change_tag
from benchmarks.settings import InputError
from benchmarks.sources import ImageData
from benchmarks.trace import FORMAT

#: Fields of a protocol that say something to people, or of other methods.
_SILENT = ("summary", "methods", "sources", "notes", "expected")
_MARK = "format.json"
#: What everybody reads of a result.
NEEDED = frozenset(
    ("protocol", "method", "seed", "changed", "hyper_parameters", "accuracy_matrix", "acc", "bwt", "train_seconds")
)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        path: the folder.
        key: of the run.
    """

    path: Path
    key: str

    @property
    def result(self) -> Path:
        """The finished result."""
        return self.path / "result.json"

    @property
    def error(self) -> Path:
        """The traceback of the last failure."""
        return self.path / "error.txt"

    @property
    def status(self) -> Path:
        """Where a run is that goes on, for those who watch."""
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        """What happened, in words."""
        return self.path / "log.txt"

    def read(self) -> dict[str, Any] | None:
        """Return the finished result; None if there is none, or it is damaged or of another run."""
        try:
            result = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        fits = isinstance(result, dict) and result.get("key") == self.key and result.get("format") == FORMAT
        return result if fits and result.keys() >= NEEDED else None

    def clean(self) -> None:
        """Remove what a run leaves until it has finished, also after a kill; errors in doing so do not matter."""
        for file in (self.error, self.status, *self.path.glob("checkpoint.pt"), *self.path.glob(".checkpoint.pt.*")):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def run_key(job: Job, data: str) -> str:
    """Digest everything that determines a result: 16 hexadecimal digits.

    Args:
        job: the run.
        data: digest of the images.

    Returns:
        The key. Hardware and threads are not in it: they change the order of sums, and a run may be sent to any machine
        with any number of jobs. They are in the result.
    """
    from benchmarks import external, resources

    protocol = {
        field.name: getattr(job.protocol, field.name)
        for field in dataclasses.fields(job.protocol)
        if field.name not in _SILENT
    }
    everything = {
        "format": FORMAT,
        "protocol": protocol,
        "hyper_parameters": job.hyper_parameters,
        "method": job.method,
        "origin": external.origin(job.method),
        "seed": job.seed,
        "device": job.device.type,
        "data": data,
        "code": code_digest(),
        "versions": {**resources.versions(), **resources.libraries()},
    }
    text = json.dumps(everything, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Write what JSON does not know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else str(value)


def run_folder(out: Path, job: Job, key: str) -> RunFolder:
    """Name the folder of a run below the folder of results."""
    tag = change_tag(job.protocol, job.method, job.changes)
    return RunFolder(out / "runs" / job.protocol.name / f"{job.method}-seed{job.seed}{tag}-{key[:8]}", key)


def data_digest(data: ImageData) -> str:
    """Digest the images and labels of a data set: 16 hexadecimal digits."""
    result = hashlib.sha256(repr((data.n_classes, data.coarse)).encode())
    for part in (data.x_train, data.y_train, data.x_test, data.y_test):
        result.update(repr((part.dtype, tuple(part.shape))).encode())
        result.update(memoryview(part.contiguous().numpy()).cast("B"))
    return result.hexdigest()[:16]


def claim(out: Path, name: str, protocols: Sequence[str] = ()) -> None:
    """Make the folder of results, see that it can be written, and that no other version's runs are in it.

    Args:
        out: the folder.
        name: of the comparison's folder in it.
        protocols: of its runs.

    Raises:
        InputError: if it is something else, cannot be made or written, or is of another version.
    """
    if name == "runs" or Path(name).name != name or name.startswith("."):
        raise InputError(f"--name {name!r}: expected the name of a folder below {str(out)!r}, other than 'runs'")
    mark = out / "runs" / _MARK
    try:
        if mark.exists():
            _check_mark(mark, out)
        else:
            write_json(mark, {"format": FORMAT})
        for folder in (out / name, *(out / "runs" / protocol for protocol in protocols)):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out: {explain(error, out)}") from error


def _check_mark(mark: Path, out: Path) -> None:
    """Refuse a folder whose runs another version of this program wrote."""
    try:
        found = json.loads(mark.read_text(encoding="utf-8")).get("format")
    except (ValueError, AttributeError):
        found = "unknown"
    if found != FORMAT:
        raise InputError(
            f"--out {str(out)!r} holds runs of format {found}, and this version writes format {FORMAT}: they are kept "
            f"as they are; give another folder with --out"
        )
