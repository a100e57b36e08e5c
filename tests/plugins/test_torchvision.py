"""Unmodified torchvision networks train three experiences, every parameter accounted for."""

from __future__ import annotations

import pytest
import torch
import torchvision
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_gradproj import HALRP, GPMPlugin
from avalanche_gradproj.testing import leftovers
from tests.plugins.images import image_stream


def resnet18():
    return torchvision.models.resnet18(num_classes=4)


def transformer():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=4
    )


def matrices(model, name):
    """Number of inputs (with the bias) of every covered layer, counted by hand."""
    if name == "resnet18":
        return {
            n: m.weight[0].numel() + (m.bias is not None)
            for n, m in model.named_modules()
            if hasattr(m, "stride") and isinstance(m, nn.Conv2d)
        } | {"fc": 513}
    expected = {"conv_proj": 3 * 64 + 1, "heads.head": 25}
    for i in range(2):
        block = f"encoder.layers.encoder_layer_{i}"
        expected |= {f"{block}.self_attention.{p}_proj": 25 for p in ("q", "k", "v", "out")}
        expected |= {f"{block}.mlp.0": 25, f"{block}.mlp.3": 49}
    return expected


@pytest.mark.parametrize("make", [resnet18, transformer], ids=["resnet18", "vision transformer"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_three_experiences(make, optimizer):
    torch.manual_seed(0)
    model = make()
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    }
    plugin = GPMPlugin(threshold=0.9, n_samples=8)
    learner = Naive(
        model=model,
        optimizer=kinds[optimizer](model.parameters()),
        train_mb_size=8,
        train_epochs=2,
        plugins=[plugin],
        evaluator=EvaluationPlugin(),
    )
    previous = {}
    for experience in image_stream().train_stream:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        learner.train(experience)
        assert not leftovers(model, learner)
        assert all(value <= 1e-4 for value in plugin.method.leak.values())
        for row in plugin.report():
            moved = not torch.equal(before[row.parameter], model.get_parameter(row.parameter))
            assert moved != (row.treatment == "frozen" and bool(previous)), row
        previous = plugin.bases
    name = "resnet18" if make is resnet18 else "vit"
    assert {layer: blocks[0].shape[0] for layer, blocks in plugin.bases.items()} == matrices(model, name)
    assert all(block.shape[1] > 0 for blocks in plugin.bases.values() for block in blocks)
    report = plugin.report()
    assert {row.parameter for row in report} == set(before)
    frozen = {row.parameter for row in report if row.treatment == "frozen"}
    plain = {"class_token", "encoder.pos_embedding"} if name == "vit" else set()
    norms = {n for n in before if "bn" in n or "downsample.1" in n or "ln" in n}
    assert frozen == plain | norms


@pytest.mark.parametrize("make", [resnet18, transformer], ids=["resnet18", "vision transformer"])
def test_a_perturbation_of_each_layer(make):
    torch.manual_seed(0)
    model = make()
    attention = ["encoder.layers.*.self_attention"] if make is transformer else None
    settings = {"train_mb_size": 8, "exclude": attention, "max_growth": 2.0, "evaluator": EvaluationPlugin()}
    learner = HALRP(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), **settings)
    x, outputs = torch.randn(4, 3, 32, 32), []
    for experience in image_stream(tasks=True).train_stream:
        learner.train(experience)
        learner.model.eval()
        with torch.no_grad():  # else attention takes another kernel once its weights are frozen
            now = [learner.model(x, task) for task in learner.plugin.method.tasks]
        assert all(torch.equal(before, after) for before, after in zip(outputs, now, strict=False))
        outputs = now
    assert len(outputs) == 3
    perturbed = set(learner.plugin.method.ledger.records[2].ranks)
    name = "resnet18" if make is resnet18 else "vit"
    expected = {layer for layer in matrices(make(), name) if "self_attention" not in layer} - {"fc", "heads.head"}
    assert perturbed == expected
