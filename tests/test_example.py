"""The worked example: short, passes the kit, is found when it is installed, and forgets less than plain training."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import external
from benchmarks.cli import app
from benchmarks.jobs import make_job
from benchmarks.run import run
from benchmarks.sources import read_digits

EXAMPLE = Path(__file__).parents[1] / "examples" / "l2_anchor"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The example as `pip install` leaves it, in a folder of its own."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("example")
    # A build writes into the folder that it builds from.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    copy = shutil.copytree(EXAMPLE, folder / "source", ignore=ignored)
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder / "site"), str(copy)]
    subprocess.run(command, check=True, timeout=300)
    return folder / "site"


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()


def test_the_example_is_short():
    lines = (EXAMPLE / "src" / "l2_anchor.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60


def test_the_example_passes_its_own_tests(tmp_path):
    """With bytecode and caches elsewhere: a test leaves nothing in the checkout."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLE / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    # 9 checks of the first case, 8 of the second, which has no bad arguments, and the dense reference.
    assert "18 passed, 1 skipped" in done.stdout


@pytest.mark.usefixtures("installed")
def test_the_command_line_runs_it(tmp_path):
    quick = ["--set", "epochs=1", "--set", "n_experiences=2", "--set", "train_limit=40", "--out", str(tmp_path)]
    words = ["run", "digits-permuted", "--method", "l2-anchor", "--set", "strength=0.5", *quick]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    written = [json.loads(file.read_text()) for file in tmp_path.rglob("*.json")]
    (one,) = [content for content in written if content.get("method") == "l2-anchor"]
    assert one["hyper_parameters"]["strength"] == 0.5
    origin = external.origin("l2-anchor")
    assert origin is not None
    assert origin.startswith("l2-anchor 0.1.0 l2_anchor:l2_anchor ")


@pytest.mark.usefixtures("installed")
def test_it_forgets_less_than_plain_training():
    data, cpu = read_digits(), torch.device("cpu")
    results = {name: run(make_job("digits-permuted", name, 0, cpu, {}), data) for name in ("naive", "l2-anchor")}
    # Backward transfer, percent: measured -47.0 and -40.5.
    assert results["l2-anchor"]["bwt"] > results["naive"]["bwt"] + 2
    assert results["l2-anchor"]["acc"] > results["naive"]["acc"]
