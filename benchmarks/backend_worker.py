"""What runs in a worker: a shell around one run that nothing but the death of its process gets out of."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: What a shell hands back: the index of its item, what became of it, and the parts of it.
Report = tuple[int, str, tuple[Any, ...]]
Shell = Callable[..., Report]


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end.

    Attributes:
        kind: `raised` by the run itself; `import`: its code could not be loaded where it should run;
            `worker died`: its process ended without a word; `cluster`: the cluster gave the run up.
        message: one line that says what happened and, where something can be done, what.
        traceback: where it happened, or the last lines that the dead worker wrote; may be empty.
    """

    kind: Literal["raised", "import", "worker died", "cluster"]
    message: str
    traceback: str = ""


def died(detail: str, traceback: str = "") -> Failure:
    """Build the failure of an item whose worker died each time.

    Args:
        detail: what is known about it.
        traceback: the last lines of the worker, if there are any.

    Returns:
        The failure, with what can be done.
    """
    advice = (
        "often for lack of memory: use fewer jobs or a machine with more; "
        "the run goes on from its checkpoint when the command is repeated"
    )
    return Failure("worker died", f"{detail}, {advice}", traceback)


def read(report: Report) -> tuple[int, Any]:
    """Turn what a shell handed back into an outcome.

    Args:
        report: the shell's result.

    Returns:
        The index and the value or the failure.
    """
    index, kind, parts = report
    if kind != "value":
        return index, Failure(kind, *parts)  # type: ignore[arg-type]
    try:
        return index, pickle.loads(parts[0])
    except Exception as error:
        return index, Failure("raised", f"its result cannot be read here: {type(error).__name__}: {error}")


def read_file(path: Path) -> tuple[int, Any]:
    """Read the outcome that a local worker left in a file.

    Args:
        path: the file.

    Returns:
        The index and the value or the failure.
    """
    return read(pickle.loads(path.read_bytes()))


def pack(work: Callable[[Any], Any], item: Any) -> bytes:
    """Make the part of a task that only the shell opens, so that a failing import has somebody to report it.

    Args:
        work: what does a run.
        item: the run.

    Returns:
        Both as bytes.
    """
    return pickle.dumps((work, item))


def make_shell() -> Shell:
    """Make the function that the workers call with `(index, payload, threads, folder)`.

    `folder` is None on a cluster. On this machine, the shell leaves there the file `running-INDEX-PID` while
    it runs, `done-INDEX` with its report, and `PID.log` with all that was printed; what it hands back says no more than
    that the report is there.

    Returns:
        A function that is sent as code: where this package cannot be imported it still starts, and says so.
    """

    # Nested and without names of this module: that is what makes pickle send it by value.
    def shell(index: int, payload: bytes, threads: int, folder: str | None) -> Report:
        import os
        import pickle
        import platform
        import signal
        import sys
        import threading
        import time
        import traceback

        def watch(parent: int) -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(1)

        if folder is not None:
            marker = os.path.join(folder, f"running-{index}-{os.getpid()}")
            with open(marker, "w"):
                pass
            # Ctrl-C reaches every process of a terminal; the driver is the one that acts on it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if not any(thread.name == "watch driver" for thread in threading.enumerate()):
                # At the level of the system: native libraries print past Python's own streams.
                log = os.open(os.path.join(folder, f"{os.getpid()}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.close(log)
                # A driver that is killed cannot stop its workers, which would train on unseen.
                threading.Thread(target=watch, args=(os.getppid(),), name="watch driver", daemon=True).start()

        for name in ("OMP", "MKL", "OPENBLAS", "VECLIB", "NUMEXPR"):
            os.environ[f"{name}_{'MAXIMUM' if name == 'VECLIB' else 'NUM'}_THREADS"] = str(threads)
        try:
            work, item = pickle.loads(payload)
            # Loaded with the code of the run. The variables alone do not bind PyTorch: it takes no more threads
            # than there are cores, and a worker that has it keeps the number of an earlier run.
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(threads)
        except BaseException as error:
            where = f"on {platform.node()}, started in {os.getcwd()}, with Python {platform.python_version()}"
            what = f"the worker {where} cannot load the code of the run: {type(error).__name__}: {error}"
            advice = "install the same packages there and start the workers in the folder of the code"
            report = (index, "import", (f"{what}; {advice}", traceback.format_exc()))
        else:
            try:
                report = (index, "value", (pickle.dumps(work(item)),))
            except BaseException as error:
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                report = (index, "raised", (message, traceback.format_exc()))
        if folder is not None:
            sys.stdout.flush()
            done = os.path.join(folder, f"done-{index}")
            with open(f"{done}.part", "wb") as file:
                pickle.dump(report, file)
            os.replace(f"{done}.part", done)
            os.unlink(marker)
            # A few bytes, which a pipe takes whole: of a process that dies in the middle of a long message the others
            # keep the pipe open, and the driver would wait for the rest for ever.
            return index, "file", ()
        return report

    return shell
