"""Networks: parameter counts worked out by hand, heads, and what a head sees."""

from __future__ import annotations

import pytest
import torch
from avalanche.models import MultiHeadClassifier
from torch import nn

from benchmarks.heads import MASKED, TaskHeads
from benchmarks.models import build_model
from benchmarks.settings import InputError
from benchmarks.streams import Stream


def stream_of(shape, n_outputs, n_heads):
    return Stream(None, (), (), (), shape, n_outputs, n_heads)


MLP = 784 * 100 + 100 * 100 + 100 * 10
ALEXNET = (
    64 * 3 * 16 + 128 * 64 * 9 + 256 * 128 * 4  # convolutions: kernels 4, 3, 2
    + 2048 * 1024 + 2048 * 2048  # 256 channels of 2 x 2 pixels come in
    + 2 * (64 + 128 + 256 + 2048 + 2048)  # BatchNorm: scale and shift
    + 10 * 10 * 2048
)  # fmt: skip
LENET = 20 * 3 * 25 + 50 * 20 * 25 + 800 * 50 * 64 + 500 * 800 + 20 * 5 * 500


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "heads", "count"),
    [
        ("mlp", (1, 28, 28), 10, 0, MLP),
        ("alexnet", (3, 32, 32), 10, 10, ALEXNET),
        ("lenet", (3, 32, 32), 5, 20, LENET),
        ("mlp", (1, 8, 8), 2, 5, 64 * 100 + 100 * 100 + 5 * 2 * 100),
    ],
)
def test_parameter_counts(name, shape, outputs, heads, count):
    assert (MLP, ALEXNET, LENET) == (89_400, 6_713_216, 3_036_500)
    model = build_model(name, stream_of(shape, outputs, heads), 100)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert not [key for key, _ in model.named_parameters() if "bias" in key and name != "alexnet"]
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.bias is None
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.affine
            assert not module.track_running_stats
    x = torch.randn(4, *shape)
    logits = model(x, torch.tensor([0, 1, 1, 0])) if heads else model(x)
    assert logits.shape == (4, outputs)


def test_perceptrons_with_biases():
    """784-100-100-10: Xavier-uniform weights and biases of zero, or PyTorch's own."""
    torch.manual_seed(0)
    plain, xavier = (build_model(name, stream_of((1, 28, 28), 10, 0), 100) for name in ("mlp-bias", "mlp-xavier"))
    for model in (plain, xavier):
        assert sum(parameter.numel() for parameter in model.parameters()) == MLP + 100 + 100 + 10
        assert model(torch.randn(4, 1, 28, 28)).shape == (4, 10)
    for layer in (module for module in xavier if isinstance(module, nn.Linear)):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert not layer.bias.any()
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert plain[1].bias.abs().max() > 0


