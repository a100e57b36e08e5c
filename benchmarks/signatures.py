"""Settings from a signature: the arguments of a callable that a command line can set, as a record of settings.

An argument is offered if it can be given by keyword, has a plain default, and is annotated as an integer, a number, a
text, true or false, a `Literal` of texts, a tuple of one of these, or a union of such types and None; without an
annotation the type of its default counts. All others are left at their defaults.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from benchmarks.record import Protocol
from benchmarks.settings import setting

_PLAIN = (int, float, str, bool)
#: Arguments that are called as a field of the protocol get this prefix: `--set lr=` is the protocol's learning rate.
_PREFIX = "plugin_"
_PROTOCOL = frozenset(field.name for field in dataclasses.fields(Protocol))
_SEED = "seed"
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class Signature:
    """What can be given to a callable from the command line.

    Attributes:
        settings: the record's type, all of its fields with a default.
        arguments: name of a setting to the argument that it sets.
        seeded: whether there is an argument `seed`.
        unset: arguments that no text can set; they stay at their defaults.
    """

    settings: type
    arguments: Mapping[str, str]
    seeded: bool
    unset: tuple[str, ...] = ()

    def keywords(self, settings: Any, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of a call.

        Args:
            settings: a record of the type above.
            seed: the run's seed.
        """
        given = {argument: getattr(settings, name) for name, argument in self.arguments.items()}
        return given | ({_SEED: seed} if self.seeded else {})


def read(target: Callable[..., Any], method: str, rebuild: Callable[..., Any]) -> Signature:
    """Make the settings of a callable from its signature.

    Args:
        target: a class or any other callable.
        method: the name of the method, for the record's type.
        rebuild: makes a record again from `method` and its values, in another process too.

    Returns:
        Its settings.

    Raises:
        TypeError: if an argument besides `seed` has no default.
        ValueError: if it has no signature.
    """
    parameters = inspect.signature(target).parameters
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in _REST]
    lacking = [name for name in needed if name != _SEED or parameters[name].kind not in _BY_KEYWORD]
    if lacking:
        raise TypeError(f"{', '.join(lacking)}: no default; all arguments but seed need one")
    fields: list[tuple[str, Any, Any]] = []
    arguments: dict[str, str] = {}
    for parameter in parameters.values():
        if parameter.kind not in _BY_KEYWORD or parameter.name == _SEED or parameter.name.startswith("_"):
            continue
        name = _PREFIX + parameter.name if parameter.name in _PROTOCOL else parameter.name
        kind = _settable(parameter, target)
        if kind is not None and name not in arguments and (name == parameter.name or name not in parameters):
            fields.append((name, kind, setting(parameter.default, optional=parameter.default is None)))
            arguments[name] = parameter.name

    def reduce(self: Any) -> tuple[Any, ...]:
        return rebuild, (method, {name: getattr(self, name) for name in arguments})

    # The type is made at run time: a record that goes to another process is made anew there.
    made = dataclasses.make_dataclass("ExternalSettings", fields, frozen=True, namespace={"__reduce__": reduce})
    made.__doc__ = f"Settings of {method}."
    seeded = _SEED in parameters and parameters[_SEED].kind in _BY_KEYWORD
    known = {*arguments.values(), *([_SEED] if seeded else [])}
    others = [p.name for p in parameters.values() if p.name not in known and p.kind not in _REST]
    unset = tuple(name for name in others if not name.startswith("_"))
    return Signature(made, arguments, seeded, unset)


def _settable(parameter: inspect.Parameter, target: Callable[..., Any]) -> Any:
    """The type that a text is read as; None where the argument cannot be set."""
    default = parameter.default
    elements = default if isinstance(default, tuple) else () if default is None else (default,)
    if not all(type(element) in _PLAIN for element in elements):
        return None
    annotation = _annotation(parameter, target)
    if annotation is parameter.empty or annotation is Any:
        annotation = tuple[type(default[0]), ...] if isinstance(default, tuple) and default else type(default)
    united = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = [kind for member in (typing.get_args(annotation) if united else (annotation,)) if (kind := _kind(member))]
    if not kinds:
        return None
    # A number is also a text, and an integer a number: the one that takes less is tried first.
    kinds.sort(key=lambda kind: (bool, int, float).index(kind) if kind in (bool, int, float) else 3 + (kind is str))
    return typing.Union[tuple(kinds)] if len(kinds) > 1 else kinds[0]  # noqa: UP007


def _kind(member: Any) -> Any:
    """One member of a union as a type that texts are read as, or None."""
    origin, inside = typing.get_origin(member), typing.get_args(member)
    if origin is typing.Annotated:
        return _kind(inside[0])
    if origin is Literal:
        texts = tuple(text for text in inside if isinstance(text, str))
        return Literal[texts] if texts and all(text is None or text in texts for text in inside) else None
    if origin is tuple:
        elements = {element for element in inside if element is not Ellipsis}
        return tuple[inside[0], ...] if len(elements) == 1 and elements <= set(_PLAIN) else None
    return member if member in _PLAIN else None


def _annotation(parameter: inspect.Parameter, target: Callable[..., Any]) -> Any:
    """The annotation as a type: one that names what exists only for type checkers counts as none."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    function: Any = target.__init__ if isinstance(target, type) else inspect.unwrap(getattr(target, "func", target))
    names = getattr(function, "__globals__", None)
    if names is None:
        names = getattr(type(function).__call__, "__globals__", {})
    holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        return typing.get_type_hints(holder, globalns=names, include_extras=True)["it"]
    except Exception:
        return parameter.empty
