"""Jobs: what the user asked for, resolved and checked before anything is trained or written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import sources
from benchmarks.fixed import FRESH, OPTIMIZERS
from benchmarks.methods import find_method
from benchmarks.protocols import PROTOCOLS, find_protocol, resolve
from benchmarks.record import Protocol
from benchmarks.settings import InputError, settable, values


@dataclass(frozen=True)
class Job:
    """What one run needs to know.

    Attributes:
        protocol: the protocol, with the user's changes.
        method: the method's name.
        settings: the method's hyper-parameters, with the user's changes.
        seed: for weights, batches, permutations and validation samples.
        device: where to train.
        changes: what the user changed, key to text.
    """

    protocol: Protocol
    method: str
    settings: Any
    seed: int
    device: torch.device
    changes: Mapping[str, str]

    @property
    def differing(self) -> dict[str, str]:
        """The settings whose values are not the protocol's own, as texts that `--set` takes."""
        return {key: _text(value) for key, value in _differing(self.protocol, self.method, self.changes).items()}

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """All figures that fix the run, ready for JSON."""
        protocol = self.protocol
        fixed = {
            "model": protocol.model,
            "optimizer": FRESH if protocol.reset_optimizer else OPTIMIZERS[protocol.optimizer],
            "split": protocol.split,
            "permutation_rule": protocol.permutation_rule if protocol.split == "permutations" else None,
            "draw_rule": protocol.draw_rule,
            "outputs": protocol.outputs if protocol.task_labels else None,
            "image_shape": list(protocol.image_shape) if protocol.image_shape else None,
            "normalisation": dataclasses.asdict(protocol.normalisation),
            "valid_share": protocol.valid_share,
            "valid_rule": protocol.valid_rule if protocol.valid_share else None,
        }
        return {**fixed, **values(protocol), **values(self.settings)}


def change_tag(protocol: Protocol, method: str, changes: Mapping[str, str]) -> str:
    """Name what was changed: nothing for nothing, else a short hash of the values that differ.

    Args:
        protocol: the protocol as changed.
        method: the method's name.
        changes: key to text, as given.

    Returns:
        The tag, with a leading dash where there is one; equal values written differently give equal tags.
    """
    differing = _differing(protocol, method, changes)
    if not differing:
        return ""
    return "-" + hashlib.sha256(json.dumps(differing).encode()).hexdigest()[:8]


def _differing(protocol: Protocol, method: str, changes: Mapping[str, str]) -> dict[str, Any]:
    """The values that the changes make other than they are without."""
    changed_protocol, changed_settings, _ = resolve(protocol.name, method, changes)
    before_protocol, before_settings, _ = resolve(protocol.name, method, {})
    now = {**values(changed_protocol), **values(changed_settings)}
    before = {**values(before_protocol), **values(before_settings)}
    return {key: value for key, value in sorted(now.items()) if value != before[key]}


def _text(value: Any) -> str:
    """Write a value as `--set` takes it."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_job(
    protocol_name: str, method_name: str, seed: int, device: torch.device, assignments: Mapping[str, str]
) -> Job:
    """Resolve names and changed settings, and try whether the method accepts them.

    Args:
        protocol_name: the protocol.
        method_name: the method.
        seed: the run's seed.
        device: where to train.
        assignments: what came with `--set`; keys of other methods are ignored.

    Returns:
        The job.

    Raises:
        InputError: if something is unknown or refused.
    """
    if not 0 <= seed < 2**31:
        raise InputError(f"seed {seed} is out of range: expected 0 to {2**31 - 1}")
    protocol, settings, used = resolve(protocol_name, method_name, assignments)
    method = find_method(method_name)
    reason = method.unsuited(settings, protocol)
    if reason is not None:
        raise InputError(f"{method_name} on {protocol_name}: {reason}{_where_it_runs(method_name, protocol_name)}")
    try:
        method.plugins(settings, seed)
    except ValueError as error:
        raise InputError(f"{method_name} refuses its settings: {' '.join(str(error).split())}") from error
    return Job(protocol, method_name, settings, seed, device, used)


def unsuited(protocol_name: str, methods: Iterable[str], assignments: Mapping[str, str]) -> dict[str, str]:
    """Find the methods that a protocol does not suit, for a comparison of all that it does.

    Args:
        protocol_name: the protocol.
        methods: the methods' names.
        assignments: what came with `--set`.

    Returns:
        Method to the reason; one whose own settings were changed is asked for, and left to `make_job` to refuse.
    """
    found = {}
    for name in methods:
        protocol, settings, _ = resolve(protocol_name, name, assignments)
        reason = find_method(name).unsuited(settings, protocol)
        if reason is not None and not set(settable(settings)) & set(assignments):
            found[name] = reason
    return found


def _where_it_runs(method: str, protocol: str) -> str:
    """Advice for a method that a protocol does not suit at all; none where it is the user's settings that do not."""
    suited = [name for name in PROTOCOLS if _runs(method, name)]
    return "" if protocol in suited else f"; choose one of {', '.join(suited)}"


def _runs(method: str, protocol: str) -> bool:
    record = find_protocol(protocol)
    return find_method(method).unsuited(record.methods[method], record) is None


def load_data(protocol: Protocol, path: Path | None) -> sources.ImageData:
    """Read the images of a protocol, from the user's file where there is one.

    Args:
        protocol: the protocol.
        path: an `.npz` file, or None.

    Returns:
        The data.

    Raises:
        InputError: if there is no data, or not what the protocol needs.
    """
    if protocol.source == "digits":
        if path is not None:
            raise InputError(f"{protocol.name} brings its own images and takes no --data (got {str(path)!r})")
        return sources.read_digits()
    if path is None and protocol.source == "npz":
        raise InputError(f"{protocol.name} needs your images: give them with --data FILE.npz")
    read = sources.download(protocol.source) if path is None else sources.read_npz(path, protocol.expected)
    if not protocol.expected.coarse:
        # Not every file has the superclasses: the same images are the same data with and without.
        read = dataclasses.replace(read, coarse=None)
    return read if protocol.image_shape is None else sources.fit_images(read, protocol.image_shape)
