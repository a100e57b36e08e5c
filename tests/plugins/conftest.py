"""Fixtures of the plugin tests."""

from typing import Any

import pytest

from avalanche_gradproj.plugins import tensors as tensors_module


@pytest.fixture
def materialised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the datasets that were read sample by sample."""
    sizes: list[int] = []
    read = tensors_module._read

    def counting(data: Any, *args: Any) -> Any:
        sizes.append(len(data))
        return read(data, *args)

    monkeypatch.setattr(tensors_module, "_read", counting)
    return sizes
