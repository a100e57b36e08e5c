"""What a protocol fixes and `--set` cannot change, in words: beside its settings, all that is needed to read it off."""

from __future__ import annotations

from benchmarks.record import Expected, Normalisation, Protocol

#: In results too, so that they are not to be reworded; the first one is Adam with `reset_optimizer`.
FRESH = "Adam, its state forgotten between experiences"
OPTIMIZERS = {"sgd": "SGD without momentum or weight decay", "adam": "Adam, its state kept between experiences"}

_IMAGES = {
    "digits": "scikit-learn's 1797 digits of 8 x 8 pixels in 10 classes, embedded; every fifth is for test",
    "mnist": "MNIST: --data mnist.npz, or downloaded",
    "cifar100": "CIFAR-100: --data cifar100.npz, or downloaded",
    "npz": "your own: --data FILE.npz",
}

#: What `models.py` builds.
NETWORKS = {
    "mlp": "two hidden layers, ReLU; no biases",
    "mlp-bias": "two hidden layers, ReLU; biases",
    "mlp-xavier": "two hidden layers, ReLU; Xavier-uniform weights, biases that start at zero",
    "mlp-bn": "two hidden layers, each with BatchNorm before its ReLU; biases",
    "alexnet": "convolutions of 64, 128 and 256 channels, two layers of 2048 units, each with BatchNorm (no running "
    "statistics), ReLU and dropout; no biases",
    "lenet": "convolutions of 20 and 50 channels with local response normalisation, layers of 800 and 500 units, ReLU; "
    "Kaiming-uniform weights, no biases",
    "lenet-bn": "convolutions of 20 and 50 channels, layers of 800 and 500 units, each with BatchNorm and ReLU; biases",
    "slim-resnet18": "ResNet-18 with 20 filters; BatchNorm keeps running statistics",
}

_DRAWN = {
    "same": "by the run's seed; experiences over the same images draw the same ones",
    "each": "by the run's seed; every experience draws its own",
}


def figures(protocol: Protocol) -> dict[str, str]:
    """Say what a protocol fixes.

    Args:
        protocol: the protocol; of its settings it matters alone which of them there are.

    Returns:
        What, and how it is; only what applies to the protocol.
    """
    found = {
        "images": f"{_IMAGES[protocol.source]}{_needed(protocol.expected)}",
        "image shape": "as it is" if protocol.image_shape is None else _brought(protocol.image_shape),
        "normalisation": _normalised(protocol.normalisation),
        "experiences": _experiences(protocol),
    }
    for name, order in protocol.task_orders.items():
        found[f"task_order {name}"] = ", ".join(map(str, order))
    found["task labels"] = "yes" if protocol.task_labels else "no"
    found["output"] = _output(protocol)
    found["network"] = f"{protocol.model}: {NETWORKS[protocol.model]}"
    found["loss"] = "cross-entropy, mean over the mini-batch"
    found["optimizer"] = OPTIMIZERS[protocol.optimizer]
    if protocol.reset_optimizer is not None:
        found["optimizer"] += "; with reset_optimizer forgotten"
    found["learning rate"] = _rate(protocol)
    found["validation"] = _validation(protocol)
    found["train_limit, validation"] = _DRAWN[protocol.draw_rule]
    return found


def _needed(expected: Expected) -> str:
    """What the images have to be, where that is not known from where they are from."""
    parts = []
    if expected.height_width is not None:
        parts.append("{} x {} pixels".format(*expected.height_width))
    if expected.channels is not None:
        parts.append("grey" if expected.channels == 1 else f"{expected.channels} channels")
    if expected.n_classes is not None:
        parts.append(f"{expected.n_classes} classes")
    if expected.coarse:
        parts.append("their superclasses (key coarse)")
    return f"; {', '.join(parts)}" if parts else ""


def _brought(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"brought to {height} x {width} pixels (bilinear), {channels} channels"


def _normalised(rule: Normalisation) -> str:
    """Write the way from pixels to floats."""
    means, stds = (", ".join(f"{value:.4g}" for value in values) for values in (rule.mean, rule.std))
    plain = set(rule.mean) == {0.0} and set(rule.std) == {1.0}
    return f"pixels / {rule.scale:g}" + ("" if plain else f", less mean {means}, divided by std {stds}")


def _experiences(protocol: Protocol) -> str:
    """What an experience is made of."""
    if protocol.split == "permutations":
        code = protocol.permutation_rule.upper()
        return f"permutations of the pixels, of the first experience too; drawn as in {code}'s code"
    if protocol.split == "rotations":
        return "rotations, at random within equal parts of max_angle, in ascending order"
    if protocol.split == "superclasses":
        groups = "the classes of a superclass each"
    else:
        even = "; classes_per_experience=0 divides them evenly" if protocol.classes_per_experience == 0 else ""
        groups = f"classes in label order, as many each{even}"
    return groups if protocol.task_order is None else f"{groups}; the groups come in the order of task_order"


def _output(protocol: Protocol) -> str:
    """Which outputs the network has for the experiences."""
    if not protocol.task_labels:
        return "one layer, shared by all experiences"
    if protocol.outputs == "masked" and not protocol.permuted_heads:
        return "one layer; units of other experiences' classes are masked"
    return "a head for each experience"


def _rate(protocol: Protocol) -> str:
    """How the learning rate goes, and which weights are kept."""
    if protocol.patience is not None:
        how = "divided by lr_factor after patience epochs without a better validation loss, until it is below lr_min"
        return f"lr at the start of every experience, {how}; the best weights are kept"
    if protocol.lr_decay is not None:
        return (
            "lr at the start of every experience, times lr_decay in the course of an epoch; the last weights are kept"
        )
    return "lr throughout; the last weights are kept"


def _validation(protocol: Protocol) -> str:
    """Which samples are held back."""
    if not protocol.valid_share:
        return "none"
    which = "the first" if protocol.valid_rule == "first" else "at random"
    unused = "" if protocol.patience is not None else "; the learning rate does not depend on them"
    return f"{100 * protocol.valid_share:g} % of an experience's training samples, {which}{unused}"
