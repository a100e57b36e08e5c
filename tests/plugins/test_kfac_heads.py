"""K-FAC Laplace and heads: of tasks, shared ones that grow, streams in pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from torch import nn

from avalanche_gradproj import KFACLaplacePlugin
from avalanche_gradproj.testing import strategy, stream
from tests.plugins.kfac_setup import HEADS, class_incremental, incremental, learning


class TaskHeads(MultiTaskModule):
    """One hidden layer, a head a task."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(12, 16), MultiHeadClassifier(16, 4, masking=False)

    def forward(self, x, task_labels):
        return self.head(torch.relu(self.hidden(x)), task_labels)


@pytest.mark.parametrize("heads", [False, True], ids=["domain-incremental", "task-incremental"])
def test_old_predictions_move_less(heads):
    drifts = []
    for strength in (0.0, 5.0):
        benchmark = stream(task_labels=heads)
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        model = TaskHeads() if heads else plain
        learner = learning(model, [KFACLaplacePlugin(strength)], train_epochs=30)
        learner.train(benchmark.train_stream[0])
        learner.model.eval()
        x = torch.stack([benchmark.train_stream[0].dataset[i][0] for i in range(48)])
        labels = [torch.zeros(48, dtype=torch.long)] if heads else []
        with torch.no_grad():
            before = learner.model(x, *labels).softmax(1)
        learner.train(benchmark.train_stream[1])
        learner.model.eval()
        with torch.no_grad():
            after = learner.model(x, *labels)
        drifts.append(F.kl_div(after.log_softmax(1), before, reduction="batchmean").item())
    assert drifts[1] < 0.5 * drifts[0]


def test_task_heads_are_left_alone_and_the_report_says_why():
    benchmark, plugin = stream(task_labels=True), KFACLaplacePlugin()
    learner = strategy(HEADS, [plugin])
    for experience in benchmark.train_stream:
        learner.train(experience)
    row = plugin.report()["head.classifiers.0.classifier.weight"]
    assert (row.treatment, row.reason) == ("left alone", "task head: data of other tasks gives it no gradient")
    assert plugin.report()["body.scale"].reason == "diagonal"
    assert plugin.report()["body.norm.bias"].treatment == "penalised"
    assert len(plugin.method.bytes_by_experience) == 3


def test_heads_that_are_included_hold_still_once_their_task_is_over():
    benchmark = stream(task_labels=True)
    plugin = KFACLaplacePlugin(include=["body.conv", "body.hidden", "head.*"], mode="online")
    learner = strategy(HEADS, [plugin])
    learner.train(benchmark.train_stream[0])
    before = learner.model.head.classifiers["0"].classifier.weight.detach().clone()
    learner.train(benchmark.train_stream[1])
    assert "Kronecker" in plugin.report()["head.classifiers.0.classifier.weight"].reason
    assert torch.equal(before, learner.model.head.classifiers["0"].classifier.weight)


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_a_shared_head_that_grows_is_penalised(mode):
    plugin, free = KFACLaplacePlugin(1.0, mode=mode, damping=1.0), KFACLaplacePlugin(0.0)
    moved = []
    for own in (plugin, free):
        torch.manual_seed(1)
        learner = incremental([own])
        experiences = class_incremental()
        learner.train(experiences[0])
        old = learner.model[2].classifier.weight.detach().clone()
        for experience in experiences[1:]:
            learner.train(experience)
        now = learner.model[2].classifier.weight.detach()
        assert now.shape == (6, 16)
        moved.append((now[:2] - old).norm().item())
    assert moved[0] < 0.7 * moved[1]
    assert plugin.report()["2.classifier.weight"].treatment == "penalised"


def test_online_pieces_are_consolidated_once_an_experience():
    plugin = KFACLaplacePlugin()
    learner = incremental([plugin])
    pieces = split_online_stream(class_incremental(), experience_size=10, access_task_boundaries=True)
    for piece in pieces:
        learner.train(piece)
    assert plugin.method.experiences == 3
    assert [form.weight for form in plugin.method._memory.forms] == [40.0, 40.0, 40.0]
