"""Which parameters a method covers, and what happens to every other one: no silent gap."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from avalanche_gradproj.errors import ConfigurationError, ModelError, choice
from avalanche_gradproj.layers.rules import units_of
from avalanche_gradproj.layers.unit import Unit

UNCOVERED = ("freeze", "train", "raise")


@dataclass(frozen=True)
class Coverage:
    """What a method does with each parameter of one model.

    Attributes:
        units: the covered matrices, in the model's order.
        frozen: names of parameters that are to stay as the first experience left them.
        alone: parameter name -> why it is left alone.
        parameters: every parameter of the model by name.
    """

    units: list[Unit]
    frozen: list[str] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def cover(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    heads: Iterable[str] = (),
    uncovered: str = "freeze",
    keep: Collection[str] = (),
) -> Coverage:
    """Decide the treatment of every parameter of a model.

    `uncovered` is about parameters of no matrix layer that `include` and `exclude` leave open: with `include`, what it
    does not match is left alone.

    A pattern (shell style, `*` and `?`) matches a layer by its name or by the name of a module that holds it:
    `"features"` and `"features.*"` both match `features.0`. Attention layers hold `q_proj`, `k_proj`, `v_proj` and
    `out_proj`.

    Args:
        model: the model.
        include: only these layers are covered, heads among them if a pattern says so; default all but heads.
        exclude: these layers and parameters are left alone.
        heads: names of modules that are task heads: left alone unless `include` matches them.
        uncovered: what is no matrix layer (norm scale and shift, embeddings, plain parameters): `"freeze"`,
            `"train"` (left alone) or `"raise"`.
        keep: layers that are covered though their weight takes no gradient now: it may again.

    Raises:
        ConfigurationError: for a pattern that matches nothing.
        ModelError: for lazy, tied or reparametrised weights, transposed convolutions, no covered layer, or an
            uncovered parameter where `uncovered="raise"`.
    """
    choice("uncovered", uncovered, UNCOVERED)
    refuse_lazy(model)
    heads = tuple(heads)
    parameters = dict(model.named_parameters())
    check_patterns(model, parameters, include, "include")
    check_patterns(model, parameters, exclude, "exclude")
    units: list[Unit] = []
    alone: dict[str, str] = {}
    projections: set[str] = set()  # output projections of attention, submodules that their layer computes itself
    for name, module in model.named_modules():
        if name in projections or matches(name, exclude):
            continue
        in_head = any(name == head or name.startswith(head + ".") for head in heads)
        within = include is None or matches(name, include)
        if in_head and (include is None or not within):
            alone.update({f"{name}.{own}".lstrip("."): "task head" for own in module._parameters})
            continue
        if isinstance(module, nn.MultiheadAttention):
            projections.add(f"{name}.out_proj".lstrip("."))
        elif not within and not any(matches(f"{name}.{own}", include) for own in module._parameters):
            alone.update({f"{name}.{own}".lstrip("."): "not in include" for own in module._parameters})
            continue
        for unit in units_of(name, module):
            if _covers(unit, exclude, "exclude"):
                continue
            if include is None or _covers(unit, include, "include"):
                if unit.weight.parameter.requires_grad or unit.name in keep:
                    units.append(unit)
            else:
                alone.update({part.name: "not in include" for part in unit.slices})
    _refuse_tied(model, units)
    if not units:
        raise ModelError(
            "no layer is covered: the model has no Linear, Conv1d/2d/3d or MultiheadAttention layer outside its "
            "heads and `exclude`; give `include` patterns, or use another method"
        )
    return _treat(units, parameters, alone, exclude, uncovered)


def _covers(unit: Unit, patterns: Sequence[str] | None, argument: str) -> bool:
    """Whether patterns match a unit: by its name, or by the names of all its parameters.

    Raises:
        ConfigurationError: if they match some of its parameters and not all: a matrix is covered whole or not at all.
    """
    if matches(unit.name, patterns):
        return True
    matched = [part.name for part in unit.slices if matches(part.name, patterns)]
    if matched and len(matched) < len(unit.slices):
        raise ConfigurationError(
            f"{argument}: {list(patterns or ())!r} matches {matched[0]!r} and not all of layer {unit.name!r}, which is "
            f"covered whole or not at all: give {unit.name!r}"
        )
    return bool(matched)


def _treat(
    units: list[Unit],
    parameters: dict[str, nn.Parameter],
    alone: dict[str, str],
    exclude: Sequence[str] | None,
    uncovered: str,
) -> Coverage:
    """Sort every parameter into covered, frozen and left alone."""
    covered: dict[str, int] = defaultdict(int)
    for part in (part for unit in units for part in unit.slices):
        covered[part.name] += part.stop - part.start
    coverage = Coverage(units, parameters=parameters)
    for name, parameter in parameters.items():
        if name in covered:
            if covered[name] < parameter.shape[0]:
                coverage.alone[name] = f"{parameter.shape[0] - covered[name]} of its rows: excluded or not in include"
            continue
        if name in alone:
            coverage.alone[name] = alone[name]
        elif not parameter.requires_grad:
            coverage.alone[name] = "takes no gradient"
        elif matches(name, exclude):
            coverage.alone[name] = "excluded"
        elif uncovered == "raise":
            raise ModelError(
                f"parameter {name!r} belongs to no matrix layer and uncovered='raise': exclude it, or use "
                "uncovered='freeze' or 'train'"
            )
        elif uncovered == "train":
            coverage.alone[name] = "uncovered='train'"
        else:
            coverage.frozen.append(name)
    return coverage


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a name, or that of a module that holds it, matches one of the patterns."""
    if not patterns:
        return False
    pieces = name.split(".")
    ancestors = [".".join(pieces[: n + 1]) for n in range(len(pieces))]
    return any(fnmatchcase(ancestor, pattern) for pattern in patterns for ancestor in ancestors)


