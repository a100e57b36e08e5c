"""A small network with two BatchNorms, and a look at its pairs that checks that nothing comes of it."""

import pickle
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.layers.norm import batch_norms
from avalanche_gradproj.layers.pairs import find_pairs
from avalanche_gradproj.layers.select import cover


def snapshot(model):
    """Everything that a look at the model could leave behind."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    modules = [(m.training, *(len(getattr(m, kind)) for kind in kinds), "forward" in vars(m)) for m in model.modules()]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [(p.requires_grad, p.grad) for p in model.parameters()]
    drawn = pickle.dumps((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))  # noqa: NPY002
    return modules, gradients, drawn, tensors


def check_untouched(model, before):
    after = snapshot(model)
    assert after[:3] == before[:3]
    assert after[3].keys() == before[3].keys()
    assert all(torch.equal(value, before[3][name]) for name, value in after[3].items())


def look(model, *inputs, given=None):
    """What is found in a model in training mode; nothing else comes of it."""
    model.train()
    before = snapshot(model)
    units, norms = cover(model).units, batch_norms(model)
    try:
        return find_pairs(model, units, norms, lambda: model(*inputs), given)
    finally:
        check_untouched(model, before)


class Net(nn.Module):
    """`first` and `second` feed the BatchNorms `norm` and `other` as `how` says; a head of five outputs."""

    def __init__(self, how, **modules):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 6, bias=False)
        self.norm, self.other = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)
        for name, module in modules.items():
            setattr(self, name, module)
        self.how = how

    def forward(self, *inputs):
        return self.how(self, *inputs)


def chain(m, x):
    return m.head(torch.tanh(m.other(m.second(F.relu(m.norm(m.first(x)))))))


BOTH = {"norm": "first", "other": "second"}


NOT_A_LAYER, ELSEWHERE = "not the output of a covered", "changes the network's output"


ALTERED = "what enters it is not what layer"


X = torch.linspace(-2, 2, 21, dtype=torch.float64).reshape(7, 3).sin() * 2


def skip(m, x):
    h = m.first(x)
    return m.head(F.relu(m.norm(h)) + h)
