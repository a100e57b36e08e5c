"""What LOGD and OGD cost: LOGD's solve beside principal components, and training steps as experiences pile up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from avalanche.models import SlimResNet18
from sklearn.decomposition import PCA
from torch import nn

from avalanche_gradproj.linalg.orthogonal import OrthonormalRows
from avalanche_gradproj.linalg.rank_one import choose
from avalanche_gradproj.methods.episodic import EpisodicMemory
from avalanche_gradproj.methods.gradient_blocks import GradientBlocks, partition
from avalanche_gradproj.methods.logd import update_coefficients
from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition
from avalanche_gradproj.methods.logit_gradients import logit_gradients
from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent
from avalanche_gradproj.methods.old_gradients import OldGradients
from benchmarks.timing import Measurement, Timing, in_turn

#: Old experiences in the solve, and in the steps.
OLD, STEPS = 19, (1, 2, 5, 10, 19)
#: Samples of a batch, and of each old experience, on the permuted MNIST of LOGD.
BATCH, PATTERNS = 10, 256
#: Components that the official scripts of LOGD remove, and parameter tensors of a block there.
COMPONENTS, TENSORS = 3, 5
#: Vectors that OGD holds.
VECTORS = (200, 400, 800)
PIXELS, HIDDEN, CLASSES = 784, 100, 10


def measurements(device: torch.device) -> Iterator[Measurement]:
    """Yield each table's title and what measures it."""
    yield (
        f"LOGD's solve, {OLD} old experiences, reduced ResNet-18, blocks of {TENSORS} tensors",
        partial(logd_solve, device),
    )
    title = f"A step of LOGD on the perceptron 784-100-100-10, batch {BATCH}, {PATTERNS} patterns each"
    yield title, partial(logd_step, device)
    yield "The largest part of a step of LOGD: gradients of 19 old experiences", partial(memory_pass, device)
    yield f"A step of OGD on the perceptron 784-100-100-10, batch {BATCH}", partial(ogd_step, device)
    for count in VECTORS:
        title = f"OGD's projection of a gradient of the perceptron, {count} stored gradients"
        yield title, partial(ogd_projection, device, count)


def logd_solve(device: torch.device) -> list[Timing]:
    """LOGD's update of all blocks, given the gradients; beside it principal components alone, on the host.

    The official code runs scikit-learn's PCA on every block in float64 at every step; its time here is that of the
    conversion and the decomposition, without the update that it then makes.
    """
    torch.manual_seed(0)
    parameters = dict(SlimResNet18(100, nf=20).to(device).named_parameters())
    blocks = GradientBlocks(parameters, partition(list(parameters), TENSORS), OLD)
    blocks.rows.normal_()

    def solve(n_components: int | None) -> Callable[[], None]:
        def run() -> None:
            coefficients, finite = update_coefficients(blocks.grams(), n_components=n_components, variant="official")
            blocks.combine(coefficients, finite)

        return run

    def host() -> Iterator[np.ndarray]:
        for begin, end in blocks.bounds:
            old = blocks.rows[:-1, begin:end].cpu().double().numpy()
            yield old - old.mean(axis=0)

    def pca() -> None:
        for specific in host():
            PCA(n_components=COMPONENTS).fit(specific)

    def svd() -> None:
        for specific in host():
            np.linalg.svd(specific, full_matrices=False)

    return in_turn(
        {
            f"LOGD, {COMPONENTS} components": solve(COMPONENTS),
            "LOGD, all directions": solve(None),
            "PCA of each block alone (scikit-learn)": pca,
            "SVD of each block alone (NumPy)": svd,
        },
        repeats=5,
        warmup=1,
    )


