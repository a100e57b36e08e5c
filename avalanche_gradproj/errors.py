"""The package's exceptions: one small family, each also the built-in type that a caller would expect.

Every message names the argument or the layer, what came, what was expected and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any


class GradProjError(Exception):
    """Base of every exception that this package raises on purpose."""


class ConfigurationError(GradProjError, ValueError):
    """An argument has a wrong value: out of range, an unknown option, a pattern that matches nothing."""


class ModelError(GradProjError, ValueError):
    """The model cannot be handled: lazy, tied or reparametrised weights, no layer to act on."""


class DataError(GradProjError, ValueError):
    """The data cannot be used: too few samples, random transforms, elements that are no tensors."""


class StateError(GradProjError, RuntimeError):
    """A saved state does not fit, or a call came at the wrong moment (before training began, say)."""


class NonFiniteError(GradProjError, ArithmeticError):
    """A layer produced an infinity or a NaN."""


def choice(argument: str, value: object, options: tuple[str, ...]) -> None:
    """Check that an option is one of those that exist.

    Args:
        argument: the argument's name, for the message.
        value: what the caller gave.
        options: what is allowed.

    Raises:
        ConfigurationError: if `value` is none of `options`.
    """
    if value not in options:
        expected = ", ".join(repr(option) for option in options)
        raise ConfigurationError(f"{argument}={value!r} is unknown: use one of {expected}")


def numbers(
    argument: str, given: Any, kind: type, expected: str, valid: Callable[[Any], bool], *, one: bool = False
) -> tuple[Any, ...]:
    """Check an argument that is one number or a sequence of them.

    Args:
        argument: its name, for the message.
        given: what came.
        kind: `int`, or `float` (which takes integers too).
        expected: what one number must be, for the message.
        valid: whether a number is.
        one: a sequence is refused.

    Returns:
        The numbers; one for a single number.

    Raises:
        ConfigurationError: naming argument, what came and what was expected.
    """
    # Arrays of numpy and torch know tolist(); their scalars become Python's.
    plain = given.tolist() if hasattr(given, "tolist") else given
    several = isinstance(plain, Sequence) and not isinstance(plain, str)
    values = tuple(v.item() if hasattr(v, "item") else v for v in plain) if several else (plain,)
    allowed = int if kind is int else (int, float)
    for value in values or (None,):
        wrong = isinstance(value, bool) or not isinstance(value, allowed) or math.isnan(value) or not valid(value)
        if wrong or (one and several):
            raise ConfigurationError(
                f"{argument}={given!r}: give {expected}" + ("" if one else ", or one a covered layer")
            )
    return tuple(kind(value) for value in values)


def in_unit(value: float) -> bool:
    """Whether a number lies between 0 and 1."""
    return 0 <= value <= 1
