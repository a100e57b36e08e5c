"""Imports point down only, and Avalanche is known to the upper layers alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.processes import run_to_end

PACKAGE = Path(__file__).parents[1] / "avalanche_gradproj"

#: Each layer and the layers that it may import from; errors are everybody's.
BELOW = {
    "errors": set(),
    "linalg": {"errors"},
    "layers": {"errors", "linalg"},
    "methods": {"errors", "linalg", "layers"},
    "plugins": {"errors", "methods"},
    "strategies": {"plugins"},
    "metrics": {"methods", "plugins"},
    "testing": {"errors"},
    "__init__": {"errors", "plugins", "strategies"},
}
KNOW_AVALANCHE = {"plugins", "strategies", "metrics", "testing"}


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Full names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module)
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    layer = layer_of(file)
    assert layer in BELOW, f"{layer} is a new layer: say here what it may import"
    for name in imported(file):
        if name.split(".")[0] == "avalanche_gradproj":
            target = name.split(".")[1]
            assert target == layer or target in BELOW[layer], f"{layer} imports {name}"
        if name.split(".")[0] == "avalanche":
            assert layer in KNOW_AVALANCHE, f"{layer} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 300


def test_no_assert_and_no_print_in_the_package():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            assert not isinstance(node, ast.Assert), f"{file}:{node.lineno}"
            called = getattr(getattr(node, "func", None), "id", "")
            assert called != "print", f"{file}:{node.lineno}"


def test_methods_run_without_avalanche():
    """A plain PyTorch loop needs nothing of Avalanche: importing it is made to fail."""
    code = """
import sys, types
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'avalanche':
            raise ImportError('Avalanche must not be imported')
sys.meta_path.insert(0, Refuse())
package = types.ModuleType('avalanche_gradproj')
package.__path__ = [PACKAGE]
sys.modules['avalanche_gradproj'] = package
import torch
from avalanche_gradproj.methods.gpm import GradientProjectionMemory
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
gpm = GradientProjectionMemory(threshold=0.5, n_samples=8)
x, y = torch.randn(8, 4), torch.randint(2, (8,))
for _ in range(2):
    with gpm.experience(model, optimizer):
        torch.nn.functional.cross_entropy(model(x), y).backward(); gpm.transform(); optimizer.step(); gpm.after_step()
    gpm.consolidate(model, [x])
from avalanche_gradproj.methods.kfac import KroneckerLaplace
laplace = KroneckerLaplace()
for _ in range(2):
    with laplace.experience(model):
        (torch.nn.functional.cross_entropy(model(x), y) + laplace.penalty()).backward(); optimizer.step()
    laplace.consolidate(model, [x])
from avalanche_gradproj.methods.halrp import LowRankPerturbation
network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
halrp = LowRankPerturbation(max_growth=4.0)
for _ in range(2):
    with halrp.experience(network, optimizer, batches=[(x, y)]):
        torch.nn.functional.cross_entropy(network(x), y).backward(); halrp.regularise(); optimizer.step()
assert halrp.tasks == [0, 1] and 0 < halrp.growth <= 4
assert laplace.experiences == 2 and laplace.bytes_held > 0
assert gpm.experiences == 2 and gpm.bases[''][0].shape[0] == 5
"""
    done = run_to_end([sys.executable, "-c", f"PACKAGE = {str(PACKAGE)!r}\n{code}"])
    assert done.returncode == 0, done.stderr
