"""Which outputs reach other samples' losses: those before a layer that normalises by the mini-batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.autograd.graph import Node, get_gradient_edge


@contextmanager
def entering(modules: Iterable[nn.Module], nodes: list[Node]) -> Iterator[None]:
    """Collect where the graph of autograd enters modules while the context lasts.

    Args:
        modules: what to watch.
        nodes: gets the node that made each module's input; none for inputs that take no gradient.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.requires_grad:
            nodes.append(get_gradient_edge(x).node)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def upstream(nodes: Iterable[Node]) -> set[Node]:
    """Return the nodes of the graph that others are made of, themselves among them."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions if before is not None]
    return found
