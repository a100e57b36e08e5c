"""Doing one run where a backend sends it: in this process, in another, on another machine.

The result is on the disk when a run ends, and what went wrong too. A run that is stopped goes on from its last finished
experience when it is done again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.files import explain, write_bytes, write_json, write_text
from benchmarks.folders import RunFolder, data_digest, run_key

try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two processes from doing the same run
    fcntl = None  # type: ignore[assignment]

#: Seconds between two notes of where a run is.
_PAUSE = 1.0
#: Seconds between two looks at a lock that another process has.
_PATIENCE = 1.0


class OtherRunError(Exception):
    """This process would do another run than the one that was planned."""


@dataclass(frozen=True)
class Item:
    """A run in plain values, as it travels to another process.

    Attributes:
        protocol: its name.
        method: its name.
        seed: of the run.
        device: where to train.
        changes: setting to text.
        data: the user's file with the images, or None.
        folder: of the run.
        key: of the run.
        threads: of the run.
        wandb: settings of Weights & Biases, or None.
    """

    protocol: str
    method: str
    seed: int
    device: str
    changes: Mapping[str, str]
    data: str | None
    folder: str
    key: str
    threads: int
    wandb: Mapping[str, Any] | None = None

    @property
    def files(self) -> RunFolder:
        """Its folder."""
        return RunFolder(Path(self.folder), self.key)


def work(item: Item) -> str | None:
    """Do one run and write its result.

    Args:
        item: what to run.

    Returns:
        None if the result is there; else one line about what went wrong, its traceback being in the run's folder.
    """
    files = item.files
    if files.read() is not None:
        files.clean()
        return None
    if not files.path.parent.parent.is_dir():
        return (
            f"{socket.gethostname()} does not see {str(files.path.parent.parent)!r}: give --out a folder that all "
            f"machines of the cluster share"
        )
    try:
        files.path.mkdir(parents=True, exist_ok=True)
        with _alone(files):
            return None if files.read() is not None else _logged(item, files)
    except OSError as error:
        return explain(error, files.path)


def _logged(item: Item, files: RunFolder) -> str | None:
    """Do the run with everything it says going to its log."""
    with files.log.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), _warnings_to(log):
        _say(log, f"started on {socket.gethostname()}, process {os.getpid()}")
        try:
            result = _run(item, files, log)
            write_json(files.result, {**result, "key": item.key})
        except (Exception, SystemExit) as error:  # a method of any origin may raise anything
            if isinstance(error, OSError) and _of_the_folder(error, files.path):
                _say(log, f"failed: {error}")
                return explain(error, files.path)
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _say(log, f"failed: {message}")
            write_text(files.error, traceback.format_exc())
            return f"{message} (traceback in {files.error})"
        except BaseException as error:
            _say(log, f"stopped: {type(error).__name__}")
            raise
        finally:
            files.status.unlink(missing_ok=True)
        _say(log, "finished")
    files.clean()
    return None


def _of_the_folder(error: OSError, folder: Path) -> bool:
    """Whether it was the run's own folder that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return error.filename is not None and folder in Path(str(error.filename)).parents


def _run(item: Item, files: RunFolder, log: TextIO) -> dict[str, Any]:
    """Train and test."""
    import torch

    from benchmarks import plan
    from benchmarks.jobs import make_job
    from benchmarks.run import run
    from benchmarks.trace import Session

    job = make_job(item.protocol, item.method, item.seed, torch.device(item.device), item.changes)
    data = plan.load(item.protocol, None if item.data is None else Path(item.data))
    if run_key(job, data_digest(data)) != item.key:
        raise OtherRunError(
            "this process has other code, versions or data than the plan was made with (were they changed, or is "
            "a machine of the cluster set up differently?): nothing was trained; repeat the command"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(item.threads)
    try:
        return run(job, data, _Notes(files, log).note, Session(files.path, item.key, item.wandb))
    finally:
        torch.set_num_threads(before)


class _Notes:
    """Leaves notes about where a run is."""

    def __init__(self, files: RunFolder, log: TextIO) -> None:
        self._files, self._log = files, log
        self._began = time.time()
        self._last, self._experience = 0.0, -1

    def note(self, experience: int, experiences: int, epoch: int, epochs: int) -> None:
        """Write it down, once a second and when an experience begins; see `progress.Report`."""
        if experience != self._experience:
            _say(self._log, f"experience {experience + 1} of {experiences}, {epochs} epochs")
        elif time.monotonic() - self._last < _PAUSE:
            return
        self._last, self._experience = time.monotonic(), experience
        status = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": self._began,
            "experience": experience,
            "experiences": experiences,
            "epoch": epoch,
            "epochs": epochs,
        }
        write_bytes(self._files.status, json.dumps(status).encode(), durable=False)


@contextlib.contextmanager
def _alone(files: RunFolder) -> Iterator[None]:
    """Hold the run's lock, which ends with the process that holds it; wait while another process is at the run."""
    with (files.path / ".lock").open("w") as lock:
        while fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_PATIENCE)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield


@contextlib.contextmanager
def _warnings_to(log: TextIO) -> Iterator[None]:
    """Write warnings into the log, each once."""
    seen = set()

    def show(message: Any, category: type[Warning], file: str, line: int, *rest: Any) -> None:
        text = f"{category.__name__}: {' '.join(str(message).split())} ({Path(file).name}:{line})"
        if text not in seen:
            seen.add(text)
            _say(log, text)

    with warnings.catch_warnings():
        # Not a filter: Avalanche's deprecation marks switch filters off.
        held: Callable[..., None] = warnings.showwarning
        warnings.showwarning = show
        try:
            yield
        finally:
            warnings.showwarning = held


def _say(log: TextIO, text: str) -> None:
    """Write one line with the time."""
    log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    log.flush()
