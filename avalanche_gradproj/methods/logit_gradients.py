"""Gradients of a network's logits, one a sample, over a set of parameters: what OGD remembers (arXiv 1910.07104).

Of sample i with outputs f(x_i) [classes], the gradient of `w . f(x_i)` is taken, where w picks the logit of the true
class (`"gtl"`), each logit in turn (`"all"`), or their mean (`"ave"`): gradients of the function, not of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from avalanche_gradproj.errors import DataError, ModelError, NonFiniteError
from avalanche_gradproj.layers.record import undisturbed
from avalanche_gradproj.methods.base import Forward

TARGETS = ("gtl", "all", "ave")

#: Bytes of the gradients that are computed at once at most (but for a single one).
CHUNK_BYTES = 64 * 2**20


@dataclass
class Route:
    """How gradients were computed: `batched` turns False when the model could not be run under vmap."""

    batched: bool = True


class _Forward(nn.Module):
    """A model and the function that runs it as one module, so that its parameters can be replaced in a call."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self.run = forward

    def forward(self, batch: Sequence[Any]) -> Any:
        return self.model(batch[0]) if self.run is None else self.run(self.model, batch)


def logit_gradients(
    model: nn.Module,
    names: Sequence[str],
    batch: Any,
    *,
    target: str = "gtl",
    forward: Forward | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    route: Route | None = None,
) -> Iterator[Tensor]:
    """Yield the gradients of a mini-batch's logits, in chunks, ordered by sample and then by class.

    The model runs in evaluation mode (BatchNorm with its running statistics, no dropout); modes, statistics, gradients
    and random states are left as they were, whenever the caller stops.

    All samples of a chunk are differentiated at once by `torch.func`, every one in a forward pass of its own (of
    `"all"`, every one of its logits). A model that cannot be run so (data-dependent control flow, or writing into
    tensors that it makes, as the multi-head models of Avalanche do) is run sample by sample instead: the same
    gradients, slower.

    Args:
        model: the model.
        names: parameters over which gradients are taken, concatenated in this order.
        batch: a tuple `(x, y, ...)`: inputs [n, ...], targets [n], and whatever `forward` needs besides; tensors with
            n leading entries are cut into samples.
        target: one of `TARGETS`.
        forward: `forward(model, batch)` gives logits [n, classes]; default `model(batch[0])`.
        chunk_bytes: bytes of a chunk of gradients at most; a single gradient may be larger.
        route: remembers over several calls whether the model can be run batched.

    Yields:
        [k, p], p the numbers of all named parameters; half precision is widened to float32. n rows in all, for `"all"`
        n times the number of logits.

    Raises:
        DataError: for a batch that is no such tuple, or a label that has no logit.
        ModelError: if the outputs are not [n, classes].
        NonFiniteError: if a logit or a gradient is infinite or NaN; for a gradient, naming the parameter.
    """
    route = Route() if route is None else route
    _, y = _parts(batch)
    with _evaluation(model):
        logits = _Forward(model, forward)(batch)
    _check_logits(logits, y, target)
    samples, weights = _items(logits, y, target)
    for found in weighted_gradients(
        model, names, batch, samples, weights, forward=forward, chunk_bytes=chunk_bytes, route=route
    ):
        rows = torch.cat([_widened(part).flatten(1) for part in found], dim=1)
        if not bool(torch.isfinite(rows).all()):
            bad = next((n for n, part in zip(names, found, strict=True) if not bool(part.isfinite().all())), "")
            raise NonFiniteError(
                f"a logit's gradient holds an infinity or a NaN at parameter {bad!r}, from which no basis can be made: "
                "training has diverged (lower the learning rate) or the data holds one"
            )
        yield rows


