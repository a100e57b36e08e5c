"""Running statistics of normalisation layers: held while a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


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
def held_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise with the running statistics, and leave them as they are, also in training.

    The layers are put into evaluation mode and given back their mode at the end, also after an exception.

    Args:
        model: a model in training mode; layers already in evaluation mode stay in it.
    """
    held = [module for module in tracked_norms(model).values() if module.training]
    with ExitStack() as stack:
        for module in held:
            module.eval()
            stack.callback(module.train)
            # Whoever calls model.train() in between would thaw them.
            stack.callback(module.register_forward_pre_hook(_evaluate).remove)
        yield


def _evaluate(module: nn.Module, args: Any) -> None:
    module.training = False
