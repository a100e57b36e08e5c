"""HALRP's protocols: orders, images, task labels, learning rates, epochs, and what a run's file says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from PIL import Image
from sklearn.utils import shuffle
from torch import nn

from benchmarks.build import build_stream
from benchmarks.check import check_method
from benchmarks.jobs import load_data, make_job
from benchmarks.methods import METHODS
from benchmarks.protocols import PROTOCOLS, find_protocol
from benchmarks.run import run
from benchmarks.settings import InputError, apply
from benchmarks.sources import fit_images, read_digits

CPU = torch.device("cpu")


def test_orders_are_the_official_ones():
    """Read off the official run_cifar100.py: whole for the order A, ends of the others."""
    ends = {
        "cifar100-halrp": {"A": (0, 9), "B": (1, 3), "C": (7, 9), "D": (5, 1), "E": (2, 7)},
        "cifar100-superclass-halrp": {"A": (0, 19), "B": (15, 19), "C": (17, 8), "D": (11, 17), "E": (6, 16)},
    }
    for name, wanted in ends.items():
        protocol = find_protocol(name)
        assert protocol.task_order == "A"
        assert protocol.task_orders["A"] == tuple(range(protocol.n_experiences))
        assert {order: (groups[0], groups[-1]) for order, groups in protocol.task_orders.items()} == wanted
        for groups in protocol.task_orders.values():
            assert sorted(groups) == list(range(protocol.n_experiences))
    assert find_protocol("cifar100-halrp").task_orders["D"] == (5, 8, 2, 9, 0, 4, 3, 7, 6, 1)


@pytest.mark.parametrize(
    ("name", "order", "first", "second"),
    [
        ("cifar100-halrp", "A", range(10), range(10, 20)),
        ("cifar100-halrp", "C", range(70, 80), range(10)),
        ("cifar100-superclass-halrp", "B", range(15, 100, 20), range(12, 100, 20)),
    ],
)
def test_experiences_hold_the_classes_of_their_group(cifar_like, name, order, first, second):
    protocol = apply(find_protocol(name), {"task_order": order, "n_experiences": "2"})
    stream = build_stream(protocol, cifar_like, 3)
    assert (stream.n_heads, stream.n_outputs) == (2, len(first))
    for i, classes in enumerate((first, second)):
        for part, count in (("train", 16), ("valid", 4), ("test", 2)):
            dataset = getattr(stream, part)[i]
            brightest = dataset.pixels().flatten(1).max(1).values.long() - 1  # class c has pixels c and c + 1
            assert sorted(set(brightest.tolist())) == list(classes)
            assert dataset.targets.tolist() == [list(classes).index(c) for c in brightest.tolist()]
            assert len(dataset) == count * len(classes)
        assert stream.benchmark.train_stream[i].task_label == i
        assert stream.benchmark.streams["valid"][i].task_label == i


def test_an_order_of_other_groups_is_refused(cifar_like):
    protocol = apply(find_protocol("cifar100-halrp"), {"classes_per_experience": "5"})
    with pytest.raises(InputError, match=r"orders 10 groups of classes.*makes 20"):
        build_stream(protocol, cifar_like, 0)


def test_permutations_move_all_values_of_resized_images_and_have_task_labels(mnist_like):
    protocol = apply(find_protocol("pmnist-halrp"), {"n_experiences": "3"})
    data = load_data(protocol, mnist_like)
    stream = build_stream(protocol, data, 2)
    assert (stream.n_heads, stream.n_outputs, stream.input_shape) == (3, 10, (3, 32, 32))
    with np.load(mnist_like) as archive:
        raw, labels = archive["x_train"], archive["y_train"]
    resized = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in raw]
    flat = np.stack([resized] * 3, 1).reshape(60, 3072).astype(np.float32) / 255
    flat = (flat - np.float32(0.1307)) / np.float32(0.3081)
    numbers = shuffle(np.arange(10), random_state=2)
    for i in range(3):
        wanted = np.stack([shuffle(image, random_state=numbers[i] * 100 + i) for image in flat])
        for part, rows in (("valid", slice(0, 12)), ("train", slice(12, 60))):  # the first fifth is for validation
            images, targets = getattr(stream, part)[i].as_tensors()
            np.testing.assert_allclose(images.reshape(len(images), -1).numpy(), wanted[rows], rtol=0, atol=2e-7)
            assert targets.tolist() == labels[rows].tolist()
        assert stream.benchmark.train_stream[i].task_label == stream.benchmark.test_stream[i].task_label == i
    permuted = build_stream(apply(find_protocol("pmnist-gpm"), {"n_experiences": "2"}), data, 2)
    assert (permuted.n_heads, permuted.benchmark.train_stream[1].task_label) == (0, 0)


def test_images_of_other_channels_are_refused(images, cifar_like):
    assert fit_images(cifar_like, (3, 32, 32)).x_train is not None
    with pytest.raises(InputError, match=r"\[3, 32, 32\]; expected grey ones or 4 channels"):
        fit_images(cifar_like, (4, 32, 32))
    fitted = fit_images(images, (3, 5, 4))
    assert torch.equal(fitted.x_test[:, 2:], images.x_test)


class Witness(SupervisedPlugin):
    """Writes down the learning rates, and gives the optimizer a new parameter before each later experience."""

    growth = 0.125

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings
        self.rates, self.epochs, self.extra = [], [], []

    def before_training_exp(self, strategy, **kwargs):
        self.rates.append([])
        self.epochs.append(0)
        if len(self.rates) > 1:
            self.extra.append(nn.Parameter(torch.ones(3)))
            strategy.optimizer.param_groups[0]["params"].append(self.extra[-1])

    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + sum(extra.sum() for extra in self.extra)

    def before_update(self, strategy, **kwargs):
        assert len(strategy.optimizer.param_groups) == 1
        self.rates[-1].append(strategy.optimizer.param_groups[0]["lr"])

    def after_training_epoch(self, strategy, **kwargs):
        self.epochs[-1] += 1


def watch(monkeypatch, method):
    witness = Witness()
    record = METHODS[method]
    monkeypatch.setitem(METHODS, method, type(record)(**vars(record) | {"plugins": lambda settings, seed: [witness]}))
    return witness


@pytest.mark.parametrize("method", ["naive", "halrp", "joint"])
def test_learning_rates_fall_in_each_iteration_and_start_anew(monkeypatch, cifar_like, method):
    """Each experience has 160 samples: five batches of 32 an epoch; HALRP's own epoch counts in later ones."""
    witness = watch(monkeypatch, method)
    changes = {"n_experiences": "3", "epochs": "3", "train_batch": "32"}
    result = run(make_job("cifar100-halrp", method, 0, CPU, changes), cifar_like)
    # Joint training takes at least ten samples of each of the three tasks into a batch.
    iterations, epochs = {"naive": (5, [3, 3, 3]), "halrp": (5, [3, 2, 2]), "joint": (16, [3])}[method]
    assert witness.epochs == epochs
    gamma = 0.95 ** (1 / iterations)
    for rates, count in zip(witness.rates, epochs, strict=True):
        assert len(rates) == count * iterations
        np.testing.assert_allclose(rates, [0.001 * gamma**k for k in range(len(rates))], rtol=1e-9)
        assert rates[iterations] == pytest.approx(0.00095)
    assert len(witness.extra) == len(epochs) - 1
    for extra in witness.extra:
        assert not torch.equal(extra, torch.ones(3))  # the optimizer moves what was added
    assert result["growth"] == 0.125


