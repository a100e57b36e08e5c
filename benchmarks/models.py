"""The networks of the protocols: multilayer perceptrons, AlexNet and LeNet of the GPM family, HALRP's LeNet, a ResNet.

In the networks of the GPM family no layer has a bias. Task-incremental streams get a `MultiHead` model: one trunk and
one head a task (with a bias where the trunk has them), all heads made at the start so that every test experience can be
evaluated at any time and the initial weights depend on the seed alone; or one output layer with the units of other
tasks masked (`MaskedOutputs`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from avalanche.models import SlimResNet18
from torch import nn

from benchmarks.heads import MaskedOutputs, MultiHead, TaskHeads
from benchmarks.settings import InputError, unknown
from benchmarks.streams import Stream

_ALEXNET_CHANNELS = ((3, 64, 4, 0.2), (64, 128, 3, 0.2), (128, 256, 2, 0.5))
_ALEXNET_UNITS = (1024, 2048, 2048)
_LENET_CHANNELS = ((3, 20), (20, 50))
_LENET_UNITS = (3200, 800, 500)
_RESNET_FILTERS = 20


def _mlp_trunk(stream: Stream, hidden: int) -> nn.Sequential:
    """Flatten and two hidden layers."""
    channels, height, width = stream.input_shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, hidden, bias=False),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        nn.ReLU(),
    )


def _mlp(stream: Stream, hidden: int) -> nn.Module:
    """Two hidden layers of `hidden` units; the output layer is shared or one head a task."""
    trunk = _mlp_trunk(stream, hidden)
    if stream.n_heads:
        return MultiHead(trunk, TaskHeads(hidden, stream.n_outputs, stream.n_heads))
    return trunk.append(nn.Linear(hidden, stream.n_outputs, bias=False))


def _mlp_with_biases(stream: Stream, hidden: int) -> nn.Module:
    """Two hidden layers of `hidden` units and one output layer, with biases and PyTorch's own initial weights."""
    units = (torch.Size(stream.input_shape).numel(), hidden, hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(units):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, stream.n_outputs))


def _mlp_xavier(stream: Stream, hidden: int) -> nn.Module:
    """The same with Xavier-uniform weights and biases of zero."""
    model = _mlp_with_biases(stream, hidden)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def alexnet_trunk() -> nn.Sequential:
    """Three convolutions and two wide layers, each with BatchNorm (batch statistics), ReLU and dropout.

    Maps images [n, 3, 32, 32] to features [n, 2048].
    """
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, dropout in _ALEXNET_CHANNELS:
        layers += [
            nn.Conv2d(inputs, outputs, kernel, bias=False),
            nn.BatchNorm2d(outputs, track_running_stats=False),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.MaxPool2d(2),
        ]
    layers.append(nn.Flatten())
    for inputs, outputs in pairwise(_ALEXNET_UNITS):
        layers += [
            nn.Linear(inputs, outputs, bias=False),
            nn.BatchNorm1d(outputs, track_running_stats=False),
            nn.ReLU(),
            nn.Dropout(0.5),
        ]
    return nn.Sequential(*layers)


def _alexnet(stream: Stream, hidden: int) -> nn.Module:
    """The AlexNet of the GPM family."""
    del hidden
    return _image_network(alexnet_trunk(), _ALEXNET_UNITS[-1], stream)


def _lenet(stream: Stream, hidden: int) -> nn.Module:
    """Two convolutions with local response normalisation and two wide layers; Kaiming-uniform weights."""
    del hidden
    layers: list[nn.Module] = []
    for inputs, outputs in _LENET_CHANNELS:
        layers += [
            nn.Conv2d(inputs, outputs, 5, padding=2, bias=False),
            nn.ReLU(),
            nn.LocalResponseNorm(4, alpha=0.001 / 9.0, beta=0.75, k=1.0),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
    layers.append(nn.Flatten())
    for inputs, outputs in pairwise(_LENET_UNITS):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    model = _image_network(nn.Sequential(*layers), _LENET_UNITS[-1], stream)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
    return model


def lenet_trunk() -> nn.Sequential:
    """HALRP's LeNet: two convolutions and two wide layers with biases, BatchNorm, ReLU; PyTorch's own weights.

    Maps images [n, 3, 32, 32] to features [n, 500].
    """
    layers: list[nn.Module] = []
    for inputs, outputs in _LENET_CHANNELS:
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    for inputs, outputs in pairwise(_LENET_UNITS):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    # The same numbers but for rounding; convolutions and pooling on a CPU take a third less time.
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _lenet_batch_norm(stream: Stream, hidden: int) -> nn.Module:
    """HALRP's LeNet with its heads, which have biases too."""
    del hidden
    return _image_network(lenet_trunk(), _LENET_UNITS[-1], stream, bias=True)


def _mlp_batch_norm(stream: Stream, hidden: int) -> nn.Module:
    """Two hidden layers of `hidden` units, each with BatchNorm before its ReLU, and one output layer; with biases."""
    units = (torch.Size(stream.input_shape).numel(), hidden, hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(units):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, stream.n_outputs))


def _slim_resnet(stream: Stream, hidden: int) -> nn.Module:
    """The reduced ResNet-18 of the GEM family, with 20 filters and BatchNorm with running statistics."""
    del hidden
    _refuse_other_images(stream)
    network = SlimResNet18(stream.n_outputs, nf=_RESNET_FILTERS)
    return MaskedOutputs(network, stream.classes, stream.n_outputs) if stream.classes else network


def _refuse_other_images(stream: Stream) -> None:
    if stream.input_shape != (3, 32, 32):
        raise InputError(f"this network takes images of [3, 32, 32]; the data has {list(stream.input_shape)}")


def _image_network(trunk: nn.Sequential, features: int, stream: Stream, *, bias: bool = False) -> nn.Module:
    """Put heads on a trunk made for 32 x 32 colour images."""
    _refuse_other_images(stream)
    if stream.n_heads:
        return MultiHead(trunk, TaskHeads(features, stream.n_outputs, stream.n_heads, bias=bias))
    return trunk.append(nn.Linear(features, stream.n_outputs, bias=bias))


_BUILDERS: dict[str, Callable[[Stream, int], nn.Module]] = {
    "mlp": _mlp,
    "mlp-bias": _mlp_with_biases,
    "mlp-xavier": _mlp_xavier,
    "mlp-bn": _mlp_batch_norm,
    "alexnet": _alexnet,
    "lenet": _lenet,
    "lenet-bn": _lenet_batch_norm,
    "slim-resnet18": _slim_resnet,
}


def build_model(name: str, stream: Stream, hidden: int | None) -> nn.Module:
    """Build a network for a stream; the weights come from the global random state.

    Args:
        name: the network's name.
        stream: gives the shapes of inputs and outputs and the tasks.
        hidden: units of the hidden layers, for perceptrons.

    Returns:
        The network.

    Raises:
        InputError: if the name is unknown or the images do not fit the network.
    """
    if name not in _BUILDERS:
        raise unknown("model", name, _BUILDERS)
    return _BUILDERS[name](stream, hidden or 0)
