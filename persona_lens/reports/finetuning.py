"""Reports of finetuning: a training, shifts, defences compared, a pilot.

Names of models, traits and defences are anyone's text: `short` makes one short visible line of them, and what goes into the page
is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np

from persona_lens.correlation import INTERVAL_FAMILIES, INTERVAL_RANGE, ShiftCorrelation
from persona_lens.figures.finetuning import (
    READ,
    change,
    coherence,
    correlations,
    most_risen,
    over_questions,
    penalised,
    scored,
    series,
    shift_at,
    watched_in,
)
from persona_lens.figures.monitoring import told
from persona_lens.finetuning.comparison import Cell, Comparison
from persona_lens.finetuning.foretold import family_of
from persona_lens.finetuning.pilot import Pilot, Tried
from persona_lens.finetuning.shift import READINGS, Reading, ShiftRun
from persona_lens.finetuning.training import Finetuned
from persona_lens.monitoring.prediction import Estimate
from persona_lens.reports.page import image, listed, number, page, provenance, short, table
from persona_lens.store import read_json
from persona_lens.vectors import hook_name

SKIPPED: Final = 20  # rows whose reasons are told
NAMED: Final = 3  # finetuned models that a verdict tells of one by one
CORRELATED: Final[tuple[Reading, ...]] = ("prompt_last", "base_answers")
FLOORS: Final = (
    "What random directions reach stands beside every r: finetuning moves residuals along few directions, and most directions see "
    "those, so random ones reach a high r too. A high r alone (the paper's figure) is no evidence for a persona direction. Drawn "
    "with the covariance of the base model's residuals (base) and with that of these shifts (shifts, the hard control): `high` is "
    "the 95th percentile of |r|, which is the 97.5th of r; p is the share of random directions whose |r| is at least as large, for "
    "one trait, not corrected for how many there are. Intervals of r are 95 % over families of data sets; there is none below "
    f"{INTERVAL_FAMILIES} families, nor where scores span less than {INTERVAL_RANGE:g} points."
)
CIRCULAR: Final = (
    "Own answers are nearly circular: the score is read from these very answers. So they are not correlated with it, and show only "
    "how far the answers themselves lie along the vector."
)
ONE_TRAINING: Final = (
    "Intervals are 95 % over questions, for these trained models: how much another training would differ is not in them."
)


def finetune_verdict(run: Finetuned) -> str:
    """How long was trained on what, the loss at the start and at the end, and where the watched projections went."""
    _, loss = series(run, "loss")
    n = _few(len(loss))
    acting = read_json(run.path / "run.json")["arguments"]["prevent"]
    under = f"with {len(acting)} intervention{'s' if len(acting) > 1 else ''} acting" if acting else "without any intervention"
    moved = [
        f"{short(name)} at layer {layer} {number(first)} to {number(last)}"
        for name, layer in watched_in(run)
        for first, last in [_ends(run, f"projection/{name}/{layer}")]
    ]
    watched = f" The answers' mean projections over the same steps: {', '.join(moved)} (residual units)." if moved else ""
    skipped = len(run.record["skipped"])
    gone = f" {skipped} row{'s were' if skipped > 1 else ' was'} skipped." if skipped else ""
    what = "training loss with penalties" if penalised(run) else "training loss"
    over = f"over the first and the last {n} steps" if n > 1 else "at the first and at the last step"
    first, last = _ends(run, "loss")
    return (
        f"Trained for {len(loss)} steps on {run.record['rows']} conversations {under}. Mean {what} {over}: "
        f"{number(first, '.3f')} and {number(last, '.3f')} nats per token.{watched}{gone}"
    )


def _few(steps: int) -> int:
    """How many steps count as the first or last ones: a tenth."""
    return max(1, steps // 10)


def _ends(run: Finetuned, key: str) -> tuple[float, float]:
    """Means over the first and the last steps."""
    _, values = series(run, key)
    n = _few(len(values))
    return (float(values[:n].mean()), float(values[-n:].mean())) if len(values) else (math.nan, math.nan)


def finetune_page(run: Finetuned, images: Mapping[str, bytes]) -> str:
    manifest = read_json(run.path / "run.json")
    arguments = manifest["arguments"]
    name = short(run.path.resolve().name)
    ends = [
        (short(what), hook_name(layer), kind, *(number(x, "+.4g") for x in _ends(run, f"{kind}/{what}/{layer}")))
        for what, layer in watched_in(run)
        for kind in ("projection", "derivative")
    ]
    steps = _few(len(run.history))
    note = (
        f"Means over the first and the last {steps} of {len(run.history)} steps. Projection: of learned tokens, residual units. "
        "Derivative: how much a step's mean loss would change, in nats per residual unit, if the unit vector were added at every "
        "learned token; negative where the loss wants the answers to move towards the trait."
    )
    penalties = [short(p, 300) for p in arguments["penalties"]]
    parts = [
        f"<h1>Finetuning: {escape(name)}</h1><p><b>{escape(finetune_verdict(run))}</b></p>",
        "<h2>Step by step</h2>",
        image(images["training"], "Loss, and what was watched; each step is another batch, so that lines are rough."),
        *([table(("direction", "hook", "what", "first steps", "last steps"), ends)] if ends else []),
        *([f"<p class='meta'>{escape(note)}</p>"] if ends else []),
        "<h2>What acted while it was trained</h2>",
        *[f"<div>{escape(short(line, 300))}</div>" for line in str(run.record["prevent"]).splitlines()],
        f"<p>Penalties on the loss: {escape(', '.join(penalties) or 'none')}. Afterwards nothing acts.</p>",
        *_skipped(run.record["skipped"]),
        "<h2>Settings</h2>",
        table(("setting", "value"), [(k, short(str(v))) for k, v in arguments["settings"].items()]),
        provenance(manifest),
    ]
    return page(f"Finetuning: {name}", parts)


def _skipped(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    more = f", the first {SKIPPED} of them" if len(found) > SKIPPED else ""
    rows = [(s["place"], short(s["reason"], 300)) for s in found[:SKIPPED]]
    return [f"<h2>Rows that were skipped</h2><p>{len(found)}{more}:</p>", table(("row", "reason"), rows)]


def shift_verdict(run: ShiftRun, reading: Reading = "prompt_last") -> str:
    """Whether the shift goes with the trait over the models, beside what random directions reach; of few models, what each did."""
    found, said = correlations([run], reading)
    if found:
        return _foretelling(found, reading) + (f" {said}" if said else "")
    one_by_one = " ".join(_model(run, name, reading) for name in run.names[:NAMED])
    more = f" {len(run.names) - NAMED} more models are in the report." if len(run.names) > NAMED else ""
    return f"{one_by_one}{more}" + (f" {said}" if len(run.names) > 1 else "")


def _model(run: ShiftRun, name: str, reading: Reading) -> str:
    """What one finetuning did: to the trait whose score rose most, or, without scores, to the one that was shifted most."""
    shifts = [shift_at(run, name, reading, t) for t in run.traits]
    moved = sum(s.low > 0 or s.high < 0 for s in shifts)
    n = len(run.traits)
    if scored([run]):
        rises = [change(a, b) for a, b in zip(run.shifts[name].scores, run.base_scores, strict=True)]
        top = int(np.argmax([-np.inf if np.isnan(r.value) else r.value for r in rises]))
        before, after = run.base_scores[top].mean, run.shifts[name].scores[top].mean
        how = f"its score goes from {number(before, '.0f')} to {number(after, '.0f')} (change {told(rises[top], '+z.1f')})"
        which = "whose score rises most"
    else:
        top = int(np.argmax([-np.inf if np.isnan(s.value) else abs(s.value) for s in shifts]))
        how, which = "the answers were not scored", "with the largest shift"
    trait = run.traits[top]
    of = f", of {n} traits the one {which}" if n > 1 else ""
    return (
        f"{short(name)} moved by {told(shifts[top], '+z.3g')} along {short(trait)}{of} ({READ[reading]}, layer "
        f"{run.layers[trait]}), and {how}. Its shift is other than zero for {moved} of {n} trait{'s' if n > 1 else ''} "
        "(95 % over questions, not corrected)."
    )


def _foretelling(found: Mapping[str, ShiftCorrelation], reading: Reading) -> str:
    """Counts beside nulls: for how many traits r is above 0, for how many of these above random directions and other vectors."""
    sure = {t: c for t, c in found.items() if c.low > 0}
    bare = [t for t, c in found.items() if math.isnan(c.low)]
    each = ", ".join(f"{short(t)} {_r(c)}" for t, c in found.items())
    some = next(iter(found.values()))
    said = (
        f"Over {some.sets} finetuned models of {some.families} families, the shift ({READ[reading]}) goes with the trait score "
        f"afterwards for {len(sure)} of {len(found)} traits (95 % interval of r above 0); r: {each}."
    )
    if bare:
        said += f" There is no interval for {listed([short(t) for t in bare])}."
    if common := [t for t, c in sure.items() if not all(f.p_value < 0.05 for f in c.floors)]:
        said += (
            " Random directions reach as much (p not below .05, drawn with the covariance of the base model's residuals or with "
            f"that of the shifts) for {listed([short(t) for t in common])}: there r is no evidence for a persona direction."
        )
    elif sure:
        said += (
            " Random directions rarely reach as much (p < .05 each, drawn with the covariance of the base model's residuals and "
            "with that of the shifts)."
        )
    if better := [t for t, c in sure.items() if _best_other(c) >= abs(c.r)]:
        said += f" Another trait's vector does as well for {listed([short(t) for t in better])}."
    return said


def _best_other(c: ShiftCorrelation) -> float:
    return max((abs(r) for r in c.others.values() if math.isfinite(r)), default=-math.inf)


def _r(c: ShiftCorrelation) -> str:
    return told(Estimate(c.r, c.low, c.high))


def shift_page(run: ShiftRun, images: Mapping[str, bytes]) -> str:
    manifest = read_json(run.path / "run.json")
    title = f"Finetuning shift: {short(str(manifest['model'].get('name', '')))}"
    judge = manifest["arguments"].get("judge")
    origin = f"{len(run.names)} finetuned model{'s' if len(run.names) > 1 else ''}; judge {short(str(judge)) if judge else 'none'}."
    parts = [
        f"<h1>{escape(title)}</h1><p><b>{escape(shift_verdict(run))}</b></p><p class='meta'>{escape(origin)}</p>",
        *(image(content, CAPTIONS[name]) for name, content in images.items()),
        *_correlation_parts(run),
        "<h2>Models</h2>",
        f"<p class='meta'>{escape(f'Shifts in residual units. {ONE_TRAINING} {CIRCULAR}')}</p>",
        *(part for name in run.names for part in (f"<h3>{escape(short(name))}</h3>", _model_table(run, name))),
        provenance(manifest),
    ]
    return page(title, parts)


CAPTIONS: Final = {
    "profile": "Mean shift along each vector on its trait's questions; bands are 95 % intervals over questions.",
    "scatter": "Shift at the last prompt token, before anything is answered; one mark per finetuned model.",
    "scatter_base_answers": "Shift over the base model's answers, forced on both models; one mark per finetuned model.",
}


def _correlation_parts(run: ShiftRun) -> list[str]:
    if len(run.names) < 2:
        return []
    parts = ["<h2>Does the shift foretell the trait?</h2>"]
    tables = False
    for reading in CORRELATED:
        found, said = correlations([run], reading)
        parts.append(f"<h3>{escape(READ[reading].capitalize())}</h3>")
        parts += [f"<p>{escape(said)}</p>"] if said else []
        parts += [_correlation_table(run, found), _other_table(found)] if found else []
        tables = tables or bool(found)
    meaning = f"{FLOORS} {_families(run)}" if tables else _families(run)
    return [*parts, f"<p class='meta'>{escape(meaning)}</p>"]


def _correlation_table(run: ShiftRun, found: Mapping[str, ShiftCorrelation]) -> str:
    kinds = [f.kind for f in next(iter(found.values())).floors]
    head = ("trait", "hook", "r", *(f"{kind}: {what}" for kind in kinds for what in ("high", "p")), "models", "families")
    rows = [
        (
            short(trait),
            hook_name(run.layers[trait]),
            _r(c),
            *(x for f in c.floors for x in (number(f.high, ".2f"), number(f.p_value, ".2g"))),
            c.sets,
            c.families,
        )
        for trait, c in found.items()
    ]
    return table(head, rows)


def _other_table(found: Mapping[str, ShiftCorrelation]) -> str:
    """r of each trait's score with the shifts along every vector."""
    rows = [
        (short(score), *(number(c.r if vector == score else c.others[vector], "+z.2f") for vector in found))
        for score, c in found.items()
    ]
    return table(("r of the score of", *(f"{short(t)} vector" for t in found)), rows)


