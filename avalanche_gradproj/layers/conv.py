"""Convolutions as matrices: a row is one patch, a block one group.

The features of a row are ordered as the weight is: input channel of the group, then kernel positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_gradproj.layers.unit import ParameterSlice, Unit

#: Rows of a convolution are formed for so many images at a time that at most this many numbers exist at once (16 MB
#: in float32): on large images the rows of one mini-batch alone would fill the memory.
CHUNK_NUMBERS = 2**22

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def padded(x: Tensor, module: Convolution) -> Tensor:
    """Return the input as the kernel sees it, padded as the layer's mode says.

    Args:
        x: [n, channels, *space].
        module: the convolution; `padding` may be `"same"` or `"valid"`.
    """
    pads: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            both = module.dilation[axis] * (module.kernel_size[axis] - 1)
            pads += [both // 2, both - both // 2]
        elif module.padding == "valid":
            pads += [0, 0]
        else:
            pads += [int(module.padding[axis])] * 2
    if not any(pads):
        return x
    return F.pad(x, pads, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def patches(x: Tensor, module: Convolution) -> Tensor:
    """Return a view of all patches: [n, channels, *positions, *kernel].

    Args:
        x: padded input [n, channels, *space].
        module: the convolution, for its kernel, stride and dilation.
    """
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        window = dilation * (kernel - 1) + 1
        x = x.unfold(2 + axis, window, stride)[..., ::dilation]
    return x


def conv_units(name: str, module: nn.Module) -> list[Unit]:
    """Return the unit of a convolution: W [groups, out/groups, in/groups * prod(kernel) (+ 1)].

    Args:
        name: the layer's name.
        module: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, any stride, padding, dilation and groups.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(f"{name}: conv_units needs a convolution, got {type(module).__name__}")
    groups, space = module.groups, len(module.kernel_size)
    bias = module.bias is not None
    taps = module.in_channels // groups * math.prod(module.kernel_size)

    def bare_rows(x: Tensor) -> Iterator[Tensor]:
        x = x.reshape(-1, *x.shape[-space - 1 :])  # an input without the batch dimension is a batch of one
        numbers = groups * taps * max(1, math.prod(x.shape[2:]) // math.prod(module.stride))
        for part in x.split(max(1, CHUNK_NUMBERS // numbers)):
            every = patches(padded(part, module), module)
            positions = every.shape[2 : 2 + space]
            every = every.reshape(part.shape[0], groups, x.shape[1] // groups, *every.shape[2:])
            # [n, groups, channels, *positions, *kernel] -> [groups, n, *positions, channels, *kernel]
            order = (1, 0, *range(3, 3 + space), 2, *range(3 + space, 3 + 2 * space))
            count = part.shape[0] * math.prod(positions)
            yield every.permute(order).reshape(groups, count, taps)

    def output_rows(y: Tensor) -> Tensor:
        y = y.reshape(-1, *y.shape[-space - 1 :])
        y = y.reshape(y.shape[0], groups, module.out_channels // groups, math.prod(y.shape[2:]))
        return y.permute(1, 0, 3, 2).reshape(groups, y.shape[0] * y.shape[3], module.out_channels // groups)

    return [
        Unit(
            name=name,
            module=module,
            weight=ParameterSlice.whole(f"{name}.weight" if name else "weight", module.weight),
            bias=ParameterSlice.whole(f"{name}.bias" if name else "bias", module.bias)
            if module.bias is not None
            else None,
            blocks=groups,
            out=module.out_channels // groups,
            features=taps + bias,
            bare_rows=bare_rows,
            output_rows=output_rows,
        )
    ]
