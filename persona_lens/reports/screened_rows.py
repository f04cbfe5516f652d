"""Rows in the report of a screening: those that were flagged, that stand out, and that were skipped.

Samples are anyone's text. They are shown as they are, escaped and with what is invisible made visible; long ones scroll.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from persona_lens.figures.monitoring import told
from persona_lens.figures.screened import FIRST, SAID, Screened, Skips
from persona_lens.monitoring.prediction import Estimate
from persona_lens.monitoring.rendering import visible
from persona_lens.reports.page import number, short, table
from persona_lens.screening.agreement import Agreement
from persona_lens.screening.flagging import RECORD, FlaggedSample, Flags
from persona_lens.screening.run import EXTREMES, Extreme
from persona_lens.vectors import hook_name

BUDGET: Final = 8_000_000  # characters of the samples of a section: what opens in a browser
LEAST: Final = 2_000  # characters of a message that are shown in any case
REASONS: Final = 10  # of a set, told one by one
BOX: Final = "white-space:pre-wrap;overflow-wrap:anywhere;max-height:16rem;overflow:auto;margin:.1rem 0 .5rem"
SIDES: Final = {"highest": "positive", "lowest": "negative"}


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def named(found: Screened, name: str) -> str:
    """A set's name, and whether it is the reference."""
    return short(name) + (" (reference)" if name == found.reference else "")


def form_of(values: Sequence[float]) -> str:
    """How numbers are written: three digits of the largest one."""
    largest = max((abs(v) for v in values if math.isfinite(v) and v), default=1.0)
    return f"+z,.{min(max(2 - math.floor(math.log10(largest)), 0), 12)}f"


def wide(content: str) -> str:
    """A table that scrolls where the page is too narrow."""
    return f'<div style="overflow-x:auto">{content}</div>'


def extreme_parts(found: Screened) -> list[str]:
    """The highest and the lowest samples of every set that is shown, trait by trait."""
    parts = ["<h2>Samples that stand out</h2>"]
    by_set: dict[tuple[str, str], list[Extreme]] = {}
    for x in found.run.extremes:
        by_set.setdefault((x.trait, x.set), []).append(x)
    wanted = {(s.trait, n): by_set.get((s.trait, n), []) for s in found.standings for n in found.listed(s)}
    longest = _longest([x.messages for shown in wanted.values() for x in shown])
    for standing in found.standings:
        some = found.some(standing)
        parts.append(f"<h3>{escape(short(standing.trait))}{f' ({some})' if some else ''}</h3>")
        for i, name in enumerate(found.listed(standing)):
            parts.append(_extremes_of(found, name, wanted[standing.trait, name], longest, opened=not i))
    return [*parts, f"<p class='meta'>Of each set and trait up to five at either end; all of them are in {EXTREMES}.</p>"]


def _extremes_of(found: Screened, name: str, shown: Sequence[Extreme], longest: int, *, opened: bool) -> str:
    form = form_of([x.score for x in shown])
    seen: set[int] = set()
    samples: list[str] = []
    for x in shown:
        if x.place not in seen:  # of a few rows the highest are the lowest
            heading = f"{_place(found, name, x.place)}: {SAID[found.rows]} {x.score:{form}} ({x.side})"
            samples.append(_sample(heading, x.messages, longest, EXTREMES, SIDES[x.side]))
        seen.add(x.place)
    return _folded(f"{named(found, name)}: {count(len(samples), 'sample')}", samples, opened=opened)


def flag_parts(found: Screened) -> list[str]:
    """Thresholds, how many rows of each set were flagged, how far a judge agrees, and samples."""
    flags = found.flags
    if flags is None:
        return ["<h2>Flagged samples</h2><p>Nothing was flagged: that needs a set that is known to be harmless (a reference).</p>"]
    several = len(flags.thresholds) > 1
    how = (
        f"A row is flagged where {'any trait' if several else 'the trait'} is so unusual among the rows of "
        f"{short(flags.reference)} that at most {100 * flags.rate:g} % of new rows like these would be flagged"
        f"{' by all traits together. A threshold is what a trait alone would take; together each takes more.' if several else '.'}"
    )
    return [
        "<h2>Flagged samples</h2>",
        f"<p>{escape(how)}</p>",
        _threshold_table(found, flags),
        "<p class='meta'>May really be: the share of new rows like the reference's that this very threshold flags (95 % "
        "interval). Scores in residual-stream units.</p>",
        wide(_flag_table(found, flags)),
        *_agreement_parts(flags),
        *_flagged_samples(found, flags),
    ]


def _threshold_table(found: Screened, flags: Flags) -> str:
    form = form_of([t.value for t in flags.thresholds.values()])
    rows = [
        (
            short(trait),
            hook_name(found.run.layer(trait)),
            number(t.value, form),
            f"{100 * t.rate:g} %",
            f"{_percent(t.low)} to {_percent(t.high)}",
            f"{t.rows:,}",
            f"{t.prompts:,}",
        )
        for trait, t in flags.thresholds.items()
    ]
    signals: dict[str, str] = {**SAID}
    limit = f"threshold ({signals.get(flags.signal, flags.signal)})"
    return table(("trait", "hook", limit, "rate", "may really be", "reference rows", "prompts"), rows)


