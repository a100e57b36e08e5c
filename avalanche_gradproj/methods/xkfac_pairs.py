"""What becomes of each BatchNorm of a model: merged with its layer, held, or left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_gradproj.errors import ConfigurationError, ModelError, StateError, choice
from avalanche_gradproj.layers.merged import MergedUnit, merged_coverage
from avalanche_gradproj.layers.norm import batch_norms, kept_in_evaluation
from avalanche_gradproj.layers.pairs import find_pairs
from avalanche_gradproj.layers.select import Coverage, matches
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.methods.arguments import kinds

#: What happens to BatchNorms from the second experience on, and to one that stands behind no layer.
BATCHNORM, UNPAIRED = ("merge", "freeze", "track"), ("raise", "freeze")


class BatchNormPlan:
    """Decides about every BatchNorm that is neither excluded nor in a head.

    Args:
        batchnorm: `"merge"`, `"freeze"` (all are held) or `"track"` (all are left as they are).
        pairs: `"auto"`, or BatchNorm's name -> layer's name.
        unpaired: what to do about one without a layer: `"raise"` or `"freeze"`.
        include: patterns of layers that are covered; a BatchNorm that they do not match may be without a layer.
        exclude: patterns of what is left alone.

    Attributes:
        found: BatchNorm's name -> name of the layer that it is merged with; None before anybody looked. Once there, a
            name stays.
        held: names of BatchNorms that stay as the first experience leaves them.

    Raises:
        ConfigurationError: for an unknown option, or pairs that are no dict of names.
    """

    def __init__(
        self, batchnorm: str, pairs: Any, unpaired: str, include: Sequence[str] | None, exclude: Sequence[str] | None
    ) -> None:
        choice("batchnorm", batchnorm, BATCHNORM)
        choice("unpaired", unpaired, UNPAIRED)
        self._batchnorm, self._unpaired = batchnorm, unpaired
        self._include, self._exclude = include, exclude
        self._given: dict[str, str] | None = None
        if not (isinstance(pairs, str) and pairs == "auto"):
            if not isinstance(pairs, Mapping) or not all(
                isinstance(one, str) for item in pairs.items() for one in item
            ):
                raise ConfigurationError(f"pairs={pairs!r}: give 'auto', or a dict from BatchNorms' names to layers'")
            self._given = dict(pairs)
        self.found: dict[str, str] | None = None
        self.held: list[str] = []

    @property
    def looks(self) -> bool:
        """Whether pairs are wanted."""
        return self._batchnorm == "merge"

    def find(self, model: nn.Module, coverage: Coverage, heads: Sequence[str], run: Callable[[], Any]) -> None:
        """Find a layer for every BatchNorm; nothing changes where one is refused.

        Args:
            model: the model.
            coverage: its covered layers.
            heads: names of heads of one task.
            run: runs the model on a mini-batch.

        Raises:
            ModelError: naming each BatchNorm without a layer, if that is not allowed, or if it cannot be held.
            ConfigurationError: for wrong pairs given.
        """
        norms = self._concerned(model, heads)
        pairs = find_pairs(model, coverage.units, norms, run, self._given)
        before = self.found or {}
        for name, layer in before.items():
            if name in norms and name not in pairs.unseen and pairs.found.get(name) != layer:
                now = pairs.unpaired.get(name, f"it stands behind layer {pairs.found.get(name)!r}")
                raise ModelError(
                    f"BatchNorm {name!r} was merged with layer {layer!r}, and now {now}: what was learned is about the "
                    "two together; use the model as it was"
                )
        # Of one that the model did not call nothing is known, and nothing changes.
        lonely = {
            name: why
            for name, why in pairs.unpaired.items()
            if name not in pairs.unseen
            and name not in self.held
            and (self._include is None or matches(name, self._include))
            and (norms[name].running_mean is None or _learns(norms[name]))
        }
        _refuse_untracked({name: norms[name] for name in lonely})
        if lonely and self._unpaired == "raise":
            reasons = "; ".join(f"BatchNorm {name!r}: {why}" for name, why in lonely.items())
            raise ModelError(
                f"{len(lonely)} BatchNorm(s) cannot be merged with a layer. {reasons}. Give pairs={{norm: layer}}, "
                "hold them from the second experience on (unpaired='freeze'), exclude them, or use batchnorm='track' "
                "or 'freeze' for all"
            )
        new = {name: layer for name, layer in pairs.found.items() if name not in self.held}
        self.found, self.held = {**before, **new}, [*self.held, *lonely]

    def hold(self, model: nn.Module, heads: Sequence[str]) -> None:
        """Hold all where that is wanted.

        Raises:
            ModelError: naming a BatchNorm that keeps no statistics.
        """
        if self._batchnorm == "freeze":
            norms = self._concerned(model, heads)
            _refuse_untracked(norms)
            self.held = list(norms)

    def applied(self, coverage: Coverage, model: nn.Module) -> Coverage:
        """Return a coverage with pairs merged, and without scale and shift of BatchNorms that are held."""
        here = batch_norms(model)
        for name in (*(self.found or {}), *self.held):
            if name not in here:
                raise StateError(
                    f"the state is of another model: it has no BatchNorm {name!r}, only {', '.join(here) or 'none'}"
                )
        pairs = [(layer, norm) for norm, layer in (self.found or {}).items()]
        coverage = merged_coverage(coverage, model, pairs)
        held = self.held_parameters(coverage, model)
        return replace(coverage, frozen=[name for name in coverage.frozen if name not in held])

    def by_batch(self, units: Iterable[Unit], model: nn.Module) -> list[_BatchNorm]:
        """Return the BatchNorms that go on normalising by the mini-batch, and keep statistics.

        Those are none that the model keeps in evaluation mode when it trains.
        """
        norms: list[_BatchNorm] = []
        if self._batchnorm == "merge":
            norms = [unit.norm for unit in merged_units(units)]
        elif self._batchnorm == "track":
            norms = [norm for norm in batch_norms(model).values() if norm.running_mean is not None]
        fixed = {id(norm) for norm in kept_in_evaluation(model)} if norms else set()
        return [norm for norm in norms if id(norm) not in fixed]

    def held_norms(self, model: nn.Module) -> list[_BatchNorm]:
        """Return the BatchNorms that are held."""
        norms = batch_norms(model)
        return [norms[name] for name in self.held]

    def held_parameters(self, coverage: Coverage, model: nn.Module) -> list[str]:
        """Return the names of their scales and shifts."""
        own = {id(parameter) for norm in self.held_norms(model) for parameter in norm.parameters()}
        return [name for name, parameter in coverage.parameters.items() if id(parameter) in own]

    def notes(self, model: nn.Module) -> list[str]:
        """Say what becomes of each BatchNorm's statistics."""
        found = self.found or {}
        treated = {
            "held through the penalty on the merged weights": [f"{norm} (behind {own})" for norm, own in found.items()],
            "held from the second experience on": self.held,
            "left to drift": [name for name in batch_norms(model) if name not in found and name not in self.held],
        }
        return [f"statistics {what}: {', '.join(names)}" for what, names in treated.items() if names]

    def state(self) -> dict[str, Any]:
        """Return names."""
        found = None if self.found is None else dict(self.found)
        return {"batchnorm": self._batchnorm, "pairs": found, "held": list(self.held)}

    def check(self, state: Mapping[str, Any], balanced: bool) -> None:
        """Check what `state` returned, and what an XK-FAC adds to it.

        Args:
            state: the state.
            balanced: whether strengths are balanced here.

        Raises:
            StateError: if it is damaged, or of another `batchnorm`.
        """
        if state.get("batchnorm") != self._batchnorm:
            raise StateError(
                f"the state is of batchnorm={state.get('batchnorm')!r:.80}, this is batchnorm={self._batchnorm!r}: use "
                "that one"
            )
        if state.get("balanced") != balanced:
            made = "with" if state.get("balanced") else "without"
            raise StateError(
                f"the state was made {made} strength='balanced', which weighs experiences otherwise: use the same"
            )
        kinds(state, pairs=dict | None, held=list, moved_for=int)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned, once checked."""
        self.found, self.held = state["pairs"], list(state["held"])

    def _concerned(self, model: nn.Module, heads: Sequence[str]) -> dict[str, _BatchNorm]:
        found = {}
        for name, norm in batch_norms(model).items():
            own = [f"{name}.{key}" for key, _ in norm.named_parameters()]
            excluded = [parameter for parameter in own if matches(parameter, self._exclude)]
            if excluded and len(excluded) < len(own):
                raise ConfigurationError(
                    f"exclude matches {excluded[0]!r} and not all of BatchNorm {name!r}, which is covered whole or not "
                    f"at all: give {name!r}"
                )
            in_head = any(name == head or name.startswith(f"{head}.") for head in heads)
            if not (excluded or in_head or matches(name, self._exclude)):
                found[name] = norm
        return found


def _learns(norm: _BatchNorm) -> bool:
    """Whether scale or shift take a gradient; without either, only statistics move."""
    parameters = list(norm.parameters())
    return not parameters or any(parameter.requires_grad for parameter in parameters)


def _refuse_untracked(norms: Mapping[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        if norm.running_mean is None:
            raise ModelError(
                f"BatchNorm {name!r} keeps no running statistics (track_running_stats=False), so that it can be "
                "neither merged nor held: use batchnorm='track', or exclude it"
            )


def merged_units(units: Iterable[Unit]) -> list[MergedUnit]:
    """Return those units that are pairs."""
    return [unit for unit in units if isinstance(unit, MergedUnit)]
