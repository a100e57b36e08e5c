"""Spreading runs over processes of this machine: order, threads, deaths, interruptions, and what is refused."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from benchmarks import backends
from benchmarks.backends import Options, check, execute
from benchmarks.settings import InputError
from tests.benchmarks.small_runs import (
    ROOT,
    Unloadable,
    await_begun,
    await_gone,
    await_path,
    count,
    do,
    items,
    report_threads,
    slow_one_does_not_hold_back,
    starts,
    work,
)


def test_results_do_not_depend_on_the_jobs(tmp_path):
    todo = items(tmp_path, ("", "a"), ("raise", "b"), ("", "c"))
    alone, spread = do(todo, jobs=1), do(todo)
    assert alone == {0: "a", 1: alone[1], 2: "c"}
    assert {k: v for k, v in spread.items() if k != 1} == {0: "a", 2: "c"}
    for failure in (alone[1], spread[1]):
        assert (failure.kind, failure.message) == ("raised", "ValueError: out of range")
        assert "in work" in failure.traceback


def test_one_job_stays_in_this_process(tmp_path):
    do(items(tmp_path, ("", "a")), jobs=1)
    assert (tmp_path / "a").read_text() == f"{os.getpid()}\n"

    def interrupted(item):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(execute(interrupted, [1], Options()))


def test_one_item_is_not_run_in_this_process_when_jobs_were_asked_for(tmp_path):
    do(items(tmp_path, ("", "a")))
    assert (tmp_path / "a").read_text() != f"{os.getpid()}\n"


def test_completion_order(tmp_path):
    slow_one_does_not_hold_back(tmp_path, Options(jobs=2, threads=1))


def test_no_more_than_the_jobs_at_a_time(tmp_path):
    todo = items(tmp_path, *(("wait", f"r{k}") for k in range(4)))
    with closing(execute(work, todo, Options(jobs=2, threads=1))) as outcomes:
        import threading

        def release():
            await_path(tmp_path / "r0")
            await_path(tmp_path / "r1")
            time.sleep(0.3)
            begun.extend(path.name for path in tmp_path.glob("r?"))
            (tmp_path / "release").touch()

        begun: list[str] = []
        threading.Thread(target=release).start()
        assert len(dict(outcomes)) == 4
    assert sorted(begun) == ["r0", "r1"]


def test_threads_are_set_for_each_run():
    """Also for the later ones of a worker, whatever the earlier ones left behind. The items bring PyTorch along."""
    import torch

    found = dict(execute(report_threads, [torch.float32] * 4, Options(jobs=2, threads=3)))
    assert {outcome[:3] for outcome in found.values()} == {(3, "3", "3")}
    assert len({outcome[3] for outcome in found.values()}) < 4


def test_threads_by_default(monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: 9)
    assert [backends._local_threads(Options(jobs=jobs)) for jobs in (2, 4, 20)] == [4, 2, 1]


def test_threads_of_this_process_are_put_back():
    import torch

    before = torch.get_num_threads()

    def seen(item):
        return torch.get_num_threads()

    assert dict(execute(seen, [0], Options(threads=before + 2))) == {0: before + 2}
    assert torch.get_num_threads() == before


def test_a_worker_that_dies_takes_nothing_along(tmp_path):
    todo = items(tmp_path, ("", "a"), ("die", "b"), ("die once", "c"), ("", "d"), ("raise", "e"), ("", "f"))
    found = do(todo)
    assert [found[k] for k in (0, 2, 3, 5)] == ["a", "c", "d", "f"]
    assert found[4].kind == "raised"
    assert found[1].kind == "worker died"
    assert "EXIT(3)" in found[1].message
    assert "fewer jobs" in found[1].message
    assert "checkpoint" in found[1].message
    assert found[1].traceback == "last words\n"
    assert starts(tmp_path, "b") == starts(tmp_path, "c") == 2
    assert starts(tmp_path, "a") == 1, "what had finished is not done again"


def test_a_bystander_is_not_blamed(tmp_path):
    """It runs at both deaths and is killed with the pool, but it is the other process that died."""
    todo = items(tmp_path, ("wait", "bystander"), ("die beside", "killer"))
    found = {}
    with closing(execute(work, todo, Options(jobs=2, threads=1))) as outcomes:
        for index, outcome in outcomes:
            found[index] = outcome
            (tmp_path / "release").touch()
    assert found[1].kind == "worker died"
    assert "SIGKILL" in found[1].message
    assert found[0] == "bystander"
    assert starts(tmp_path, "bystander") == 3


def die_while_sending(item):
    """Die as soon as the result is written down, in the middle of sending it."""
    import threading

    folder, scratch = item
    count(folder / "runs")

    def die():
        while not list(scratch.glob("*/done-0")):
            pass
        os._exit(3)

    threading.Thread(target=die, daemon=True).start()
    return b"x" * 50_000_000


def test_a_result_that_was_written_is_not_lost(tmp_path):
    found = dict(execute(die_while_sending, [(tmp_path, tmp_path / "s")], Options(jobs=2, threads=1), tmp_path / "s"))
    assert len(found[0]) == 50_000_000
    assert starts(tmp_path, "runs") == 1
    assert list((tmp_path / "s").iterdir()) == [], "nothing is left in the scratch folder"


def test_what_cannot_be_loaded_or_sent_is_named(tmp_path):
    todo = [*items(tmp_path, ("unpicklable", "a"), ("", "b")), Unloadable()]
    found = do(todo)
    assert found[1] == "b"
    assert found[0].kind == "raised"
    assert "pickle" in found[0].message
    assert found[2].kind == "import"
    assert "no_such_package" in found[2].message


def test_workers_print_nothing_here(tmp_path, capfd):
    assert do(items(tmp_path, *(("noise", f"n{k}") for k in range(3)), ("die", "d")))[0] == "n0"
    assert capfd.readouterr() == ("", "")


def test_leaving_early_stops_the_workers_without_a_word(tmp_path, recwarn):
    todo = items(tmp_path, ("", "a"), ("wait", "b"), ("wait", "c"))
    with closing(execute(work, todo, Options(jobs=2, threads=1))) as outcomes:
        assert next(outcomes) == (0, "a")
        await_begun(tmp_path, "b", "c")
    await_gone([int((tmp_path / name).read_text()) for name in "abc"])
    assert [str(warning.message) for warning in recwarn] == []


def test_no_worker_stays_after_the_end(tmp_path):
    do(items(tmp_path, ("", "a"), ("", "b")))
    await_gone([int((tmp_path / name).read_text()) for name in "ab"])


DRIVER = """
import sys
from pathlib import Path
from benchmarks.backends import Options, execute
from tests.benchmarks.small_runs import items, work
todo = items(Path(sys.argv[1]), ("wait", "a"), ("wait", "b"), ("", "c"))
for index, outcome in execute(work, todo, Options(jobs=2, threads=1)):
    print(index, outcome)