def weighted_gradients(
    model: nn.Module,
    names: Sequence[str],
    batch: Sequence[Any],
    samples: Tensor,
    weights: Tensor,
    *,
    forward: Forward | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    route: Route | None = None,
) -> Iterator[list[Tensor]]:
    """Yield the gradients of given combinations of samples' logits, in chunks, as `logit_gradients` computes them.

    Args:
        model: the model.
        names: parameters with respect to which gradients are taken.
        batch: a tuple `(inputs, ...)`; tensors with as many entries as there are inputs are cut into samples.
        samples: [m], which sample each combination is of.
        weights: [m, classes], its weights.
        forward: `forward(model, batch)` gives logits [n, classes]; default `model(batch[0])`.
        chunk_bytes: bytes of a chunk of gradients at most; a single gradient may be larger.
        route: remembers over several calls whether the model can be run batched.

    Yields:
        One tensor [k, *shape] a parameter; m rows in all.
    """
    route = Route() if route is None else route
    wrapped, parameters = _Forward(model, forward), dict(model.named_parameters())
    chosen = {f"model.{name}": parameters[name] for name in names}
    size = sum(parameter.numel() * max(4, parameter.element_size()) for parameter in chosen.values())
    step = max(1, chunk_bytes // size)
    for begin in range(0, len(samples), step):
        own = slice(begin, begin + step)
        with _evaluation(model):
            found = _chunk(wrapped, chosen, batch, len(batch[0]), samples[own], weights[own], route)
        yield found


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    with undisturbed(model), ExitStack() as stack:
        # The fused kernels of attention have no derivative.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _parts(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not all(isinstance(p, Tensor) for p in batch[:2]):
        what = type(batch).__name__
        raise DataError(f"a mini-batch is a {what}, expected a tuple (inputs, targets, ...) of tensors")
    x, y = batch[0], batch[1]
    if y.dim() != 1 or len(x) != len(y) or y.is_floating_point():
        raise DataError(
            f"a mini-batch has inputs {tuple(x.shape)} and targets {tuple(y.shape)} of type {y.dtype}: expected "
            "[n, ...] and [n] class numbers"
        )
    return x, y


def _check_logits(logits: Any, y: Tensor, target: str) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(y):
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model's output is {came}, expected logits [{len(y)}, classes]: give such a `forward`")
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(
            "a logit is an infinity or a NaN: training has diverged (lower the learning rate) or the data holds one"
        )
    if target == "gtl" and len(y) and (int(y.min()) < 0 or int(y.max()) >= logits.shape[1]):
        raise DataError(
            f"labels from {int(y.min())} to {int(y.max())} came and the model has {logits.shape[1]} logits: labels "
            "must count from 0 within the outputs of their task"
        )


def _items(logits: Tensor, y: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """Return which sample each gradient is of [m], and the weights of its logits [m, classes]."""
    n, classes = logits.shape
    samples = torch.arange(n, device=logits.device)
    if target == "ave":
        return samples, torch.full_like(logits, 1 / classes)
    one_hot = torch.eye(classes, dtype=logits.dtype, device=logits.device)
    if target == "all":
        return samples.repeat_interleave(classes), one_hot.repeat(n, 1)
    return samples, one_hot[y.to(logits.device)]


def _chunk(
    wrapped: _Forward,
    chosen: dict[str, nn.Parameter],
    batch: Sequence[Any],
    n: int,
    samples: Tensor,
    weights: Tensor,
    route: Route,
) -> list[Tensor]:
    """Return the gradients [k, *shape] of each parameter."""
    if route.batched:
        try:
            return _batched(wrapped, chosen, batch, n, samples, weights)
        except RuntimeError:  # what vmap cannot do; an error of the model's own comes again below
            route.batched = False
    return _one_by_one(wrapped, chosen, batch, n, samples, weights)


def _batched(
    wrapped: _Forward,
    chosen: dict[str, nn.Parameter],
    batch: Sequence[Any],
    n: int,
    samples: Tensor,
    weights: Tensor,
) -> list[Tensor]:
    # What is the same for all samples (the label of their task) stays an ordinary tensor: a model may look at it.
    cut = [isinstance(part, Tensor) and part.dim() > 0 and len(part) == n for part in batch]
    same = [place > 0 and is_cut and bool((part == part[:1]).all()) for place, (part, is_cut) in _places(batch, cut)]
    mapped = [is_cut and not is_same for is_cut, is_same in zip(cut, same, strict=True)]
    parts = [part[samples.to(part.device)] for part, is_mapped in zip(batch, mapped, strict=True) if is_mapped]
    fixed = [part[:1] if is_same else part for part, is_same in zip(batch, same, strict=True)]

    def value(parameters: dict[str, Tensor], weight: Tensor, *sample: Tensor) -> Tensor:
        own = iter(sample)
        full = [next(own)[None] if is_mapped else part for part, is_mapped in zip(fixed, mapped, strict=True)]
        logits: Tensor = functional_call(wrapped, parameters, (full,))
        return (logits[0] * weight).sum()

    parameters = {name: parameter.detach() for name, parameter in chosen.items()}
    dimensions = (None, 0, *(0 for _ in parts))
    found = vmap(grad(value), in_dims=dimensions, randomness="different")(parameters, weights, *parts)
    return [found[name].detach() for name in chosen]


def _places(batch: Sequence[Any], cut: list[bool]) -> list[tuple[int, tuple[Any, bool]]]:
    return list(enumerate(zip(batch, cut, strict=True)))


def _one_by_one(
    wrapped: _Forward,
    chosen: dict[str, nn.Parameter],
    batch: Sequence[Any],
    n: int,
    samples: Tensor,
    weights: Tensor,
) -> list[Tensor]:
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in chosen.items()}
    values = list(parameters.values())
    found = [value.new_zeros(len(samples), *value.shape) for value in values]
    for row, index in enumerate(samples.tolist()):
        sample = [
            part[index : index + 1] if isinstance(part, Tensor) and part.dim() > 0 and len(part) == n else part
            for part in batch
        ]
        with torch.enable_grad():
            logit = (functional_call(wrapped, parameters, (sample,))[0] * weights[row]).sum()
        if not logit.requires_grad:
            continue
        for gradients, own in zip(found, torch.autograd.grad(logit, values, allow_unused=True), strict=True):
            if own is not None:
                gradients[row] = own.to_dense() if own.is_sparse else own
    return [gradients.detach() for gradients in found]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor
