"""What GPM costs: a training step, and the update of the bases after an experience."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from avalanche_gradproj.layers.record import record, undisturbed
from avalanche_gradproj.layers.select import cover
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.subspace import Basis, grow_basis
from avalanche_gradproj.methods.projected import ProjectedTraining
from avalanche_gradproj.methods.rows import collect_rows
from benchmarks.models import alexnet_trunk
from benchmarks.timing import Measurement, Timing, in_turn

BATCH = 64
IMAGES = 125
#: Samples a layer of the GPM protocol on CIFAR-100: those of the three convolutions, then the linear layers.
SAMPLES = (24, 100, 100, 125, 125)


def alexnet() -> nn.Module:
    """Return the AlexNet of the GPM family with one head of 10 classes."""
    return nn.Sequential(OrderedDict(trunk=alexnet_trunk(), head=nn.Linear(2048, 10, bias=False)))


def half_bases(units: list[Unit], device: torch.device) -> dict[str, Basis]:
    """Return a random basis for each layer, of half its input dimension."""
    generator = torch.Generator().manual_seed(0)
    bases = {}
    for unit in units:
        columns = torch.linalg.qr(torch.randn(unit.blocks, unit.features, unit.features // 2, generator=generator)).Q
        bases[unit.name] = Basis(columns.to(device), (columns.shape[2],) * unit.blocks)
    return bases


def alexnet_step(device: torch.device) -> list[Timing]:
    """One training step of AlexNet at batch 64, every basis at half of its layer's input dimension."""
    torch.manual_seed(0)
    model = alexnet().to(device).train()
    x, y = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    units = cover(model, exclude=["head"]).units
    bases = half_bases(units, device)

    def step(training: ProjectedTraining | None) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if training is not None:
                training.transform()
            optimizer.step()

        def inside() -> None:
            if training is None:
                run()
            else:
                with training.active():
                    run()

        return inside

    variants = {"plain SGD": step(None)}
    for label, route in (("auto", "auto"), ("dense", "dense"), ("factored", "factored")):
        training = ProjectedTraining(model, optimizer, units, bases, [], apply_to="gradient", route=route)
        variants[f"GPM, route {label}"] = step(training)
    update = ProjectedTraining(model, optimizer, units, bases, [], apply_to="update")

    def update_step() -> None:
        step(update)()
        update.after_step()

    variants["GPM, apply_to update"] = update_step
    return in_turn(variants, repeats=25)


def explicit_patches(x: np.ndarray, kernel: int) -> np.ndarray:
    """Collect the patches of images [n, channels, height, width] one by one, as columns [features, n * positions].

    In float64, which is what the official code's matrix of patches is.
    """
    n, channels, height, width = x.shape
    rows, columns = height - kernel + 1, width - kernel + 1
    matrix = np.zeros((channels * kernel * kernel, n * rows * columns))
    at = 0
    for image in x:
        for i in range(rows):
            for j in range(columns):
                matrix[:, at] = image[:, i : i + kernel, j : j + kernel].reshape(-1)
                at += 1
    return matrix


def explicit_update(units: list[Unit], inputs: dict[str, Tensor], bases: dict[str, Basis], threshold: float) -> None:
    """Extend every basis by the route of the paper: patches in a loop, one SVD for the energy, one of the residual."""
    for unit, samples in zip(units, SAMPLES, strict=True):
        array = inputs[unit.name][:samples].cpu().numpy()
        convolution = isinstance(unit.module, nn.Conv2d)
        matrix = explicit_patches(array, unit.module.kernel_size[0]) if convolution else array.T
        basis = bases[unit.name].columns[0].cpu().numpy()
        energies = np.linalg.svd(matrix, full_matrices=False)[1] ** 2
        residual = matrix - basis @ (basis.T @ matrix)
        vectors, values, _ = np.linalg.svd(residual, full_matrices=False)
        reached, count = 1 - (values**2).sum() / energies.sum(), 0
        while reached < threshold:
            reached += values[count] ** 2 / energies.sum()
            count += 1
        np.hstack([basis, vectors[:, :count]])


def basis_update(device: torch.device) -> list[Timing]:
    """Extend the bases of all layers of AlexNet by 125 images, the bases holding a tenth of each space."""
    torch.manual_seed(0)
    model = alexnet().to(device)
    # Smooth images: their spectra fall as those of photographs do.
    images = nn.functional.interpolate(torch.randn(IMAGES, 3, 8, 8), size=32, mode="bicubic").to(device)
    units = cover(model, exclude=["head"]).units
    limits: dict[str, int | None] = {unit.name: n for unit, n in zip(units, SAMPLES, strict=True)}
    generator = torch.Generator().manual_seed(0)
    bases = {}
    for unit in units:
        columns = torch.linalg.qr(torch.randn(1, unit.features, unit.features // 10, generator=generator)).Q
        bases[unit.name] = Basis(columns.to(device), (columns.shape[2],))

    def explicit() -> None:
        inputs: dict[str, Tensor] = {}
        with undisturbed(model), record(units, inputs=lambda unit, x: inputs.update({unit.name: x.clone()})):
            model(images)
        explicit_update(units, inputs, bases, 0.97)

    def streaming() -> None:
        rows = collect_rows(model, units, [images], limits=limits)
        for unit in units:
            grow_basis(rows[unit.name], bases[unit.name], 0.97)

    return in_turn({"GPM, second moments": streaming, "explicit patches, two SVDs": explicit}, repeats=7, warmup=1)


def measurements(device: torch.device) -> Iterator[Measurement]:
    """Yield each table's title and what measures it."""
    yield f"A step of GPM on AlexNet, batch {BATCH}, bases at half of each input", partial(alexnet_step, device)
    yield f"GPM's update of the bases of AlexNet's five layers from {IMAGES} images", partial(basis_update, device)
