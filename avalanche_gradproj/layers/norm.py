"""Statistics of normalisation layers: held, or replaced by those of the mini-batch, while a context lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def tracked_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that keep running statistics (BatchNorm, InstanceNorm that tracks), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }


def untracked_norms(model: nn.Module) -> list[str]:
    """Return the names of normalising layers without running statistics: nothing of theirs can be held."""
    return [
        name for name, module in model.named_modules() if isinstance(module, _NormBase) and module.running_mean is None
    ]


@contextmanager
def held_statistics(model: nn.Module, norms: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Normalise with the running statistics, and leave them as they are, also in training.

    The layers are put into evaluation mode and given back their mode at the end, also after an exception (or the
    model's, if that was changed meanwhile).

    Args:
        model: a model in training mode; layers already in evaluation mode stay in it.
        norms: those of its layers, in whatever mode; default all in training mode that keep statistics.
    """
    held = list(norms) if norms is not None else [norm for norm in tracked_norms(model).values() if norm.training]
    with ExitStack() as stack:
        for module in held:
            stack.callback(_back, module, module.training, model, model.training)
            module.eval()
            # Whoever calls model.train() in between would thaw them.
            stack.callback(module.register_forward_pre_hook(_evaluate).remove)
        yield


def _back(module: nn.Module, training: bool, model: nn.Module, model_training: bool) -> None:
    """Give a layer its mode, or that of the model where the model's was changed meanwhile."""
    changed = module is not model and model.training != model_training
    module.train(model.training if changed else training)


def _evaluate(module: nn.Module, args: Any) -> None:
    module.training = False


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return every BatchNorm by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def kept_in_evaluation(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms that the model itself leaves in evaluation mode when it is put into training mode.

    That is how fixed BatchNorms are usually kept: the model's own `train` puts them back, which is called here.

    Args:
        model: all modes stay as they are.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        return [norm for norm in batch_norms(model).values() if not norm.training]
    finally:
        if not modes[model]:
            model.eval()  # some do more than to set modes
        for module, training in modes.items():
            module.training = training


@contextmanager
def batch_statistics(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Normalise by the mini-batch while the context lasts, in evaluation mode too; running statistics do not move.

    Args:
        norms: the layers.
    """
    with ExitStack() as stack:
        for norm in norms:
            for key in ("running_mean", "running_var"):
                # Without statistics to fall back on, a BatchNorm takes those of the mini-batch.
                stack.callback(setattr, norm, key, getattr(norm, key))
                setattr(norm, key, None)
        yield


@contextmanager
def frozen(model: nn.Module, norms: Iterable[nn.Module]) -> Iterator[None]:
    """Keep layers as they are while the context lasts: statistics held, scale and shift without a gradient.

    Args:
        model: the model.
        norms: its layers that keep running statistics.
    """
    norms = list(norms)
    with ExitStack() as stack:
        stack.enter_context(held_statistics(model, norms))
        for parameter in [p for norm in norms for p in norm.parameters() if p.requires_grad]:
            # Without a gradient no optimizer touches them, whatever momentum or weight decay it has.
            parameter.grad = None
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_)
        yield
