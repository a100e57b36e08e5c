"""A comparison described by a YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.request import Description
from benchmarks.settings import InputError, unknown


def read_file(path: Path) -> Description:
    """Read a comparison from a YAML file.

    `set` and `grid` are mappings there (`grid: {gpm.threshold: [0.9, 0.95]}`), the other entries as in `Description`.

    Args:
        path: the file.

    Returns:
        What it says.

    Raises:
        InputError: if it cannot be read, or an entry is unknown or of the wrong type.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses keys that are there twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"{key!r} is there twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file {str(path)!r} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"--file {str(path)!r} is no YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise InputError(f"--file {str(path)!r} holds {type(content).__name__}; expected entries like protocols: [...]")
    names = [own.name for own in fields(Description)]
    for key in content:
        if key not in names:
            raise unknown(f"entry of {path.name}:", str(key), names)
    read = {key: _entry(path, key, value) for key, value in content.items() if value is not None}
    return Description(**read)


@contextmanager
def errors_of(path: Path, file: Description, given: Description) -> Iterator[None]:
    """Let errors name entries of the file instead of options, where it was the file that gave them.

    Args:
        path: the file.
        file: what it says.
        given: what the command line says.
    """

    def entry(found: re.Match[str]) -> str:
        name, key = found[1].replace("-", "_"), found[2]
        ours, theirs = (getattr(own, name, None) for own in (given, file))
        if key:
            own, other = ({text.partition("=")[0] for text in texts or ()} for texts in (theirs, ours))
            in_file = key in own - other
        else:
            in_file = theirs is not None and ours is None
        what = f"{name} {key}" if key else name
        return found[0] if not in_file else f"{what} of {path.name}" if found.start() else f"{path.name}: {what}"

    try:
        yield
    except InputError as error:
        # Keys follow --set and --grid; another option is what a message is about where it begins it.
        message = re.sub(r"--(set|grid) ([\w.-]+)", entry, str(error))
        raise InputError(re.sub(r"^--([a-z-]+)()", entry, message)) from error


_NUMBERS: Mapping[str, Any] = {"jobs": int, "threads": int, "gpu_share": (int, float)}


def _entry(path: Path, key: str, value: Any) -> Any:
    """Bring one entry of a file into the form of the command line."""
    if key in ("set", "grid"):
        if not isinstance(value, dict):
            raise InputError(f"{key} in {path.name} is {value!r:.60}; expected key: value entries")
        return [f"{name}={_values(path, key, name, own)}" for name, own in value.items()]
    if key in ("protocols", "methods", "data", "seeds", "columns"):
        parts = value if isinstance(value, list) else [value]
        wanted = int if key == "seeds" else str
        if not parts or any(isinstance(part, bool) or not isinstance(part, wanted) for part in parts):
            raise InputError(f"{key} in {path.name} is {value!r:.60}; expected a list of {wanted.__name__}")
        return parts
    wanted = _NUMBERS.get(key, str)
    if isinstance(value, bool) or not isinstance(value, wanted):
        kind = "a number" if key in _NUMBERS else "a text"
        raise InputError(f"{key} in {path.name} is {value!r:.60}; expected {kind}")
    return value


def _values(path: Path, key: str, name: str, value: Any) -> str:
    """Write the value of a setting, or a grid's values, as the command line has them."""
    if key == "set":
        return ",".join(map(_text, value)) if isinstance(value, list) else _text(value)
    if not isinstance(value, list) or not value:
        raise InputError(f"grid {name} in {path.name} is {value!r:.60}; expected a list of values")
    texts = [",".join(map(_text, part)) if isinstance(part, list) else _text(part) for part in value]
    if any(";" in text for text in texts):
        raise InputError(f"grid {name} in {path.name} is {value!r:.60}; expected values without semicolons")
    # The semicolon at the end marks a list even where it is alone.
    return ";".join(texts) + ";" if any("," in text for text in texts) else ",".join(texts)


def _text(value: Any) -> str:
    """Write a plain value as the command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
