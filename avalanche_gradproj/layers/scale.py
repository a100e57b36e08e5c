"""Scale and shift of normalisation layers: their gradient, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

_OWN_FORWARD: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True, eq=False)
class Scale:
    """A normalisation layer y = weight * x^ + bias.

    Attributes:
        name: the layer's name.
        module: the layer.
        parameters: `"weight"` or `"bias"` -> its name in the model.
    """

    name: str
    module: nn.Module
    parameters: dict[str, str]

    def tells_samples(self, x: Tensor, size: int) -> bool:
        """Return whether the shape of an input says beyond doubt which entries belong to which sample.

        The first axis must count the samples. No other leading axis may be a multiple of their number: it could be the
        one of the samples (sequence first), or of the windows that they were cut into.

        Args:
            x: what enters the layer.
            size: n, samples in the mini-batch.
        """
        own = self.module.normalized_shape if isinstance(self.module, nn.LayerNorm | nn.RMSNorm) else x.shape[1:]
        leading = x.shape[: x.dim() - len(own)]
        return len(leading) > 0 and leading[0] == size and (size == 1 or all(axis % size for axis in leading[1:]))

    def sample_gradients(self, x: Tensor, gradient: Tensor, size: int) -> dict[str, Tensor]:
        """Return each parameter's gradient of each sample's loss.

        Args:
            x: what entered the layer, of which `tells_samples` is true.
            gradient: of the summed loss, at the layer's output, shaped like it.
            size: n, samples in the mini-batch.

        Returns:
            Parameter's name in the model -> [n, *shape].
        """
        found = {}
        for own, name in self.parameters.items():
            shape = getattr(self.module, own).shape
            values = gradient * _normalised(self.module, x) if own == "weight" else gradient
            if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
                values = values.reshape(*x.shape[: x.dim() - len(shape)], -1)
            else:
                values = values.flatten(2).sum(2) if values.dim() > 2 else values
            found[name] = values.reshape(size, -1, values.shape[-1]).sum(1).reshape(size, *shape)
        return found


def scales_of(model: nn.Module, names: Iterable[str]) -> list[Scale]:
    """Return the normalisation layers that own some of the named parameters.

    A subclass counts only if it computes what its base does.

    Args:
        model: the model.
        names: parameters of the model.
    """
    wanted = set(names)
    by_id = {id(parameter): name for name, parameter in model.named_parameters() if name in wanted}
    found = []
    for name, module in model.named_modules():
        base = next((base for base in type(module).__mro__ if base in _OWN_FORWARD), None)
        if base is None or type(module).forward is not base.forward:
            continue
        own = {key: by_id[id(p)] for key, p in module._parameters.items() if p is not None and id(p) in by_id}
        if own:
            found.append(Scale(name, module, own))
    return found


@contextmanager
def watch_scales(scales: Iterable[Scale], on_call: Callable[[Scale, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Report every use of normalisation layers while the context lasts.

    Args:
        scales: the layers.
        on_call: called as `on_call(scale, input, output)`; what it returns takes the output's place.
    """

    def hook_of(scale: Scale) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return on_call(scale, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    with ExitStack() as stack:
        for scale in scales:
            stack.callback(scale.module.register_forward_hook(hook_of(scale), with_kwargs=True).remove)
        yield


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """Return x^, the layer's output before scale and shift."""
    if isinstance(module, _BatchNorm | _InstanceNorm):
        by_batch = module.training or module.running_mean is None
        mean, var = (None, None) if by_batch else (module.running_mean, module.running_var)
        if isinstance(module, _InstanceNorm):
            return F.instance_norm(x, mean, var, None, None, by_batch, 0.0, module.eps)
        return F.batch_norm(x, mean, var, None, None, by_batch, 0.0, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, list(module.normalized_shape), None, module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, list(module.normalized_shape), None, None, module.eps)
    raise TypeError(f"{type(module).__name__} is no normalisation layer")


def batch_dependent(model: nn.Module) -> list[str]:
    """Return the names of layers that, as the model stands, normalise a sample by the others of its mini-batch."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]
