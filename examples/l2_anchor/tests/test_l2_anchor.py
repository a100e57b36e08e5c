"""L2 anchor passes the conformance kit, and its penalty is the sum that it stands for."""

import torch
from l2_anchor import L2Anchor, l2_anchor

from avalanche_gradproj.testing import MethodCase, conformance

test_l2_anchor = conformance(
    MethodCase(
        "l2-anchor",
        make=lambda: l2_anchor(strength=0.1),
        neutral=lambda: l2_anchor(strength=0.0),
        bad_arguments=[
            (lambda: l2_anchor(strength=-1.0), "strength=-1.0"),
            (lambda: l2_anchor(strength=float("nan")), "strength=nan"),
            (lambda: l2_anchor(strength="strong"), "strength='strong'"),
        ],
    ),
    MethodCase(
        "l2-anchor-heads",
        make=lambda: l2_anchor(strength=0.1),
        neutral=lambda: l2_anchor(strength=0.0),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        task_incremental=True,
    ),
)


def test_gradient_is_that_of_the_sum_over_experiences():
    """Against a reference that keeps every solution, in float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    method, solutions = L2Anchor(strength=0.3), []
    for _ in range(3):
        for weight in model.parameters():
            torch.nn.init.normal_(weight)
        method.start(model)
        method.finish()
        method.consolidate(model, [])
        solutions.append([weight.detach().clone() for weight in model.parameters()])
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    method.start(model)
    found = torch.autograd.grad(method.penalty(), list(model.parameters()))
    reference = sum(
        0.3 / 2 * (weight - old).square().sum()
        for solution in solutions
        for weight, old in zip(model.parameters(), solution, strict=True)
    )
    expected = torch.autograd.grad(reference, list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
