"""Made-up results in the format of real ones."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.report.study import Study


def result(label: str, seed: int, **changes: Any) -> dict[str, Any]:
    """One run over three experiences; what is given replaces what is here."""
    base = 80.0 + seed
    run: dict[str, Any] = {
        "format": 2,
        "protocol": "digits-split",
        "label": label,
        "method": label.split(maxsplit=1)[0],
        "seed": seed,
        "hyper_parameters": {"lr": 0.1, "epochs": 3, "hidden": None},
        "changed": {},
        "task_order": None,
        "experience_groups": None,
        "initial_accuracies": [50.0, 50.0, 50.0],
        "accuracy_matrix": [[100.0, 50.0, 40.0], [90.0, 98.0, 45.0], [base, 90.0, 97.0]],
        "acc": (base + 90.0 + 97.0) / 3,
        "bwt": ((base - 100.0) + (90.0 - 98.0)) / 2,
        "forgetting": ((100.0 - base) + (98.0 - 90.0)) / 2,
        "forward_transfer": -2.5,
        "growth": None,
        "added_parameters": 0,
        "bytes_held": None,
        "experiences": [{"train_seconds": 1.0, "epochs": [], "bytes_held": None, "free_share": None}] * 3,
        "train_seconds": 3.0 + seed / 10,
        "wall_seconds": 4.0,
        "peak_memory_mb": 1000.0 + seed,
        "peak_memory_kind": "resident_during_run",
        "sessions": 1,
        "method_report": None,
        "device": "cpu",
        "nondeterministic": [],
        "threads": 1,
        "versions": {"python": "3.11", "torch": "2.15"},
        "code": "0123456789ab",
    }
    return {**run, **changes}


def joint(seed: int, label: str = "joint", **changes: Any) -> dict[str, Any]:
    """One run of joint training: one row, and nothing that compares rows."""
    row = [96.0 + seed, 97.0, 98.0]
    nothing = {"bwt": None, "forgetting": None, "forward_transfer": None}
    return result(label, seed, accuracy_matrix=[row], acc=sum(row) / 3, **nothing, **changes)


def with_bases(label: str, seed: int, **changes: Any) -> dict[str, Any]:
    """One run of a method whose layers fill up."""
    experiences = [{"free_share": {"conv": 0.9 - 0.1 * k, "linear": 0.8 - 0.2 * k}} for k in range(3)]
    return result(label, seed, experiences=experiences, bytes_held=4096, **changes)


def large(methods: int = 12, experiences: int = 10, seeds: int = 3, protocol: str = "digits-split") -> Study:
    """Many methods with noisy figures, joint training the last of them."""
    source = random.Random(0)
    runs: list[dict[str, Any]] = []
    for index in range(methods - 1):
        for seed in range(seeds):
            matrix = [
                [
                    min(100.0, max(5.0, source.gauss(95 - (i - j) * (9 - 8 * index / methods) if j <= i else 12, 1.5)))
                    for j in range(experiences)
                ]
                for i in range(experiences)
            ]
            last = matrix[-1]
            change = sum(last[i] - matrix[i][i] for i in range(experiences - 1)) / max(1, experiences - 1)
            layers = range(4)
            shares = [{"free_share": {f"layer{k}": 1 - 0.05 * e * k for k in layers}} for e in range(experiences)]
            runs.append(
                result(
                    f"method{index}",
                    seed,
                    protocol=protocol,
                    accuracy_matrix=matrix,
                    acc=sum(last) / experiences,
                    bwt=change,
                    forgetting=-change,
                    train_seconds=100 * (1 + index) * source.uniform(0.95, 1.05),
                    peak_memory_mb=1400 + 40 * index + source.gauss(0, 15),
                    bytes_held=123456 * index,
                    growth=0.2,
                    experiences=shares if index in (2, 5) else [{}] * experiences,
                )
            )
    for seed in range(seeds):
        row = [source.gauss(97, 0.5) for _ in range(experiences)]
        runs.append(joint(seed, protocol=protocol) | {"accuracy_matrix": [row], "acc": sum(row) / experiences})
    return Study("Twelve methods", "python -m benchmarks compare digits-split", runs)


def small() -> Study:
    """Two protocols, three labels, and all that can go wrong with runs."""
    runs = [
        *(result("naive", seed) for seed in range(3)),
        *(with_bases("gpm threshold=0.9", seed, acc=95.0 + seed, changed={"threshold": "0.9"}) for seed in range(3)),
        *(joint(seed) for seed in range(3)),
        *(result("naive", seed, protocol="pmnist-gpm") for seed in range(2)),
        *(with_bases("gpm", seed, protocol="pmnist-gpm", acc=93.0 + seed) for seed in range(2)),
    ]
    return Study(
        "A study",
        "python -m benchmarks compare digits-split pmnist-gpm",
        runs,
        failures=[("digits-split", "ogd", 1, "NonFiniteError: <loss> is & stays NaN")],
        left_out={"pmnist-gpm": {"halrp": "needs task labels"}},
        unfinished=2,
    )
