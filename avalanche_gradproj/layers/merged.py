"""A matrix layer and the BatchNorm behind it as the one matrix that they are in evaluation.

With running mean m, running variance v and s = sqrt(v + eps), a BatchNorm of scale gamma and shift beta behind
h = W a + b gives

    y = gamma (h - m) / s + beta = W~ a + b~,        W~ = diag(gamma / s) W,    b~ = gamma (b - m) / s + beta

Batch statistics replace m and v in training; W~ and b~ are what evaluation uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_gradproj.errors import DataError
from avalanche_gradproj.layers.select import Coverage
from avalanche_gradproj.layers.unit import Unit


@dataclass(frozen=True, eq=False, kw_only=True)
class MergedUnit(Unit):
    """A unit whose matrix is [W~, b~]: it always has a bias column, and its output is the BatchNorm's.

    `slices`, `matrix` and what writes weights are the layer's own, without the BatchNorm.

    Attributes:
        norm_name: the BatchNorm's name in the model.
        norm: the BatchNorm; it keeps running statistics.
    """

    norm_name: str
    norm: _BatchNorm

    @property
    def constant(self) -> bool:
        """True: the BatchNorm's shift sees the constant 1, if the layer's bias does not."""
        return True

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Every parameter that the matrix depends on."""
        own = [part.parameter for part in self.slices]
        return (*own, *(p for p in (self.norm.weight, self.norm.bias) if p is not None))

    def tensors(self, entered: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return W~ [blocks * out, ...] and b~ [blocks * out], differentiable functions of W, b, gamma and beta.

        Args:
            entered: what entered the BatchNorm [n, channels, ...] in a training step: its mean and variance take the
                place of m and v, and are differentiable too. Default the running statistics, as constants.
        """
        scale, shift = affine(self.norm, entered)
        weight = self.weight.parameter
        merged = weight * scale.view(-1, *(1,) * (weight.dim() - 1)).to(weight.dtype)
        bias = None if self.bias is None else self.bias.parameter
        return merged, shift if bias is None else shift + scale * bias

    def weights(self) -> Tensor:
        """Return the present [W~, b~] [blocks, out, features], detached."""
        with torch.no_grad():
            weight, bias = self.tensors()
        shape = self.blocks, self.out, -1
        return torch.cat([weight.reshape(shape), bias.reshape(shape).to(weight.dtype)], dim=2)


def affine(norm: _BatchNorm, entered: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return scale and shift [channels] by which a BatchNorm maps its input.

    Args:
        norm: the BatchNorm.
        entered: by the statistics of this input, as in training; default by the running ones, as in evaluation.
    """
    mean, variance = norm.running_mean, norm.running_var
    if entered is not None:
        wide = entered.float() if entered.element_size() < 4 else entered
        variance, mean = torch.var_mean(wide, dim=[axis for axis in range(wide.dim()) if axis != 1], correction=0)
    if mean is None or variance is None:
        raise TypeError("a BatchNorm without running statistics is no fixed map")
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -scale * mean
    return scale, shift if norm.bias is None else shift + norm.bias


def merge(unit: Unit, norm_name: str, norm: _BatchNorm) -> MergedUnit:
    """Return the unit that a layer's unit and the BatchNorm behind it make up.

    Args:
        unit: of a Linear layer or a convolution, with as many outputs as the BatchNorm has channels.
        norm_name: the BatchNorm's name in the model.
        norm: the BatchNorm.
    """

    def output_rows(y: Tensor) -> Tensor:
        if y.dim() > 1:
            y = y.movedim(1, -1)
        return y.reshape(-1, unit.blocks, unit.out).transpose(0, 1)

    return MergedUnit(
        name=unit.name,
        module=unit.module,
        weight=unit.weight,
        bias=unit.bias,
        blocks=unit.blocks,
        out=unit.out,
        features=unit.features + (not unit.constant),
        bare_rows=unit.bare_rows,
        output_rows=output_rows,
        batch_dimension=unit.batch_dimension,
        norm_name=norm_name,
        norm=norm,
    )


def merged_coverage(coverage: Coverage, model: nn.Module, pairs: Iterable[tuple[str, str]]) -> Coverage:
    """Return a coverage in which pairs are one unit each; scale and shift of their BatchNorms are part of it.

    Args:
        coverage: of the model.
        model: the model.
        pairs: (name of a covered unit, name of a BatchNorm); those whose layer is not covered are passed over.
    """
    by_unit = dict(pairs)
    units = [
        merge(unit, by_unit[unit.name], norm)
        if unit.name in by_unit and isinstance(norm := model.get_submodule(by_unit[unit.name]), _BatchNorm)
        else unit
        for unit in coverage.units
    ]
    taken = {id(p) for unit in units if isinstance(unit, MergedUnit) for p in unit.norm.parameters()}
    frozen = [name for name in coverage.frozen if id(coverage.parameters[name]) not in taken]
    alone = {name: why for name, why in coverage.alone.items() if id(coverage.parameters[name]) not in taken}
    return replace(coverage, units=units, frozen=frozen, alone=alone)


@contextmanager
def watch_entering(
    units: Iterable[MergedUnit], entered: dict[str, Tensor], wanted: Callable[[str], bool]
) -> Iterator[None]:
    """Keep what enters the BatchNorms in training steps while the context lasts.

    Args:
        units: the pairs.
        entered: gets the last wanted tensor of each, by the BatchNorm's name; it holds the graph of that step.
        wanted: whether what enters a BatchNorm, by its name, is that of a training step.
    """

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not (module.training and torch.is_grad_enabled() and wanted(name)):
                return
            x = args[0] if args else next(iter(kwargs.values()))
            if x.dim() > 1 and x.numel() == x.shape[1]:
                raise DataError(
                    f"BatchNorm {name!r} got a mini-batch of one sample, which has no variance to normalise by: drop "
                    "the last mini-batch, or take another train_mb_size"
                )
            entered[name] = x

        return hook

    with ExitStack() as stack:
        for unit in units:
            handle = unit.norm.register_forward_pre_hook(hook_of(unit.norm_name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