"""


@pytest.mark.parametrize("stop", ["Ctrl-C", "interrupt", "kill"])
def test_no_orphans(tmp_path, stop):
    """Ctrl-C reaches the driver and its workers; an interrupt or a kill the driver alone."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await_begun(tmp_path, "a", "b")
        if stop == "Ctrl-C":
            os.killpg(driver.pid, signal.SIGINT)
        else:
            driver.send_signal(signal.SIGINT if stop == "interrupt" else signal.SIGKILL)
        out, err = driver.communicate(timeout=60)
        assert out == ""
        if stop != "kill":
            assert err.count("KeyboardInterrupt") == 1
            assert err.rstrip().endswith("KeyboardInterrupt")
        pids = [int(line) for name in "ab" for line in (tmp_path / name).read_text().splitlines()]
        await_gone(pids)
        assert not (tmp_path / "c").exists()
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"jobs": 0}, "--jobs 0: expected at least 1"),
        ({"threads": 0}, "--threads 0: expected at least 1"),
        ({"gpu_share": 0.0}, "GPU share of 0: "),
        ({"gpu_share": 1.5}, "GPU share of 1.5: "),
        ({"backend": "slurm"}, "unknown backend 'slurm': expected local, ray or dask"),
        ({"address": "tcp://host:1"}, "'tcp://host:1' is of a cluster"),
    ],
)
def test_refused(options, expected):
    with pytest.raises(InputError, match=re.escape(expected)):
        check(Options(**options))


@pytest.mark.parametrize(
    ("backend", "missing", "extra"),
    [("local", "joblib", "benchmarks"), ("ray", "ray", "ray"), ("dask", "distributed", "dask")],
)
def test_a_missing_package_names_the_extra(monkeypatch, backend, missing, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(InputError, match=rf"{missing} is not installed.*avalanche-gradproj\[{extra}\]"):
        check(Options(backend=backend, jobs=2))


def test_accepted():
    check(Options())
    check(Options(jobs=3, threads=2, gpu_share=0.5, cuda=True))
