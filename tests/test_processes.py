"""Programs in the tests are ended, with all that they started."""

from __future__ import annotations

import sys
import time

import pytest

from tests.benchmarks.small_runs import await_gone
from tests.processes import run_to_end

#: Starts another one that keeps its output open, and says which.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
print("warned", file=sys.stderr, flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(3)
"""


def test_one_that_leaves_another_behind():
    begin = time.monotonic()
    done = run_to_end([sys.executable, "-c", PARENT, "0"], limit=60)
    assert time.monotonic() - begin < 60
    assert done.returncode == 3
    assert done.stderr == "warned\n"
    await_gone([int(done.stdout)])


def test_one_that_takes_too_long():
    with pytest.raises(AssertionError, match=r"took longer than 3 s; its last words: \d+\nwarned") as caught:
        run_to_end([sys.executable, "-c", PARENT, "600"], limit=3)
    await_gone([int(str(caught.value).split("last words: ")[1].split()[0])])
