"""The Makefile: each target installs what it needs and no more, and what is there is not installed again."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.processes import run_to_end

ROOT = Path(__file__).parents[1]
#: Asks make what it would do.
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout in which nothing was made."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def commands(checkout: Path, *targets: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    done = run_to_end(["make", "-n", *targets], cwd=checkout, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def installed(lines: list[str]) -> list[str]:
    return [line.split("'")[1] for line in lines if "pip install" in line and " -e " in line]


def make(checkout: Path, lines: list[str]) -> None:
    """Do as if the installation had been carried out."""
    (checkout / ".venv").mkdir(exist_ok=True)
    for line in lines:
        if line.startswith("touch "):
            for stamp in line.split()[1:]:
                (checkout / stamp).touch()


def test_comparing_installs_what_it_needs_alone(checkout):
    lines = commands(checkout, "compare")
    assert installed(lines) == [".[benchmarks]"]
    assert lines[-1].endswith("-m benchmarks compare digits-split digits-permuted")
    (extra,) = re.findall(r"^benchmarks = \[([^]]*)\]", (checkout / "pyproject.toml").read_text(), flags=re.M)
    assert '"typer' in extra
    assert not re.search(r'"(ray|distributed|mkdocs|pytest|mypy|avalanche-gradproj)', extra)


@pytest.mark.parametrize("target", ["venv", "test", "docs"])
def test_the_others_install_everything_once(checkout, target):
    lines = commands(checkout, target)
    assert installed(lines) == [".[test]"]
    make(checkout, lines)
    for again in ("venv", "test", "docs", "compare"):
        assert installed(commands(checkout, again)) == []


def test_comparing_first_leaves_the_rest_to_be_installed(checkout):
    make(checkout, commands(checkout, "compare"))
    assert installed(commands(checkout, "compare")) == []
    assert installed(commands(checkout, "test")) == [".[test]"]


def test_other_requirements_are_installed_anew(checkout):
    make(checkout, commands(checkout, "venv"))
    later = (checkout / ".venv" / "installed").stat().st_mtime + 10
    os.utime(checkout / "pyproject.toml", (later, later))
    assert installed(commands(checkout, "compare")) == [".[benchmarks]"]
    assert installed(commands(checkout, "test")) == [".[test]"]