def check_patterns(
    model: nn.Module, parameters: dict[str, nn.Parameter], patterns: Sequence[str] | None, argument: str
) -> None:
    """Check the patterns of one argument.

    Raises:
        ConfigurationError: for one string instead of a list, or a pattern that matches no layer and no parameter.
    """
    if isinstance(patterns, str):
        raise ConfigurationError(f"{argument}={patterns!r} is one string: give a list of patterns, [{patterns!r}]")
    if not all(isinstance(pattern, str) for pattern in patterns or ()):
        raise ConfigurationError(f"{argument}={patterns!r}: give a list of patterns, each a string")
    names = [name for name, _ in model.named_modules() if name] + list(parameters)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            names += [f"{name}.{part}_proj" for part in ("q", "k", "v")]
    for pattern in patterns or ():
        if not any(matches(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ConfigurationError(
                f"{argument}: the pattern {pattern!r} matches no layer and no parameter; the model has, among "
                f"others, {', '.join(map(repr, near))}"
            )


def refuse_lazy(model: nn.Module) -> None:
    """Refuse parameters without a shape.

    Raises:
        ModelError: naming the parameter.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"parameter {name!r} is lazy, its shape is unknown: run one batch through the model first")


def _refuse_tied(model: nn.Module, units: list[Unit]) -> None:
    """Refuse a covered weight that a second module uses too: its inputs there would go unseen."""
    owners: dict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():  # a module reached by two names comes once: no tie
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{module_name}.{name}".lstrip("."))
    for unit in units:
        for part in unit.slices:
            names = owners[id(part.parameter)]
            if len(names) > 1:
                raise ModelError(
                    f"layer {unit.name!r}: its parameter is tied, it is {' and '.join(map(repr, names))}; untie it "
                    f"(give one module a copy) or exclude both (exclude={[n.rpartition('.')[0] for n in names]!r})"
                )
