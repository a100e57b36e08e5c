"""Every method meets every contract."""

from __future__ import annotations

import pytest

from avalanche_gradproj.testing import CHECKS
from tests.contracts.cases import CASES


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(case, check):
    check(case)