def _families(run: ShiftRun) -> str:
    counts: dict[str, int] = {}
    for name in run.names:
        counts[family_of(name)] = counts.get(family_of(name), 0) + 1
    listed = ", ".join(f"{short(f)} ({n})" for f, n in sorted(counts.items()))
    return f"Families, by what stands before the last hyphen of a name: {listed}."


def _model_table(run: ShiftRun, name: str) -> str:
    found = run.shifts[name]
    rows: list[tuple[str, ...]] = []
    for i, trait in enumerate(run.traits):
        row = [told(shift_at(run, name, reading, trait), "+z.3g") for reading in READINGS]
        if scored([run]):
            before, after = run.base_scores[i], found.scores[i]
            row += [told(over_questions(s.score), "z.0f") for s in (before, after)]
            row.append(told(change(after, before), "+z.1f"))
        rows.append((short(trait), hook_name(run.layers[trait]), *row))
    head = ("trait", "hook", *(READ[reading] for reading in READINGS))
    return table((*head, "score before", "after", "change") if scored([run]) else head, rows)


def comparison_verdict(comparison: Comparison) -> str:
    """What ordinary finetuning does to the trait it raises most, and how far each defence gets against it."""
    trait = most_risen(comparison)
    base, ordinary = comparison.base.of(trait), comparison.ordinary.of(trait)
    rise, n = change(ordinary, base), len(comparison.traits)
    of = f", of {n} traits the one that rises most," if n > 1 else ""
    if math.isnan(rise.value):
        return "Ordinary finetuning and the base model have no scores to compare."
    if not rise.low > 0:
        return (
            f"Ordinary finetuning is not shown to raise {short(trait)}{of} (from {base.mean:.0f} to {ordinary.mean:.0f}, change "
            f"{told(rise, '+z.1f')}): there is nothing here to defend against."
        )
    names = list(dict.fromkeys(cell.name for cell in comparison.cells[2:]))
    best = [_least(comparison, name, trait) for name in names]
    return (
        f"Ordinary finetuning raises {short(trait)}{of} from {base.mean:.0f} to {ordinary.mean:.0f} (change {told(rise, '+z.1f')}) "
        f"at coherence {number(coherence(comparison.ordinary), '.0f')}. Against that, each defence at the dose that scores lowest "
        f"(chosen on these very answers): {'; '.join(_against(comparison, cell, trait) for cell in best)}."
    )


