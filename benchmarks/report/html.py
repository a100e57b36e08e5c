"""The report as one page that needs nothing else: no network, no fonts, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.report import sections
from benchmarks.report.formatting import decimal
from benchmarks.report.markup import Markup, bullets, join, lines, tag
from benchmarks.report.page_style import CSS
from benchmarks.report.plots import Plot, draw
from benchmarks.report.protocol_facts import facts, named
from benchmarks.report.statistics import ALPHA, NAMES, Test
from benchmarks.report.study import Study
from benchmarks.report.summary import METRICS


def page(study: Study, *, test: Test = "t", drawn: Mapping[str, Sequence[Plot]] | None = None) -> str:
    """Write the page.

    Args:
        study: what there is to report.
        test: which paired test.
        drawn: the plots of each protocol, where they are drawn already (`plots.draw`).

    Returns:
        HTML; the same study gives the same text.
    """
    names = named(study)
    drawn = draw(study) if drawn is None else drawn
    parts = [
        tag("h1", study.title),
        _numbers(study),
        tag("pre", tag("code", study.command)) if study.command else "",
        _contents(names),
    ]
    if not study.results:
        parts.append(tag("p", "No run has finished: there is nothing to compare."))
    parts += [
        sections.protocol(study, name, f"p{index}", drawn.get(name, ()), test) for index, name in enumerate(names, 1)
    ]
    parts.append(_reading(test))
    body = tag("body", tag("main", lines(parts)))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light">',
            '<link rel="icon" href="data:,">',
            tag("title", study.title),
            f"<style>\n{CSS}\n</style>",
            "</head>",
            body,
            "</html>",
            "",
        ]
    )


def _numbers(study: Study) -> Markup:
    """How much there is."""
    labels = {result["label"] for result in study.results}
    counts = [
        _count(len(study.results), "finished run"),
        _count(len(study.protocols), "protocol"),
        _count(len(labels), "method"),
    ]
    if study.failures:
        counts.append(_count(len(study.failures), "failed run"))
    text = tag("p", join(counts, ", "), ".")
    if not study.unfinished:
        return text
    missing = f"{_count(study.unfinished, 'run')} not finished: every mean below is over those that are."
    return lines([text, tag("p", tag("strong", "Not complete. "), missing, class_="warning")])


def _count(count: int, what: str) -> str:
    """A number with its noun."""
    return f"{decimal(count, 0)} {what}{'' if count == 1 else 's'}"


def _contents(names: tuple[str, ...]) -> Markup:
    """Table of contents of a page with several protocols."""
    if len(names) < 2:
        return Markup("")
    links = []
    for index, name in enumerate(names, 1):
        summary = facts(name).summary
        links.append(join([tag("a", name, href=f"#p{index}"), f": {summary}" if summary else ""]))
    links.append(tag("a", "How to read the figures", href="#reading"))
    return tag("nav", bullets(links), aria_label="Contents")


def _reading(test: Test) -> Markup:
    """What the words mean."""
    meanings = [join([tag("dt", metric.name), tag("dd", metric.meaning)]) for metric in METRICS]
    return tag(
        "section",
        tag("h2", "How to read the figures"),
        tag(
            "p",
            "Figures are means over seeds ± sample standard deviation; in brackets, or below in small print, the 95 % "
            "t-interval of the mean. It takes the figures of seeds to be normally distributed, so that with few seeds "
            "it is wide and may reach past what is possible; a remark below the table then says so. Another machine, "
            "or another number of threads, may round differently, and training follows.",
        ),
        tag(
            "p",
            f"Tests: {NAMES[test]} on ACC, two-sided, over the seeds that both methods have; p-values are corrected by "
            f"Holm's method over all pairs of a protocol, and count as a difference below {ALPHA}. They speak of other "
            "seeds on the same data, not of other data, networks or settings.",
        ),
        tag("dl", lines(meanings)),
        id="reading",
    )
