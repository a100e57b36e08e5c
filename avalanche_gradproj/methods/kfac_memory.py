"""The quadratic forms that a Laplace approximation keeps between experiences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.layers.select import Coverage
from avalanche_gradproj.methods.kfac_curvature import Curvature, check_fits, merged, sharing

MODES = ("separate", "online")


class CurvatureMemory:
    """One form an experience, or one for all.

    Args:
        mode: `"separate"` or `"online"` (see `kfac_curvature.merged`).
        truncate: share that truncated factors keep (`linalg.kronecker.Factor.cheaper`); None for whole factors.
    """

    def __init__(self, mode: str, truncate: float | None) -> None:
        self._mode, self._truncate = mode, truncate
        #: The forms that penalties are made of, one an experience, or one in all.
        self.forms: list[Curvature] = []
        # Whole factors of the one form, where `forms` has truncated ones: sums of truncated factors would drift.
        self._whole: Curvature | None = None

    @property
    def whole(self) -> Curvature | None:
        """The one form of the online mode with whole factors; None in separate mode, and before there is one."""
        return self._whole or (self.forms[0] if self._mode == "online" and self.forms else None)

    @property
    def bytes_held(self) -> int:
        """Bytes of all tensors, each counted once."""
        forms = self.forms + ([] if self._whole is None else [self._whole])
        tensors = {tensor.data_ptr(): tensor for form in forms for tensor in form.tensors()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def diagonal_names(self) -> frozenset[str]:
        """Names of the parameters that have diagonal terms."""
        return frozenset(name for form in self.forms for name in form.diagonal)

    def add(self, new: Curvature, centres: Curvature) -> None:
        """Take the form of one more experience.

        Args:
            new: full terms, and its own centres.
            centres: centres of every layer and parameter of the model.
        """
        if self._mode == "separate":
            self.forms = [*self.forms, new.truncated(self._truncate)]
            return
        if self.forms:
            layers = {name: layer for name, layer in centres.layers.items() if name in self.forms[0].layers}
            diagonal = {name: own for name, own in centres.diagonal.items() if name in self.forms[0].diagonal}
            last = Curvature(new.weight, {**layers, **new.layers}, {**diagonal, **new.diagonal})
            new = merged(self._whole or self.forms[0], last)
        self._whole = None if self._truncate is None else new
        self.forms = [new.truncated(self._truncate)]

    def recentre(self, centres: Curvature) -> None:
        """Move the one form of the online mode to new centres; others keep theirs."""
        if self._mode == "online" and self.forms:
            self.add(Curvature(0.0), centres)

    def attach(self, coverage: Coverage) -> None:
        """Check the forms against a model, and move them to its devices and types.

        Raises:
            StateError: if they are of another model; nothing changes then.
        """
        units, parameters = {unit.name: unit for unit in coverage.units}, coverage.parameters
        for form in self.forms:
            check_fits(form, coverage.units, parameters)
        self.forms = [form.moved(units, parameters) for form in self.forms]
        if self._whole is not None:
            self._whole = self._whole.moved(units, parameters)
            self.forms = [sharing(form, self._whole) for form in self.forms]

    def state(self) -> dict[str, Any]:
        """Return tensors, numbers and names."""
        whole = None if self._whole is None else self._whole.state()
        return {"mode": self._mode, "forms": [form.state() for form in self.forms], "whole": whole}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the forms of a state.

        Raises:
            StateError: if the mode is another, something is damaged, or a layer that is here has another shape; nothing
                changes then.
        """
        if state.get("mode") != self._mode:
            raise StateError(f"the state is of mode={state.get('mode')!r}, this is mode={self._mode!r}: use that one")
        try:
            forms = [Curvature.from_state(form) for form in state["forms"]]
            whole = None if state["whole"] is None else Curvature.from_state(state["whole"])
            forms = [form if whole is None else sharing(form, whole) for form in forms]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state's factors are damaged ({error}): expected what state_dict() gives") from error
        if self._mode == "online" and forms and (whole is None) != (self._truncate is None):
            raise StateError(
                f"the state was made {'without' if whole is None else 'with'} truncation, this has "
                f"truncate={self._truncate!r}: online factors cannot change between the two"
            )
        held = {name: layer.centre.shape for form in self.forms for name, layer in form.layers.items()}
        for name, layer in ((name, layer) for form in forms for name, layer in form.layers.items()):
            # What grows may have grown since, or not yet.
            if name in held and held[name][::2] != layer.centre.shape[::2]:
                raise StateError(
                    f"the state is of another model: layer {name!r} is {tuple(layer.centre.shape)} there and "
                    f"{tuple(held[name])} here (blocks, outputs, inputs; a bias counts as one)"
                )
        self.forms, self._whole = forms, whole