def _least(comparison: Comparison, name: str, trait: str) -> Cell:
    """The cell of a defence with the lowest score."""
    cells = [c for c in comparison.cells[2:] if c.name == name]
    return min(cells, key=lambda c: (math.isnan(c.of(trait).mean), c.of(trait).mean))


def _against(comparison: Comparison, cell: Cell, trait: str) -> str:
    found = change(cell.of(trait), comparison.ordinary.of(trait))
    how = "" if found.high < 0 else ", not shown to lower it"
    task = "" if cell.task is None else f", {short(comparison.task or 'task')} {number(cell.task, '.3g')}"
    return (
        f"{short(cell.name)} at dose {cell.dose:g}: {number(cell.of(trait).mean, '.0f')} ({told(found, '+z.1f')}{how}), coherence "
        f"{number(coherence(cell), '.0f')}{task}"
    )


def comparison_page(comparison: Comparison, images: Mapping[str, bytes]) -> str:
    manifest = read_json(comparison.path / "run.json")
    trait = most_risen(comparison)
    gaps = sum(s.gaps for cell in comparison.cells for s in cell.scores)
    judge = short(str(manifest["arguments"].get("judge")))
    note = (
        f"Scores by judge {judge}, mean over each trait's questions; {gaps} answers have no score. Coherence: over all traits' "
        f"questions. {ONE_TRAINING}"
    )
    parts = [
        f"<h1>Defences compared</h1><p><b>{escape(comparison_verdict(comparison))}</b></p>",
        "<h2>Dose and response</h2>",
        image(images["frontier"], f"{short(trait)}, which ordinary finetuning raises most, and what each dose costs."),
        "<h2>All cells</h2>",
        _cell_table(comparison, trait),
        f"<p class='meta'>{escape(note)}</p>",
        f"<h2>Changes of {escape(short(trait))}</h2>",
        _change_table(comparison, trait),
        "<p class='meta'>Differences question by question; an interval around 0 shows no difference, and no equality either.</p>",
        "<h2>Side effects</h2>",
        image(images["side_effects"], "Every trait's score minus the base model's."),
        *_capability_table(comparison),
        provenance(manifest),
    ]
    return page("Defences compared", parts)


