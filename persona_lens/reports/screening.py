"""Report of a screening: data sets ranked by trait, what stands beside the scores, rows, and what was done.

Names are anyone's text: `short` makes one short visible line of them, and what goes into the page is escaped. Nothing is claimed
without an interval; what has none is called a description.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from persona_lens.figures.monitoring import told
from persona_lens.figures.screened import LENGTH, SAID, Beside, Screened, Standing, between, rivals_of, screened
from persona_lens.figures.screening import histogram_name
from persona_lens.monitoring.prediction import Estimate
from persona_lens.reports.page import image, listed, number, page, provenance, short, table
from persona_lens.reports.screened_rows import count, extreme_parts, flag_parts, form_of, named, skipped_parts, wide
from persona_lens.screening.calibration import Predicted
from persona_lens.screening.run import ScreenRun
from persona_lens.screening.sets import LEAST_PROMPTS, Difference, Ranked, SetScore
from persona_lens.vectors import hook_name

TOLD: Final = 3  # traits, and sets, that a verdict tells of one by one
LEAST_SETS: Final = 5  # of a correlation over sets
CLEAR: Final = 0.3  # a correlation with length from which on it is pointed out
NO_INTERVAL: Final = f"no interval (it takes {LEAST_PROMPTS} different prompts, and scores that vary)"
SLACK: Final = 1e-9  # correlations that differ by less are the same

Line = tuple[dict[str, float], list[str]]  # correlations by rival, and the cells of a table


def screen_verdict(run: ScreenRun | Screened) -> str:
    """Which set ranks highest for the traits that tell most, how sure that is, and how many rows were skipped and flagged."""
    found = screened(run)
    counts = found.run.record["sets"].values()
    rows, skipped = (sum(c[what] for c in counts) for what in ("rows", "skipped"))
    n = len(found.run.sets)
    size = f"Screened {count(rows - skipped, 'row')} of {count(n, 'data set')}; {count(skipped, 'row')} could not be screened."
    told_of = found.standings if len(found.standings) <= TOLD else sorted(found.standings, key=_telling, reverse=True)[:TOLD]
    said = [f"{short(s.trait)}: {_leading(found, s)}." for s in told_of]
    more = len(found.standings) - len(told_of)
    rest = [f"{count(more, 'other trait')} with less clear differences: see the report."] if more else []
    return " ".join([size, *said, *rest, _flagged_in_short(found)])


def _telling(standing: Standing) -> float:
    """How far apart the highest and the lowest set are, in half intervals; below all others where that has no interval."""
    if not standing.sets:
        return -math.inf
    if len(standing.sets) == 1:
        score = standing.sets[0].score
        ratio = 2 * abs(score.mean) / (score.high - score.low)
    else:
        d = standing.difference(standing.names[0], standing.names[-1])
        ratio = 2 * d.difference / (d.high - d.low)
    return ratio if math.isfinite(ratio) else -math.inf


def _form(standing: Standing) -> str:
    return form_of([r.score.mean for r in standing.sets])


def _scored(score: SetScore, form: str) -> str:
    return told(Estimate(score.mean, score.low, score.high), form)


def _what(standing: Standing) -> str:
    """What sets are scored by; in full where it is estimated."""
    how = f" (estimated: {100 * _answered(standing):.3g} % of the rows have an own answer)" if standing.kind == "estimated" else ""
    return SAID[standing.kind] + how


def _answered(standing: Standing) -> float:
    """Share of the rows that have an own answer."""
    scores = [r.score for r in standing.sets]
    return sum(s.exact for s in scores) / max(sum(s.rows for s in scores), 1)


def _leading(found: Screened, standing: Standing) -> str:
    """The highest set, and what it is shown to be ahead of."""
    if not standing.sets:
        return "no set has a score"
    first, form = standing.sets[0], _form(standing)
    mean = _scored(first.score, form)
    if len(standing.sets) == 1:
        said = f"the mean {_what(standing)} of {short(first.name)} is {mean}"
        return f"{said}; {_from_zero(standing, first.score)}"
    said = f"{short(first.name)} has the highest mean {_what(standing)}, {mean}"
    return f"{said}; {_ahead(standing, first)}{_against_one(found, standing, first, form)}"


def _from_zero(standing: Standing, score: SetScore) -> str:
    if math.isnan(score.low):
        return f"there is {NO_INTERVAL}, so nothing is claimed"
    if standing.kind == "cheap":
        return "one set alone says nothing without projection differences"
    return "above 0" if score.low > 0 else "below 0" if score.high < 0 else "not shown to differ from 0"


def _ahead(standing: Standing, first: Ranked) -> str:
    others = len(standing.sets) - 1
    if math.isnan(first.score.low):
        return f"there is {NO_INTERVAL}, so no place is claimed"
    behind = len(standing.sets) - first.worst
    if behind == others:
        return f"ahead of {f'all {others} other sets' if others > 1 else 'the other set'}"
    if not behind:
        return f"not shown to differ from {'any of the others' if others > 1 else 'the other set'}"
    return f"ahead of {behind} of {others} other sets and not shown to differ from {count(others - behind, 'set')}"


def _against_one(found: Screened, standing: Standing, first: Ranked, form: str) -> str:
    """The difference to the reference, or where there is none to the next set."""
    if first.name == found.reference:
        return " (it is the reference itself)"
    other = found.reference if found.reference in standing.names else standing.names[1]
    d = standing.difference(first.name, str(other))
    if math.isnan(d.low):
        return ""
    what = "the reference" if other == found.reference else "the next"
    return f" ({told(Estimate(d.difference, d.low, d.high), form)} over {what}, {short(str(other))})"


def _flagged_in_short(found: Screened) -> str:
    if found.flags is None:
        return "Nothing was flagged: there is no reference."
    f = found.flags
    ordered = sorted(f.counts.items(), key=lambda item: -item[1].flagged / max(item[1].rows, 1))
    each = [f"{c.flagged:,} of {c.rows:,} rows of {short(name)}" for name, c in ordered[:TOLD]]
    more = f" (of {len(ordered)} sets those with the largest shares)" if len(ordered) > TOLD else ""
    return (
        f"Flagged, at a rate of at most {100 * f.rate:g} % of new rows like those of {short(f.reference)} for "
        f"{'all traits together' if len(f.thresholds) > 1 else 'the trait'}: {listed(each) if each else 'nothing to flag'}{more}."
    )


def screen_page(run: ScreenRun | Screened, images: Mapping[str, bytes]) -> str:
    found = screened(run)
    manifest = found.run.manifest
    title = f"Screening for {short(listed(found.run.traits))}"
    parts = [
        f"<h1>{escape(title)}</h1><p><b>{escape(screen_verdict(found))}</b></p>",
        image(images["ranking"], "Data sets from the highest score to the lowest. Band: the reference's interval."),
        *_meaning(found),
        *(part for i, s in enumerate(found.standings) for part in _trait(found, s, images[histogram_name(i, s.trait)])),
        *_scatters(images),
        *_rivals(found),
        *flag_parts(found),
        *extreme_parts(found),
        *skipped_parts(found),
        "<h2>Settings</h2>",
        table(("setting", "value"), [(k, short(str(v))) for k, v in manifest["arguments"]["settings"].items()]),
        table(("data set", "which"), [(short(n), short(json.dumps(d), 200)) for n, d in manifest["arguments"]["data"].items()]),
        provenance(manifest),
    ]
    return page(title, parts)


def _meaning(found: Screened) -> list[str]:
    first = found.standings[0]
    difference = (
        "its mean projection difference: of the data's answers, minus that of the model's own greedy answers to the same prompts"
    )
    how = {
        "difference": f"A set's score is {difference}.",
        "estimated": f"A set's score is {difference}. {100 * _answered(first):.3g} % of the rows have an own answer; the mean is "
        f"estimated with the help of all rows' {SAID['cheap']}. Where few rows make the mean and that part misses them, the "
        "interval is too short.",
        "cheap": f"{_lacking(first)}: a set's score is its mean {SAID['cheap']}, which says less about it.",
    }[first.kind]
    several = [t for t, layers in found.run.layers.items() if len(layers) > 1]
    named_traits = listed([short(t) for t in several]) if several else ""
    layers = f" Read at several layers, of which the most reliable is shown: {named_traits}." if several else ""
    text = (
        f"{how} Rows are scored by their {SAID[found.rows]}. Intervals are 95 %, over prompts, for endless rows like these. Places "
        "a set may have, and p of differences, are corrected for all pairs of sets (Holm), not for the number of "
        f"traits.{layers}"
    )
    return [f"<p class='meta'>{escape(text)}</p>"]


def _lacking(standing: Standing) -> str:
    return "Not all sets have own answers to all of their prompts, or to enough" if standing.both else "There are no own answers"


def _trait(found: Screened, standing: Standing, histogram: bytes) -> list[str]:
    caption = (
        f"Rows by {SAID[found.rows]}; the outermost bars hold what lies beyond them (at most a thousandth of a set on either side)."
        + (" Rows are flagged for what is unusual in them, at a rate for all traits together." if found.flags else "")
    )
    gone = [f"{short(name)}: {why}" for name, why in standing.unscored.items()]
    return [
        f"<h2>{escape(short(standing.trait))}</h2>",
        _ranking_table(found, standing),
        *[f"<p class='meta'>No place: {escape(text)}.</p>" for text in gone],
        image(histogram, caption),
    ]


def _ranking_table(found: Screened, standing: Standing) -> str:
    form, predicted = _form(standing), found.predictions.get(standing.trait, {})
    estimated = standing.kind == "estimated"
    head = ["data set", "place", "may be", f"mean {SAID[standing.kind]}", "minus the next", "p", "rows"]
    head += ["with own answer"] * estimated + ["prompts", "skipped"] + ["predicted score (95 %)"] * bool(predicted)
    rows: list[list[Any]] = []
    for i, ranked in enumerate(standing.sets):
        s = ranked.score
        following = standing.difference(ranked.name, standing.names[i + 1]) if i + 1 < len(standing.sets) else None
        row: list[Any] = [named(found, ranked.name), *_may_be(ranked), _scored(s, form), *_next(following, form), f"{s.rows:,}"]
        row += [f"{s.exact:,}"] * estimated + [f"{s.prompts:,}", f"{found.run.record['sets'][ranked.name]['skipped']:,}"]
        if predicted:
            p = predicted.get(ranked.name)
            row.append("-" if p is None else _foretold(p))
        rows.append(row)
    where = f"{hook_name(standing.layer)}, residual-stream units"
    return f"<p class='meta'>{escape(where)}</p>{wide(table(head, rows))}{_predicted(predicted)}"


def _foretold(p: Predicted) -> str:
    return told(Estimate(p.value, p.low, p.high), "z.0f") + (" (extrapolated)" if p.extrapolated else "")


def _predicted(found: Mapping[str, Predicted]) -> str:
    """What the predictions mean, and why some have no interval."""
    if not found:
        return ""
    note = (
        "Predicted score: of the trait (0-100) after finetuning on the set, from what finetuning on other sets did, with a 95 % "
        "prediction interval for a set of a new family. Extrapolated: its score lies outside those of the known sets, and nothing "
        "says that the prediction holds."
    )
    without = dict.fromkeys(p.reason for p in found.values() if p.reason)
    note += f" Without interval: {'; '.join(without)}." if without else ""
    return f"<p class='meta'>{escape(note)}</p>"


def _may_be(ranked: Ranked) -> tuple[Any, str]:
    """A set's place, and those that it may have; none where it has no interval."""
    if math.isnan(ranked.score.low):
        return ranked.place, "-"
    return ranked.place, str(ranked.best) if ranked.best == ranked.worst else f"{ranked.best} to {ranked.worst}"


