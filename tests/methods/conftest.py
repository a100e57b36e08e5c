"""Fixtures of several files: float64 by default, and factors that are truncated in small networks too."""

import pytest
import torch

from avalanche_gradproj.linalg import kronecker


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def small_is_cheap(monkeypatch):
    """Truncate the factors of a small network too."""
    monkeypatch.setattr(kronecker, "OPERATION_COST", 0)
