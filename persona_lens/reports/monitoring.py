"""Reports of monitored chats, of studies of prediction and of calibrations.

Names of chats and conditions and reasons are anyone's text: `short` makes one short visible line of them, and what goes into the
page is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy.stats import beta, betabinom

from persona_lens.errors import MonitoringError
from persona_lens.figures.monitoring import (
    RATES,
    SAID,
    alarming,
    is_vector,
    threshold,
    told,
    values_of,
    verdicts_of,
)
from persona_lens.monitoring.calibration import Calibration
from persona_lens.monitoring.prediction import Advantage, Skill
from persona_lens.monitoring.rendering import Scale, html_of, scale_of
from persona_lens.monitoring.run import STATISTICS, MonitorRun, Verdict, WatchedChat, peaks, standing_out
from persona_lens.monitoring.study import Prediction, PredictionRun
from persona_lens.reports.page import image, listed, number, page, provenance, short, table
from persona_lens.store import read_json, read_manifest
from persona_lens.vectors import hook_name

TABLED: Final = 100  # chats in the table
SKIPPED: Final = 20  # records whose reasons are told
CONTENT: Final = {"own": "by the message's own projections", "embedding": "by an embedding of the message"}
OBSERVED: Final = {"answer": "answers", "before": "last prompt tokens"}


def monitor_verdict(run: MonitorRun) -> str:
    """How many conversations alarm beside how many neutral ones do, on which traits, and what is held constant."""
    record, calibration = run.record, run.record["calibration"]
    if calibration is None:
        return _uncalibrated(run)
    n, rate, horizon = record["chats"], record["rate"], calibration["settings"]["horizon"]
    several = len(run.probes) > 1
    where = f"any of {len(run.probes)} traits" if several else short(run.probes[0])
    counts = {s: alarming(run, calibration["names"][-1], s) for s in STATISTICS}
    p = {s: _p_neutral(k, n, rate, calibration["counts"]["calibrating"]) for s, k in counts.items()}
    if record["note"]:
        chance = dict.fromkeys(STATISTICS, "")
        more = "The rate is that of the model that was calibrated, which has other weights."
    else:
        chance = {s: f", p = {x:.2g} if all were neutral" for s, x in p.items()}
        enough = min(p.values()) < 0.05 / len(p)
        more = "That is more than neutral conversations explain." if enough else "So many may alarm where all are neutral."
    found = [f"{k} by their {SAID[s]} ({_share(k, n)}{chance[s]})" for s, k in counts.items()]
    by_trait = [f"{short(name)} {alarming(run, name, *STATISTICS)}" for name in run.probes]
    each = f" Trait by trait, each at these rates: {', '.join(by_trait)}." if several else ""
    return (
        f"Of {n} conversations {listed(found)} alarm on {where} within {horizon} turns; of neutral ones at most "
        f"{100 * rate:g} % do by each. {more}{each}"
    )


def _uncalibrated(run: MonitorRun) -> str:
    chats = list(run.chats())
    highest: list[str] = []
    for k, (name, top) in enumerate(zip(run.probes, peaks(chats).argmax(0), strict=True)):
        value, turn = _highest(chats[top], k)
        highest.append(f"{short(name)} {value} (chat {short(chats[top].name)}, turn {turn})")
    return (
        f"{run.record['chats']} chats ({run.record['turns']} turns) were read without a calibration: nothing can alarm, and "
        f"projections on different traits do not compare. The highest answers: {', '.join(highest)}."
    )


def _highest(chat: WatchedChat, k: int) -> tuple[str, str]:
    """A chat's highest value on a probe, and its turn (from 1); dashes where nothing was read."""
    values = np.where(np.isnan(values_of(chat)[:, k]), -np.inf, values_of(chat)[:, k])
    at = int(values.argmax())
    return ("-", "-") if np.isneginf(values[at]) else (number(float(values[at])), str(at + 1))


def _share(k: int, n: int) -> str:
    """A share with its 95 % interval (Clopper and Pearson's)."""
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return f"{100 * k / n:.0f} % [{100 * low:.0f} %, {100 * high:.0f} %]"


def _p_neutral(k: int, n: int, rate: float, calibrating: int) -> float:
    """P(k or more of n alarm) if all are exchangeable with the calibrating ones: the threshold is one of these, ranked."""
    return float(betabinom.sf(k - 1, n, *_ranks(calibrating, rate)))


