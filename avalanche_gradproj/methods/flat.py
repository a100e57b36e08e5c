"""Parameters of a model as one long vector, and orthonormal vectors of that kind: the memory of OGD."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_gradproj.errors import ConfigurationError, ModelError, StateError
from avalanche_gradproj.layers.select import matches, refuse_lazy
from avalanche_gradproj.linalg.orthogonal import OrthonormalRows


@dataclass(frozen=True)
class FlatCoverage:
    """Which parameters of a model make up the vector.

    Attributes:
        covered: name -> parameter, in the model's order.
        alone: name -> why it is left alone.
        parameters: every parameter of the model by name.
    """

    covered: dict[str, nn.Parameter]
    alone: dict[str, str]
    parameters: dict[str, nn.Parameter]


def cover_flat(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    heads: Iterable[str] = (),
) -> FlatCoverage:
    """Decide for every parameter whether it belongs to the vector; any kind can, a tied one counts once.

    Args:
        model: the model.
        include: patterns (shell style; they match a parameter by its name or that of a module that holds it): only
            these are covered, heads among them if a pattern says so; default all but heads.
        exclude: patterns of what is left alone.
        heads: names of modules that are task heads.

    Raises:
        ConfigurationError: for a pattern that matches no parameter.
        ModelError: for lazy parameters, parameters on several devices, or if nothing is covered.
    """
    refuse_lazy(model)
    parameters, heads = dict(model.named_parameters()), tuple(heads)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        _check_patterns(argument, patterns, list(parameters))
    covered: dict[str, nn.Parameter] = {}
    alone: dict[str, str] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            alone[name] = "takes no gradient"
        elif matches(name, exclude):
            alone[name] = "excluded"
        elif include is not None and not matches(name, include):
            alone[name] = "not in include"
        elif include is None and any(name.startswith(f"{head}.") for head in heads):
            alone[name] = "task head"
        else:
            covered[name] = parameter
    if not covered:
        raise ModelError(
            "no parameter is covered: the model has none that takes a gradient outside its heads and `exclude`; give "
            "`include` patterns, or use another method"
        )
    devices = {str(parameter.device) for parameter in covered.values()}
    if len(devices) > 1:
        raise ModelError(
            f"the covered parameters live on {', '.join(sorted(devices))}, their gradients make up one vector: put the "
            "model on one device, or exclude some"
        )
    return FlatCoverage(covered, alone, parameters)


def _check_patterns(argument: str, patterns: Sequence[str] | None, names: list[str]) -> None:
    if isinstance(patterns, str):
        raise ConfigurationError(f"{argument}={patterns!r} is one string: give a list of patterns, [{patterns!r}]")
    for pattern in patterns or ():
        if not any(matches(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ConfigurationError(
                f"{argument}: the pattern {pattern!r} matches no parameter; the model has, among others, "
                f"{', '.join(map(repr, near))}"
            )


class FlatMemory:
    """Orthonormal vectors V over named parameters, concatenated.

    Parameters that come later, and later rows of ones that grow, were not there when the vectors were taken: the
    vectors are zero there. Memory: 4 p bytes a vector in float32, p the numbers of all these parameters, and 8 r^2
    bytes for the triangle of r vectors (`OrthonormalRows.triangle`).
    """

    #: How training removes the span: one of `linalg.rank_one.PROJECTIONS`; all compute the same.
    projection = "auto"

    def __init__(self) -> None:
        #: Parameter name -> shape, in the order of the vector.
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.vectors = OrthonormalRows(0)

    @property
    def length(self) -> int:
        """p, numbers in a vector."""
        return _length(self.shapes)

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        return self.length * self.vectors.rows.element_size()

    def pieces(self) -> list[tuple[str, slice]]:
        """Return each parameter's name and its place in a vector."""
        found, begin = [], 0
        for name, shape in self.shapes.items():
            end = begin + torch.Size(shape).numel()
            found.append((name, slice(begin, end)))
            begin = end
        return found

    def plan(self, coverage: FlatCoverage) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the vectors must have for a model.

        Raises:
            StateError: if a parameter of the vectors is not covered any more, or is smaller.
        """
        shapes = {}
        for name, shape in self.shapes.items():
            parameter = coverage.parameters.get(name)
            reason = "it has no such parameter" if parameter is None else coverage.alone.get(name)
            if parameter is None or (reason is not None and reason != "takes no gradient"):
                raise StateError(
                    f"the stored gradients are over parameter {name!r}, which is not covered in this model ({reason}): "
                    "use the model, include and exclude that they were made with"
                )
            now = tuple(parameter.shape)
            if len(now) != len(shape) or any(new < old for new, old in zip(now, shape, strict=True)):
                raise StateError(
                    f"the stored gradients are of another model: parameter {name!r} has shape {list(now)} here and "
                    f"{list(shape)} there; it may grow, not shrink"
                )
            shapes[name] = now
        return shapes | {name: tuple(p.shape) for name, p in coverage.covered.items() if name not in shapes}

    def attach(self, coverage: FlatCoverage) -> None:
        """Bring the vectors into the shapes, the type and onto the device of a model's parameters.

        Parameters in half precision are remembered in float32.

        Raises:
            StateError: if they are of another model (see `plan`); nothing changes then.
        """
        shapes = self.plan(coverage)
        first = next(iter(coverage.covered.values()))
        wide = any(p.dtype == torch.float64 for p in coverage.covered.values())
        vectors = self.vectors
        if shapes != self.shapes:
            if vectors.count:
                vectors = vectors.embedded(_positions(self.shapes, shapes), _length(shapes))
            else:
                vectors = OrthonormalRows(_length(shapes))
        self.vectors = vectors.to(dtype=torch.float64 if wide else torch.float32, device=first.device)
        self.shapes = shapes

    def state(self) -> dict[str, Any]:
        """Return names, shapes and copies of the vectors [count, p] and their triangle, if it is known, on the host."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        state = {"shapes": shapes, "vectors": self.vectors.rows.detach().cpu().clone()}
        triangle = self.vectors.triangle
        return state if triangle is None else {**state, "triangle": triangle.detach().cpu().clone()}

    def load(self, state: Any) -> None:
        """Take the vectors of a state, and their triangle, which older states do not have.

        Raises:
            StateError: if it is no such state, or over other parameters than those already here; nothing changes then.
        """
        try:
            shapes = {str(name): tuple(int(size) for size in shape) for name, shape in state["shapes"].items()}
            vectors = state["vectors"]
            fits = vectors.dim() == 2 and vectors.shape[1] == _length(shapes) and vectors.dtype.is_floating_point
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state's gradients are damaged ({error}): expected shapes and vectors") from error
        if not fits:
            raise StateError(
                f"the state's vectors are {list(vectors.shape)} {vectors.dtype}, expected [count, {_length(shapes)}] "
                "for its parameters: it is damaged"
            )
        triangle = state.get("triangle")
        _check_triangle(triangle, len(vectors))
        for name, shape in self.shapes.items():
            if shapes.get(name) != shape:
                found = list(shapes[name]) if name in shapes else "nothing"
                raise StateError(
                    f"the state is of another model: for parameter {name!r} it holds {found}, expected {list(shape)}"
                )
        triangle = None if triangle is None else triangle.detach().clone()
        self.shapes, self.vectors = shapes, OrthonormalRows.of(vectors.detach().clone(), triangle)


def _check_triangle(triangle: Any, count: int) -> None:
    """Refuse what cannot be the triangle of so many vectors: its rows have length 1, its diagonal is positive."""
    if triangle is None:
        return
    good = isinstance(triangle, Tensor) and triangle.shape == (count, count) and triangle.is_floating_point()
    if not good or not bool(
        torch.equal(triangle, triangle.tril())
        and (triangle.diagonal() > 0).all()
        and ((triangle.double().norm(dim=1) - 1).abs() < 1e-3).all()
    ):
        what = f"{list(triangle.shape)} {triangle.dtype}" if isinstance(triangle, Tensor) else type(triangle).__name__
        raise StateError(
            f"the state's triangle is damaged: {what} came, expected a lower triangular [{count}, {count}] with a "
            "positive diagonal and rows of length 1"
        )


def _length(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _positions(old: dict[str, tuple[int, ...]], new: dict[str, tuple[int, ...]]) -> Tensor:
    """Return where the entries of vectors of the old shapes lie in vectors of the new ones."""
    found, begin = [], 0
    for name, shape in new.items():
        size = torch.Size(shape).numel()
        if name in old:  # the old parameter is the leading corner of the new one; both orders start with the old names
            places = torch.arange(begin, begin + size).reshape(shape)
            found.append(places[tuple(slice(length) for length in old[name])].reshape(-1))
        begin += size
    return torch.cat(found)