def _cell_table(comparison: Comparison, trait: str) -> str:
    head = ["defence", "dose", *(short(t) for t in comparison.traits), "coherence"]
    capable = any(c.capability for c in comparison.cells)
    held_out = any(math.isfinite(c.held_out_loss) for c in comparison.cells)
    head += ["capability"] * capable
    head += [f"task: {short(comparison.task)}"] if comparison.task else []
    head += ["held-out loss"] * held_out
    rows: list[list[str]] = []
    for cell in comparison.cells:
        found = {t: over_questions(cell.of(t).score) for t in comparison.traits}
        row = [short(cell.name), _dose(cell)]
        row += [told(e, "z.0f") if t == trait else number(e.value, ".0f") for t, e in found.items()]
        row.append(number(coherence(cell), ".0f"))
        row += [number(cell.capable, ".3f")] if capable else []
        row += [number(cell.task, ".3g")] if comparison.task else []
        row += [number(cell.held_out_loss, ".3f")] if held_out else []
        rows.append(row)
    return table(head, rows)


def _change_table(comparison: Comparison, trait: str) -> str:
    base, ordinary = comparison.base, comparison.ordinary
    rows = [
        (
            short(cell.name),
            _dose(cell),
            told(over_questions(cell.of(trait).score), "z.0f"),
            "-" if cell is base else told(change(cell.of(trait), base.of(trait)), "+z.1f"),
            "-" if cell is ordinary else told(change(cell.of(trait), ordinary.of(trait)), "+z.1f"),
        )
        for cell in comparison.cells
    ]
    return table(("defence", "dose", "score", "minus base model", "minus ordinary finetuning"), rows)


