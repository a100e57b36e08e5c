"""The networks of the protocols: multilayer perceptrons, the AlexNet and the LeNet of the GPM family, a ResNet.

In the networks of the GPM family no layer has a bias. Task-incremental streams get a `MultiHead` model: one trunk and
one bias-free head a task, all heads made at the start so that every test experience can be evaluated at any time and
the initial weights depend on the seed alone; or one output layer with the units of other tasks masked
(`MaskedOutputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from avalanche.models import MultiHeadClassifier, MultiTaskModule, SlimResNet18
from torch import Tensor, nn

from benchmarks.settings import InputError, unknown
from benchmarks.streams import Stream

_ALEXNET_CHANNELS = ((3, 64, 4, 0.2), (64, 128, 3, 0.2), (128, 256, 2, 0.5))
_ALEXNET_UNITS = (1024, 2048, 2048)
_LENET_CHANNELS = ((3, 20), (20, 50))
_LENET_UNITS = (3200, 800, 500)
_RESNET_FILTERS = 20

#: The logit of a class of another task.
MASKED = -1e11


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


class MaskedOutputs(MultiTaskModule):
    """A network with one output layer in which only the units of the sample's own task count.

    Args:
        network: maps images to logits of all classes.
        classes: units of each task.
        n_outputs: units of the output layer.
    """

    def __init__(self, network: nn.Module, classes: Sequence[Sequence[int]], n_outputs: int) -> None:
        super().__init__()
        self.network = network
        others = torch.ones(len(classes), n_outputs, dtype=torch.bool)
        for task, own in enumerate(classes):
            others[task, list(own)] = False
        self.register_buffer("others", others)

    def forward(self, x: Tensor, task_labels: Tensor | int | None = None) -> Any:
        """Logits of all classes, [batch, n_outputs], those of other tasks at `MASKED`.

        The whole batch passes at once: BatchNorm normalises what comes together.

        Args:
            x: images.
            task_labels: one label a sample, or one for all; None asks for every task's logits.

        Returns:
            The logits, or a dict of them for None.
        """
        logits = self.network(x)
        if task_labels is None:
            return {task: _masked(logits, own) for task, own in enumerate(self.others)}
        return _masked(logits, self.others[task_labels])

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Logits with those of all tasks but one masked, [batch, n_outputs]."""
        return _masked(self.network(x), self.others[task_label])


def _masked(logits: Tensor, others: Tensor) -> Tensor:
    return logits.masked_fill(others, max(MASKED, torch.finfo(logits.dtype).min))


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


def _image_network(trunk: nn.Sequential, features: int, stream: Stream) -> nn.Module:
    """Put heads on a trunk made for 32 x 32 colour images."""
    _refuse_other_images(stream)
    if stream.n_heads:
        return MultiHead(trunk, BiasFreeHeads(features, stream.n_outputs, stream.n_heads))
    return trunk.append(nn.Linear(features, stream.n_outputs, bias=False))


_BUILDERS: dict[str, Callable[[Stream, int], nn.Module]] = {
    "mlp": _mlp,
    "mlp-bias": _mlp_with_biases,
    "mlp-xavier": _mlp_xavier,
    "mlp-bn": _mlp_batch_norm,
    "alexnet": _alexnet,
    "lenet": _lenet,
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
