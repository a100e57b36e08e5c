"""`conformance` in a file of somebody else's: what is right passes, and each defect is caught by its check."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from avalanche.core import SupervisedPlugin

from avalanche_gradproj import GPMPlugin
from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.methods.gpm import GradientProjectionMemory
from avalanche_gradproj.methods.report import Report
from avalanche_gradproj.testing import CHECKS, MethodCase, conformance
from avalanche_gradproj.testing.restart import check_restart
from tests.processes import run_to_end

SOURCE = Path(__file__).parents[1] / "examples" / "l2_anchor" / "src"

TESTS = """
import torch
from avalanche_gradproj.methods.report import Report
from avalanche_gradproj.plugins.penalty import PenaltyPlugin
from avalanche_gradproj.testing import MethodCase, conformance
from l2_anchor import L2Anchor

class LeavesHook(L2Anchor):
    def start(self, model, *args, **kwargs):
        super().start(model, *args, **kwargs)
        next(model.children()).register_forward_hook(lambda *call: None)

class NeverNeutral(L2Anchor):
    def __init__(self, strength):
        super().__init__(strength)
        self.strength = max(self.strength, 0.01)

class RefusesNothing(L2Anchor):
    def __init__(self, strength):
        super().__init__(max(strength, 0.0))
    def load_state_dict(self, state):
        self._load_state(state)

class Forgets(L2Anchor):
    def _state(self):
        return {"anchors": {}}

class MissesParameter(L2Anchor):
    def report(self):
        return Report(super().report().rows[1:])

class AsksDevice(L2Anchor):
    def penalty(self):
        value = super().penalty()
        return value if value.item() > 0 else value * 0

class DoesNothing(L2Anchor):
    penalising = False

class DrawsNumbers(L2Anchor):
    def consolidate(self, model, batches, **kwargs):
        import torch
        torch.rand(1)
        super().consolidate(model, batches, **kwargs)

class SharesState(L2Anchor):
    done = []
    def consolidate(self, model, batches, **kwargs):
        super().consolidate(model, batches, **kwargs)
        self.done.append(1)
    def penalty(self):
        return super().penalty() * len(self.done)

class KeepsModel(L2Anchor):
    def finish(self):
        super().finish()
        self._kept = self._model
    def start(self, model, *args, **kwargs):
        super().start(model, *args, **kwargs)
        self._model = model

class MakesFloats(L2Anchor):
    def penalty(self):
        weight = next(iter(self._training.values())).flatten()
        return super().penalty() + 0 * torch.dot(weight, torch.ones(len(weight)))

class HoldsOnModel(L2Anchor):
    # A copy of the whole strategy has it, and whoever starts with fresh objects has not.
    def consolidate(self, model, batches, **kwargs):
        super().consolidate(model, batches, **kwargs)
        model.held = dict(self._anchors)
        self._anchors = {}
    def start(self, model, *args, **kwargs):
        self._anchors = getattr(model, "held", {})
        super().start(model, *args, **kwargs)

class Shrinks(PenaltyPlugin):
    def after_backward(self, strategy, *args, **kwargs):
        if self.method.strength > 0:
            with torch.no_grad():
                next(strategy.model.parameters()).mul_(0.99)

class ShrinksWeights(L2Anchor):
    pass

def case(kind, plugin=PenaltyPlugin):
    return MethodCase(
        kind.__name__,
        make=lambda: plugin(kind(0.1)),
        neutral=lambda: plugin(kind(0.0)),
        bad_arguments=[(lambda: plugin(kind(-1.0)), "strength=-1.0")],
    )

