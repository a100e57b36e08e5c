"""What a method costs on a large torchvision network: `python -m benchmarks.large resnet50 --method xkfac`.

Two experiences of random images: steps without protection, what follows the first experience (bases or factors), what
precedes the second (XK-FAC: pairs and reparameterisation), steps with protection. Seconds and peak memory; no accuracy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from torch import Tensor, nn

from avalanche_gradproj.methods.gpm import GradientProjectionMemory
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from benchmarks.resources import PeakMemory


def measure(
    name: str,
    method: str,
    *,
    batch: int,
    steps: int,
    samples: int,
    threshold: float = 0.97,
    truncate: float = 0.99,
    pixels: int = 224,
) -> dict[str, float]:
    """Train two short experiences of a torchvision network.

    Args:
        name: of a network in `torchvision.models`.
        method: `gpm` or `xkfac`.
        batch: images a step.
        steps: steps an experience.
        samples: images that bases or factors are made of.
        threshold: share of the energy that GPM's bases explain.
        truncate: share of their squared norm that XK-FAC's factors keep; 1 for whole ones.
        pixels: height and width of an image.

    Returns:
        Seconds of a plain and a protected step (medians), before and after an experience; peak memory in MB, and what
        the method keeps.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = getattr(torchvision.models, name)(num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    core: Any
    if method == "gpm":
        core = GradientProjectionMemory(threshold, 0.0, samples)
    else:
        core = ExtendedKroneckerLaplace(truncate=None if truncate == 1 else truncate)
    images = torch.randn(max(batch, samples), 3, pixels, pixels, device=device)
    labels = torch.randint(10, (batch,), device=device)
    parts = images[:samples].split(batch)
    settings = {"samples": samples, "batches": parts} if method == "xkfac" else {}
    seconds: list[list[float]] = [[], []]
    figures = {}
    memory = PeakMemory(device)
    memory.start()
    for experience, own in enumerate(seconds):
        begin = _timed(lambda: core.start(model, optimizer, **settings), device)
        if experience == 1:
            figures["before the second experience"] = begin
        model.train()
        with core.active():
            for _ in range(steps):
                own.append(_timed(lambda: _step(model, optimizer, core, images[:batch], labels), device))
        core.finish()
        if experience == 0:
            figures["after the first experience"] = _timed(lambda: core.consolidate(model, parts), device)
    plain, protected = (statistics.median(own) for own in seconds)
    kept = {"kept (MB)": core.bytes_held / 2**20} if method == "xkfac" else {}
    peak = {"peak memory (MB)": memory.stop()[0] or float("nan")}
    return {"plain step": plain, "protected step": protected, **figures, **peak, **kept}


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, core: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    if isinstance(core, GradientProjectionMemory):
        loss.backward()
        core.transform()
        optimizer.step()
        core.after_step()
    else:
        core.objective(loss).backward()
        optimizer.step()


def main(
    name: Annotated[str, typer.Argument(help="a network in torchvision.models")] = "vit_b_16",
    method: Annotated[str, typer.Option(help="gpm or xkfac")] = "gpm",
    batch: Annotated[int, typer.Option(help="images a step")] = 8,
    steps: Annotated[int, typer.Option(help="steps an experience")] = 4,
    samples: Annotated[int, typer.Option(help="images that bases or factors are made of")] = 32,
    threshold: Annotated[float, typer.Option(help="share of the energy that GPM's bases explain")] = 0.97,
    truncate: Annotated[float, typer.Option(help="share of their norm that XK-FAC's factors keep")] = 0.99,
    pixels: Annotated[int, typer.Option(help="height and width of an image")] = 224,
) -> None:
    """Measure one network and print the figures."""
    if method not in ("gpm", "xkfac"):
        raise typer.BadParameter(f"method {method!r} is not measured here: gpm or xkfac")
    figures = measure(
        name, method, batch=batch, steps=steps, samples=samples, threshold=threshold, truncate=truncate, pixels=pixels
    )
    for what, value in figures.items():
        Console().print(f"{what}: {value:.2f}" + ("" if "MB" in what else " s"))


if __name__ == "__main__":
    typer.run(main)
