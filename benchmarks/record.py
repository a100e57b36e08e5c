"""What a protocol is: a record of everything that fixes a benchmark, but for method and seed.

Plain values only: to list protocols and to refuse wrong names, neither torch nor Avalanche is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.settings import setting


@dataclass(frozen=True)
class Expected:
    """What a protocol's network and stream need of the data; None means that anything will do.

    Attributes:
        height_width: image size.
        channels: 1 (grey, `[n, h, w]`) or 3 (`[n, h, w, 3]`).
        n_classes: number of classes.
        coarse: whether the superclass of each class is needed.
    """

    height_width: tuple[int, int] | None = None
    channels: int | None = None
    n_classes: int | None = None
    coarse: bool = False


@dataclass(frozen=True)
class Normalisation:
    """Pixels to floats: `(pixel / scale - mean) / std`, one mean and std a channel.

    Attributes:
        scale: largest pixel value.
        mean: a value for each channel, or one for all.
        std: a value for each channel, or one for all.
    """

    scale: float = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Protocol:
    """Everything that fixes a benchmark, but for method and seed.

    A field that is None does not apply to the protocol and cannot be set.

    Attributes:
        name: what the command line calls it.
        summary: one line for people.
        source: where the images come from: `digits` (embedded), `mnist`, `cifar100` (a file or a download) or
            `npz` (the user's file).
        expected: what the images must look like.
        split: experiences by classes in label order, by superclasses, by permutations of the pixels or by
            rotations.
        model: the network.
        normalisation: pixels to floats.
        n_experiences: how many experiences, the first ones of the protocol's order.
        classes_per_experience: classes of each; 0 divides all classes evenly.
        task_order: in which of `task_orders` the groups of classes come.
        task_orders: for each name the groups of classes in the order in which they are learned; a group's number is
            its place in label order (that of superclasses: in the order of their labels).
        image_shape: channels, height and width that the images are brought to (`sources.fit_images`).
        hidden: units of the perceptron's hidden layers.
        epochs: epochs of an experience, at most.
        optimizer: `sgd` without momentum or weight decay, or `adam` with PyTorch's other defaults; its state lasts from
            one experience to the next, as Avalanche keeps it.
        reset_optimizer: whether that state is forgotten as an experience begins.
        lr: learning rate, the initial one where there is a schedule.
        train_batch: samples of a training batch.
        test_batch: samples of a test or validation batch.
        max_angle: degrees over which the rotations are spread.
        outputs: of a split by classes: a head a task, or one layer whose units of other tasks are masked.
        permuted_heads: of permutations and rotations: a head a task and task labels, instead of one output layer and
            task label 0 throughout.
        permutation_rule: whose permutations: those of GPM's code or those of GEM's.
        train_limit: at most so many training samples an experience; 0 takes all.
        draw_rule: which ones: the same in all experiences over the same images, or other ones in each.
        valid_share: share of the training samples held back for validation.
        valid_rule: which ones: the first, or random ones.
        patience: epochs without a better validation loss before the learning rate falls.
        lr_factor: what it is divided by.
        lr_min: below it the experience ends.
        lr_decay: what the learning rate is multiplied by in the course of an epoch, a little in each iteration; it
            starts anew in every experience.
        methods: hyper-parameters of each method.
        sources: where each figure is from.
        notes: what a reader of the results has to know.
    """

    name: str
    summary: str
    source: Literal["digits", "mnist", "cifar100", "npz"]
    expected: Expected
    split: Literal["classes", "superclasses", "permutations", "rotations"]
    model: str
    normalisation: Normalisation
    n_experiences: int = setting(5, minimum=1)
    classes_per_experience: int | None = setting(None, minimum=0)
    task_order: Literal["A", "B", "C", "D", "E"] | None = setting(None)
    task_orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    image_shape: tuple[int, int, int] | None = None
    hidden: int | None = setting(None, minimum=1)
    epochs: int = setting(1, minimum=1)
    optimizer: Literal["sgd", "adam"] = "sgd"
    reset_optimizer: bool | None = setting(None)
    lr: float = setting(0.01, above=0)
    train_batch: int = setting(10, minimum=1)
    test_batch: int = setting(64, minimum=1)
    max_angle: float | None = setting(None, above=0, maximum=360)
    outputs: Literal["heads", "masked"] = "heads"
    permuted_heads: bool = False
    permutation_rule: Literal["gpm", "gem"] = "gpm"
    train_limit: int = setting(0, minimum=0)
    draw_rule: Literal["same", "each"] = "same"
    valid_share: float | None = None
    valid_rule: Literal["first", "random"] = "random"
    patience: int | None = setting(None, minimum=1)
    lr_factor: float | None = setting(None, above=1)
    lr_min: float | None = setting(None, above=0)
    lr_decay: float | None = setting(None, above=0, maximum=1)
    methods: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def task_labels(self) -> bool:
        """Whether the experiences have task labels of their own (task-incremental)."""
        return self.split in ("classes", "superclasses") or self.permuted_heads

    @property
    def group_order(self) -> tuple[int, ...] | None:
        """The group of classes of each experience, or None where there are no orders to choose from."""
        if self.task_order is None:
            return None
        return self.task_orders[self.task_order][: self.n_experiences]
