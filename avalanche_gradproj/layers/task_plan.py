"""Which layers of a model get parameters for every task, and putting them in their places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from avalanche_gradproj.errors import ConfigurationError, ModelError
from avalanche_gradproj.layers.rules import RULES, covered_type, units_of
from avalanche_gradproj.layers.select import check_patterns, matches, refuse_lazy
from avalanche_gradproj.layers.tasks import OwnLayer, PerturbedLayer, Selection, TaskLayer

#: Layers of matrices that a perturbation cannot stand in for: their weights are used by other modules.
_REFUSED = (nn.MultiheadAttention, nn.RNNBase)


#: They hold parameters that another module computes with.
_COLLECTIONS = (nn.ParameterList, nn.ParameterDict)

#: They act elementwise, whatever the shape of their parameters.
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()))

_NOT_INCLUDED = "not in include"


@dataclass
class TaskPlan:
    """What becomes of every layer, by names in the model as it was given.

    Attributes:
        perturbed: Linear and Conv layers whose weights other tasks perturb.
        own: layers of which every task has its own.
        head: the one of these that starts anew for every task; None where the model has heads for its tasks.
        frozen: parameter -> why it stays as the first task leaves it.
        alone: parameter -> why nothing is done with it.
    """

    perturbed: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    head: str | None = None
    frozen: dict[str, str] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)


def plan_tasks(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    heads: Iterable[str] = (),
    head: str | None = None,
) -> TaskPlan:
    """Decide what becomes of every parameter of a model.

    Linear and Conv1d/2d/3d layers are perturbed; layers without children that hold vectors alone (norm layers, PReLU,
    running means) are copied; parameters of modules with children, and what is excluded, are frozen after the first
    task.

    Args:
        model: the model, as it was built.
        include: patterns of Linear and Conv layers to perturb, default all; others are frozen.
        exclude: patterns of layers and parameters to freeze.
        heads: names of modules that hold a head for each task; they are left to the model.
        head: the layer that becomes one head a task, where there are no `heads`; default the last Linear layer.

    Raises:
        ConfigurationError: for a pattern or head that matches nothing.
        ModelError: for a layer that cannot be perturbed, lazy, tied or reparametrised weights, no layer to perturb.
    """
    refuse_lazy(model)
    heads = tuple(heads)
    parameters = dict(model.named_parameters())
    check_patterns(model, parameters, include, "include")
    check_patterns(model, parameters, exclude, "exclude")
    _refuse_tied(model, exclude)
    plan = TaskPlan()
    inside: tuple[str, ...] = ()  # modules whose children are not looked at
    for name, module in model.named_modules():
        if any(name == one or name.startswith(f"{one}.") for one in (*heads, *inside)):
            continue
        if _place(plan, name, module, include, exclude) and name:
            inside += (name,)
    _freeze_excluded(plan, parameters, exclude)
    _choose_head(model, plan, heads, head)
    for name in [name for name in plan.frozen if name in parameters and not parameters[name].requires_grad]:
        del plan.frozen[name]
        plan.alone[name] = "takes no gradient"
    if not plan.perturbed:
        raise ModelError(
            "no layer is left to be perturbed: the model has no Linear or Conv1d/2d/3d layer besides its head and what "
            "`include` and `exclude` leave out"
        )
    return plan


def _place(
    plan: TaskPlan, name: str, module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> bool:
    """Decide what becomes of one module; say whether that settles its children too."""
    names = {f"{name}.{own}".lstrip("."): p for own, p in module._parameters.items() if p is not None}
    leaf = not list(module.children())
    whole = bool(names) and leaf and all(matches(own, exclude) for own in names)
    if matches(name, exclude) or whole:
        plan.frozen.update(dict.fromkeys(_all_names(name, module), "excluded"))
        return True
    if isinstance(module, _REFUSED):
        if any(p.requires_grad for p in module.parameters()):
            raise _unfit(name, module)
        plan.alone.update(dict.fromkeys(_all_names(name, module), "takes no gradient"))
        return True
    if names and not any(p.requires_grad for p in names.values()) and not isinstance(module, _NormBase):
        plan.alone.update(dict.fromkeys(names, "takes no gradient"))
    elif covered_type(module) in RULES:
        _place_matrix(plan, name, module, names, include)
    elif isinstance(module, _NORMS) or (leaf and (names or _moves(module)) and not isinstance(module, _COLLECTIONS)):
        if any(p.dim() > 1 for p in names.values()) and not isinstance(module, _NORMS):
            raise _unfit(name, module)
        if name and (names or _moves(module)):
            plan.own.append(name)
    else:
        plan.frozen.update(dict.fromkeys(names, "parameter of a module with others inside"))
        plan.frozen.update({own: "excluded" for own in names if matches(own, exclude)})
    return False


def _place_matrix(
    plan: TaskPlan, name: str, module: nn.Module, names: Iterable[str], include: Sequence[str] | None
) -> None:
    """Decide what becomes of a Linear or Conv layer."""
    units_of(name, module)  # refuses reparametrised weights
    if not module.weight.requires_grad:
        plan.frozen.update(dict.fromkeys(names, "its weight takes no gradient"))
    elif name and (include is None or matches(name, include)):
        plan.perturbed.append(name)
    elif include is None:
        raise ModelError(f"the model is one {type(module).__name__}: put it into an nn.Sequential with a name")
    else:
        plan.frozen.update(dict.fromkeys(names, _NOT_INCLUDED))


def _all_names(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters()]


def _moves(module: nn.Module) -> bool:
    """Whether a module has vectors that training may move, and no larger constants."""
    buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
    return bool(buffers) and all(buffer.dim() <= 1 for buffer in buffers)


def _unfit(name: str, module: nn.Module) -> ModelError:
    return ModelError(
        f"layer {name!r} is a {type(module).__name__}, which cannot be perturbed: exclude it (exclude=[{name!r}]), and "
        "it stays as the first task leaves it, or build it of Linear and Conv layers"
    )


def _freeze_excluded(plan: TaskPlan, parameters: dict[str, nn.Parameter], exclude: Sequence[str] | None) -> None:
    """Refuse patterns that match a part of a layer.

    Raises:
        ConfigurationError: naming parameter and layer.
    """
    for name in parameters:
        owner = name.rpartition(".")[0]
        if matches(name, exclude) and name not in plan.frozen and owner in (*plan.perturbed, *plan.own):
            raise ConfigurationError(
                f"exclude: {list(exclude or ())!r} matches {name!r} and not all of layer {owner!r}, which has "
                f"parameters for every task as a whole or not at all: give {owner!r}"
            )


def _choose_head(model: nn.Module, plan: TaskPlan, heads: Sequence[str], head: str | None) -> None:
    """Move the head from the perturbed layers to those that each task has for itself."""
    aside = {name.rpartition(".")[0] for name, reason in plan.frozen.items() if reason == _NOT_INCLUDED}
    order = [name for name, _ in model.named_modules() if name in plan.perturbed or name in aside]
    linear = [name for name in order if isinstance(model.get_submodule(name), nn.Linear)]
    if head is not None and head not in linear:
        raise ConfigurationError(
            f"head={head!r} is no Linear layer that may be perturbed: give one of {', '.join(map(repr, linear))}"
        )
    if head is None and heads:
        return
    if head is None and not linear:
        raise ModelError(
            "the model has neither heads for its tasks (MultiHeadClassifier) nor a Linear layer that could become one "
            "head a task: HALRP needs one"
        )
    plan.head = head or linear[-1]
    plan.perturbed = [name for name in plan.perturbed if name != plan.head]
    plan.own.append(plan.head)
    for name in _all_names(plan.head, model.get_submodule(plan.head)):
        plan.frozen.pop(name, None)


def _refuse_tied(model: nn.Module, exclude: Sequence[str] | None) -> None:
    """Refuse a parameter that two modules use: one of them would be perturbed and not the other."""
    owners: dict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            full = f"{module_name}.{name}".lstrip(".")
            if isinstance(parameter, Tensor):
                owners[id(parameter)].append(full)
    for names in owners.values():
        if len(names) > 1 and not all(matches(name, exclude) for name in names):
            raise ModelError(
                f"parameter {' and '.join(map(repr, names))} is tied: untie it (give one module a copy) or exclude "
                f"both (exclude={[name.rpartition('.')[0] for name in names]!r})"
            )


def put_in_place(model: nn.Module, plan: TaskPlan, selection: Selection) -> dict[str, TaskLayer]:
    """Replace the planned layers, wherever the model refers to them as children.

    Args:
        model: changed in place; a wrapped layer's parameters are then called `<layer>.base.<parameter>`.
        plan: which ones.
        selection: what all of them will refer to.

    Returns:
        The new layers by name.
    """
    made: dict[int, TaskLayer] = {}
    layers: dict[str, TaskLayer] = {}
    for name in (*plan.perturbed, *plan.own):
        module = model.get_submodule(name)
        kind = PerturbedLayer if name in plan.perturbed else OwnLayer
        layers[name] = made[id(module)] = kind(module, selection)
    for parent in [module for module in model.modules() if not isinstance(module, TaskLayer)]:
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in made:
                parent._modules[key] = made[id(child)]
    for layer in made.values():
        layer.train(layer.base.training)
    return layers


def take_out(model: nn.Module) -> None:
    """Put the layers that a model was given with back into their places; what tasks had there is gone."""
    for parent in [module for module in model.modules() if not isinstance(module, TaskLayer)]:
        for key, child in list(parent._modules.items()):
            if isinstance(child, TaskLayer):
                parent._modules[key] = child.base
