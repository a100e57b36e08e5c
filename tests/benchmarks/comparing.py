"""Carrying out small comparisons in this process, and looking at what they leave."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from benchmarks import run as run_module
from benchmarks.cli import app

QUICK = ["--set", "epochs=1", "--set", "train_limit=40", "--set", "n_experiences=2"]


def compare(tmp_path, *arguments, code=0):
    result = CliRunner().invoke(app, ["compare", *arguments, "--out", str(tmp_path / "results")])
    assert result.exit_code == code, result.output
    return result


def results(tmp_path):
    return {
        file.parent.name: json.loads(file.read_text())
        for file in sorted((tmp_path / "results" / "runs").rglob("result.json"))
    }


def counting(monkeypatch):
    """Count the runs that are really done."""
    done = []
    real = run_module.run

    def run(job, *rest):
        done.append((job.protocol.name, job.method, job.seed))
        return real(job, *rest)

    monkeypatch.setattr(run_module, "run", run)
    return done
