"""What a run costs and on what it ran: peak memory, device checks, deterministic settings, versions."""

from __future__ import annotations

import os
import platform
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.settings import InputError

_MEBIBYTE = 2**20


def check_device(name: str) -> torch.device:
    """Turn a device's name into a device that is there.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, ...

    Returns:
        The device.

    Raises:
        InputError: if the name is no device, or the device is absent.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(f"device {name!r} was asked for, but {count} CUDA devices are available: use --device cpu")
    return device


class PeakMemory:
    """Peak memory between `start` and `stop`.

    On CUDA it is what PyTorch allocated there. On Linux the kernel's high-water mark of the process is reset
    first; elsewhere, or where the reset is refused, it is the largest resident size since the process began.

    Args:
        device: where the run happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset = False

    def start(self) -> None:
        """Begin to measure."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5 resets the high-water mark and nothing else
            self._reset = True
        except OSError:
            self._reset = False

    def stop(self) -> tuple[float | None, str]:
        """End the measurement.

        Returns:
            Mebibytes and what they are: `cuda_allocated`, `resident_during_run`, `resident_since_start` or,
            without a number, `unavailable`.
        """
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _MEBIBYTE, "cuda_allocated"
        if self._reset:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024, "resident_during_run"
        try:
            import resource
        except ImportError:  # not a Unix
            return None, "unavailable"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts bytes, the others kibibytes.
        return (peak / _MEBIBYTE if sys.platform == "darwin" else peak / 1024), "resident_since_start"


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed every global generator and ask for deterministic algorithms; the request ends with the context.

    Args:
        seed: the run's seed.

    Yields:
        Nothing.
    """
    # cuBLAS reads this once, before its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A property of a module that replaces itself: type checkers do not see it.
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = deterministic.fill_uninitialized_memory
    cudnn_before = torch.backends.cudnn.benchmark
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  Avalanche and scikit-learn draw from the global generator
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory guards against reads of uninitialised values; it costs time and changes no result
    # here.
    deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_before)
        deterministic.fill_uninitialized_memory = fill_before
        torch.backends.cudnn.benchmark = cudnn_before


@contextmanager
def noting_nondeterminism(found: list[str]) -> Iterator[None]:
    """Note which operations warn that they have no deterministic version; other warnings go where they went.

    Args:
        found: their names are added here.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: Any, file: str, line: int, *rest: Any) -> None:
            text = str(message)
            if "deterministic" in text and "does not have" in text:
                name = text.split(maxsplit=1)[0]
                if name not in found:
                    found.append(name)
                return
            shown(message, category, file, line, *rest)

        warnings.showwarning = show
        yield


def libraries() -> dict[str, str]:
    """Name the versions of what else results depend on: what draws, handles images, or solves Avalanche's GEM."""
    found = {}
    for package in ("numpy", "scikit-learn", "pillow", "torchvision", "qpsolvers", "quadprog"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def versions() -> dict[str, str]:
    """Name the versions that a result may depend on.

    Returns:
        Package to version.
    """
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("avalanche-lib", "avalanche-gradproj"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
