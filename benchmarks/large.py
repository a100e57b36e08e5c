"""What protecting a large torchvision network costs: `python -m benchmarks.large vit_b_16`.

Two experiences of random images of 224 pixels: steps without protection, the pass over the data with the growth of the
bases, steps with protection. Seconds and peak memory; no accuracy.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import torchvision
import typer
from rich.console import Console
from torch import Tensor, nn

from avalanche_gradproj.methods.gpm import GradientProjectionMemory
from benchmarks.resources import PeakMemory


def measure(name: str, batch: int, steps: int, samples: int, threshold: float) -> dict[str, float]:
    """Train two short experiences of a torchvision network.

    Args:
        name: of a network in `torchvision.models`.
        batch: images a step.
        steps: steps an experience.
        samples: images that the bases are made of.
        threshold: share of the energy that they explain.

    Returns:
        Seconds of a plain and a protected step (medians) and of the pass after an experience; peak memory in MB.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = getattr(torchvision.models, name)(num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gpm = GradientProjectionMemory(threshold, 0.0, samples)
    images = torch.randn(max(batch, samples), 3, 224, 224, device=device)
    labels = torch.randint(10, (batch,), device=device)
    seconds: list[list[float]] = [[], []]
    figures = {}
    memory = PeakMemory(device)
    memory.start()
    for experience in range(2):
        with gpm.experience(model, optimizer):
            for _ in range(steps):
                start = time.perf_counter()
                _step(model, optimizer, gpm, images[:batch], labels)
                seconds[experience].append(time.perf_counter() - start)
        if experience == 0:
            start = time.perf_counter()
            gpm.consolidate(model, images[:samples].split(batch))
            figures["consolidation"] = time.perf_counter() - start
    plain, protected = (statistics.median(own) for own in seconds)
    return {
        "plain step": plain,
        "protected step": protected,
        **figures,
        "peak memory (MB)": memory.stop()[0] or float("nan"),
    }


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, gpm: GradientProjectionMemory, x: Tensor, y: Tensor
) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    gpm.transform()
    optimizer.step()
    gpm.after_step()
    if x.is_cuda:
        torch.cuda.synchronize()


def main(
    name: Annotated[str, typer.Argument(help="a network in torchvision.models")] = "vit_b_16",
    batch: Annotated[int, typer.Option(help="images a step")] = 8,
    steps: Annotated[int, typer.Option(help="steps an experience")] = 4,
    samples: Annotated[int, typer.Option(help="images that the bases are made of")] = 32,
    threshold: Annotated[float, typer.Option(help="share of the energy that they explain")] = 0.97,
) -> None:
    """Measure one network and print the figures."""
    for what, value in measure(name, batch, steps, samples, threshold).items():
        Console().print(f"{what}: {value:.2f}" + ("" if "memory" in what else " s"))


if __name__ == "__main__":
    typer.run(main)
