"""The table of protocols, and how a protocol, a method and what the user changed are joined.

The records (`protocol_records/`) hold stream, network, schedule, hyper-parameters, and where each figure is from: the
official code, a paper or a choice made here; `python -m benchmarks list NAME` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.methods import find_method
from benchmarks.protocol_records.curvature import DIGITS_BN, PMNIST_BN, PMNIST_KFAC
from benchmarks.protocol_records.digits import DIGITS_PERMUTED, DIGITS_SPLIT, NPZ_PERMUTED, NPZ_SPLIT
from benchmarks.protocol_records.gpm import CIFAR100_GPM, CIFAR100_SUPERCLASS, PMNIST_GPM
from benchmarks.protocol_records.gradients import CIFAR100_LOGD, PMNIST_LOGD, PMNIST_OGD, RMNIST_LOGD
from benchmarks.protocol_records.halrp import CIFAR100_HALRP, CIFAR100_SUPERCLASS_HALRP, PMNIST_HALRP
from benchmarks.record import Protocol
from benchmarks.settings import apply, settable, unknown

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        DIGITS_SPLIT,
        DIGITS_PERMUTED,
        PMNIST_GPM,
        CIFAR100_GPM,
        CIFAR100_SUPERCLASS,
        PMNIST_LOGD,
        RMNIST_LOGD,
        CIFAR100_LOGD,
        PMNIST_OGD,
        PMNIST_KFAC,
        PMNIST_BN,
        DIGITS_BN,
        CIFAR100_HALRP,
        CIFAR100_SUPERCLASS_HALRP,
        PMNIST_HALRP,
        NPZ_SPLIT,
        NPZ_PERMUTED,
    )
}


def find_protocol(name: str) -> Protocol:
    """Look a protocol up.

    Args:
        name: its name.

    Returns:
        The protocol.

    Raises:
        InputError: if there is none of that name, with the nearest one.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def resolve(
    protocol_name: str, method_name: str, assignments: Mapping[str, str]
) -> tuple[Protocol, Any, dict[str, str]]:
    """Join a protocol and a method with what the user changed.

    Args:
        protocol_name: the protocol.
        method_name: the method.
        assignments: what came with `--set`; keys that neither of the two knows are left to the caller.

    Returns:
        The changed protocol, the changed settings of the method, and those assignments that belong to either.

    Raises:
        InputError: if a name is unknown or a value does not fit.
    """
    protocol = find_protocol(protocol_name)
    settings = _settings(protocol, method_name)
    known = {*settable(protocol), *settable(settings)}
    used = {key: text for key, text in assignments.items() if key in known}
    return apply(protocol, used), apply(settings, used), used


def _settings(protocol: Protocol, method_name: str) -> Any:
    """What a protocol says of a method; the defaults where it says nothing, as of methods of other packages."""
    method = find_method(method_name)
    return protocol.methods[method.name] if method.name in protocol.methods else method.settings()