def test_protocols_without_decay_keep_their_rate(monkeypatch, cifar_like):
    witness = watch(monkeypatch, "naive")
    run(make_job("cifar100-logd", "naive", 0, CPU, {"n_experiences": "2", "train_limit": "20"}), cifar_like)
    assert {rate for rates in witness.rates for rate in rates} == {0.1}


def test_settings_reach_the_plugin_each_in_its_place(monkeypatch):
    monkeypatch.setattr("avalanche_gradproj.HALRPPlugin", Witness, raising=False)
    changes = {"warmup_epochs": "2", "approximation_rate": "0.7", "max_rank": "11", "l1": "0.25", "weight_decay": "0.5"}
    changes |= {"max_growth": "0.3", "prune_threshold": "0.01", "prune": "all", "importance": "train"}
    for name in ("cifar100-halrp", "digits-split"):
        job = make_job(name, "halrp", 7, CPU, changes)
        (plugin,) = METHODS["halrp"].plugins(job.settings, 7)
        given = {"warmup_epochs": 2, "approximation_rate": 0.7, "max_rank": 11, "l1": 0.25, "weight_decay": 0.5}
        given |= {"max_growth": 0.3, "prune_threshold": 0.01, "prune": "all", "importance": "train"}
        assert plugin.settings == given | {"unseen": "base", "seed": 7}
    settings = {name: PROTOCOLS[name].methods["halrp"] for name in PROTOCOLS}
    for name, protocol in PROTOCOLS.items():
        assert settings[name].importance == ("valid" if name.endswith("-halrp") else "train")
        assert protocol.valid_share or settings[name].importance == "train"
    permuted = settings["pmnist-halrp"]
    assert (permuted.l1, permuted.weight_decay, permuted.max_growth) == (1e-6, 1e-3, 0.6)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith(("cifar", "digits", "pmnist-halrp"))])