def _flag_table(found: Screened, flags: Flags) -> str:
    grouped = any(c.groups is not None for c in flags.counts.values())
    several = list(flags.thresholds) if len(flags.thresholds) > 1 else []
    rows: list[list[Any]] = []
    for name, c in sorted(flags.counts.items(), key=lambda item: -item[1].flagged / max(item[1].rows, 1)):
        row = [named(found, name), f"{c.rows:,}", f"{c.flagged:,}", _percent(c.flagged / c.rows if c.rows else math.nan)]
        row += [f"{c.by_trait[t]:,}" for t in several]
        rows.append(row + ["-" if c.groups is None else f"{c.groups:,}"] * grouped)
    return table(["data set", "rows", "flagged", "share", *map(short, several), *["without near copies"] * grouped], rows)


def _agreement_parts(flags: Flags) -> list[str]:
    rows = [(short(name), short(trait), *_agreed(a)) for name, found in flags.agreements.items() for trait, a in found.items()]
    head = (
        *("data set", "trait", "both", "flagged only", "judge only", "neither", "one is silent", "kappa (95 %)"),
        *("of the judge's, flagged", "of the flagged, the judge's"),
    )
    note = "Flags of a trait beside a judge's scores of 50 and more. A judge reads the text alone: the two need not agree."
    return ["<h3>Agreement with the judge</h3>", wide(table(head, rows)), f"<p class='meta'>{note}</p>"] if rows else []


def _agreed(a: Agreement) -> tuple[str, ...]:
    rows = (a.both, a.flagged_only, a.judged_only, a.neither, a.missing)
    kappa = told(Estimate(a.kappa, a.low, a.high))
    return *(f"{n:,}" for n in rows), kappa, *(_percent(share) for share in (a.judged_found, a.flagged_found))


def _flagged_samples(found: Screened, flags: Flags) -> list[str]:
    by_set: dict[str, list[FlaggedSample]] = {}
    for x in flags.shown:
        by_set.setdefault(x.set, []).append(x)
    longest = _longest([x.messages for x in flags.shown])
    parts: list[str] = []
    for i, (name, shown) in enumerate(by_set.items()):
        samples = [_sample(_why(found, x), x.messages, longest, RECORD, "positive") for x in shown]
        parts.append(_folded(f"{named(found, name)}: {count(len(shown), 'sample')}, the most unusual first", samples, opened=not i))
    return parts


def _why(found: Screened, x: FlaggedSample) -> str:
    copies = f", one of {x.copies:,} near copies" if x.copies > 1 else ""
    return f"{_place(found, x.set, x.place)}: {short(x.why, 300)} (p {x.p_value:.2g}){copies}"


def skipped_parts(found: Screened) -> list[str]:
    """How many rows were skipped for what, and the first ones with their places."""
    if not found.skips:
        return []
    sets = found.run.record["sets"]
    rows = [row for name, skips in found.skips.items() for row in _reasons(name, sets[name]["rows"], skips)]
    parts = ["<h2>Rows that were skipped</h2>", table(("data set", "rows", "skipped", "reason"), rows)]
    for name, skips in found.skips.items():
        first = [(_place(found, name, s.place), short(s.reason, 300)) for s in skips.first]
        total = sum(skips.counts.values())
        some = f", the first {FIRST} of {total:,}" if total > FIRST else ""
        parts.append(_folded(f"{short(name)}: skipped rows{some}", [table(("place", "reason"), first)]))
    return [*parts, "<p class='meta'>All of them are in the Parquet files under sets, in the column `reason`.</p>"]


def _reasons(name: str, rows: int, skips: Skips) -> list[tuple[str, ...]]:
    told_of = list(skips.counts.items())
    lines = [(short(name), f"{rows:,}", f"{n:,}", short(reason, 300)) for reason, n in told_of[:REASONS]]
    if rest := told_of[REASONS:]:
        lines.append((short(name), f"{rows:,}", f"{sum(n for _, n in rest):,}", f"{len(rest)} other reasons"))
    return lines


def _place(found: Screened, name: str, place: int) -> str:
    return f"{found.run.record['sets'][name]['unit']} {place:,}"


def _longest(conversations: Sequence[Sequence[Mapping[str, str]]]) -> int:
    """How many characters of a message are shown, so that a page of many long ones still opens."""
    return max(LEAST, BUDGET // max(sum(map(len, conversations)), 1))


def _sample(heading: str, messages: Sequence[Mapping[str, str]], longest: int, file: str, side: str) -> str:
    """A conversation in full."""
    said = "".join(f"<div class='meta'>{escape(short(m['role']))}</div>{_text(m['content'], longest, file)}" for m in messages)
    return f"<div class='answer {side}'><div><b>{escape(heading)}</b></div>{said}</div>"


def _text(content: str, longest: int, file: str) -> str:
    left = len(content) - longest
    more = f"<div class='meta'>{left:,} more characters: see {file}</div>" if left > 0 else ""
    return f'<div dir="auto" style="{BOX}">{escape(visible(content[:longest]))}</div>{more}'


def _folded(heading: str, parts: Sequence[str], *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(heading)}</summary>{''.join(parts)}</details>"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.{2 if share < 0.1 else 3}g} %"