def test_perceptron_with_batch_norm():
    """The perceptron with biases, and a BatchNorm with running statistics between each hidden layer and its ReLU."""
    model = build_model("mlp-bn", stream_of((1, 28, 28), 10, 0), 100)
    kinds = [nn.Flatten, *[nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2, nn.Linear]
    assert [type(module) for module in model] == kinds
    assert sum(parameter.numel() for parameter in model.parameters()) == MLP + 100 + 100 + 10 + 4 * 100
    assert all(norm.track_running_stats and norm.affine for norm in (model[2], model[5]))
    assert model(torch.randn(4, 1, 28, 28)).shape == (4, 10)


def test_lenet_with_batch_norm():
    """HALRP's: 5 x 5 convolutions to 20 and 50 channels, 3200-800-500, biases, BatchNorm before each ReLU.

    With one head of ten units 2,995,620 numbers, counted in the official code and by hand.
    """
    shared, heads = (build_model("lenet-bn", stream_of((3, 32, 32), 10, count), None) for count in (0, 3))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (shared, heads)]
    assert counts == [2_995_620, 2_995_620 + 2 * (10 * 500 + 10)]
    block = [nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    kinds = [nn.Conv2d, *block, nn.Conv2d, *block, nn.Flatten, *[nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2]
    assert [type(module) for module in heads.trunk] == kinds
    assert [type(module) for module in shared] == [*kinds, nn.Linear]
    for module in heads.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.affine
            assert module.track_running_stats
    x = torch.randn(4, 3, 32, 32)
    assert shared(x).shape == (4, 10)
    heads.eval()
    logits, features = heads(x, torch.tensor([2, 0, 1, 2])), heads.trunk(x)
    for row, task in enumerate([2, 0, 1, 2]):
        layer = heads.heads.classifiers[str(task)].classifier
        torch.testing.assert_close(logits[row], layer.weight @ features[row] + layer.bias)
        assert layer.bias.any()


def masked_resnet():
    classes = tuple(tuple(range(first, first + 5)) for first in range(0, 100, 5))
    return build_model("slim-resnet18", Stream(None, (), (), (), (3, 32, 32), 100, 20, classes), None)


def test_masked_outputs_have_the_loss_of_their_own_task():
    """As the code of the GEM family: cross-entropy over the classes of the task alone, and nothing moves the others."""
    torch.manual_seed(0)
    model = masked_resnet().eval()
    # convolutions and norms of ResNet-18 with 20, 40, 80, 160 filters, and the output layer: counted by hand
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_109_240
    x, task = torch.randn(6, 3, 32, 32), 7
    targets = torch.tensor([35, 36, 37, 38, 39, 35])
    raw = model.network(x)
    expected = nn.functional.cross_entropy(raw[:, 35:40], targets - 35)
    for labels in (task, torch.full((6,), task)):
        logits = model(x, labels)
        torch.testing.assert_close(nn.functional.cross_entropy(logits, targets), expected)
        assert set(logits.argmax(1).tolist()) <= set(range(35, 40))
    found = torch.autograd.grad(nn.functional.cross_entropy(model(x, task), targets), model.network.linear.weight)[0]
    wanted = torch.autograd.grad(expected, model.network.linear.weight)[0]
    torch.testing.assert_close(found, wanted)
    assert not found[:35].any()
    assert not found[40:].any()
    torch.testing.assert_close(model.forward_single_task(x, task), model(x, task))


def test_masked_outputs_of_a_mixed_batch():
    model = masked_resnet().eval()
    x, tasks = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 19])
    mixed, every = model(x, tasks), model(x)
    for row, task in enumerate(tasks.tolist()):
        torch.testing.assert_close(mixed[row], every[task][row])
        assert (mixed[row] > MASKED).nonzero()[:, 0].tolist() == list(range(5 * task, 5 * task + 5))


def test_networks_for_colour_images_refuse_others():
    with pytest.raises(InputError, match="takes images of"):
        build_model("slim-resnet18", stream_of((1, 28, 28), 10, 0), None)


def test_each_sample_gets_its_own_tasks_head():
    model = build_model("mlp", stream_of((1, 4, 4), 3, 3), 6).eval()
    x = torch.randn(5, 1, 4, 4)
    tasks = torch.tensor([2, 0, 0, 1, 2])
    features = model.trunk(x)
    wanted = torch.stack(
        [model.heads.classifiers[str(int(t))].classifier.weight @ f for t, f in zip(tasks, features, strict=True)]
    )
    torch.testing.assert_close(model(x, tasks), wanted)
    torch.testing.assert_close(model(x, 1), features @ model.heads.classifiers["1"].classifier.weight.T)


def test_heads_are_avalanches_and_refuse_what_they_cannot_hold():
    heads = TaskHeads(6, 2, 3)
    assert isinstance(heads, MultiHeadClassifier)
    assert list(heads.classifiers) == ["0", "1", "2"]

    class Experience:
        task_labels = (1,)
        classes_in_this_experience = frozenset({0, 1})

    heads.adaptation(Experience)
    assert all(head.classifier.bias is None for head in heads.classifiers.values())
    Experience.classes_in_this_experience = frozenset({0, 2})
    with pytest.raises(ValueError, match="3 heads of 2 units"):
        heads.adaptation(Experience)
    Experience.classes_in_this_experience, Experience.task_labels = frozenset({0}), (3,)
    with pytest.raises(ValueError, match="tasks \\[3\\]"):
        heads.adaptation(Experience)


def test_lenet_weights_are_kaiming_uniform():
    torch.manual_seed(0)
    model = build_model("lenet", stream_of((3, 32, 32), 5, 2), None)
    weight = model.trunk[9].weight  # 3200 -> 800
    bound = (6 / 3200) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.999 * bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
