"""Settings that a user may change from the command line: typed, bounded, and refused by name.

A record of settings is a frozen dataclass whose changeable fields are made by `setting`. `apply` turns the
texts of `--set key=value` into values of the annotated types and returns a changed copy of the record. A
field that holds None does not apply to that record and is not offered, unless it is declared optional.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

Record = TypeVar("Record")

_TYPE_NAMES: dict[type, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "true or false"),
}


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that says what came and what is expected."""


class SettingError(InputError):
    """A setting's value cannot be used; who knows where it was given says so.

    Attributes:
        key: the setting, as the record names it.
        text: the value, or that element of it that is wrong.
        problem: what is wrong with it.
    """

    def __init__(self, key: str, text: object, problem: str) -> None:
        super().__init__(f"{key}={text}: {problem}")
        self.key, self.text, self.problem = key, str(text), problem


def setting(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    optional: bool = False,
) -> Any:
    """Declare a dataclass field that `--set` may change.

    Args:
        default: the field's default.
        minimum: smallest value allowed (of every element, for lists).
        maximum: largest value allowed.
        above: bound that has to be exceeded.
        optional: None is a value like any other, not the mark of a field that does not apply.

    Returns:
        The dataclass field.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above}
    return dataclasses.field(default=default, metadata={"settable": True, "bounds": bounds, "optional": optional})


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Build the error for a name that does not exist, with the nearest ones that do.

    Args:
        kind: what the name should have named.
        name: what came.
        known: the names that exist.

    Returns:
        The error, to be raised by the caller.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(item) for item in near)}? " if near else ""
    listing = ", ".join(names) if names else "none"
    return InputError(
        f"unknown {kind} {name!r}: {hint}(known: {listing})" if hint else f"unknown {kind} {name!r} (known: {listing})"
    )


def parse_assignments(texts: Sequence[str]) -> dict[str, str]:
    """Split `key=value` texts.

    Args:
        texts: what came with `--set`, one text for each use of the option.

    Returns:
        Key to text of the value, in the order given.

    Raises:
        InputError: if a text has no `=`, no key, or repeats a key.
    """
    assignments: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"--set {text!r} is not of the form key=value")
        if key in assignments:
            raise InputError(f"--set gives {key!r} twice: {assignments[key]!r} and {value.strip()!r}")
        assignments[key] = value.strip()
    return assignments


def settable(record: Any) -> tuple[str, ...]:
    """Name the fields of a record that can be set.

    Args:
        record: a dataclass instance.

    Returns:
        The names, in the order of declaration; fields that do not apply (None) are left out.
    """
    names = []
    for field in dataclasses.fields(record):
        inapplicable = getattr(record, field.name) is None and not field.metadata.get("optional", False)
        if field.metadata.get("settable", False) and not inapplicable:
            names.append(field.name)
    return tuple(names)


def apply(record: Record, assignments: Mapping[str, str]) -> Record:
    """Return a copy of a record with the given fields changed.

    Args:
        record: a dataclass instance.
        assignments: field name to the text of its new value; names that the record does not offer are ignored
            (the caller knows which other record they may belong to).

    Returns:
        The changed copy.

    Raises:
        SettingError: if a text is not of the field's type or out of its bounds.
    """
    hints = typing.get_type_hints(type(record))
    changes: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, record))}
    for key in settable(record):
        if key in assignments:
            value = _convert(key, assignments[key], hints[key])
            _check_bounds(key, value, fields[key].metadata["bounds"])
            changes[key] = value
    return typing.cast(Record, dataclasses.replace(typing.cast(Any, record), **changes))


def values(record: Any) -> dict[str, Any]:
    """List the settable fields of a record with their values, ready for JSON.

    Args:
        record: a dataclass instance.

    Returns:
        Name to value; tuples become lists.
    """
    result = {}
    for name in settable(record):
        value = getattr(record, name)
        result[name] = list(value) if isinstance(value, tuple) else value
    return result


def _convert(key: str, text: str, annotation: Any) -> Any:
    """Read a text as the first member of the annotated type that takes it."""
    members = _members(annotation)
    for member in members:
        try:
            return _read(text, member)
        except ValueError:
            continue
    expected = " or ".join(_describe(member) for member in members)
    raise SettingError(key, text, f"{text!r} is not {expected}")


def _members(annotation: Any) -> tuple[Any, ...]:
    """Take a union apart; None (the mark of a field that does not apply) is no value that can be given."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(member for member in typing.get_args(annotation) if member is not type(None))
    return (annotation,)


def _read(text: str, kind: Any) -> Any:
    """Read one text as one type; ValueError where it does not fit."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        if text not in typing.get_args(kind):
            raise ValueError(text)
        return text
    if origin is tuple:
        element = typing.get_args(kind)[0]
        return tuple(_read(part.strip(), element) for part in text.split(","))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if not text:
        raise ValueError(text)
    value = kind(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(text)
    return value


def _describe(kind: Any) -> str:
    """Name a type in words, for a message."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if origin is tuple:
        return f"a comma-separated list of {_TYPE_NAMES[typing.get_args(kind)[0]][1]}"
    return _TYPE_NAMES[kind][0]


def _check_bounds(key: str, value: Any, bounds: Mapping[str, float | None]) -> None:
    """Refuse values outside the field's bounds."""
    minimum, maximum, above = bounds["minimum"], bounds["maximum"], bounds["above"]
    for element in value if isinstance(value, tuple) else (value,):
        if isinstance(element, str):
            continue
        if minimum is not None and element < minimum:
            raise SettingError(key, element, f"expected at least {minimum:g}")
        if maximum is not None and element > maximum:
            raise SettingError(key, element, f"expected at most {maximum:g}")
        if above is not None and element <= above:
            raise SettingError(key, element, f"expected more than {above:g}")
