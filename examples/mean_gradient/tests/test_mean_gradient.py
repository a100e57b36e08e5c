"""Mean-gradient projection passes the conformance kit, and its steps are those of a dense least-squares solution."""

import pytest
import torch
from mean_gradient import MeanGradient, mean_gradient

from avalanche_gradproj.errors import NonFiniteError, StateError
from avalanche_gradproj.testing import MethodCase, conformance

test_mean_gradient = conformance(
    MethodCase(
        "mean-gradient",
        make=mean_gradient,
        neutral=lambda: mean_gradient(directions=0),
        bad_arguments=[
            (lambda: mean_gradient(directions=-1), "directions=-1"),
            (lambda: mean_gradient(directions=2.5), "directions=2.5"),
            (lambda: mean_gradient(directions="all"), "directions='all'"),
        ],
    ),
    MethodCase(
        "mean-gradient-heads",
        make=mean_gradient,
        neutral=lambda: mean_gradient(directions=0),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        task_incremental=True,
    ),
)

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "decay": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
}


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def mean_gradient_of(model, x, y):
    """The mean over samples of the gradient of -log softmax, one sample after the other."""
    total = 0
    for sample, label in zip(x, y, strict=True):
        logits = model(sample[None])[0]
        loss = logits.exp().sum().log() - logits[label]
        total = total + flat(torch.autograd.grad(loss, list(model.parameters())))
    return total / len(x)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_moves_orthogonally_to_all_mean_gradients(name):
    """Against gradients that are kept as they came, and removed by least squares, in float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    optimizer, method, kept = OPTIMIZERS[name](model.parameters()), MeanGradient(directions=3), []
    for experience in range(4):
        x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
        before = flat(model.parameters())
        with method.experience(model, optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                plain = flat(weight.grad for weight in model.parameters())
                method.transform()
                if name == "sgd" and kept:
                    G = torch.stack(kept, dim=1)
                    expected = plain - G @ torch.linalg.lstsq(G, plain).solution
                    found = flat(weight.grad for weight in model.parameters())
                    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
                optimizer.step()
                method.after_step()
                moved = flat(model.parameters()) - before
                assert moved.norm() > 1e-3
                for gradient in kept:
                    assert abs(gradient @ moved) < 1e-12 * gradient.norm() * moved.norm()
        if experience < 3:  # the memory holds no more
            kept.append(mean_gradient_of(model, x, y))
        method.consolidate(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert method.state_dict()["memory"]["vectors"].shape == (3, len(kept[0]))
    assert method.bytes_held >= 8 * 3 * len(kept[0])


def test_what_does_not_fit_is_named():
    model, method = torch.nn.Linear(5, 3), MeanGradient(directions=2)
    x, y = torch.randn(7, 5), torch.randint(3, (7,))
    with method.experience(model):
        pass
    with pytest.raises(NonFiniteError, match="'weight'"):
        method.consolidate(model, [(x / 0, y)])
    method.consolidate(model, [(x, y)])
    with pytest.raises(StateError, match="'weight'"):
        method.start(torch.nn.Linear(4, 3))