def _next(d: Difference | None, form: str) -> tuple[str, str]:
    return ("-", "-") if d is None else (told(Estimate(d.difference, d.low, d.high), form), _p(d.p_value))


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else number(value, ".2g")


def _scatters(images: Mapping[str, bytes]) -> list[str]:
    captions = {
        "traits": "Data sets by two traits each.",
        "signals": "What the cheap scores, which need no own answers, say of the same rows. Where they put sets in another order, "
        "they mislead.",
    }
    shown = [image(images[name], caption) for name, caption in captions.items() if name in images]
    return ["<h2>Data sets beside each other</h2>", *shown] if shown else []


def _rivals(found: Screened) -> list[str]:
    """What the texts alone say, and how far scores go with length."""
    parts = ["<h2>Beside the scores</h2>"]
    starred = False
    for standing in found.standings:
        rivals = [*rivals_of(found.run, standing.trait), LENGTH]
        beside = found.beside[standing.trait]
        head = ["data set", "rows", *(x for r in rivals for x in (f"{short(r)}: mean", "rho"))]
        lines = {f"all {len(standing.sets)} sets": _over_sets(beside, standing, rivals)} if len(standing.sets) >= LEAST_SETS else {}
        lines |= {named(found, name): _in_set(beside[name], rivals) for name in found.listed(standing)}
        stars = {what: _by_length(rho) for what, (rho, _) in lines.items()}
        starred = starred or any(stars.values())
        rows = [[what + " *" * stars[what], *cells] for what, (_, cells) in lines.items()]
        some = found.some(standing)
        parts += [f"<h3>{escape(short(standing.trait))}{f' ({some})' if some else ''}</h3>", wide(table(head, rows))]
    note = (
        f"rho: Spearman's correlation, over a set's rows, of their {SAID[found.rows]} with a rival's scores, and with how long the "
        "answers are; in the line of all sets: of sets' scores with their means. These are descriptions without intervals. Rows "
        "that a rival finds too could have been found without the model."
    )
    if starred:
        note += f" * Length goes with the scores (|rho| of at least {CLEAR}), and no rival does as closely: it may explain them."
    return [*parts, f"<p class='meta'>{escape(note)}</p>"]


def _in_set(beside: Mapping[str, Beside], rivals: Sequence[str]) -> Line:
    """Correlations over a set's rows, and their line."""
    cells = [x for r in rivals for x in (number(beside[r].mean, ".3g"), number(beside[r].rho, "+z.2f"))]
    return {r: beside[r].rho for r in rivals}, [f"{beside[LENGTH].rows:,}", *cells]


def _over_sets(
    beside: Mapping[str, Mapping[str, Beside]], standing: Standing, rivals: Sequence[str]
) -> tuple[dict[str, float], list[str]]:
    """Correlations over the sets, and their line."""
    rho = {rival: between(beside, standing, rival) for rival in rivals}
    return rho, ["-", *(x for r in rho.values() for x in ("-", number(r, "+z.2f")))]


def _by_length(rho: Mapping[str, float]) -> bool:
    """Whether the scores go with length, and with no rival as closely."""
    size = {name: abs(r) for name, r in rho.items() if math.isfinite(r)}
    length = size.pop(LENGTH, 0.0)
    return length >= CLEAR and all(length > r + SLACK for r in size.values())
