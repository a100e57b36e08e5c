"""What truncated factors of K-FAC Laplace lose of the quadratic form, and what memory they save."""

from __future__ import annotations

import torch
from rich.table import Table
from torch import Tensor, nn

from avalanche_gradproj.methods.kfac import KroneckerLaplace
from benchmarks.speed_curvature import ALEXNET_SAMPLES, CLASSES, MLP_SAMPLES, SHARES, images, perceptron, step
from benchmarks.speed_gpm import alexnet

TITLE = "Truncated factors of K-FAC beside whole ones, perceptron and AlexNet"


def truncation(device: torch.device) -> list[tuple[str, str, str, float, float, float]]:
    """Measure what truncation keeps of a quadratic form, and what it saves.

    Returns:
        (network, share, eigenvectors kept of A and B of the first layer, mean of |truncated - whole| / whole of the
        form at 50 displacements drawn at random, the same at displacements by training on other data, megabytes).
    """
    rows = []
    for name, make, data in (
        ("perceptron", perceptron, images(MLP_SAMPLES, 1, 28).to(device)),
        ("AlexNet", alexnet, images(ALEXNET_SAMPLES, 3, 32).to(device)),
    ):
        torch.manual_seed(0)
        model = make().to(device)
        labels = torch.randint(CLASSES, (len(data),), device=device)
        for begin in range(0, len(data), 128):
            step(model.train(), data[begin : begin + 128], labels[begin : begin + 128], None, lr=0.05)()
        start = {key: value.clone() for key, value in model.state_dict().items()}
        methods = {share: KroneckerLaplace(truncate=share) for share in (None, *SHARES, 0.9999)}
        for method in methods.values():
            method.consolidate(model, data.split(128))
        whole = methods.pop(None)
        for share, method in methods.items():
            errors: dict[str, list[float]] = {"random": [], "trained": []}
            for kind, found in errors.items():
                for trial in range(50 if kind == "random" else 5):
                    model.load_state_dict(start)
                    _displace(model, kind, trial, data, device)
                    values = []
                    for one in (whole, method):
                        with one.experience(model, samples=len(data)):
                            values.append(float(one.penalty()))
                    found.append(abs(values[1] - values[0]) / values[0])
            model.load_state_dict(start)
            term = next(iter(method._memory.forms[0].layers.values())).terms[0]
            kept = f"{term.right.rank}/{term.right.size}, {term.left.rank}/{term.left.size}"
            means = [sum(found) / len(found) for found in errors.values()]
            rows.append((name, str(share), kept, means[0], means[1], method.bytes_held / 1e6))
        rows.append((name, "whole", "all", 0.0, 0.0, whole.bytes_held / 1e6))
    return rows


def truncation_table(device: torch.device) -> Table:
    """Return what `truncation` measured, as a printable table."""
    result = Table(title=TITLE, title_justify="left")
    for column in ("network", "share", "kept of A, B (first layer)", "error, random", "error, trained", "MB"):
        result.add_column(column, justify="left" if column in ("network", "share") else "right")
    for network, share, kept, drawn, trained, size in truncation(device):
        result.add_row(network, share, kept, f"{drawn:.4f}", f"{trained:.4f}", f"{size:.1f}")
    return result


def _displace(model: nn.Module, kind: str, trial: int, data: Tensor, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(trial)
    if kind == "random":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(device))
        return
    pixels = torch.randperm(data[0].numel(), generator=generator)
    others = data.flatten(1)[:, pixels.to(device)].view_as(data)
    labels = torch.randint(CLASSES, (len(data),), generator=generator).to(device)
    for begin in range(0, len(data), 128):
        step(model.train(), others[begin : begin + 128], labels[begin : begin + 128], None, lr=0.05)()
