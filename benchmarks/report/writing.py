"""Writing the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks.files import write_text
from benchmarks.report.html import page
from benchmarks.report.latex import latex
from benchmarks.report.plot_files import FOLDER, write_plots
from benchmarks.report.plots import draw
from benchmarks.report.study import Study
from benchmarks.report.tables import csv_table, markdown


def write(
    folder: Path, study: Study, *, test: Literal["t", "wilcoxon"] = "t", columns: Sequence[str] = ()
) -> list[Path]:
    """Write the report: a page, tables for people, for pandas and for LaTeX, and each plot as a file.

    Args:
        folder: where; made if it is not there.
        study: what there is to report.
        test: paired t-test, or Wilcoxon's signed-rank test.
        columns: keys of the metrics in `table.md` and `table.tex` (`columns.check`); none takes those that there are.

    Returns:
        The files: `report.html`, `table.md`, `table.csv`, `table.tex`, and the plots; the same study gives the same
        bytes.

    Raises:
        OSError: if one cannot be written.
    """
    drawn = draw(study)
    texts = {
        "report.html": page(study, test=test, drawn=drawn),
        "table.md": markdown(study, test=test, columns=columns),
        "table.csv": csv_table(study),
        "table.tex": latex(study, columns=columns),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*(folder / name for name in texts), *write_plots(folder / FOLDER, drawn)]
