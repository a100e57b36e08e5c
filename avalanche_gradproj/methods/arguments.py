"""Checks of the arguments that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from avalanche_gradproj.errors import ConfigurationError, StateError, numbers


def one_number(argument: str, given: Any, kind: type, expected: str, valid: Callable[[Any], bool]) -> Any:
    """Return an argument that is one number; see `errors.numbers`.

    Raises:
        ConfigurationError: naming argument, what came and what was expected.
    """
    return numbers(argument, given, kind, expected, valid, one=True)[0]


def optional_number(argument: str, given: Any, kind: type, expected: str, valid: Callable[[Any], bool]) -> Any:
    """Return an argument that is one number or None.

    Raises:
        ConfigurationError: naming argument, what came and what was expected.
    """
    return None if given is None else one_number(argument, given, kind, f"{expected}, or None", valid)


def strengths(given: Any) -> tuple[float, ...]:
    """Return a method's strengths: one for all experiences, or one each.

    Raises:
        ConfigurationError: if one is negative, infinite or no number, or there is none.
    """
    plain = given.tolist() if hasattr(given, "tolist") else given
    values = plain if isinstance(plain, list | tuple) else (plain,)
    if not values:
        raise ConfigurationError(f"strength={given!r}: give a number from 0, or one an experience")
    return tuple(one_number("strength", v, float, "a number from 0, or one an experience", finite) for v in values)


def switches(**given: Any) -> None:
    """Check arguments that are True or False.

    Raises:
        ConfigurationError: naming the first that is neither.
    """
    for argument, value in given.items():
        if not isinstance(value, bool):
            raise ConfigurationError(f"{argument}={value!r}: give True or False")


def kinds(state: Mapping[str, Any], **wanted: Any) -> None:
    """Check that a state's entries are of the kinds that they were saved as.

    Args:
        state: the state.
        wanted: a type, or a union of some, by key.

    Raises:
        StateError: naming the first entry that is of another kind, or missing.
    """
    for key, kind in wanted.items():
        if not isinstance(state.get(key), kind):
            expected = getattr(kind, "__name__", str(kind))
            raise StateError(f"the state's {key!r} is {state.get(key)!r:.80}, expected {expected}: it is damaged")


def finite(value: float) -> bool:
    """Whether a number is neither negative nor infinite."""
    return 0 <= value < float("inf")


def positive(value: int) -> bool:
    """Whether an integer is at least 1."""
    return value >= 1


def share(value: float) -> bool:
    """Whether a number lies above 0 and not above 1."""
    return 0 < value <= 1
