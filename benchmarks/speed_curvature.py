"""What K-FAC Laplace and XK-FAC cost: a training step, and the pass that makes the factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import InMemoryDataPlugin, KFACLaplacePlugin
from avalanche_gradproj.layers.select import cover
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.methods.kfac_factors import FactorPass
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from benchmarks.speed_gpm import alexnet
from benchmarks.timing import Measurement, Timing, in_turn

MLP_BATCH, ALEXNET_BATCH, CLASSES = 128, 64, 10
#: Samples that the factors of a step's penalty are made of.
MLP_SAMPLES, ALEXNET_SAMPLES = 6400, 1280
#: Samples of an epoch inside Avalanche, and beside whose epoch the pass that makes factors is timed: those of an
#: experience of permuted MNIST, and of split CIFAR-100. What an experience costs once, eigenvectors above all, is the
#: same however many there are, so that fewer would overstate it.
MLP_EXPERIENCE, ALEXNET_EXPERIENCE = 60000, 5000
SHARES = (0.99, 0.999)
#: Steps for which a penalty is kept, where it is: what is timed are as many steps.
KEPT = 8
#: How mini-batches come in an epoch inside Avalanche.
LOADERS = "its loader and the transforms of its PermutedMNIST", "its loader alone", "in memory"


def images(count: int, channels: int, size: int) -> Tensor:
    """Return random images [n, channels, size, size] whose spectrum falls with the frequency as that of photographs."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.fft.fftfreq(size)
    distance = (frequencies[:, None].square() + frequencies[None].square()).sqrt().clamp(min=1.0 / size)
    noise = torch.fft.fft2(torch.randn(count, channels, size, size, generator=generator))
    pixels = torch.fft.ifft2(noise / distance).real
    return (pixels - pixels.mean()) / pixels.std()


def perceptron(*, batch_norm: bool = False) -> nn.Module:
    """Return the perceptron 784-100-100-10 with biases, with or without BatchNorm."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, 100):
        layers += [nn.Linear(inputs, 100), *([nn.BatchNorm1d(100)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, CLASSES))


def step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: KroneckerLaplace | None,
    lr: float = 1e-4,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], None]:
    """Return one training step, with the penalty of a method whose experience has begun, as its plugin adds it."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)

    def run() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        adds = method is not None and method.adds_gradient
        if method is not None and not adds:
            loss = method.objective(loss)
        loss.backward()
        if method is not None and adds:
            loss = loss.detach() + method.add_gradient()
        optimizer.step()

    return run


def steps(
    make: Callable[[], nn.Module],
    data: Tensor,
    batch: int,
    methods: dict[str, Callable[[], KroneckerLaplace]],
    device: torch.device,
    repeats: int = 31,
) -> list[Timing]:
    """Time a step of plain SGD and of each method, the mean of `KEPT`, all on networks of the same weights."""
    variants: dict[str, Callable[[], object]] = {}
    data = data.to(device)
    y = torch.randint(CLASSES, (batch,), device=device)
    with ExitStack() as stack:
        for name, build in {"plain SGD": None, **methods}.items():
            torch.manual_seed(0)
            model = make().to(device).train()
            method = None if build is None else build()
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
            if method is not None:
                method.consolidate(model, data.split(128))
                further = {"batches": data.split(128)} if isinstance(method, ExtendedKroneckerLaplace) else {}
                stack.enter_context(method.experience(model, optimizer, samples=len(data), **further))
            variants[name] = _repeated(step(model, data[:batch], y, method, optimizer=optimizer), KEPT)
        timings = in_turn(variants, repeats=repeats, warmup=3)
    return [replace(timing, seconds=timing.seconds / KEPT) for timing in timings]


