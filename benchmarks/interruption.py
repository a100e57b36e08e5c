"""Ctrl-C that nothing swallows."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

#: Seconds until an interruption that was swallowed comes again.
_PAUSE = 0.05


@contextlib.contextmanager
def not_lost() -> Iterator[None]:
    """Repeat an interruption that came where Python ignores exceptions.

    An exception in a finaliser or in a callback of the garbage collector (JAX has one, and qpsolvers loads JAX where
    it is installed) is printed and forgotten, so that Ctrl-C would now and then do nothing. Python tells a hook of
    those, and this one sends the signal again, until it is heard. Outside of the main thread this does nothing.

    Yields:
        Nothing.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return
    before = sys.unraisablehook
    left = False

    def again() -> None:
        if left:
            return
        if hasattr(signal, "pthread_kill"):  # which also ends a system call that the main thread waits in
            signal.pthread_kill(main.ident, signal.SIGINT)
        else:
            _thread.interrupt_main()

    def hook(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            before(ignored)
            return
        timer = threading.Timer(_PAUSE, again)
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        left = True
        sys.unraisablehook = before
