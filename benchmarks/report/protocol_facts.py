"""What is known of a protocol without its runs; a name that this version does not know is no error."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.published import IMAGES, Published, published
from benchmarks.report.formatting import MISSING, changes, decimal
from benchmarks.report.study import Study
from benchmarks.report.summary import Row


@dataclass(frozen=True)
class Facts:
    """Of one protocol.

    Attributes:
        name: its name.
        summary: what it is; empty if unknown.
        notes: what a reader has to know.
    """

    name: str
    summary: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Beside:
    """A published figure beside one of ours.

    Attributes:
        record: the published figure.
        row: ours; None if the method was not run.
        agrees: whether the protocols are the same, changes of the run included.
        differences: what differs, or what else there is to say.
    """

    record: Published
    row: Row | None
    agrees: bool
    differences: str


def facts(name: str) -> Facts:
    """Look a protocol up."""
    from benchmarks.protocols import PROTOCOLS

    protocol = PROTOCOLS.get(name)
    return Facts(name, "", ()) if protocol is None else Facts(name, protocol.summary, protocol.notes)


def named(study: Study) -> tuple[str, ...]:
    """Return every protocol that a study speaks of: first those with finished runs."""
    return tuple(dict.fromkeys((*study.protocols, *(failure[0] for failure in study.failures), *study.left_out)))


def beside(protocol: str, rows: list[Row]) -> list[Beside]:
    """Put published figures beside ours.

    Args:
        protocol: its name.
        rows: ours.

    Returns:
        For each published figure the rows of its method, or one without a row.
    """
    found = []
    for record in published(protocol):
        own = [row for row in rows if row.method == record.method]
        for row in own:
            parts = [f"changed in this run: {changes(row)}"] if changes(row) else []
            parts += ["other images than those of the data set"] if _other_images(protocol, row) else []
            found.append(Beside(record, row, record.agrees and not parts, "; ".join([*parts, record.differences])))
        if not own:
            found.append(Beside(record, None, record.agrees, record.differences))
    return found


def _other_images(protocol: str, row: Row) -> bool:
    """Whether a row was run on other images than the data set that its protocol is made for."""
    from benchmarks.protocols import PROTOCOLS

    known = PROTOCOLS.get(protocol)
    if known is None or known.source not in IMAGES or known.image_shape is not None:
        return False
    return any(images not in IMAGES[known.source] for images in row.data)


def published_text(record: Published, key: str) -> str:
    """Write a published figure.

    Args:
        record: the figure.
        key: `acc` or `bwt`.
    """
    if key == "acc":
        text = decimal(record.acc, 2) if record.acc_std is None else f"{record.acc:.2f} ± {record.acc_std:.2f}"
        return f"above {record.acc:.0f}" if record.bound else text
    if record.bwt is None:
        return MISSING
    return f"{record.bwt:g} ± {record.bwt_std:g}" if record.bwt_std else f"{record.bwt:g}"
