"""What HALRP costs: a training step, the two routes of a perturbed layer, the fit of a task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from avalanche_gradproj.layers.perturbed import Factors, canonical, perturbed
from avalanche_gradproj.layers.tasks import task_layers
from avalanche_gradproj.linalg.lowrank import fit
from avalanche_gradproj.methods.halrp import LowRankPerturbation
from benchmarks.models import lenet_trunk
from benchmarks.speed_curvature import images
from benchmarks.timing import Measurement, Timing, in_turn

BATCH, CLASSES = 128, 10

#: Layers, the shape of their inputs, the rank, and whether something before them is trained.
_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "conv 3-20, kernel 5, of 32 x 32": (lambda: nn.Conv2d(3, 20, 5, padding=2), (128, 3, 32, 32), 3, False),
    "conv 20-50, kernel 5, of 16 x 16": (lambda: nn.Conv2d(20, 50, 5, padding=2), (128, 20, 16, 16), 15, True),
    "conv 64-64, kernel 3, of 32 x 32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 32, 32), 16, True),
    "conv 256-256, kernel 3, of 8 x 8": (lambda: nn.Conv2d(256, 256, 3, padding=1), (32, 256, 8, 8), 50, True),
    "conv 256-64, kernel 1, of 16 x 16": (lambda: nn.Conv2d(256, 64, 1), (32, 256, 16, 16), 20, True),
    "linear 3200-800": (lambda: nn.Linear(3200, 800), (128, 3200), 50, True),
    "linear 800-500": (lambda: nn.Linear(800, 500), (128, 800), 50, True),
}


def lenet() -> nn.Module:
    """Return the LeNet with BatchNorm and one head."""
    return nn.Sequential(lenet_trunk(), nn.Linear(500, CLASSES))


def training_step(device: torch.device, repeats: int = 30) -> list[Timing]:
    """Time a step of Adam on the LeNet: plain, and of a later task by each route.

    Args:
        device: where.
        repeats: counted turns.
    """
    x = images(3 * BATCH, 3, 32).reshape(3, BATCH, 3, 32, 32)[0].to(device)
    y = torch.arange(BATCH, device=device) % CLASSES
    variants: dict[str, Callable[[], None]] = {}
    for name, route in (
        ("plain Adam", None),
        ("HALRP", "auto"),
        ("HALRP, factored", "factored"),
        ("HALRP, formed", "formed"),
    ):
        torch.manual_seed(0)
        model = lenet().to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        method = None
        if route is not None:
            method = LowRankPerturbation(max_growth=None)
            with method.experience(model, optimizer):
                _step(model, optimizer, x, y, method)()
            method.start(model, optimizer, batches=[(x, y)] * 8)
            for layer in task_layers(model).values():
                layer.route = route  # type: ignore[assignment]
        variants[name] = _step(model, optimizer, x, y, method)
    return in_turn(variants, repeats)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, method: LowRankPerturbation | None
) -> Callable[[], None]:
    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if method is not None:
            method.regularise()
        optimizer.step()

    return run


def routes(name: str, device: torch.device, repeats: int = 11) -> list[Timing]:
    """Time a single layer forwards and backwards: trained as it is, and perturbed by each route.

    Args:
        name: of the layer in `_LAYERS`.
        device: where.
        repeats: counted turns.
    """
    make, shape, rank, inner = _LAYERS[name]
    torch.manual_seed(0)
    plain: nn.Module = make().to(device)
    fixed = copy.deepcopy(plain).requires_grad_(False)
    x = torch.randn(shape, device=device, requires_grad=inner)
    groups, out, into, _ = canonical(fixed, fixed.weight).shape  # type: ignore[arg-type]
    sizes = ((out,), (into,), (groups, out, rank), (groups, rank, into), (out,))
    factors = Factors(*(torch.randn(size, device=device).mul_(0.1).requires_grad_() for size in sizes))

    def run(forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: forward(x).sum().backward()

    def by(route: str) -> Callable[[Tensor], Tensor]:
        return lambda given: perturbed(fixed, given, factors, route)  # type: ignore[arg-type]

    kinds = ("formed", "factored", "auto")
    return in_turn({"plain": run(plain), **{kind: run(by(kind)) for kind in kinds}}, repeats)


def fitting(device: torch.device, repeats: int = 3) -> list[Timing]:
    """Time the fit of the LeNet's four layers: ours, and with an SVD of each residual in float32 and float64.

    Args:
        device: where.
        repeats: counted turns.
    """
    torch.manual_seed(0)
    layers = [m for m in lenet_trunk().modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    pairs = [(canonical(m, m.weight.detach()).to(device), m) for m in layers]
    pairs = [(base, base + 0.1 * torch.randn_like(base)) for base, _ in pairs]  # type: ignore[misc]

    def svd(dtype: torch.dtype) -> None:
        for base, free in pairs:
            torch.linalg.svd((free - base).mean(3).to(dtype), full_matrices=False)  # type: ignore[operator]

    return in_turn(
        {
            "least squares and Gram matrices, float64": lambda: [fit(free, base) for base, free in pairs],  # type: ignore[arg-type, misc]
            "SVDs alone, float32": lambda: svd(torch.float32),
            "SVDs alone, float64": lambda: svd(torch.float64),
        },
        repeats,
        warmup=1,
    )


def measurements(device: torch.device) -> Iterator[Measurement]:
    """Yield each table's title and what measures it."""
    title = f"A step of HALRP on the LeNet with BatchNorm, batch {BATCH}, a later task"
    yield title, partial(training_step, device)
    for name, (_, shape, rank, _) in _LAYERS.items():
        size = "x".join(map(str, shape))
        title = f"One layer perturbed by HALRP, forwards and backwards: {name}, rank {rank}, input {size}"
        yield title, partial(routes, name, device)
    yield "HALRP's fit of the LeNet's four layers", partial(fitting, device)
