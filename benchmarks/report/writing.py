"""Writing the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from benchmarks.files import write_text
from benchmarks.report.html import page
from benchmarks.report.latex import latex
from benchmarks.report.study import Study
from benchmarks.report.tables import csv_table, markdown


def write(folder: Path, study: Study, *, test: Literal["t", "wilcoxon"] = "t") -> list[Path]:
    """Write the report: a page, and tables for people, for pandas and for LaTeX.

    Args:
        folder: where; made if it is not there.
        study: what there is to report.
        test: paired t-test, or Wilcoxon's signed-rank test.

    Returns:
        The files: `report.html`, `table.md`, `table.csv`, `table.tex`; the same study gives the same bytes.
    """
    texts = {
        "report.html": page(study, test=test),
        "table.md": markdown(study, test=test),
        "table.csv": csv_table(study),
        "table.tex": latex(study),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]
