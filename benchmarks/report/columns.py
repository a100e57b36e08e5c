"""Which figures the tables show."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.summary import BY_KEY
from benchmarks.settings import InputError, unknown


def check(names: Sequence[str] | None) -> tuple[str, ...]:
    """Check the names of columns.

    Args:
        names: as `table.csv` has them in its column `metric`; None leaves the choice to the tables.

    Returns:
        The names; none where the tables choose.

    Raises:
        InputError: if a name is unknown or there twice, or there is none.
    """
    if names is None:
        return ()
    if not any(names):
        raise InputError(f"--columns is empty: expected names separated by commas, of {', '.join(BY_KEY)}")
    for name in names:
        if name not in BY_KEY:
            raise InputError(f"--columns: {unknown('column', name, BY_KEY)}")
        if list(names).count(name) > 1:
            raise InputError(f"--columns names {name!r} twice: expected every column once")
    return tuple(names)