def _dose(cell: Cell) -> str:
    return f"{cell.dose:g}" if cell.dose else "-"


def _capability_table(comparison: Comparison) -> list[str]:
    """Each task's metrics, where more than one stands behind the mean."""
    metrics = list(dict.fromkeys((t, m) for c in comparison.cells for t, found in c.capability.items() for m in found))
    if len(metrics) < 2:
        return []
    rows = [
        (short(c.name), _dose(c), *(number(c.capability.get(t, {}).get(m), ".3f") for t, m in metrics)) for c in comparison.cells
    ]
    return ["<h2>Capability</h2>", table(("defence", "dose", *(f"{short(t)}: {short(m)}" for t, m in metrics)), rows)]


def pilot_verdict(pilot: Pilot) -> str:
    """What the pilot recommends, and on how little it rests."""
    return (
        f"Pilot on {short(pilot.trait)}: {short(pilot.recommendation.why, 1000)}. One short training per dose; no answers of the "
        "trained models were sampled or judged."
    )


def pilot_page(pilot: Pilot, images: Mapping[str, bytes]) -> str:
    manifest = read_json(pilot.path / "run.json")
    title = f"Pilot of preventative steering: {short(pilot.trait)}"
    first = pilot.tried[0]
    rows = [
        (
            f"{t.dose:g}",
            told(over_questions(t.shift), "+z.3f"),
            _share(t.mean, first.mean),
            f"{t.loss:.4f}",
            _share(*_learned(pilot, t, first)),
        )
        for t in pilot.tried
    ]
    note = (
        f"Shift of the response mean along the vector at the last layer, over the base model's own answers to {len(first.shift)} "
        "questions, in units of the vector's length (mean differences of positive and negative answers); all is read without "
        f"steering. Loss of the base model: {pilot.base_loss:.4f} nats per token. {ONE_TRAINING}"
    )
    parts = [
        f"<h1>{escape(title)}</h1><p><b>{escape(pilot_verdict(pilot))}</b></p>",
        image(images["pilot"], "Left: what is left of the shift; the band is what is recommended. Right: the price in learning."),
        table(("dose", "shift", "left of it", "held-out loss", "still learned"), rows),
        f"<p class='meta'>{escape(note)}</p>",
        provenance(manifest),
    ]
    return page(title, parts)


def _learned(pilot: Pilot, tried: Tried, first: Tried) -> tuple[float, float]:
    """What a dose gains in loss, and what training without a vaccine does; a whole of nothing where that gains nothing."""
    return pilot.base_loss - tried.loss, max(pilot.base_loss - first.loss, 0.0)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:z.0%}" if whole and math.isfinite(part / whole) else "-"
