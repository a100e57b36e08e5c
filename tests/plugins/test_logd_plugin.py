"""LOGD inside Avalanche: streams of every kind, bad input."""

from __future__ import annotations

import inspect

import pytest
import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets, class_incremental_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule, avalanche_forward
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import ConfigurationError, DataError, NonFiniteError
from avalanche_gradproj.methods.logd import logd_update
from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition
from avalanche_gradproj.plugins.logd import LOGDPlugin
from avalanche_gradproj.testing import MethodCase, leftovers, strategy, stream

CASE = MethodCase("logd", lambda: LOGDPlugin(24))
HEADS = MethodCase("logd", lambda: LOGDPlugin(24), task_incremental=True)


class Watch(Naive.PLUGIN_CLASS):
    """Checks a method's update at every step against one written out from the memory's own losses."""

    def __init__(self, plugin, **kwargs):
        super().__init__()
        self.plugin, self.kwargs, self.steps, self.moved = plugin, kwargs, 0, 0.0

    def after_backward(self, strategy, *args, **kwargs):
        """Comes before the plugin in the list of plugins."""
        self.given = {n: p.grad.clone() for n, p in strategy.model.named_parameters() if p.grad is not None}

    def before_update(self, strategy, *args, **kwargs):
        model, memory = strategy.model, self.plugin.method.memory
        named = dict(model.named_parameters())
        if not len(memory):
            assert all(torch.equal(named[name].grad, value) for name, value in self.given.items())
            return
        statistics = {n: b.clone() for n, b in model.named_buffers()}
        old = []
        for k in range(len(memory)):
            x, y, t = memory[k]
            loss = strategy._criterion(avalanche_forward(model, x, t), y)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            old.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)])
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
        for index, (name, parameter) in enumerate(named.items()):
            if name not in self.given:
                assert parameter.grad is None
                continue
            g_k = torch.stack([row[index].flatten() for row in old])
            update = logd_update(self.given[name].flatten(), g_k, **self.kwargs).view_as(parameter)
            size = self.given[name].norm() + g_k.norm()
            assert (parameter.grad - update).norm() < 1e-3 * size + 1e-7, name
            self.moved += float((update - self.given[name]).norm())
        self.steps += 1


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("case", [CASE, HEADS], ids=["domain-incremental", "task-incremental"])
def test_every_step_is_the_update(case, variant):
    """With one tensor a block: mini-batch gradients go in, those of the decomposition come out, old heads rest."""
    plugin = LOGDPlugin(24, variant=variant, blocks=1, n_components=1)
    watch = Watch(plugin, variant=variant, n_components=1)
    benchmark = stream(task_labels=case.task_incremental)
    learner = strategy(case, [watch, plugin], train_epochs=1)
    for experience in benchmark.train_stream:
        learner.train(experience)
    assert watch.steps == 2 * 48 / 8
    assert watch.moved > 0.1
    assert not leftovers(learner.model, learner)
    assert (plugin.method.memory[1][2] == (1 if case.task_incremental else 0)).all()


def test_the_first_experience_is_naive_bit_for_bit():
    benchmark = stream()
    learner, plain = strategy(CASE, [LOGDPlugin(24)]), strategy(CASE, [])
    for one in (learner, plain):
        torch.manual_seed(1)
        one.train(benchmark.train_stream[0])
    theirs = plain.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in learner.model.state_dict().items())
    for one in (learner, plain):
        torch.manual_seed(1)
        one.train(benchmark.train_stream[1])
    assert not torch.equal(learner.model.hidden.weight, plain.model.hidden.weight)


def class_incremental():
    torch.manual_seed(0)
    centres = 3 * torch.randn(6, 12)
    targets = torch.arange(240) % 6
    data = ClassificationDataset(
        [TensorDataset(centres[targets] + torch.randn(240, 12), targets)],
        data_attributes=[DataAttribute(targets.tolist(), "targets")],
    )
    order = list(range(6))
    return class_incremental_benchmark({"train": data, "test": data}, class_order=order, num_experiences=3)


def learn_classes(plugins):
    torch.manual_seed(0)
    benchmark = class_incremental()
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), IncrementalClassifier(16, 2))
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_mb_size=10,
        train_epochs=3,
        eval_mb_size=60,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
    )
    for experience in benchmark.train_stream:
        learner.train(experience)
    data = benchmark.train_stream[0].dataset
    x, y = torch.stack([row[0] for row in data]), torch.tensor([row[1] for row in data])
    model.eval()
    return nn.functional.cross_entropy(model(x), y).item(), model


def test_class_incremental_with_a_growing_head():
    """The head grows before training, so that the memory sees it whole; the first classes are forgotten less."""
    plugin = LOGDPlugin(20)
    held, model = learn_classes([plugin])
    free, _ = learn_classes([])
    assert held < 0.7 * free
    assert model[2].classifier.out_features == 6
    report = plugin.report()
    assert report["2.classifier.weight"].layer == "2.classifier"
    assert "one pass over all of them" in str(report)


def test_multi_head_models_take_one_pass_each_or_one():
    plugin = LOGDPlugin(24)
    learner = strategy(HEADS, [plugin])
    for experience in list(stream(task_labels=True).train_stream)[:2]:
        learner.train(experience)
    assert "one pass each (BatchNorm in training mode)" in str(plugin.report())
    assert plugin.report()["head.classifiers.1.classifier.weight"].treatment == "decomposed"


def test_blocks_that_do_not_fit():
    with pytest.raises(ConfigurationError, match="blocks=12: the model has 9"):
        strategy(CASE, [LOGDPlugin(10, blocks=12)]).train(stream().train_stream[0])


class TwoHeads(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.head = MultiHeadClassifier(12, 4)

    def forward(self, x, task_labels):
        return self.head(x, task_labels)


def test_a_model_that_needs_task_labels_and_gets_none():
    data = AvalancheDataset(
        [TensorDataset(torch.randn(20, 12), torch.zeros(20, dtype=torch.long))],
        data_attributes=[DataAttribute([0] * 20, "targets")],
    )
    model = nn.Linear(12, 4)
    experience = benchmark_from_datasets(train=[data]).train_stream[0]
    experience.classes_in_this_experience = [0]
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[LOGDPlugin(10)],
        evaluator=EvaluationPlugin(),
    )
    learner.train(experience)  # without heads, labels are not needed
    learner.model = TwoHeads()
    with pytest.raises(DataError, match="the forward of TwoHeads needs task labels and experience 0 has none"):
        learner.train(experience)


def test_divergence_is_named():
    learner = strategy(CASE, [LOGDPlugin(10)])
    benchmark = stream()
    learner.train(benchmark.train_stream[0])
    with torch.no_grad():
        learner.model.out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="block"):
        learner.train(benchmark.train_stream[1])


def test_the_plugin_has_the_arguments_of_the_core():
    core = inspect.signature(LayerwiseGradientDecomposition.__init__).parameters
    plugin = inspect.signature(LOGDPlugin.__init__).parameters
    assert set(core) - set(plugin) == {"criterion", "forward"}
    assert all(core[name].default == parameter.default for name, parameter in plugin.items())
