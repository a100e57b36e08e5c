"""Spreading runs over a Ray cluster of two machines and a Dask cluster of two workers, all of them on this one."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time

import pytest

from benchmarks import backends
from benchmarks.backends import Options, check, execute
from benchmarks.interruption import not_lost
from benchmarks.settings import InputError
from tests.benchmarks.small_runs import (
    ROOT,
    Unloadable,
    await_begun,
    await_gone,
    await_path,
    count,
    items,
    report_threads,
    slow_one_does_not_hold_back,
    starts,
    work,
)
from tests.processes import run_to_end

pytestmark = pytest.mark.cluster

STORE = 80 * 2**20


@pytest.fixture(scope="module")
def ray_cluster():
    """The address of a cluster with one processor on each of two machines."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'avalanche-gradproj[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))  # of the workers
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE}
        try:
            cluster = Cluster(initialize_head=True, head_node_args=head)
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        except (OSError, RuntimeError, TimeoutError) as error:  # no ports or no shared memory for it
            pytest.skip(f"Ray cannot start a cluster on this machine: {error}")
        try:
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def dask_cluster():
    """The address of a scheduler with two workers. The scheduler gives a run up at the first death."""
    distributed = pytest.importorskip(
        "distributed", reason="Dask is not installed: pip install 'avalanche-gradproj[dask]'"
    )
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
    ):
        yield cluster.scheduler_address


@pytest.fixture(params=["ray", "dask"])
def options(request):
    return Options(backend=request.param, jobs=2, address=request.getfixturevalue(f"{request.param}_cluster"))


def pids(folder, *names):
    return {int(line) for name in names for line in (folder / name).read_text().splitlines()}


def endless(item):
    """Compute until it is stopped, and say so, whatever `except Exception` is in between."""
    folder, name = item
    count(folder / name)
    try:
        while True:
            try:
                time.sleep(0.02)
            except Exception:
                continue
    finally:
        (folder / f"{name} stopped").touch()


def test_two_runs_at_a_time_in_two_workers_that_are_not_this_process(tmp_path, options):
    check(options)
    todo = items(tmp_path, ("wait", "a"), ("wait", "b"), ("raise", "c"))

    def release():
        await_begun(tmp_path, "a", "b")
        (tmp_path / "release").touch()

    threading.Thread(target=release).start()
    found = dict(execute(work, todo, options))
    assert (found[0], found[1]) == ("a", "b")
    assert (found[2].kind, found[2].message) == ("raised", "ValueError: out of range")
    assert len(pids(tmp_path, "a", "b") - {os.getpid()}) == 2


def test_completion_order(tmp_path, options):
    slow_one_does_not_hold_back(tmp_path, options)


def test_one_job_goes_to_the_cluster_too(tmp_path, options):
    found = dict(execute(work, items(tmp_path, ("", "a"), ("", "b")), Options(**(vars(options) | {"jobs": 1}))))
    assert found == {0: "a", 1: "b"}
    assert os.getpid() not in pids(tmp_path, "a", "b")


def test_threads_are_set(options):
    import torch

    found = dict(execute(report_threads, [torch.float32] * 3, Options(**(vars(options) | {"threads": 1}))))
    assert {outcome[:3] for outcome in found.values()} == {(1, "1", "1")}


def test_a_worker_that_dies_takes_nothing_along(tmp_path, options):
    todo = items(tmp_path, ("", "a"), ("die slowly", "b"), ("die once", "c"), ("", "d"), ("", "e"))
    found = dict(execute(work, todo, options))
    assert [found[k] for k in (0, 2, 3, 4)] == ["a", "c", "d", "e"]
    assert found[1].kind == "worker died"
    assert "died 2 times" in found[1].message
    assert "checkpoint" in found[1].message
    assert starts(tmp_path, "b") == 2 if options.backend == "ray" else starts(tmp_path, "b") in (2, 3)


def test_what_the_workers_cannot_load_is_named(tmp_path, options):
    found = dict(execute(work, [Unloadable(), *items(tmp_path, ("", "a"))], options))
    assert found[1] == "a"
    assert found[0].kind == "import"
    assert "no_such_package" in found[0].message
    assert "start the workers in the folder of the code" in found[0].message


def test_an_interruption_stops_the_runs(tmp_path, options):
    outcomes = execute(endless, [(tmp_path, "a"), (tmp_path, "b"), (tmp_path, "c")], options)

    def interrupt():
        try:
            await_begun(tmp_path, "a", "b")
        finally:  # if they never begin, the test has to fail and not to wait
            signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), not_lost():
        next(outcomes)
    if options.backend == "ray":
        await_gone(pids(tmp_path, "a", "b"), seconds=30)
    else:
        await_path(tmp_path / "a stopped", seconds=30)
        await_path(tmp_path / "b stopped", seconds=30)
    assert not (tmp_path / "c").exists()
    assert list(execute(work, items(tmp_path, ("", "d")), options)) == [(0, "d")], "the cluster goes on"