def _repeated(run: Callable[[], None], count: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(count):
            run()

    return several


def measurements(device: torch.device) -> Iterator[Measurement]:
    """Yield each table's title and what measures it."""
    kept = f"products formed every {KEPT} steps"

    def kfac(share: float | None, mode: str, every: int = 1) -> Callable[[], KroneckerLaplace]:
        return lambda: KroneckerLaplace(mode=mode, truncate=share, refresh_every=every)

    def variants(mode: str) -> dict[str, Callable[[], KroneckerLaplace]]:
        return {
            "K-FAC Laplace, whole factors": kfac(None, mode),
            **{f"K-FAC Laplace, truncated at {share}": kfac(share, mode) for share in SHARES},
            f"K-FAC Laplace, whole factors, {kept}": kfac(None, mode, KEPT),
            f"K-FAC Laplace, truncated at {SHARES[0]}, {kept}": kfac(SHARES[0], mode, KEPT),
        }

    extended: dict[str, Callable[[], KroneckerLaplace]] = {
        "XK-FAC, whole factors": ExtendedKroneckerLaplace,
        **{f"XK-FAC, truncated at {share}": _extended(share) for share in SHARES},
        f"XK-FAC, whole factors, {kept}": lambda: ExtendedKroneckerLaplace(refresh_every=KEPT),
    }
    turned: dict[str, Callable[[], KroneckerLaplace]] = {
        "K-FAC Laplace, whole factors, steps in the eigenbasis": lambda: KroneckerLaplace(
            mode="online", eigenbasis=True
        )
    }
    flat, pictures = partial(images, MLP_SAMPLES, 1, 28), partial(images, ALEXNET_SAMPLES, 3, 32)
    name = f"perceptron 784-100-100-10, batch {MLP_BATCH}"
    yield (
        f"A step of K-FAC on the {name}, online",
        lambda: steps(perceptron, flat(), MLP_BATCH, {**variants("online"), **turned}, device),
    )
    yield (
        f"A step of XK-FAC on the {name}, with BatchNorm",
        lambda: steps(partial(perceptron, batch_norm=True), flat(), MLP_BATCH, extended, device),
    )
    for loader in LOADERS:
        yield (
            f"K-FAC inside Avalanche, {loader}: an epoch of {MLP_EXPERIENCE} samples of the {name}",
            partial(avalanche_epochs, MLP_EXPERIENCE, loader, device),
        )
    yield (
        f"A step of K-FAC on AlexNet, batch {ALEXNET_BATCH}",
        lambda: steps(alexnet, pictures(), ALEXNET_BATCH, variants("separate"), device, repeats=7),
    )
    yield (
        f"K-FAC's factors of the perceptron beside an epoch of {MLP_EXPERIENCE} samples",
        lambda: factor_pass(perceptron, images(MLP_EXPERIENCE, 1, 28), MLP_BATCH, device),
    )
    # One turn of these takes over a minute, and nothing that a warm-up would take out is seen beside it.
    yield (
        f"K-FAC's factors of AlexNet beside an epoch of {ALEXNET_EXPERIENCE} samples",
        lambda: factor_pass(alexnet, images(ALEXNET_EXPERIENCE, 3, 32), ALEXNET_BATCH, device, repeats=2, warmup=0),
    )


def _extended(share: float) -> Callable[[], KroneckerLaplace]:
    return lambda: ExtendedKroneckerLaplace(truncate=share)


def avalanche_epochs(count: int, loader: str, device: torch.device) -> list[Timing]:
    """Time an epoch of Avalanche's Naive and of Naive with the plugin, with one of `LOADERS`."""
    data = images(count, 1, 28)
    experience = _experience(data, transforms=loader == LOADERS[0])
    variants: dict[str, Callable[[], object]] = {}
    kept, thin = f", products formed every {KEPT} steps", f"K-FAC Laplace, truncated at {SHARES[0]}"
    settings: dict[str, dict[str, Any] | None] = {
        "Naive": None,
        "K-FAC Laplace, whole factors": {},
        thin: {"truncate": SHARES[0]},
        f"K-FAC Laplace, whole factors{kept}": {"refresh_every": KEPT},
        f"{thin}{kept}": {"truncate": SHARES[0], "refresh_every": KEPT},
    }
    for name, options in settings.items():
        torch.manual_seed(0)
        model = perceptron().to(device)
        own = [] if options is None else [KFACLaplacePlugin(mode="online", **options)]
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-4),
            train_mb_size=MLP_BATCH,
            train_epochs=1,
            eval_mb_size=MLP_BATCH,
            device=device,
            plugins=[*own, *([InMemoryDataPlugin()] if loader == LOADERS[2] else [])],
            evaluator=EvaluationPlugin(),
        )
        if own:
            own[0].method.consolidate(model, data.to(device).split(128))
            own[0].after_training_exp = _nothing  # the factors are another table's
        variants[name] = partial(strategy.train, experience)
    return in_turn(variants, repeats=5, warmup=1)


def _experience(data: Tensor, *, transforms: bool) -> Any:
    """Return an experience of Avalanche made of images in memory, with PermutedMNIST's transforms or without any."""
    from avalanche.benchmarks.classic.cmnist import PixelsPermutation
    from avalanche.benchmarks.scenarios import class_incremental_benchmark
    from avalanche.benchmarks.utils import DataAttribute, DefaultTransformGroups
    from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
    from torchvision.transforms import Compose, Normalize

    targets = [index % CLASSES for index in range(len(data))]
    pixels = torch.randperm(data[0].numel(), generator=torch.Generator().manual_seed(0))
    both = Compose([PixelsPermutation(pixels), Normalize((0.1307,), (0.3081,))])
    dataset = ClassificationDataset(
        [TensorDataset(data, torch.tensor(targets))],
        data_attributes=[DataAttribute(targets, "targets")],
        transform_groups=DefaultTransformGroups((both, None)) if transforms else None,
    )
    (experience,) = class_incremental_benchmark(
        {"train": dataset, "test": dataset}, num_experiences=1, class_order=list(range(CLASSES))
    ).train_stream
    return experience


def _nothing(*args: object, **kwargs: object) -> None:
    """Take the place of a callback."""


def factor_pass(
    make: Callable[[], nn.Module], data: Tensor, batch: int, device: torch.device, repeats: int = 7, warmup: int = 1
) -> list[Timing]:
    """Time the pass that makes the factors, and their eigenvectors for truncation, beside an epoch of plain SGD."""
    torch.manual_seed(0)
    model, data = make().to(device), data.to(device)
    y = torch.randint(CLASSES, (len(data),), device=device)
    parts = list(zip(data.split(batch), y.split(batch), strict=True))
    runs = [step(model, x, labels, None) for x, labels in parts]
    units = cover(model).units

    def epoch() -> None:
        model.train()
        for run in runs:
            run()

    def factors() -> None:
        FactorPass(model, units, generator=torch.Generator()).run(data.split(batch))

    def consolidate(share: float | None) -> Callable[[], None]:
        return lambda: KroneckerLaplace(truncate=share).consolidate(model, data.split(batch))

    return in_turn(
        {
            "an epoch of plain SGD": epoch,
            "sums of the factors": factors,
            "the whole of consolidate": consolidate(None),
            f"the same, truncated at {SHARES[0]}": consolidate(SHARES[0]),
        },
        repeats=repeats,
        warmup=warmup,
    )
