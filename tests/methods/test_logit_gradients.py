"""Gradients of logits against a loop of `autograd.grad` per sample and class, in float64."""

from __future__ import annotations

import pytest
import torch
from avalanche.models import MultiHeadClassifier, MultiTaskModule, avalanche_forward
from torch import nn

from avalanche_gradproj.errors import DataError, ModelError, NonFiniteError
from avalanche_gradproj.methods.logit_gradients import Route, logit_gradients


class Convolutional(nn.Module):
    """Grouped convolution, BatchNorm with running statistics, dropout, attention, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.hidden = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        y = self.drop(torch.relu_(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y)[0]
        y = self.hidden(torch.tanh(self.hidden(y.mean(1))))  # used twice
        return self.last(y)


class Branching(nn.Module):
    """Looks at values: vmap cannot run it."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return torch.stack([self.layer(row) if float(row.sum()) > 0 else self.other(row) for row in x])


class MultiHead(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.head = MultiHeadClassifier(6, 3, masking=False)
        for label in range(1, 3):
            self.head.classifiers[str(label)] = nn.Sequential(nn.Linear(6, 3))
        self.head.max_class_label = 3

    def forward(self, x, task_labels):
        return self.head(torch.tanh(self.body(x)), task_labels)


def settled(model, x):
    """In float64, with running statistics that are not those of a batch of one."""
    model.double().train()
    for _ in range(3):
        model(x)
    return model


def reference(model, names, batch, target, forward):
    """One backward pass a row, nothing batched."""
    parameters = dict(model.named_parameters())
    model.eval()
    rows = []
    for i in range(len(batch[0])):
        logits = forward(model, [part[i : i + 1] for part in batch])[0]
        label = int(batch[1][i])
        values = {"gtl": lambda z, y=label: [z[y]], "ave": lambda z: [z.mean()], "all": list}[target](logits)
        for value in values:
            chosen = [parameters[name] for name in names]
            gradients = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
                        for parameter, gradient in zip(chosen, gradients, strict=True)
                    ]
                )
            )
    model.train()
    return torch.stack(rows)


def plain(model, batch):
    return model(batch[0])


def multi(model, batch):
    return avalanche_forward(model, batch[0], batch[-1])


def case(name):
    torch.manual_seed(0)
    images, vectors, y = torch.randn(7, 2, 4, 4).double(), torch.randn(7, 5).double(), torch.randint(3, (7,))
    one_task, mixed = torch.full((7,), 2), torch.tensor([0, 1, 2, 0, 0, 1, 2])
    return {
        "linear": lambda: (
            nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double(),
            (vectors, y),
            None,
            True,
        ),
        "convolutional": lambda: (settled(Convolutional(), images), (images, y), None, True),
        "branching": lambda: (Branching().double(), (vectors, y), None, False),
        "one head": lambda: (MultiHead().double(), (vectors, y, one_task), multi, None),
        "mixed heads": lambda: (MultiHead().double(), (vectors, y, mixed), multi, False),
    }[name]()


@pytest.mark.parametrize("target", ["gtl", "all", "ave"])
@pytest.mark.parametrize("name", ["linear", "convolutional", "branching", "one head", "mixed heads"])
def test_against_one_backward_pass_a_row(name, target):
    torch.set_default_dtype(torch.float64)  # the multi-head model of Avalanche makes tensors of the default type
    try:
        model, batch, forward, batched = case(name)
        names = [n for n, _ in model.named_parameters()][::-1]
        expected = reference(model, names, batch, target, forward or plain)
        for chunk_bytes in (1, 3 * 8 * expected.shape[1], 2**26):
            route = Route()
            chunks = list(
                logit_gradients(
                    model, names, batch, target=target, forward=forward, chunk_bytes=chunk_bytes, route=route
                )
            )
            assert max(len(chunk) for chunk in chunks) == min(
                max(1, chunk_bytes // (8 * expected.shape[1])), len(expected)
            )
            found = torch.cat(chunks)
            assert torch.allclose(found, expected, atol=1e-12, rtol=1e-10)
            assert not found.requires_grad
            assert batched is None or route.batched == batched
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(expected.norm()) > 0.1


def test_a_subset_of_the_parameters_in_the_order_asked_for():
    model, batch, _, _ = case("linear")
    names = ["2.bias", "0.weight"]
    (found,) = logit_gradients(model, names, batch)
    assert found.shape == (7, 3 + 30)
    assert torch.equal(found[:, :3], torch.eye(3, dtype=torch.float64)[batch[1]])
    assert torch.allclose(found, reference(model, names, batch, "gtl", plain))


def test_half_precision_is_widened_and_frozen_parameters_may_be_asked_for():
    model, (x, y), _, _ = case("linear")
    names = [name for name, _ in model.named_parameters()]
    expected = reference(model, names, (x, y), "gtl", plain)
    model.requires_grad_(False)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        (found,) = logit_gradients(model.to(dtype), names, (x.to(dtype), y))
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, atol=tolerance)


@pytest.mark.parametrize("name", ["convolutional", "branching"])
def test_nothing_is_disturbed_also_when_the_caller_stops(name):
    model, batch, forward, _ = case(name)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random, fused = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    chunks = logit_gradients(model, [n for n, _ in model.named_parameters()], batch, chunk_bytes=1, forward=forward)
    next(chunks)
    assert all(module.training for module in model.modules())
    chunks.close()
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_bad_batches_and_outputs():
    model, (x, y), _, _ = case("linear")
    names = ["0.weight"]
    for batch, message in (
        (x, "is a Tensor, expected a tuple"),
        ((x,), "expected a tuple"),
        ((x, y.tolist()), "expected a tuple"),
        ((x, y[:3]), r"targets \(3,\)"),
        ((x, y.double()), "torch.float64"),
        ((x, y + 1), "labels from 1 to 3 came and the model has 3 logits"),
        ((x, y - 1), "labels from -1 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            list(logit_gradients(model, names, batch))
    list(logit_gradients(model, names, (x, y + 1), target="ave"))  # which needs no labels
    for forward, came in ((lambda m, b: m(b[0]).sum(1), r"\(7,\)"), (lambda m, b: [m(b[0])], "list")):
        with pytest.raises(ModelError, match=came):
            list(logit_gradients(model, names, (x, y), forward=forward))


def test_what_is_not_finite_is_named():
    model, (x, y), _, _ = case("linear")
    with pytest.raises(NonFiniteError, match="a logit is an infinity or a NaN"):
        list(logit_gradients(model, ["0.weight"], (x / 0, y)))

    class Root(nn.Module):
        """Finite at zero, its derivative is not."""

        def __init__(self):
            super().__init__()
            self.fine, self.bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x[:, :3] * self.fine + self.bad.sqrt()

    with pytest.raises(NonFiniteError, match="at parameter 'bad'"):
        list(logit_gradients(Root(), ["fine", "bad"], (x, y)))


def test_an_error_of_the_model_comes_through():
    model, (x, y), _, _ = case("linear")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(logit_gradients(model, ["0.weight"], (x[:, :3], y)))