def perceptron() -> nn.Sequential:
    """Return the perceptron of LOGD's permuted MNIST."""
    return nn.Sequential(
        nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


def _images(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, PIXELS, device=device), torch.randint(CLASSES, (count,), device=device)


def _step(model: nn.Module, transform: Callable[[], None] | None, device: torch.device) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = _images(BATCH, device)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if transform is not None:
            transform()
        optimizer.step()

    return run


def _logd(model: nn.Module, count: int, device: torch.device) -> LayerwiseGradientDecomposition:
    """LOGD as the official scripts set it, with a memory of so many old experiences, ready to train."""
    method = LayerwiseGradientDecomposition(
        PATTERNS, COMPONENTS, variant="official", blocks=TENSORS, criterion=nn.functional.cross_entropy
    )
    for _ in range(count):
        method.consolidate(model, [_images(PATTERNS, device)])
    method.start(model)
    return method


def logd_step(device: torch.device) -> list[Timing]:
    """A training step against the number of old experiences."""
    torch.manual_seed(0)
    model = perceptron().to(device)
    variants: dict[str, Callable[[], object]] = {"plain SGD": _step(model, None, device)}
    for count in STEPS:
        variants[f"LOGD, {count} old"] = _step(model, _logd(model, count, device).transform, device)
    return in_turn(variants, repeats=25)


def memory_pass(device: torch.device) -> list[Timing]:
    """The gradients of all old experiences, split by experience, beside the matrix products that they need.

    Forward, input gradients (but of the first layer) and weight gradients: the least arithmetic there is. It is timed
    as the same number of multiplications in the same products, without anything between them.
    """
    torch.manual_seed(0)
    model = perceptron().to(device)
    memory = EpisodicMemory(PATTERNS)
    for _ in range(OLD):
        memory.add([_images(PATTERNS, device)])
    parameters = dict(model.named_parameters())
    blocks = GradientBlocks(parameters, partition(list(parameters), TENSORS), OLD)
    old = OldGradients(model, memory, blocks, lambda net, batch: net(batch[0]), nn.functional.cross_entropy)
    samples = OLD * PATTERNS
    sizes = [(layer.in_features, layer.out_features) for layer in model if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(samples, size, device=device) for size, _ in sizes]
    outputs = [torch.randn(samples, size, device=device) for _, size in sizes]
    weights = [torch.randn(size, inside, device=device) for inside, size in sizes]

    def products() -> None:
        for position, (x, delta, weight) in enumerate(zip(inputs, outputs, weights, strict=True)):
            torch.mm(x, weight.T)
            if position:
                torch.mm(delta, weight)
            torch.bmm(delta.view(OLD, PATTERNS, -1).mT, x.view(OLD, PATTERNS, -1))

    return in_turn({"its matrix products alone": products, "LOGD's pass over the memory": old.compute}, repeats=25)


def ogd_step(device: torch.device) -> list[Timing]:
    """A training step against the number of stored gradients."""
    torch.manual_seed(0)
    model = perceptron().to(device)
    variants: dict[str, Callable[[], object]] = {"plain SGD": _step(model, None, device)}
    for count in VECTORS:
        method = OrthogonalGradientDescent(count)
        method.consolidate(model, [_images(count, device)])
        method.start(model, torch.optim.SGD(model.parameters(), lr=0.0))
        variants[f"OGD, {method.vectors.shape[0]} gradients"] = _step(model, method.transform, device)
    return in_turn(variants, repeats=25)


def ogd_projection(device: torch.device, count: int) -> list[Timing]:
    """Removing the span of stored gradients from a vector: through outer products, and through V itself."""
    torch.manual_seed(0)
    model = perceptron().to(device)
    names, shapes = zip(*((name, tuple(p.shape)) for name, p in model.named_parameters()), strict=True)
    basis = OrthonormalRows(sum(p.numel() for p in model.parameters()), device=device)
    for rows in logit_gradients(model, names, _images(count, device)):
        basis.add(rows)
    gradient = torch.randn(basis.length, device=device)
    routes = {route: choose(basis, shapes, route).projection for route in ("auto", "dense")}

    def remove(route: str) -> Callable[[], object]:
        # Several at a time: what one route reads, the other has to read again.
        return lambda: [routes[route].remove(gradient) for _ in range(10)]

    timings = in_turn({"outer products": remove("auto"), "through V": remove("dense")}, repeats=15)
    return [Timing(one.name, one.seconds / 10, one.ratio) for one in timings]
