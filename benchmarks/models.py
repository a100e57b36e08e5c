"""The networks of the protocols: multilayer perceptrons, the AlexNet and the LeNet of the GPM family.

No layer has a bias. Task-incremental streams get a `MultiHead` model: one trunk and one bias-free head a
task, all heads made at the start so that every test experience can be evaluated at any time and the initial
weights depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from torch import Tensor, nn

from benchmarks.settings import InputError, unknown
from benchmarks.streams import Stream

_ALEXNET_CHANNELS = ((3, 64, 4, 0.2), (64, 128, 3, 0.2), (128, 256, 2, 0.5))
_ALEXNET_UNITS = (1024, 2048, 2048)
_LENET_CHANNELS = ((3, 20), (20, 50))
_LENET_UNITS = (3200, 800, 500)


class BiasFreeHeads(MultiHeadClassifier):
    """Avalanche's multi-head classifier without biases and with all heads there from the start.

    Args:
        in_features: width of the trunk's output.
        n_outputs: units of each head; no experience may have more classes.
        n_heads: number of heads, for the task labels 0 .. n_heads - 1.
    """

    def __init__(self, in_features: int, n_outputs: int, n_heads: int) -> None:
        # Masking would hide units of classes not seen yet; here every unit belongs to its task from the
        # start.
        super().__init__(in_features, initial_out_features=n_outputs, masking=False)
        head_type = type(self.classifiers["0"])
        for task in range(1, n_heads):
            self.classifiers[str(task)] = head_type(in_features, n_outputs, masking=False, auto_adapt=False)
            self.register_buffer(f"active_units_T{task}", torch.zeros(n_outputs, dtype=torch.int8))
        for head in self.classifiers.values():
            head.classifier.bias = None

    def adaptation(self, experience: Any) -> None:
        """Check that the experience fits the heads that exist; nothing grows.

        Args:
            experience: the experience about to be trained or evaluated.

        Raises:
            ValueError: if the experience has a task or a class without a unit.
        """
        tasks, top = set(experience.task_labels), max(experience.classes_in_this_experience)
        missing = sorted(task for task in tasks if str(task) not in self.classifiers)
        if missing or top >= self.starting_out_features:
            raise ValueError(
                f"experience with tasks {sorted(tasks)} and labels up to {top} does not fit "
                f"{len(self.classifiers)} heads of {self.starting_out_features} units"
            )
        super().adaptation(experience)


class MultiHead(MultiTaskModule):
    """A trunk shared by all tasks and a head for each.

    Args:
        trunk: maps images to features.
        heads: maps features and task labels to logits.
    """

    def __init__(self, trunk: nn.Module, heads: BiasFreeHeads) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads

    def forward(self, x: Tensor, task_labels: Tensor | int | None = None) -> Any:
        """Logits of each sample's own task, [batch, units].

        The features are computed for the whole batch at once: with batch statistics (the AlexNet) it matters
        which samples are normalised together.

        Args:
            x: images.
            task_labels: one label a sample, or one for all; None asks for every task's logits.

        Returns:
            The logits, or a dict of them for None.
        """
        features = self.trunk(x)
        if isinstance(task_labels, int):
            return self.heads.forward_single_task(features, task_labels)
        return self.heads(features, task_labels)

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Logits of one task for all samples, [batch, units]."""
        return self.heads.forward_single_task(self.trunk(x), task_label)


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
        return MultiHead(trunk, BiasFreeHeads(hidden, stream.n_outputs, stream.n_heads))
    return trunk.append(nn.Linear(hidden, stream.n_outputs, bias=False))


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


def _image_network(trunk: nn.Sequential, features: int, stream: Stream) -> nn.Module:
    """Put heads on a trunk made for 32 x 32 colour images."""
    if stream.input_shape != (3, 32, 32):
        raise InputError(f"this network takes images of [3, 32, 32]; the data has {list(stream.input_shape)}")
    if stream.n_heads:
        return MultiHead(trunk, BiasFreeHeads(features, stream.n_outputs, stream.n_heads))
    return trunk.append(nn.Linear(features, stream.n_outputs, bias=False))


_BUILDERS: dict[str, Callable[[Stream, int], nn.Module]] = {"mlp": _mlp, "alexnet": _alexnet, "lenet": _lenet}


def build_model(name: str, stream: Stream, hidden: int | None) -> nn.Module:
    """Build a network for a stream; the weights come from the global random state.

    Args:
        name: `mlp`, `alexnet` or `lenet`.
        stream: gives the shapes of inputs and outputs and the number of heads.
        hidden: units of the hidden layers, for `mlp`.

    Returns:
        The network.

    Raises:
        InputError: if the name is unknown or the images do not fit the network.
    """
    if name not in _BUILDERS:
        raise unknown("model", name, _BUILDERS)
    return _BUILDERS[name](stream, hidden or 0)
