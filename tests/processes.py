"""Other programs in the tests: none of them can hold a test for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def run_to_end(command: Sequence[str], limit: float = 240.0, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a program, and end whatever it has started when it ends or takes too long.

    `subprocess.run` waits for the end of the program's output after it has killed it: for ever, where a process that
    the program started (a helper of a browser, a worker) lives on with the same output. Files have no such end.

    Args:
        command: the program and its arguments.
        limit: seconds that it may take.
        settings: more arguments of `subprocess.Popen`.

    Returns:
        Its exit status and what it wrote.

    Raises:
        AssertionError: if it takes longer; the message ends with what it wrote last.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, **settings
        )
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
        told = []
        for file in (out, err):
            file.seek(0)
            told.append(file.read().decode(errors="replace"))
    assert not late, f"{list(command)} took longer than {limit:g} s; its last words: {told[0][-2000:]}{told[1][-2000:]}"
    return subprocess.CompletedProcess(command, process.returncode, *told)
