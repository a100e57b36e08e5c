"""What a user changes: `key=value` for every run that knows the key, `name.key=value` for one method or protocol alone.

A grid gives several values for a key; its points are all combinations.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from benchmarks import external
from benchmarks.methods import METHODS, find_method
from benchmarks.protocols import PROTOCOLS, find_protocol, resolve
from benchmarks.settings import InputError, settable, unknown

Grid = Mapping[str, Sequence[str]]


def for_run(protocol: str, method: str, assignments: Mapping[str, str]) -> dict[str, str]:
    """Pick what belongs to one run.

    Args:
        protocol: its protocol.
        method: its method.
        assignments: `key`, `method.key` or `protocol.key` to text.

    Returns:
        Plain keys to text; what is given for the protocol comes before what is given for all, and what is given for the
        method before both.
    """
    known = _known(protocol, method)
    found = {key: text for key, text in assignments.items() if "." not in key and key in known}
    for owner in (protocol, method):
        for key, text in assignments.items():
            name, dot, rest = key.partition(".")
            if dot and name == owner and rest in known:
                found[rest] = text
    return found


def given_as(protocol: str, method: str, assignments: Mapping[str, str], setting: str) -> str:
    """Name the key that decided a setting of a run.

    Args:
        protocol: of the run.
        method: of the run.
        assignments: as in `for_run`.
        setting: the plain key.

    Returns:
        The key as it was given: for the method, for the protocol or for all.
    """
    keys = (f"{method}.{setting}", f"{protocol}.{setting}", setting)
    return next((key for key in keys if key in assignments), setting)


def check(protocols: Sequence[str], methods: Sequence[str], assignments: Mapping[str, object]) -> None:
    """Refuse keys that none of the chosen protocols and methods knows.

    Args:
        protocols: the chosen ones.
        methods: the chosen ones.
        assignments: keys as in `for_run`.

    Raises:
        InputError: at the first such key, with the nearest ones that exist.
    """
    for key in assignments:
        name, dot, rest = key.partition(".")
        if not dot:
            _check(key, {known for p in protocols for m in methods for known in _known(p, m)})
        elif name in protocols:
            _check(rest, {known for m in methods for known in _known(name, m)}, f" of {name}")
        elif name in methods:
            _check(rest, {known for p in protocols for known in _known(p, name)}, f" of {name}")
        elif name in METHODS or name in external.found() or name in PROTOCOLS:
            raise InputError(f"{key}: {name} is not among what is to be run ({', '.join([*protocols, *methods])})")
        else:
            raise unknown(f"method or protocol in {key!r}:", name, [*protocols, *methods])


def check_hidden(protocol: str, method: str, given: Mapping[str, str], grid: Grid) -> None:
    """Refuse a grid over what is set for a run already.

    Args:
        protocol: of the run.
        method: of the run.
        given: what is set.
        grid: what varies.

    Raises:
        InputError: naming both keys.
    """
    for key in grid:
        plain = key.rpartition(".")[2]
        alone = for_run(protocol, method, {key: "grid"})
        if alone and for_run(protocol, method, {**given, key: "grid"})[plain] != "grid":
            decided = given_as(protocol, method, given, plain)
            raise InputError(f"--grid {key} has no effect on {method} on {protocol}: --set {decided} comes before it")
        if key in given:
            raise InputError(f"--set {key} and --grid {key} are both given: leave one out")
    plains = [key.rpartition(".")[2] for key in grid if for_run(protocol, method, {key: "grid"})]
    for plain in plains:
        if plains.count(plain) > 1:
            raise InputError(f"two grids vary {plain} of {method} on {protocol}: leave one out")


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read `--grid key=value,value,...`.

    Args:
        texts: what came with the option. Values are separated by commas; where there is a semicolon, by semicolons, so
            that values may be lists themselves (`gpm.threshold=0.95,0.99;0.97,0.99`).

    Returns:
        Key to the texts of its values, in order.

    Raises:
        InputError: if a text has another form, gives a key twice or a value twice.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        key = key.strip()
        if not equals or not key or not rest.strip():
            raise InputError(f"--grid {text!r} is not of the form key=value,value,...")
        if key in grid:
            raise InputError(f"--grid gives {key!r} twice: put all its values into one, separated by commas")
        values = [part.strip() for part in rest.split(";" if ";" in rest else ",")]
        if len(values) > 1 and ";" in rest and not values[-1]:
            values.pop()  # one list alone: `threshold=0.9,0.95;`
        if "" in values:
            raise InputError(f"--grid {text!r} has an empty value")
        grid[key] = check_values(key, values)
    return grid


def check_values(key: str, values: Sequence[str]) -> tuple[str, ...]:
    """Refuse a value that is there twice.

    Args:
        key: of the grid.
        values: its values.

    Returns:
        The values.

    Raises:
        InputError: naming the value.
    """
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"the grid gives {key}={value} twice")
    return tuple(values)


def points(grid: Grid) -> list[dict[str, str]]:
    """Return all combinations of a grid's values; one empty combination for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def label(protocol: str, method: str, point: Mapping[str, str]) -> str:
    """Name a method with what a grid varies of it (`gpm threshold=0.9`)."""
    return " ".join([method, *(f"{key}={text}" for key, text in for_run(protocol, method, point).items())])


def _known(protocol: str, method: str) -> set[str]:
    """Name the settings of a run."""
    _, settings, _ = resolve(protocol, method, {})
    return {*settable(find_protocol(protocol)), *settable(settings)}


def _check(key: str, known: set[str], where: str = "") -> None:
    if key not in known:
        raise unknown(f"setting{where}", key, known)


def check_names(protocols: Sequence[str], methods: Sequence[str]) -> None:
    """Refuse protocols and methods that do not exist, with the nearest one that does (`InputError`)."""
    for name in protocols:
        find_protocol(name)
    for name in methods:
        find_method(name)
