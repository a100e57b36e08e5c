"""What the code says, as one short text: results of different code are never taken for each other.

Docstrings, comments and the layout of the text do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

_HERE = Path(__file__).parent

#: Files of this folder that plan, start, watch or time runs, or present results: no result depends on them.
_AROUND = (
    "__init__",
    "__main__",
    "assignments",
    "board",
    "check",
    "cli",
    "commands",
    "compare",
    "digest",
    "files",
    "folders",
    "gather",
    "large",
    "listing",
    "logs",
    "plan",
    "published",
    "readme",
    "reference",
    "request",
    "runner",
    "spread",
    "study_file",
    "timing",
    "verify",
)
#: Beginnings of the names of further ones.
_FAMILIES = ("backend", "speed")


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return the digest of everything in this project that a result may depend on: 12 hexadecimal digits."""
    import avalanche_gradproj

    package = Path(avalanche_gradproj.__file__).parent
    own = [file for file in package.rglob("*.py") if "testing" not in file.relative_to(package).parts]
    here = [file for file in _HERE.glob("*.py") if file.stem not in _AROUND and not file.stem.startswith(_FAMILIES)]
    records = [file for folder in ("protocol_records", "method_records") for file in (_HERE / folder).glob("*.py")]
    return digest_of([*own, *here, *records])


def digest_of(files: Iterable[Path]) -> str:
    """Digest Python files by what they say: 12 hexadecimal digits.

    Args:
        files: their order does not count, their names and their folders' names do.
    """
    result = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.parent.name, file.name)):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                ast.get_docstring(node, clean=False) is not None
            ):
                node.body = node.body[1:]
        result.update(f"{file.parent.name}/{file.name}\0{ast.dump(tree)}\0".encode())
    return result.hexdigest()[:12]