def test_nothing_is_printed_here(tmp_path, ray_cluster, capfd):
    list(execute(work, items(tmp_path, ("noise", "a"), ("die slowly", "b")), Options("ray", 2, address=ray_cluster)))
    assert capfd.readouterr() == ("", "")


def test_the_cores_of_the_cluster_are_shared():
    nodes = [{"CPU": 16.0}, {"CPU": 8.0}, {"memory": 1.0}]
    assert [backends._ray_threads(Options("ray", jobs), nodes) for jobs in (1, 2, 6, 100)] == [16, 12, 4, 1]
    assert backends._ray_threads(Options("ray", 100, threads=5), nodes) == 5


def refused(options, expected, seconds):
    begin = time.monotonic()
    with pytest.raises(InputError, match=re.escape(expected)):
        check(options)
    assert time.monotonic() - begin < seconds


@pytest.fixture
def silent():
    """The port of something that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


def test_addresses_where_nothing_is(closed):
    pytest.importorskip("ray")
    pytest.importorskip("distributed")
    refused(Options("ray", address=f"127.0.0.1:{closed}"), f"'127.0.0.1:{closed}' cannot be reached", 60)
    refused(Options("dask", address=f"tcp://127.0.0.1:{closed}"), f"'tcp://127.0.0.1:{closed}' does not answer", 60)


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_an_address_of_something_else(silent, backend):
    """In a process of its own, for the libraries go on trying behind the scenes; that it ends is part of the test."""
    pytest.importorskip({"ray": "ray", "dask": "distributed"}[backend])
    address = f"{'tcp://' if backend == 'dask' else ''}127.0.0.1:{silent}"
    code = (
        "from benchmarks import backends\nbackends.PATIENCE = 1.5\n"
        f"backends.check(backends.Options({backend!r}, address={address!r}))"
    )
    done = run_to_end([sys.executable, "-c", code], limit=120, cwd=ROOT)
    assert f"InputError: the {'Ray cluster' if backend == 'ray' else 'Dask scheduler'} at {address!r}" in done.stderr
    assert "does not answer" in done.stderr


def test_no_scheduler_at_all():
    pytest.importorskip("distributed")
    refused(Options("dask"), "needs the address of a running scheduler", 60)


def test_dask_reads_its_own_configuration(dask_cluster):
    import dask

    with dask.config.set({"scheduler-address": dask_cluster}):
        check(Options("dask"))


def test_what_no_machine_has_is_refused(options):
    cuda = Options(**(vars(options) | {"cuda": True, "gpu_share": 0.5}))
    refused(cuda, "0.5 of a GPU", 10)
    if options.backend == "ray":
        refused(Options(**(vars(options) | {"threads": 64})), "no machine with 64 CPUs", 10)


def test_workers_with_several_threads_are_refused():
    """Two runs in one process would share the seeds."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=":0", processes=False
    ) as cluster:
        refused(Options("dask", address=cluster.scheduler_address), "--nthreads 1", 10)


def test_a_scheduler_without_workers_is_refused(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(backends, "PATIENCE", 1.0)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0", processes=False) as cluster:
        refused(Options("dask", address=cluster.scheduler_address), "has no workers", 10)


def test_a_comparison_on_a_cluster_equals_one_in_this_process(tmp_path, options):
    """Real runs in both workers, with the results of this process and the same keys."""
    import json

    from typer.testing import CliRunner

    from benchmarks.cli import app

    settings = [
        "--set",
        "epochs=1",
        "--set",
        "train_limit=40",
        "--set",
        "n_experiences=2",
        "--set",
        "gem.gem_patterns=10",
        "--threads",
        "1",
    ]
    command = ["compare", "digits-split", "--methods", "naive,gem", "--seeds", "0,1", *settings]
    cluster = ["--backend", options.backend, "--address", options.address, "--jobs", "2"]
    accuracies = {}
    for where, more in (("there", cluster), ("here", [])):
        found = CliRunner().invoke(app, [*command, *more, "--out", str(tmp_path / where)])
        assert found.exit_code == 0, found.output
        files = sorted((tmp_path / where / "runs").rglob("result.json"))
        assert len(files) == 4
        accuracies[where] = {file.parent.name: json.loads(file.read_text())["accuracy_matrix"] for file in files}
        assert (tmp_path / where / "digits-split" / "report.html").exists()
    assert accuracies["there"] == accuracies["here"]
    logs = [file.read_text() for file in (tmp_path / "there").rglob("log.txt")]
    assert len({log.split("process ")[1].split()[0] for log in logs} - {str(os.getpid())}) == 2