test_good = conformance(case(L2Anchor))
test_broken = conformance(*map(case, (
    LeavesHook, NeverNeutral, RefusesNothing, Forgets, MissesParameter, AsksDevice, DoesNothing, DrawsNumbers,
    SharesState, KeepsModel, MakesFloats, HoldsOnModel
)), case(ShrinksWeights, Shrinks))
test_bare = conformance(MethodCase("bare", make=lambda: PenaltyPlugin(L2Anchor(0.1))))
"""

CAUGHT = {
    "LeavesHook": {"check_nothing_left_behind"},
    "NeverNeutral": {"check_neutral_equals_naive"},
    "RefusesNothing": {"check_bad_arguments", "check_wrong_states_refused"},
    "Forgets": {"check_restart"},
    "MissesParameter": {"check_report_has_every_parameter"},
    "AsksDevice": {"check_no_host_round_trip"},
    "DoesNothing": {"check_acts"},
    "DrawsNumbers": {"check_consolidation_disturbs_nothing"},
    "SharesState": {"check_training_twice", "check_restart"},
    "KeepsModel": {"check_lets_go"},
    "MakesFloats": {"check_double_precision"},
    "HoldsOnModel": {"check_restart"},
    "ShrinksWeights": {"check_gradients_alone"},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[str, str], str]:
    """Outcome by case and check, of pytest run on a file outside of the repository."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "test_mine.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rA", "--tb=line", "-p", "no:cacheprovider", "test_mine.py"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = run_to_end(command, cwd=folder, env=environment)
    # Skipped tests are listed by their place; those that pass or fail by their names.
    found = re.findall(r"^(PASSED|FAILED) test_mine.py::test_(?:good|broken|bare)\[(\w+)-(\w+)\]", done.stdout, re.M)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    assert "2 skipped" in done.stdout
    return {(case, check): outcome for outcome, case, check in found}


def test_a_good_method_passes_every_check(outcomes):
    assert {check: outcomes["L2Anchor", check] for check in (c.__name__ for c in CHECKS)} == {
        check.__name__: "PASSED" for check in CHECKS
    }


@pytest.mark.parametrize("defect", CAUGHT)
def test_a_defect_is_caught_by_its_check(outcomes, defect):
    """Every check catches one, and no other check fails for it."""
    failed = {check for (case, check), outcome in outcomes.items() if case == defect and outcome == "FAILED"}
    assert failed == CAUGHT[defect]


def test_every_check_has_a_defect():
    others = {"check_interface"}  # below
    assert set().union(*CAUGHT.values()) == {check.__name__ for check in CHECKS} - others


class _Whole(SupervisedPlugin):
    def report(self):
        return Report(())

    def state_dict(self):
        return {"memory": [np.zeros(2)]}

    def load_state_dict(self, state):
        pass


SAME = _Whole()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (SAME, "give MyPlugin, not MyPlugin()"),
        (SupervisedPlugin, "SupervisedPlugin has no method report, state_dict, load_state_dict"),
        (lambda: GradientProjectionMemory(0.9), "GradientProjectionMemory, which is no plugin of Avalanche"),
        (lambda: SAME, "the same plugin twice"),
    ],
)
def test_what_is_no_method_is_told_before_anything_is_trained(make, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        CHECKS[0](MethodCase("mine", make=make))


def test_a_state_of_other_things_is_named():
    with pytest.raises(AssertionError, match=re.escape("state_dict()['memory'][0] is a numpy.ndarray: give tensors")):
        check_restart(MethodCase("mine", make=_Whole))


def test_a_class_that_no_checkpoint_finds_is_named():
    """As in a script: nothing is wrong with the method then."""

    class Local(GPMPlugin):
        pass

    with pytest.raises(AssertionError, match="define it at the top of a module that can be imported"):
        check_restart(MethodCase("mine", make=lambda: Local(0.9, n_samples=40)))


def test_what_a_case_does_not_give_is_skipped_not_passed(outcomes):
    checks = {check for case, check in outcomes if case == "bare"}
    assert checks == {check.__name__ for check in CHECKS} - {"check_bad_arguments", "check_neutral_equals_naive"}


def test_cases_need_names_of_their_own():
    case = MethodCase("one", make=object)
    with pytest.raises(ConfigurationError, match="each with a name of its own"):
        conformance(case, case)
    with pytest.raises(ConfigurationError, match="one case or more"):
        conformance()


def test_the_kit_imports_pytest_only_to_make_tests():
    """Whoever calls the checks themselves needs no pytest."""
    for file in Path(inspect.getfile(MethodCase)).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert "pytest" not in [*names, getattr(node, "module", "")], file
