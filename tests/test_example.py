"""The worked examples: short, pass the kit, are found when installed, and forget less than plain training."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
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
from tests.processes import run_to_end

EXAMPLES = Path(__file__).parents[1] / "examples"
#: A folder for each, and the name of its method.
METHODS = {"l2_anchor": "l2-anchor", "mean_gradient": "mean-gradient"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The examples as `pip install` leaves them, in a folder of their own."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("examples")
    # A build writes into the folder that it builds from.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    copy = shutil.copytree(EXAMPLES, folder / "source", ignore=ignored)
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    sources = [str(copy / example) for example in METHODS]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder / "site"), *sources]
    done = run_to_end(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "site"


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()


def lines_of_code(text: str) -> int:
    """Lines that are neither blank nor of a docstring."""
    documented = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    first = [node.body[0] for node in documented if ast.get_docstring(node) is not None]
    ignored = {number for own in first for number in range(own.lineno, own.end_lineno + 1)}
    return sum(bool(line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in ignored)


def test_every_example_is_under_test():
    assert {folder.name for folder in EXAMPLES.iterdir() if (folder / "pyproject.toml").is_file()} == set(METHODS)


@pytest.mark.parametrize("example", METHODS)
def test_the_example_is_short(example):
    assert lines_of_code((EXAMPLES / example / "src" / f"{example}.py").read_text(encoding="utf-8")) < 60


#: 9 checks of the first case, 8 of the second, which has no bad arguments, and tests of its own.
OUTCOMES = {"l2_anchor": "27 passed, 2 skipped", "mean_gradient": "30 passed, 2 skipped"}


@pytest.mark.parametrize("example", METHODS)
def test_the_example_passes_its_own_tests(tmp_path, example):
    """With bytecode and caches elsewhere: a test leaves nothing in the checkout."""
    folder = EXAMPLES / example
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests")]
    done = run_to_end(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert OUTCOMES[example] in done.stdout


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("example", "protocol", "key", "value"),
    [("l2_anchor", "digits-permuted", "strength", 0.5), ("mean_gradient", "digits-split", "directions", 3)],
)
def test_the_command_line_runs_it(tmp_path, example, protocol, key, value):
    quick = ["--set", "epochs=1", "--set", "n_experiences=2", "--set", "train_limit=40", "--out", str(tmp_path)]
    method = METHODS[example]
    words = ["run", protocol, "--method", method, "--set", f"{key}={value}", *quick]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    written = [json.loads(file.read_text()) for file in tmp_path.rglob("*.json")]
    (one,) = [content for content in written if content.get("method") == method]
    assert one["hyper_parameters"][key] == value
    origin = external.origin(method)
    assert origin is not None
    assert origin.startswith(f"{method} 0.1.0 {example}:{example} ")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("method", "protocol", "less"),
    # Backward transfer of plain training and of the method, percent: measured -47.0 and -40.5, -13.3 and -3.0.
    [("l2-anchor", "digits-permuted", 2), ("mean-gradient", "digits-split", 5)],
)
def test_it_forgets_less_than_plain_training(method, protocol, less):
    data, cpu = read_digits(), torch.device("cpu")
    results = {name: run(make_job(protocol, name, 0, cpu, {}), data) for name in ("naive", method)}
    assert results[method]["bwt"] > results["naive"]["bwt"] + less
    assert results[method]["acc"] > results["naive"]["acc"]