def test_protocols_that_suit_it_pass_the_check_before_training(cifar_like, mnist_like, name):
    """With the settings of the records and all experiences: the growth they allow is enough."""
    protocol = find_protocol(name)
    if METHODS["halrp"].unsuited(protocol.methods["halrp"], protocol) is not None:
        assert name in ("digits-permuted", "digits-bn", "cifar100-logd")
        return
    data = {"digits": read_digits, "cifar100": lambda: cifar_like, "mnist": lambda: load_data(protocol, mnist_like)}
    stream = build_stream(protocol, data[protocol.source](), 0)
    check_method(make_job(name, "halrp", 0, CPU, {}), stream)
    with pytest.raises(InputError, match=r"max_growth=0\.01"):
        check_method(make_job(name, "halrp", 0, CPU, {"max_growth": "0.01"}), stream)


def test_the_same_run_twice():
    def once(seed):
        changes = {"epochs": "2", "n_experiences": "3", "train_limit": "100"}
        return run(make_job("digits-split", "halrp", seed, CPU, changes), read_digits())

    first, second, other = once(0), once(0), once(1)
    for key in ("accuracy_matrix", "growth", "method_report"):
        assert first[key] == second[key]
    assert first["accuracy_matrix"] != other["accuracy_matrix"]
    assert "max_growth" not in first["changed"]
    assert first["method_report"]


@pytest.mark.parametrize("method", ["naive", "halrp"])
@pytest.mark.parametrize("name", ["cifar100-halrp", "cifar100-superclass-halrp", "pmnist-halrp"])
def test_short_runs(cifar_like, mnist_like, name, method):
    order = {} if name == "pmnist-halrp" else {"task_order": "E"}
    job = make_job(name, method, 1, CPU, {"n_experiences": "2", "epochs": "2", "train_batch": "40"} | order)
    data = load_data(job.protocol, mnist_like) if name == "pmnist-halrp" else cifar_like
    result = run(job, data)
    assert np.shape(result["accuracy_matrix"]) == (2, 2)
    groups = {"cifar100-halrp": [2, 9], "cifar100-superclass-halrp": [6, 14], "pmnist-halrp": None}[name]
    assert (result["task_order"], result["experience_groups"]) == (order.get("task_order"), groups)
    assert result["hyper_parameters"].get("task_order") == order.get("task_order")
    assert result["hyper_parameters"]["lr_decay"] == find_protocol(name).lr_decay
    if method == "naive":
        assert result["growth"] is None
        return
    assert 0 < result["growth"] <= job.settings.max_growth
    before, after = (row[0] for row in result["accuracy_matrix"])
    assert before == after  # nothing of an earlier task changes
    assert result["bwt"] == 0
