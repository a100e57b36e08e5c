"""Weight gradients of Linear layers formed from projected inputs: the cheapest route where a batch has few rows.

For Y = A W^T with D the gradient at Y, the weight's gradient is G = D^T A, and its projection

    G - (G M) M^T = D^T (A - (A M) M^T)

costs 4 n d r operations for n rows instead of 4 out d r. While the context lasts, a forward hook gives a Linear
layer's output a backward function that does this; values and the gradient at the input stay what they were.

Only what reaches the weight through the layer's forward is projected by this. Another term of the loss on the weight
(an L2 penalty, say), a second use of the layer in one forward pass, or a hook that changes the gradient is noticed:
the gradient that arrives at the weight is then not the very tensor that was formed here, and `is_projected` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.products import product
from avalanche_gradproj.linalg.projection import OPERATION_COST, Projector

#: Overhead of the hooks and of a backward function written in Python.
FUNCTION_COST = 15 * OPERATION_COST


class ProjectedInputs:
    """One Linear layer whose weight gradient is formed from projected inputs.

    Args:
        unit: the layer.
        projector: removes its basis; over [input, 1] where the layer has a bias.
        forced: take this route whatever it costs.
    """

    def __init__(self, unit: Unit, projector: Projector, *, forced: bool = False) -> None:
        self.unit = unit
        self.projector = projector
        self.forced = forced
        #: Set to a function of (rows, gradients at the output) to look at what each backward pass removes.
        self.monitor: Callable[[Tensor, Tensor], None] | None = None
        self._weight = unit.weight.parameter
        self._parameters = [part.parameter for part in unit.slices]
        self._handle_id = -1
        #: Whether forward passes are those of the training step itself.
        self.listening = True
        #: Values of the output that a forward pass is about to hand on.
        self.output: Tensor | None = None
        # Parameter id -> (address, version) of a gradient, and its storage: held, so that nobody else gets the address.
        self._formed: dict[int, tuple[tuple[int, int], torch.UntypedStorage]] = {}
        self._cheaper: dict[int, bool] = {}

    def cheaper(self, rows: int) -> bool:
        """Whether this route costs less than projecting the finished gradient, for so many rows in the batch."""
        if rows not in self._cheaper:
            gradient, _ = self.projector.cost(self.unit.out)
            inputs, _ = self.projector.cost(rows)
            self._cheaper[rows] = self.forced or inputs + FUNCTION_COST < gradient
        return self._cheaper[rows]

    def worthwhile(self) -> bool:
        """Whether there is a number of rows for which this route is the cheaper one."""
        return self.cheaper(1)

    def is_projected(self) -> bool:
        """Whether the gradients now held by the parameters are exactly those formed here; forgets them.

        The sum of all that reached a weight keeps the memory and the version count of the tensor that was formed only
        where nothing was added to it: decided on the host, without looking at values. A change through `.data` moves no
        version count: who changes gradients so must say that they cannot be trusted.
        """
        formed, self._formed = self._formed, {}
        for parameter in self._parameters:
            if not parameter.requires_grad:
                continue
            gradient, known = parameter.grad, formed.get(id(parameter))
            if gradient is None or known is None or known[0] != (gradient.data_ptr(), gradient._version):
                return False
        return True

    @contextmanager
    def active(self) -> Iterator[None]:
        """Take over the layer's backward pass while the context lasts."""
        with ExitStack() as stack:
            handle = self.unit.module.register_forward_hook(self._forward_hook)
            self._handle_id = handle.id
            stack.callback(handle.remove)
            stack.callback(self._formed.clear)
            yield

    def _forward_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        # Evaluation inside training needs nothing; under autocast the products would be rounded to half precision
        # and leak, so that the finished float32 gradient is projected instead.
        if not self.listening or not (torch.is_grad_enabled() and output.requires_grad) or len(args) != 1:
            return None
        weight = module.weight
        if weight is not self._weight or not weight.requires_grad:  # functional calls, replicas; frozen meanwhile
            return None
        if torch.is_autocast_enabled(output.device.type) or output.dtype in (torch.float16, torch.bfloat16):
            return None
        # An earlier hook may have changed the output, whose way back to the layer this one would cut off.
        if next(iter(module._forward_hooks)) != self._handle_id or _global_forward_hooks:
            return None
        x = args[0]
        if not self.cheaper(x.numel() // max(1, x.shape[-1])):
            return None
        # Not an argument of the function: as one, its result would be a view, which ReLU(inplace=True) may not modify.
        self.output = output.data
        result: Tensor = _LinearFromProjectedInputs.apply(x, weight, module.bias, self)
        return result

    def form(self, rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the projected gradients of weight and bias.

        Args:
            rows: A [n, in], the inputs.
            gradients: D [n, out], at the layer's output.
        """
        if self.monitor is not None:
            self.monitor(rows, gradients)
        transposed, projector = gradients.T, self.projector
        if self.unit.bias is None:
            return product(transposed, projector.remove(rows)), None
        kept, constant = projector.remove_with_constant(rows)
        return product(transposed, kept), transposed @ constant

    def remember(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Note the gradient that this backward pass hands to a parameter."""
        self._formed[id(parameter)] = (gradient.data_ptr(), gradient._version), gradient.untyped_storage()


class _LinearFromProjectedInputs(torch.autograd.Function):
    """The identity on a Linear layer's output, with the backward pass of the layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, layer: ProjectedInputs
    ) -> Tensor | None:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.layer = bias, layer
        output, layer.output = layer.output, None
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer: ProjectedInputs = ctx.layer
        rows, flat = x, gradient
        if x.dim() != 2:
            rows, flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        towards_input = (flat @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = layer.form(rows, flat)
        layer.remember(weight, of_weight)
        if of_bias is None:
            if ctx.bias is not None and ctx.needs_input_grad[2]:
                of_bias = flat.sum(0)
        else:
            layer.remember(ctx.bias, of_bias)
        return towards_input, of_weight, of_bias, None


@contextmanager
def projected_inputs(layers: Iterable[ProjectedInputs]) -> Iterator[None]:
    """Activate several layers for as long as the context lasts."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.active())
        yield
