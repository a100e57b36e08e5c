"""The kit as pytest tests: one for each method and check."""

from __future__ import annotations

from collections.abc import Callable

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.testing.cases import MethodCase
from avalanche_gradproj.testing.checks import CHECKS, check_bad_arguments, check_neutral_equals_naive
from avalanche_gradproj.testing.steps import check_double_precision


def conformance(*cases: MethodCase) -> Callable[[MethodCase, Callable[[MethodCase], None]], None]:
    """Make the tests of methods, to be named in a test file.

    Anywhere that pytest collects from:

        from avalanche_gradproj.testing import MethodCase, conformance

        test_mine = conformance(
            MethodCase("mine", make=MyPlugin, neutral=lambda: MyPlugin(strength=0.0)),
        )

    gives one test for each case and check, `test_mine[mine-check_restart]` and so on. Without neutral settings, or
    without bad arguments, the check that needs them is skipped, and pytest says so.

    Args:
        *cases: the methods, each under a name of its own; several cases may be one plugin with other settings.

    Returns:
        A parametrised test function.

    Raises:
        ConfigurationError: if there is no case, or two have one name.
    """
    import pytest

    names = [case.name for case in cases]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"conformance of {names}: give one case or more, each with a name of its own")

    def parameter(case: MethodCase, check: Callable[[MethodCase], None]) -> object:
        reason = ""
        if check is check_neutral_equals_naive and case.neutral is None:
            reason = "the case has no neutral settings"
        elif check is check_bad_arguments and not case.bad_arguments:
            reason = "the case has no bad arguments"
        elif check is check_double_precision and case.task_incremental:
            reason = "Avalanche's multi-head models are of float32"
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        return pytest.param(case, check, id=f"{case.name}-{check.__name__}", marks=marks)

    @pytest.mark.parametrize(("case", "check"), [parameter(case, check) for case in cases for check in CHECKS])
    def test(case: MethodCase, check: Callable[[MethodCase], None]) -> None:
        check(case)

    return test