def _ranks(calibrating: int, rate: float) -> tuple[int, int]:
    """How many of the ranks of a new conversation among the calibrating ones alarm, and how many do not."""
    calm = math.ceil((calibrating + 1) * (1 - rate) - 1e-9)
    return calibrating + 1 - calm, calm


def monitor_page(run: MonitorRun, images: Mapping[str, bytes]) -> str:
    record, manifest = run.record, read_manifest(run.path)
    chats = list(run.chats())
    title = f"Monitored chats: {short(manifest['arguments']['chats'])}"
    against = "with the neutral ones they are compared with" if record["calibration"] else "without a calibration"
    parts = [
        f"<h1>{escape(title)}</h1><p><b>{escape(monitor_verdict(run))}</b></p>",
        *_note(record["note"]),
        *_skipped(record),
        "<h2>Turn by turn</h2>",
        image(images["trajectories"], f"{len(chats)} chats, {record['turns']} turns, {against}."),
        "<h2>Chats</h2>",
        *(_alarm_table(run, chats) if record["calibration"] else _projection_table(run, chats)),
        "<h2>The chats that stand out most</h2>",
        *_shown(run, chats),
        *(_meaning(run, chats) if record["calibration"] else []),
        provenance(manifest),
    ]
    return page(title, parts)


def _note(note: str | None) -> list[str]:
    return [f"<p class='answer positive'><b>Other weights: {escape(short(note, 1000))}.</b></p>"] if note else []


def _skipped(record: Mapping[str, Any]) -> list[str]:
    found = record["skipped"]
    if not found:
        return []
    rows = [(f"{record['unit']} {s['place']}", short(s["reason"], 300)) for s in found[:SKIPPED]]
    more = f", the first {SKIPPED} of them" if len(found) > SKIPPED else ""
    records = f"{len(found)} record{'s were' if len(found) > 1 else ' was'} skipped{more}:"
    return [f"<p>{records}</p>", table(("place", "reason"), rows)]


def _alarm_table(run: MonitorRun, chats: Sequence[WatchedChat]) -> list[str]:
    """The chats with alarms first, and a row for each trait."""
    loud = {name: _loudness(verdicts) for name, verdicts in run.record["verdicts"].items()}
    ordered = sorted(standing_out(chats), key=lambda c: loud[c.name], reverse=True)[:TABLED]
    rows: list[tuple[Any, ...]] = []
    for chat in ordered:
        who = (short(chat.name), len(chat.readings))
        for verdict in verdicts_of(run, chat).values():
            rows.append((*who, *_alarm_cells(verdict)))
            who = ("", "")
    head = ("chat", "turns", "trait", "alarms at turn", "answers", "changes at turn", "trend")
    note = (
        f"{len(ordered)} of {len(chats)} chats; all turns are in turns.csv. Alarms at turn: of the conversation, by its "
        f"{' / '.join(SAID[s] for s in STATISTICS)}. Answers: how many alarm. Changes at turn: where two levels fit best (p). "
        "Trend: standard deviations per turn (p). Each p is the share of neutral conversations that change or move as much, for "
        "one chat and one trait, not corrected for how many there are."
    )
    return [table(head, rows), f"<p class='meta'>{escape(note)}</p>"]


def _loudness(verdicts: Sequence[Mapping[str, Any]]) -> tuple[bool, bool]:
    """Whether a conversation alarms, and whether an answer of it does."""
    return any(t is not None for v in verdicts for t in v["turns"].values()), any(v["answers"] for v in verdicts)


def _alarm_cells(found: Verdict) -> tuple[Any, ...]:
    turns = [found.turns[s] for s in STATISTICS]
    return (
        short(found.probe),
        " / ".join("-" if t is None else str(t) for t in turns) if any(t is not None for t in turns) else "-",
        len(found.answers) or "-",
        "-" if found.change is None else f"{found.change.turn} (p = {found.change.p_value:.2g})",
        "-" if found.trend is None else f"{found.trend.slope:+.2f} (p = {found.trend.p_value:.2g})",
    )


def _projection_table(run: MonitorRun, chats: Sequence[WatchedChat]) -> list[str]:
    ordered = standing_out(chats)[:TABLED]
    rows: list[tuple[Any, ...]] = []
    for chat in ordered:
        who = (short(chat.name), len(chat.readings))
        for k, name in enumerate(run.probes):
            rows.append((*who, short(name), _mean(values_of(chat)[:, k], "+.2f"), *_highest(chat, k)))
            who = ("", "")
    note = f"{len(ordered)} of {len(chats)} chats; all turns are in turns.csv. Projections of answers, residual-stream units."
    return [table(("chat", "turns", "trait", "mean", "highest", "at turn"), rows), f"<p class='meta'>{escape(note)}</p>"]


