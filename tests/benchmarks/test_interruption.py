"""Ctrl-C where Python swallows it."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time

import pytest
import typer

from benchmarks import cli
from benchmarks.interruption import not_lost


@pytest.fixture
def swallow():
    """Interrupts within callbacks of the garbage collector, which collects when told to, as often as the list says."""
    times, pause = [0], [0.0]

    def callback(phase, info):
        if phase == "start" and times[0] > 0:
            times[0] -= 1
            signal.raise_signal(signal.SIGINT)
        elif phase == "stop":
            time.sleep(pause[0])

    gc.disable()
    gc.callbacks.append(callback)
    yield times, pause
    gc.callbacks.remove(callback)
    gc.enable()


@pytest.mark.parametrize("swallowed", [1, 2])
def test_it_comes_again_until_it_is_heard(swallow, swallowed):
    """The second one that is swallowed is a repetition."""
    times, pause = swallow
    before = sys.unraisablehook
    begin = time.monotonic()

    def work():
        times[0], pause[0] = 1, 0.3 * (swallowed - 1)
        gc.collect()
        while time.monotonic() < begin + 60:
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt), not_lost():
        work()
    assert time.monotonic() < begin + 30
    assert times[0] == 0
    assert sys.unraisablehook is before


def test_commands_hear_it(swallow, tmp_path, capsys):
    times, _ = swallow
    begin = time.monotonic()

    def work():
        with cli._interruptible(tmp_path, kept=True):
            times[0] = 1
            gc.collect()
            while time.monotonic() < begin + 60:
                time.sleep(0.01)

    with pytest.raises(typer.Exit) as ended:
        work()
    assert ended.value.exit_code == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_it_comes_no_more_after_the_end(swallow):
    times, _ = swallow
    with not_lost():
        times[0] = 1
        gc.collect()
    assert times[0] == 0
    time.sleep(0.3)


def test_other_ignored_exceptions_are_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: told.append(ignored.exc_type))

    class Broken:
        def __del__(self):
            raise ValueError

    with not_lost():
        Broken()
    assert told == [ValueError]


def test_elsewhere_it_does_nothing():
    before, seen = sys.unraisablehook, []

    def look():
        with not_lost():
            seen.append(sys.unraisablehook)

    other = threading.Thread(target=look)
    other.start()
    other.join()
    assert seen == [before]
