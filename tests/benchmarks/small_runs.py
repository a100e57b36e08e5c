"""What the tests of the backends let workers do, and how they wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import warnings
from contextlib import closing
from pathlib import Path

from benchmarks.backends import Options, execute

ROOT = Path(__file__).parents[2]


class Unloadable:
    """An item of a package that the worker does not have."""

    def __reduce__(self):
        return (__import__, ("no_such_package",))


def count(path):
    """Append a line to a file and count its lines."""
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(path.read_text().splitlines())


def await_path(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def await_second_run(folder, seconds=120):
    """Wait until one run below a folder has finished and another one trains."""
    end = time.monotonic() + seconds
    while True:
        finished = {file.parent for file in folder.rglob("result.json")}
        if finished and {file.parent for file in folder.rglob("status.json")} - finished:
            return
        assert time.monotonic() < end, f"no second run began in {folder}"
        time.sleep(0.02)


def await_begun(folder, *names):
    """Wait until runs have begun and said in which process."""
    for name in names:
        await_path(folder / name)
        while not (folder / name).read_text().endswith("\n"):
            time.sleep(0.01)


def work(item):
    """Do what an item says; the folder of an item is shared with the test."""
    what, folder, name = item
    starts = count(folder / name)
    if what == "raise":
        raise ValueError("out of\nrange")
    if what == "wait":
        await_path(folder / "release")
    if what == "noise":
        print("LOUD")
        os.system("echo LOUD; echo LOUD >&2")
        warnings.warn("LOUD", stacklevel=2)
    if what == "die":
        print("last words", flush=True)
        os._exit(3)
    if what == "die slowly":  # a worker of Dask that dies while it starts is not started again
        time.sleep(0.3)
        os._exit(3)
    if what == "die beside":  # once the other one runs
        await_path(folder / "bystander")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die once" and starts == 1:
        time.sleep(0.2)
        os._exit(3)
    if what == "unpicklable":
        return lambda: None
    return name


def report_threads(item):
    """Report the threads of PyTorch and of the variables, and leave another number behind."""
    import torch

    seen = torch.get_num_threads()
    torch.set_num_threads(1)
    return seen, os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"], os.getpid()


def items(folder, *pairs):
    return [(what, folder, name) for what, name in pairs]


def do(todo, **options):
    return dict(execute(work, todo, Options(**({"jobs": 2, "threads": 1} | options))))


def starts(folder, name):
    return len((folder / name).read_text().splitlines())


def slow_one_does_not_hold_back(folder, options):
    """The first run goes on until all the others are there."""
    todo = items(folder, ("wait", "slow"), *(("", f"quick{k}") for k in range(5)))
    order = []
    with closing(execute(work, todo, options)) as outcomes:
        for index, outcome in outcomes:
            assert outcome == todo[index][2]
            order.append(index)
            if len(order) == 5:
                (folder / "release").touch()
    assert order[5:] == [0]
    assert sorted(order) == list(range(6))


def running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip() not in ("",) and not state.startswith("Z")


def await_gone(pids, seconds=30):
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < end, f"processes {left} are still there"
        time.sleep(0.05)