def _shown(run: MonitorRun, chats: Sequence[WatchedChat]) -> list[str]:
    """The chats that are kept token by token, each on the probe on which it goes up furthest; one scale per probe."""
    places = {c.name: i for i, c in enumerate(chats)}
    furthest = peaks(chats).argmax(1)
    what = "highest score" if run.record["calibration"] else "highest answer"
    parts: list[str] = []
    for reading in run.shown:
        k = int(furthest[places[reading.name]])
        value, turn = _highest(chats[places[reading.name]], k)
        parts.append(f"<p class='meta'>{what} on {escape(short(run.probes[k]))}: {value} at turn {turn}</p>")
        parts.append(html_of(reading, run.probes[k], _scale(run, k)))
    return parts


def _scale(run: MonitorRun, k: int) -> Scale:
    return scale_of(torch.cat([r.values[p.start : p.stop, k] for r in run.shown for p in r.parts]))


def _meaning(run: MonitorRun, chats: Sequence[WatchedChat]) -> list[str]:
    record, calibration = run.record, run.record["calibration"]
    settings, rate = calibration["settings"], f"{100 * record['rate']:g} %"
    horizon, what = settings["horizon"], OBSERVED[settings["observed"]][:-1]
    longer = sum(len(c.readings) > horizon for c in chats)
    said = (
        f"An answer alarms if its score (of the {what}) is one that at most {rate} of neutral answers exceed; a conversation "
        f"alarms at the turn at which its {' or its '.join(SAID[s] for s in STATISTICS)} (of later turns above all before them) "
        f"passes what at most {rate} of neutral conversations pass anywhere within {horizon} turns, each at that rate and `any` at "
        f"that rate for all traits together. {_held_constant(settings, calibration['explained'], run.probes)} Turns beyond "
        f"{horizon} are not covered by the alarm of a conversation ({longer} of {len(chats)} chats are longer); their answers "
        "alarm one by one."
    )
    layers = {p["name"]: hook_name(p["layer"]) for p in record["probes"]}
    rows = [
        (short(name), layers.get(name, "-"), *(number(limits[i]) for limits in calibration["thresholds"].values()))
        for i, name in enumerate(calibration["names"])
    ]
    counts = calibration["counts"]
    origin = (
        f"Thresholds in standard deviations, from {counts['calibrating']} neutral conversations of {short(calibration['model'])} "
        f"({counts['fitted']} others gave what is expected)."
    )
    head = ("trait", "read at", *(f"alarm of a{'n' if w[0] == 'a' else ''} {w}" for w in calibration["thresholds"]))
    return ["<h2>What the alarms mean</h2>", f"<p>{escape(said)}</p>", table(head, rows), f"<p class='meta'>{escape(origin)}</p>"]


def _held_constant(settings: Mapping[str, Any], explained: Sequence[float | None], names: Sequence[str]) -> str:
    if settings["content"] == "none":
        return "Nothing is held constant of what the user says: a change of topic can alarm as a change of persona does."
    shares = [f"{number(e and 100 * e, '.0f')} % ({short(n)})" for n, e in zip(names, explained, strict=True)]
    return (
        f"What the user says is held constant {CONTENT[settings['content']]}, which explained {listed(shares)} of the variance of "
        f"the neutral conversations' {OBSERVED[settings['observed']]}."
    )


def prediction_verdict(run: PredictionRun) -> str:
    """How well the projection foretells the answers, and whether text, random directions or other vectors do as well."""
    found = run.prediction
    main, others, advantages = found.comparison.main, found.comparison.others, found.comparison.advantages
    r, within = main.correlations.overall, main.correlations.within
    reached = [f.overall.high for f in found.floors]
    if not r.low > 0:
        how = "is not shown to foretell"
    elif reached and not r.value > max(reached):
        how = "foretells no better than random directions"
    else:
        how = "foretells"
    floors = [f"{f.overall.high:.2f} ({'covariance of the prompts' if f.matched else 'isotropic'})" for f in found.floors]
    beside = [_beside(s, a) for s, a in zip(others, advantages, strict=True) if not is_vector(s.name)]
    vectors = [s for s in others if is_vector(s.name) and np.isfinite(s.correlations.overall.value)]
    if vectors:
        best = max(vectors, key=lambda s: abs(s.correlations.overall.value))
        beside.append(f"of {len(vectors)} other vectors the {short(best.name)} goes furthest (r {told(best.correlations.overall)})")
    if floors:
        beside.append(f"5 % of random directions reach |r| {listed(floors)}")
    return (
        f"The projection of the last prompt token on the {short(found.trait)} vector at layer {found.layer} {how} the mean score: "
        f"r {told(r)} over {main.correlations.cells} cells, AUROC {told(main.auroc, '.2f')}; within a condition it "
        f"{'does' if within.low > 0 else 'is not shown to'} (r {told(within)}). Beside it: {'; '.join(beside)}."
    )


