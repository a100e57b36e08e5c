"""OGD inside Avalanche: task-, domain- and class-incremental streams, beside other plugins, interrupted."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from avalanche.benchmarks.scenarios import class_incremental_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import ConfigurationError, DataError
from avalanche_gradproj.plugins.ogd import OGDPlugin
from avalanche_gradproj.testing import MethodCase, leftovers, strategy, stream

CASE = MethodCase("ogd", lambda: OGDPlugin(40), optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
HEADS = MethodCase("ogd", lambda: OGDPlugin(40), optimizer=CASE.optimizer, task_incremental=True)


def label_logits(model, benchmark, task):
    """The true classes' logits of the first experience's samples."""
    samples = [benchmark.train_stream[0].dataset[i] for i in range(48)]
    x, y = torch.stack([sample[0] for sample in samples]), torch.tensor([int(sample[1]) for sample in samples])
    model.eval()
    with torch.no_grad():
        out = model(x) if task is None else model(x, torch.full((48,), task))
    model.train()
    return out[torch.arange(48), y]


@pytest.mark.parametrize("task", [None, 0], ids=["domain-incremental", "task-incremental"])
def test_old_logits_move_less_and_steps_are_orthogonal(task):
    case = CASE if task is None else HEADS
    drifts = []
    for plugin in (OGDPlugin(48), OGDPlugin(0)):
        benchmark = stream(task_labels=case.task_incremental)
        learner = strategy(case, [plugin])
        learner.train(benchmark.train_stream[0])
        before = label_logits(learner.model, benchmark, task)
        vectors = plugin.vectors.clone()
        start = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        learner.train(benchmark.train_stream[1])
        drifts.append((label_logits(learner.model, benchmark, task) - before).norm().item())
        if len(vectors):
            now = dict(learner.model.named_parameters())
            change = torch.cat([(now[name] - start[name]).detach().flatten() for name in plugin.method.shapes])
            assert (vectors @ change).norm() <= 1e-4 * change.norm()
            assert change.norm() > 0
            if task is not None:
                assert not any(name.startswith("head") for name in plugin.method.shapes)
                assert plugin.report()["head.classifiers.0.classifier.weight"].reason == "task head"
                assert "sample by sample" in str(plugin.report())
            else:
                assert "computed batched" in str(plugin.report())
    assert drifts[0] < 0.2 * drifts[1]


def class_incremental():
    torch.manual_seed(0)
    targets = (torch.arange(120) % 6).tolist()
    data = ClassificationDataset(
        [TensorDataset(torch.randn(120, 12), torch.tensor(targets))],
        data_attributes=[DataAttribute(targets, "targets")],
    )
    return class_incremental_benchmark(
        {"train": data, "test": data}, class_order=list(range(6)), num_experiences=3
    ).train_stream


@pytest.mark.parametrize("include", [None, ["0", "2"]], ids=["head alone", "head covered"])
@pytest.mark.parametrize("target", ["gtl", "all"])
def test_class_incremental_with_a_growing_head(include, target):
    experiences = class_incremental()
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), IncrementalClassifier(16, 2))
    plugin = OGDPlugin(12, target=target, include=include)
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=10,
        eval_mb_size=10,
        plugins=[plugin],
        evaluator=EvaluationPlugin(),
    )
    counts = []
    for count, experience in enumerate(experiences):
        held = plugin.vectors.clone()
        learner.train(experience)
        assert len(held) <= 12 * count < len(plugin.vectors)
        if count > 0:
            assert torch.equal(plugin.vectors[: len(held), : 12 * 16 + 16], held[:, : 12 * 16 + 16])
        counts.append(len(plugin.vectors))
    assert model[2].classifier.out_features == 6
    if include is None:
        assert list(plugin.method.shapes) == ["0.weight", "0.bias"]
        assert plugin.report()["2.classifier.weight"].reason == "task head"
    else:
        assert plugin.method.shapes["2.classifier.weight"] == (6, 16)
        of_head = plugin.vectors[:, 208 : 208 + 6 * 16].reshape(-1, 6, 16)
        for end, classes in zip(counts, (2, 4, 6), strict=True):
            assert not of_head[:end, classes:].any()  # classes that came later
            assert of_head[:end, classes - 2 : classes].any()
    assert plugin.method.leak["all"] <= 1e-4


def test_beside_other_plugins_and_adam():
    benchmark, plugin = stream(), OGDPlugin(40)
    case = MethodCase("ogd", lambda: plugin, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    learner = strategy(case, [ReplayPlugin(mem_size=20), EWCPlugin(ewc_lambda=0.5), plugin])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*taken back at its end.*")
        for experience in benchmark.train_stream:
            learner.train(experience)
            assert not leftovers(learner.model, learner)
    assert plugin.method.experiences == 3
    assert plugin.method.leak["all"] <= 1e-4
    assert "projection acts on" not in str(plugin.report())  # training is over


def test_keyboard_interrupt_and_going_on():
    class Interrupt(Naive.PLUGIN_CLASS):
        armed = True

        def after_forward(self, strategy, **kwargs):
            if self.armed and strategy.clock.train_exp_counter == 1:
                raise KeyboardInterrupt

    benchmark, interrupt, plugin = stream(), Interrupt(), OGDPlugin(40)
    learner = strategy(CASE, [plugin, interrupt])
    learner.train(benchmark.train_stream[0])
    held = plugin.vectors.clone()
    with pytest.raises(KeyboardInterrupt):
        learner.train(benchmark.train_stream[1])
    assert not leftovers(learner.model, learner)
    assert torch.equal(plugin.vectors, held)
    interrupt.armed = False
    learner.train(benchmark.train_stream[1])
    assert plugin.method.experiences == 2


def test_online_stream_stores_once_per_experience():
    benchmark, plugin = stream(), OGDPlugin(40)
    learner = strategy(CASE, [plugin], train_epochs=1)
    for count, experience in enumerate(benchmark.train_stream):
        for piece in split_online_stream([experience], experience_size=9, access_task_boundaries=True):
            assert plugin.method.experiences == count
            learner.train(piece)
    assert plugin.method.experiences == 3


def test_refused_before_training():
    benchmark = stream()
    for plugin, error, message in (
        (OGDPlugin(49), DataError, "experience 0 has 48 samples and n_gradients=49 .* give n_gradients<=48"),
        (OGDPlugin(40, max_bytes=1000), ConfigurationError, "max_bytes=1000 holds 0 gradients"),
        (OGDPlugin(40, exclude=["hiden"]), ConfigurationError, "'hiden' matches no parameter; .*'hidden"),
    ):
        learner = strategy(CASE, [plugin])
        before = {k: v.clone() for k, v in learner.model.state_dict().items()}
        with pytest.raises(error, match=message):
            learner.train(benchmark.train_stream[0])
        assert all(torch.equal(before[k], v) for k, v in learner.model.state_dict().items())


def test_labels_outside_the_logits():
    """A loss that looks at no label lets training pass: the gradients of their logits do not exist."""
    plugin = OGDPlugin(40)
    learner = strategy(CASE, [plugin], criterion=lambda out, y: out.square().mean())
    learner.model.out = nn.Linear(10, 2)
    with pytest.raises(DataError, match="labels from 0 to 3 came and the model has 2 logits"):
        learner.train(stream().train_stream[0])
    assert len(plugin.vectors) == 0
    strategy(CASE, [OGDPlugin(40, target="ave")], criterion=lambda out, y: out.square().mean()).train(
        stream().train_stream[0]
    )


def test_full_memory_warns_during_the_stream():
    benchmark, plugin = stream(), OGDPlugin(40)
    learner = strategy(CASE, [plugin])
    learner.train(benchmark.train_stream[0])
    one = 4 * plugin.method.vectors.shape[1]
    plugin = OGDPlugin(40, max_bytes=60 * one)
    learner = strategy(CASE, [plugin])
    learner.train(benchmark.train_stream[0])
    with pytest.warns(UserWarning, match="20 of 40 gradients of experience 1 were not stored"):
        learner.train(benchmark.train_stream[1])
    assert plugin.method.bytes_held == 60 * one + 60 * 60 * 8  # and how the gradients lie on the vectors


def test_plugin_and_core_have_the_same_arguments():
    plugin, core = inspect.signature(OGDPlugin), inspect.signature(type(OGDPlugin().method))
    own = {name: p.default for name, p in plugin.parameters.items() if name != "record_batch_size"}
    assert own == {name: p.default for name, p in core.parameters.items()}
    changed = OGDPlugin(3, target="ave", max_bytes=7, include=["a"], exclude=["b"], apply_to="update", seed=9)
    for name, value in (("n_gradients", 3), ("target", "ave"), ("max_bytes", 7), ("include", ["a"]), ("seed", 9)):
        assert getattr(changed.method, name) == value
    assert (changed.method.exclude, changed.method.apply_to) == (["b"], "update")
