"""Files that are whole or not there."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result so that the file is never there in part.

    Args:
        path: the file; its folder is made.
        result: what goes into it.

    Raises:
        OSError: if it cannot be written; what was there stays.
    """
    write_text(path, json.dumps(finite(result), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Put None for what JSON has no number for: NaN and infinity, as of runs that diverged."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return {key: finite(part) for key, part in value.items()} if isinstance(value, Mapping) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is never there in part.

    Args:
        path: the file; its folder is made.
        text: what goes into it.

    Raises:
        OSError: if it cannot be written; what was there stays.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview, *, durable: bool = True) -> None:
    """Write a file so that it is never there in part.

    Args:
        path: the file; its folder is made.
        content: what goes into it.
        durable: wait until it is on the disk, so that it is there also when the machine stops.

    Raises:
        OSError: if it cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def explain(error: OSError, folder: Path) -> str:
    """Say what is wrong with a folder, and what to do.

    Args:
        error: what came of writing there.
        folder: where.

    Returns:
        One line.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left for {str(folder)!r}: free some, and repeat the command; what has finished is kept"
    return f"{str(folder)!r} cannot be written ({error.strerror or error}): give another folder with --out"