def _beside(skill: Skill, advantage: Advantage) -> str:
    """Whether a baseline does as well as the vector, by the difference of r over the same cells."""
    a = advantage.overall
    if np.isnan(a.low):
        how = "has no interval for the difference"
    else:
        how = "does worse" if a.low > 0 else "does better" if a.high < 0 else "does as well"
    return f'"{short(skill.name)}" {how} (r {told(skill.correlations.overall)}, the vector\'s advantage {told(a)})'


def prediction_page(run: PredictionRun, images: Mapping[str, bytes]) -> str:
    found, manifest = run.prediction, read_manifest(run.path)
    outcomes = found.outcomes
    answers = int(outcomes.answers.sum())
    gone = ", ".join(short(name) for name in found.left_out)
    size = (
        f"{len(outcomes.conditions)} conditions x {len(outcomes.questions)} questions, {answers} scored answers by judge "
        f"{short(str(manifest['arguments']['judge']))}; {found.gaps} answers have no score."
        f"{f' Left out, since their prompts do not fit into the context: {gone}.' if gone else ''}"
    )
    what = (
        "A cell is one condition and one question; intervals are 95 % over questions, for these conditions. Text of unseen "
        "questions has been told how each condition scores, which no monitor is; text of unseen conditions meets them as the "
        "projection does. Between conditions: of their means, freed of the noise that few questions leave; plain: as they are."
    )
    parts = [
        f"<h1>Foretelling {escape(short(found.trait))}</h1><p><b>{escape(prediction_verdict(run))}</b></p>",
        f"<p>{escape(size)}</p>",
        "<h2>Projections and answers</h2>",
        image(images["prediction"], "Left: one point per cell, large ones are conditions' means. Right: bars are 95 % intervals."),
        _condition_table(found),
        "<h2>Predictors</h2>",
        *_predictor_tables(found),
        f"<p class='meta'>{escape(what)}</p>",
        *_floor_table(found),
        "<h2>Layers</h2>",
        _layer_table(found),
        provenance(manifest),
    ]
    return page(f"Foretelling {short(found.trait)}", parts)


def _condition_table(found: Prediction) -> str:
    o = found.outcomes
    rows = [
        (i, short(name), _mean(x), _mean(y, ".0f"), f"{a.sum():.0f} of {n.sum():.0f}")
        for i, (name, x, y, a, n) in enumerate(
            zip(o.conditions, found.projection, o.score, o.above, o.answers, strict=True), start=1
        )
    ]
    return table(("", "condition", "mean projection", "mean score", "answers above 50"), rows)


def _mean(values: np.ndarray, form: str = "+.1f") -> str:
    known = values[np.isfinite(values)]
    return f"{known.mean():{form}}" if len(known) else "-"


def _predictor_tables(found: Prediction) -> list[str]:
    head = ("predictor", "r over cells", "r between conditions", "plain", "r within", "left out of within", "AUROC", "cells")
    rows: list[tuple[Any, ...]] = []
    for skill in (found.comparison.main, *found.comparison.others):
        c = skill.correlations
        r = told(c.overall), told(c.between), number(c.between_plain), told(c.within)
        rows.append((short(skill.name), *r, c.left_out, told(skill.auroc, ".2f"), c.cells))
    ahead = [(short(a.over), told(a.overall), told(a.auroc)) for a in found.comparison.advantages]
    main = short(found.comparison.main.name)
    return [table(head, rows), table((f"advantage of the {main} over", "r over cells", "AUROC"), ahead)]


def _floor_table(found: Prediction) -> list[str]:
    rows = [
        (
            "covariance of the prompts" if f.matched else "isotropic",
            f.directions,
            *(f"{number(x.mean, '.2f')} / {number(x.high, '.2f')}" for x in (f.overall, f.between, f.within, f.auroc)),
        )
        for f in found.floors
    ]
    head = ("random directions", "number", "r over cells", "plain r between conditions", "r within", "AUROC")
    note = "Mean / 95th percentile of |r| and of the larger of AUROC and 1 - AUROC: directions count whichever way they point."
    return [table(head, rows), f"<p class='meta'>{note}</p>"] if rows else []


