"""Methods that other packages bring, through the entry points of the group `avalanche_gradproj.methods`.

    [project.entry-points."avalanche_gradproj.methods"]
    mine = "my_package.plugin:MyPlugin"

The entry's name is the method's name on the command line; its value is a plugin class, or any callable that makes an
Avalanche plugin from keyword arguments that all have defaults. They become the method's settings (`signatures.py`); an
argument `seed` gets the run's seed. A package is imported when one of its methods is asked for, or listed. What is
broken is listed with the reason, and disturbs nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import signatures
from benchmarks.digest import digest_of
from benchmarks.method_records.common import Method
from benchmarks.settings import InputError

GROUP = "avalanche_gradproj.methods"
#: What can be part of a file's name, of a list separated by commas, and of `--set METHOD.key=value`.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class External:
    """A method of another package, usable or not.

    Attributes:
        name: the entry's name.
        brought_by: the distribution's name and version.
        summary: one line for people.
        method: the method; None where it cannot be used.
        reason: why it cannot be used; empty where it can.
        origin: what determines its code.
        unset: arguments that no text can set.
    """

    name: str
    brought_by: str
    summary: str = ""
    method: Method | None = None
    reason: str = ""
    origin: str = ""
    unset: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """An entry point that was found; nothing is imported yet.

    Attributes:
        name: the entry's name.
        value: module and attribute, as the package gives them.
        brought_by: the distribution's name and version.
    """

    name: str
    value: str
    brought_by: str


def found() -> dict[str, tuple[Entry, ...]]:
    """Return the entries by name, several where several packages bring one of that name; imports none of them."""
    return _found(tuple(sys.path))


def load(name: str) -> External:
    """Import a method of another package.

    Args:
        name: a name that `found` has.

    Returns:
        The method, or why it cannot be used; this never raises for what the package does.
    """
    return _load(found()[name])


def method(name: str) -> Method:
    """Return a method of another package.

    Args:
        name: a name that `found` has.

    Returns:
        The method.

    Raises:
        InputError: if it cannot be used, naming the package and the cause.
    """
    external = load(name)
    if external.method is None:
        raise InputError(f"method {name!r} of {external.brought_by} cannot be used: {external.reason}")
    return external.method


def origin(name: str) -> str | None:
    """Say what determines the code of a method of another package: distribution, version, digest of its source.

    Args:
        name: a method's name.

    Returns:
        One line; None for methods that no other package brings, or that cannot be used.
    """
    from benchmarks.methods import METHODS

    if name in METHODS or name not in found():
        return None
    return load(name).origin or None


@functools.lru_cache(maxsize=4)
def _found(path: tuple[str, ...]) -> dict[str, tuple[Entry, ...]]:
    """Search all distributions on the path; the first of one name hides later ones, as for imports."""
    seen, entries = set(), []
    for distribution in importlib.metadata.distributions(path=list(path)):
        # What is wrong with one distribution, whichever it is, is no reason to miss the others.
        try:
            key = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
            chosen = [] if key in seen else [e for e in distribution.entry_points if e.group == GROUP]
            seen.add(key)
            title = f"{distribution.metadata['Name']} {distribution.version}"
        except Exception:
            continue
        entries += [Entry(entry.name, entry.value, title) for entry in chosen]
    names = sorted({entry.name for entry in entries})
    return {name: tuple(entry for entry in entries if entry.name == name) for name in names}


@functools.lru_cache(maxsize=64)
def _load(entries: tuple[Entry, ...]) -> External:
    entry = entries[0]
    title = " and ".join(dict.fromkeys(each.brought_by for each in entries))
    try:
        if len(entries) > 1:
            raise TypeError(f"{len(entries)} entries have this name: uninstall or rename all but one")
        return _usable(entry)
    except (Exception, SystemExit) as error:
        # A module may do anything while it is imported, also leave.
        kind = "" if type(error) in (TypeError, ValueError) else f"{type(error).__name__}: "
        return External(entry.name, title, reason=kind + (" ".join(str(error).split()) or "no message"))


def _usable(entry: Entry) -> External:
    """Import an entry and make a method of it; whatever goes wrong is raised."""
    from benchmarks.methods import METHODS
    from benchmarks.protocols import PROTOCOLS

    for kind, taken in (("method", METHODS), ("protocol", PROTOCOLS)):
        if entry.name in taken:
            raise ValueError(f"the name {entry.name!r} is taken by a {kind} of this project: choose another")
    if not _NAME.fullmatch(entry.name):
        raise ValueError(f"the name {entry.name!r} may hold letters, digits, _ and - only")
    point = importlib.metadata.EntryPoint(entry.name, entry.value, GROUP)
    if not point.pattern.match(entry.value):
        raise ValueError(f"{entry.value!r} is not of the form module:attribute")
    target = point.load()
    if not callable(target):
        raise TypeError(f"{entry.value} is {type(target).__name__}, expected a plugin class or another callable")
    signature = signatures.read(target, entry.name, _record)
    text = inspect.getdoc(getattr(target, "func", target)) or ""
    summary = text.strip().split("\n")[0] or "no description"

    def plugins(settings: Any, seed: int) -> list[Any]:
        return [_make(entry, target, signature.keywords(settings, seed))]

    digest = _digest(_sources(point.module, target))
    return External(
        entry.name,
        entry.brought_by,
        summary,
        Method(entry.name, summary, signature.settings, plugins),
        origin=f"{entry.brought_by} {entry.value} {digest}",
        unset=signature.unset,
    )


def _make(entry: Entry, target: Any, keywords: dict[str, Any]) -> Any:
    """Make the plugin; what is wrong with the arguments the package says itself."""
    from avalanche.core import BasePlugin

    try:
        plugin = target(**keywords)
    except ValueError:
        raise  # what a setting must be: the caller names the method
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"method {entry.name!r} of {entry.brought_by} cannot be made: {what}") from error
    if not isinstance(plugin, BasePlugin):
        raise InputError(
            f"method {entry.name!r} of {entry.brought_by} makes {type(plugin).__name__}, expected an Avalanche plugin"
        )
    return plugin


def _record(name: str, values: dict[str, Any]) -> Any:
    """Make a record of settings again, in another process."""
    return method(name).settings(**values)


def _sources(module: str, target: Any) -> set[Path]:
    """The files that make a method: the whole package of its entry, or the module; and where the target is from."""
    files = set()
    for name in (module, getattr(inspect.unwrap(target), "__module__", module)):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and file.endswith(".py"):
            files.add(Path(file))
    entry = getattr(sys.modules[module], "__file__", None)
    top = None if entry is None else Path(entry).parent
    while top is not None and (top / "__init__.py").is_file():
        files |= set(top.rglob("*.py"))
        top = top.parent
    return files


def _digest(files: Iterable[Path]) -> str:
    """Digest source files; by their bytes where one of them is no Python of this version."""
    chosen = sorted(files)
    if not chosen:
        return "no source"
    try:
        return digest_of(chosen)
    except (SyntaxError, ValueError):
        result = hashlib.sha256()
        for file in chosen:
            result.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return result.hexdigest()[:12]
