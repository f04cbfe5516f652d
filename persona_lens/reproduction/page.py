"""The report of a reproduction: a summary, a section per figure of the paper, and at the end those that have no counterpart."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from persona_lens.reports.page import image, provenance, table
from persona_lens.reports.page import page as document
from persona_lens.reproduction.finding import Finding, Row, named
from persona_lens.reproduction.paper import FIGURES, PaperFigure

HEAD: Final = ("claim", "here [95 %]", "paper", "holds if", "verdict")
WHAT_IT_MEANS: Final = (
    "A small model with planted structure validates the method and this implementation of it: a direction is known to be there, "
    "and is found. It says nothing about how strong these effects are in large models. The rules follow the paper's own figures "
    "and were not changed for these."
)


def page(findings: Mapping[str, Finding], images: Mapping[str, bytes], manifest: Mapping[str, Any]) -> str:
    """The whole report."""
    here = [f for f in FIGURES if f.key in findings]
    absent = [f for f in FIGURES if f.absent]
    hold, of = map(sum, zip(*(findings[f.key].holding for f in here), strict=True))
    scale = manifest["arguments"]["scale"]
    parts = [
        "<h1>Persona Vectors on the pocket model</h1>",
        "<p>The experiments of Chen et al. 2025 (<a href='https://arxiv.org/abs/2507.21509'>arXiv 2507.21509</a>), figure by "
        "figure. "
        f"<b>{hold} of {of} claims hold.</b></p>",
        f"<p>{escape(WHAT_IT_MEANS)}</p>",
        *(["<p><b>Quick scale: a check that everything runs. Its figures mean little.</b></p>"] if scale == "quick" else []),
        table(("figure", "what", "claims that hold"), [_overview(f, findings[f.key]) for f in here]),
    ]
    for figure in here:
        parts += _section(figure, findings[figure.key], images)
    parts += [
        "<h2>Without a counterpart here</h2>",
        table(("figure", "what", "why"), [(f.where, f.title, f.absent) for f in absent]),
        provenance(manifest),
    ]
    return document("Persona Vectors on the pocket model", parts)


def _overview(figure: PaperFigure, finding: Finding) -> tuple[str, str, str]:
    hold, of = finding.holding
    return figure.where, figure.title, f"{hold} of {of}"


def _section(figure: PaperFigure, finding: Finding, images: Mapping[str, bytes]) -> list[str]:
    return [
        f"<h2>{escape(figure.where)}: {escape(figure.title)}</h2>",
        f"<p><i>{escape(figure.claims)}</i></p>",
        *(image(images[file], caption) for file, caption in finding.images),
        table(HEAD, [_cells(r) for r in finding.rows]),
        f"<p><b>{escape(sentence(finding.rows))}</b> {escape(finding.reading)}</p>",
    ]


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    return row.claim, row.figure, row.paper, row.rule, row.verdict


def sentence(rows: Sequence[Row]) -> str:
    """What holds and what does not."""
    asked = [r for r in rows if r.holds is not None]
    if not asked:
        return "Nothing to hold against."
    if all(r.holds for r in asked):
        return "All of it holds."
    failing = f"Does not hold: {named(rows, hold=False)}."
    return failing if not any(r.holds for r in asked) else f"{failing} The rest holds."