def _layer_table(found: Prediction) -> str:
    rows = [(i, hook_name(i), number(r), "read here" if i == found.layer else "") for i, r in enumerate(found.by_layer)]
    n = len(found.chosen_on)
    chosen = (
        f"was chosen on {n} questions, and all else here is about the others" if n else "was given, not chosen on these answers"
    )
    note = f"Layer {found.layer} {chosen}. Over the cells of all questions, a description: the best of many is too good on its own."
    return f"<p class='meta'>{note}</p>" + table(("layer", "hook", "r over cells", ""), rows)


def calibration_verdict(calibration: Calibration) -> str:
    """Which rates are possible, what they may really be for these conversations, and what is held constant."""
    rates = [
        f"{100 * rate:g} % (really {_percent(low)} to {_percent(high)} of new ones like them)"
        for rate in RATES
        for low, high in _realised(calibration, rate)
    ]
    can = f"give alarms at {listed(rates)}" if rates else f"are too few for an alarm at {100 * max(RATES):g} %"
    names = [str(p["name"]) for p in calibration.probes]
    held = _held_constant(vars(calibration.settings), calibration.expectation.explained.tolist(), names)
    return f"{calibration.n} neutral conversations of {calibration.settings.horizon} turns {can}. {held}"


def _realised(calibration: Calibration, rate: float) -> list[tuple[float, float]]:
    """Between what the realised rate per conversation lies in 95 % of calibrations of this size; empty if they are too few."""
    if threshold(calibration, rate, "conversation") is None:
        return []
    low, high = beta.ppf((0.025, 0.975), *_ranks(calibration.n, rate))
    return [(float(low), float(high))]


def calibration_page(calibration: Calibration, images: Mapping[str, bytes]) -> str:
    """
    Raises:
        MonitoringError: the calibration was not saved.
    """
    manifest = read_json(saved(calibration) / "run.json")
    e, settings = calibration.expectation, calibration.settings
    rows = [
        (
            short(str(p["name"])),
            hook_name(p["layer"]),
            number(e.explained[k], ".0%"),
            number(e.scale[k], ".3g"),
            number(e.reach[k]),
        )
        for k, p in enumerate(calibration.probes)
    ]
    parts = [
        f"<h1>Calibration of alarms</h1><p><b>{escape(calibration_verdict(calibration))}</b></p>",
        image(
            images["calibration"],
            f"Scores of {calibration.n} neutral conversations that were not fitted: of all their {OBSERVED[settings.observed]}, "
            f"and the highest of each within {settings.horizon} turns.",
        ),
        "<h2>Thresholds</h2>",
        *_threshold_table(calibration),
        "<h2>What is expected</h2>",
        table(("trait", "read at", "explained by the user's message", "standard deviation (residual units)", "reach"), rows),
        "<p class='meta'>Scores are in these standard deviations above what is expected. Reach: the 99th percentile of the fitted "
        "conversations' scores; `any` is the highest score of all traits, each divided by its reach.</p>",
        "<h2>Conversations</h2>",
        table(("what", "number"), list(calibration.counts.items())),
        provenance(manifest),
    ]
    return page("Calibration of alarms", parts)


def saved(calibration: Calibration) -> Path:
    """The folder of a calibration.

    Raises:
        MonitoringError: it was not saved.
    """
    if calibration.path is None:
        raise MonitoringError("this calibration was not saved, so its report has no folder: calibrate(..., out=folder)")
    return calibration.path


def _threshold_table(calibration: Calibration) -> list[str]:
    rows: list[tuple[str, ...]] = []
    lacking: list[str] = []
    for rate in RATES:
        try:
            limits = [calibration.threshold(rate, "conversation", statistic) for statistic in STATISTICS.values()]
            limits.insert(0, calibration.threshold(rate, "answer"))
        except MonitoringError as error:
            lacking.append(f"<p class='meta'>{escape(str(error))}</p>")
            continue
        rows += [
            (short(name), f"{100 * rate:g} %", *(number(limit[k]) for limit in limits)) for k, name in enumerate(calibration.names)
        ]
    head = ("trait", "rate", "an answer", *(f"a conversation's {SAID[s]}" for s in STATISTICS))
    return [*([table(head, rows)] if rows else []), *lacking]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
