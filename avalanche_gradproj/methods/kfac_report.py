"""What K-FAC Laplace does with every parameter, and what it keeps."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from avalanche_gradproj.layers.merged import MergedUnit
from avalanche_gradproj.layers.select import Coverage
from avalanche_gradproj.linalg.kronecker import KroneckerTerm
from avalanche_gradproj.methods.kfac_curvature import Curvature
from avalanche_gradproj.methods.report import Report, ReportRow, statistics_notes

_FISHER = {
    "sampled": "Fisher matrix, labels drawn from the model's prediction",
    "exact": "Fisher matrix, summed over all classes",
    "empirical": "empirical Fisher matrix: true labels, no curvature of the loss",
}


def laplace_report(
    model: nn.Module,
    coverage: Coverage,
    forms: Sequence[Curvature],
    mode: str,
    fisher: str,
    bytes_by_experience: Sequence[int],
    *,
    held: Collection[str] = (),
    eigenbasis: bool = False,
    notes: Sequence[str] = (),
) -> Report:
    """Make the report of a Laplace approximation.

    Args:
        model: the model.
        coverage: the treatment of every parameter; what is no matrix layer is listed as frozen there.
        forms: what is kept.
        mode: `"separate"` or `"online"`.
        fisher: where labels come from.
        bytes_by_experience: bytes that each experience added.
        held: names of parameters that stay as the first experience leaves them.
        eigenbasis: whether optimizers step in the eigenbasis of the factors.
        notes: what else there is to say, instead of what becomes of running statistics.
    """
    rows = []
    for name, parameter in coverage.parameters.items():
        shape = tuple(parameter.shape)
        for unit in coverage.units:
            if any(own is parameter for own in unit.parameters):
                terms = [own.terms for form in forms if (own := form.layers.get(unit.name)) is not None and own.terms]
                kept = _factors(terms)
                if isinstance(unit, MergedUnit):
                    kept = f"layer {unit.name!r} and BatchNorm {unit.norm_name!r} as one: {kept}"
                row = ReportRow(name, shape, "penalised", kept, unit.name)
                if not parameter.requires_grad:
                    row = ReportRow(name, shape, "left alone", "takes no gradient")
                rows.append(row)
        if name in held:
            rows.append(ReportRow(name, shape, "frozen", "BatchNorm is held from the second experience on"))
        elif name in coverage.frozen:
            known = any(name in form.diagonal for form in forms)
            rows.append(ReportRow(name, shape, "penalised", "diagonal" if known else "diagonal, none yet"))
        elif name in coverage.alone:
            reason = coverage.alone[name]
            if reason == "task head":
                reason = "task head: data of other tasks gives it no gradient"
            rows.append(ReportRow(name, shape, "left alone", reason))
    lines = [f"curvature: {_FISHER[fisher]}"]
    if mode == "online":
        lines.append(
            "one pair of factors a layer, averaged over experiences: cross terms stand for the sum of their products, "
            "which is lost unless all A, or all B, of a layer are equal"
        )
    if eigenbasis:
        lines.append("under a penalty, the optimizer steps in the eigenbasis of each layer's factors")
    lines += [f"experience {index}: {size} bytes" for index, size in enumerate(bytes_by_experience)]
    return Report(tuple(rows), (*lines, *(notes or statistics_notes(model, held=False))))


def _factors(terms: Sequence[Sequence[KroneckerTerm]]) -> str:
    if not terms:
        return "Kronecker factors, none yet"
    last = terms[-1][0]
    several = ", and a term across samples" if len(terms[-1]) > 1 else ""
    out, d = last.left.size, last.right.size
    if last.left.rank < out or last.right.rank < d:
        kept = f"{last.left.rank} of {out} x {last.right.rank} of {d} eigenvectors"
        return f"Kronecker factors, {kept} in the last of {len(terms)}{several}"
    return f"Kronecker factors {out} x {d}, {len(terms)}{several}"
