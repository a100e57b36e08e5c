"""What the methods cost, as ratios measured within one run: `python -m benchmarks speed`.

Every pair is measured in turn, A B A B ..., so that a change of the machine's speed meets both; figures are
medians. Nothing here is a test: timings depend on the machine, their ratios less so.
"""

from __future__ import annotations

import torch
from rich.console import Console

from benchmarks import speed_curvature, speed_gpm, speed_gradients, speed_halrp
from benchmarks.timing import table


def main() -> None:
    """Measure everything and print the tables."""
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    console.print(f"device {device}, {threads} threads, torch {torch.__version__}; medians, measured in turn")
    title = f"One training step of AlexNet, batch {speed_gpm.BATCH}, bases at half of each input"
    console.print(table(title, speed_gpm.alexnet_step(device)))
    title = f"Basis update of AlexNet's five layers from {speed_gpm.IMAGES} images"
    console.print(table(title, speed_gpm.basis_update(device)))
    parts = (speed_gradients, speed_curvature, speed_halrp)
    for title, timings in (one for part in parts for one in part.measure(device)):
        console.print(table(title, timings))
    console.print(speed_curvature.truncation_table(device))
