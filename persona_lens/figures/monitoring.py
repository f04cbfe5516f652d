"""Figures of monitoring: chats over their turns beside neutral ones, projections beside what followed, neutral scores.

Names of chats and conditions are anyone's text: they are shortened, and what could be markup or cannot be drawn is replaced.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from jaxtyping import Float

from persona_lens.errors import MonitoringError
from persona_lens.figures.style import NEGATIVE, NEUTRAL, POSITIVE, empty_figure
from persona_lens.monitoring.calibration import Calibration, highest
from persona_lens.monitoring.prediction import Estimate
from persona_lens.monitoring.probes import ANY
from persona_lens.monitoring.rendering import visible
from persona_lens.monitoring.run import STATISTICS, MonitorRun, Verdict, WatchedChat, standing_out, values_of
from persona_lens.monitoring.study import Prediction
from persona_lens.records import decoded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN: Final = 200
NAMED: Final = 5
FEW: Final = 40  # so many lines can be told apart
COLOURS: Final = (POSITIVE, NEGATIVE, "#009E73", "#CC79A7", "#E69F00")
MARKS: Final = "osD^v"
RINGS: Final = dict(zip(STATISTICS, "os", strict=True))
SAID: Final = {"highest": "highest score", "rise": "clearest rise"}
PALE: Final = "#a8a8a8"
BAND: Final = "#e4e4e4"
RATES: Final = (0.05, 0.01)
LONGEST: Final = 36  # characters of a name
LISTED: Final = 12  # conditions that are named beside the colours


def verdicts_of(run: MonitorRun, chat: WatchedChat) -> dict[str, Verdict]:
    """What stands out in a chat, by probe; empty without a calibration."""
    return {v["probe"]: decoded(Verdict, v) for v in run.record["verdicts"].get(chat.name, ())}


def alarming(run: MonitorRun, probe: str, *statistics: str) -> int:
    """How many conversations alarm on a probe, or on `any`, by one of the statistics."""
    found = (v["turns"] for verdicts in run.record["verdicts"].values() for v in verdicts if v["probe"] == probe)
    return sum(any(turns[s] is not None for s in statistics) for turns in found)


def printed(text: str) -> str:
    """A text as a figure can show it: one short line, no mathematics, a box for what the font does not have."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    line = " ".join(visible(text).split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in line).replace("$", r"\$")


def trajectories(run: MonitorRun) -> "Figure":
    """Scores by turn on each trait: the chats that stand out most in colour, the others behind, and what neutral ones score."""
    chats = list(run.chats())
    calibration = run.record["calibration"]
    ordered = standing_out(chats)
    named = ordered[:NAMED]
    others = sorted(ordered[NAMED:], key=lambda c: c.place)
    drawn = [others[i] for i in np.linspace(0, len(others) - 1, min(len(others), DRAWN - NAMED)).round().astype(int)]
    verdicts = {c.name: verdicts_of(run, c) for c in (*named, *drawn)}
    turns = max(len(c.readings) for c in chats)
    columns = min(len(run.probes), 2)
    rows = -(-len(run.probes) // columns)
    figure, axes = empty_figure(columns, width=8.0 if columns == 1 else 5.2, height=2.9 * rows + 1.9, rows=rows)
    for ax in axes[len(run.probes) :]:
        ax.set_visible(False)
    for k, (ax, probe) in enumerate(zip(axes, run.record["probes"], strict=False)):
        title = f"{printed(probe['name'])}, layer {probe['layer']}"
        if calibration is not None:
            _neutral(ax, calibration, k)
            title += f": {alarming(run, probe['name'], *RINGS)} of {len(chats)} conversations alarm"
        for chat in drawn:
            _line(ax, chat, k, color=PALE, lw=0.6, ms=2, alpha=1.0 if len(drawn) <= FEW else 0.45, zorder=2)
            _answers(ax, chat, k, verdicts[chat.name], ".", ms=4, color=NEUTRAL, zorder=3)
        for chat, color, mark in reversed(list(zip(named, COLOURS, MARKS, strict=False))):
            _line(ax, chat, k, color=color, lw=1.6, ms=4, zorder=4)
            _answers(ax, chat, k, verdicts[chat.name], mark, ms=5, color=color, zorder=5)
            _rings(ax, chat, k, verdicts[chat.name])
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="turn", xlim=(0.5, turns + 0.5))
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for ax in axes[: len(run.probes) : columns]:
        ax.set_ylabel(_ordinate(calibration))
    _legends(figure, run, named, (len(drawn), len(others)), turns)
    return figure


def _ordinate(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "projection of the answer\n(residual-stream units)"
    what = "answer" if calibration["settings"]["observed"] == "answer" else "last prompt token"
    return f"score of the {what}\n(standard deviations)"


def _neutral(ax: Any, calibration: Mapping[str, Any], k: int) -> None:
    """The band of neutral answers and the thresholds, as far over the turns as they hold."""
    horizon = calibration["settings"]["horizon"]
    low, _, high = np.array(calibration["band"], dtype=np.float64)[:, :, k]
    at = np.array([0.5, *range(1, horizon + 1), horizon + 0.5])
    edges = [np.pad(v, 1, "edge") for v in (low, high)]
    ax.fill_between(at, *edges, step="mid", color=BAND, lw=0, zorder=0, label="neutral")
    for edge in edges:  # seen behind many lines too
        ax.step(at, edge, where="mid", color=NEUTRAL, lw=0.5, zorder=3, label="edge")
    for what, style in (("answer", ":"), ("conversation, highest", "--")):
        limit = calibration["thresholds"][what][k]
        if limit is None:
            continue
        if what == "answer":
            ax.axhline(limit, ls=style, color="black", lw=1.1, zorder=6, label=what)
        else:
            ax.plot(at[[0, -1]], [limit, limit], ls=style, color="black", lw=1.1, zorder=6, label=what)
    ax.axvline(horizon + 0.5, color=NEUTRAL, lw=0.8, zorder=1, label="horizon")


def _line(ax: Any, chat: WatchedChat, k: int, **style: Any) -> None:
    values = values_of(chat)[:, k]
    ax.plot(np.arange(1, len(values) + 1), values, marker=".", label=chat.name, **style)


def _answers(ax: Any, chat: WatchedChat, k: int, verdicts: Mapping[str, Verdict], mark: str, **style: Any) -> None:
    """A mark at every answer that alarms."""
    probe = chat.readings.probes[k]
    if probe in verdicts and verdicts[probe].answers:
        at = np.array(verdicts[probe].answers)
        ax.plot(at, values_of(chat)[at - 1, k], mark, label=f"{chat.name}: answers", **style)


def _rings(ax: Any, chat: WatchedChat, k: int, verdicts: Mapping[str, Verdict]) -> None:
    """A ring at the turn where the conversation alarms, by statistic."""
    probe = chat.readings.probes[k]
    for statistic, turn in verdicts[probe].turns.items() if probe in verdicts else ():
        if turn is not None:
            at = values_of(chat)[turn - 1, k]
            ax.plot(turn, at, RINGS[statistic], ms=10, mfc="none", mec="black", zorder=7, label=f"{chat.name}: {statistic}")


def _legends(figure: Any, run: MonitorRun, named: Sequence[WatchedChat], others: tuple[int, int], turns: int) -> None:
    """One legend for all panels: the chats in colour, and what lines and marks mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    calibration = run.record["calibration"]
    chats = [
        (Line2D([], [], color=color, marker=mark if calibration else ".", ms=5), printed(c.name))
        for c, color, mark in zip(named, COLOURS, MARKS, strict=False)
    ]
    drawn, all_of_them = others
    kinds: list[tuple[Any, str]] = []
    if drawn:
        told = f"{drawn} of {all_of_them} other chats" if drawn < all_of_them else "the other chats"
        kinds.append((Line2D([], [], color=PALE, marker=".", ms=4), told))
    if calibration is not None:
        rate, horizon = f"{100 * run.record['rate']:g} %", calibration["settings"]["horizon"]
        kinds += [
            (Patch(fc=BAND, ec=NEUTRAL, lw=0.5), "5 % to 95 % of neutral ones"),
            (Line2D([], [], color="black", ls=":"), f"alarm of an answer ({rate})"),
            (Line2D([], [], color="black", ls="--"), f"alarm of a conversation ({rate} in {horizon} turns)"),
        ]
        if turns > horizon:
            kinds.append((Line2D([], [], color=NEUTRAL, lw=0.8), "horizon of that alarm"))
        if any(alarming(run, name, *RINGS) for name in run.probes):
            kinds += [
                (Line2D([], [], ls="", marker=mark, ms=9, mfc="none", mec="black"), f"conversation alarms ({SAID[statistic]})")
                for statistic, mark in RINGS.items()
            ]
    title = "highest scores (marks: answers that alarm)" if calibration else "highest projections"
    _legend(figure, "left", chats, title=title)
    _legend(figure, "right", kinds)


def _legend(figure: Any, side: str, entries: Sequence[tuple[Any, str]], **style: Any) -> None:
    """A legend below the panels, of lines or areas and what they mean."""
    if not entries:
        return
    handles, texts = zip(*entries, strict=True)
    style |= {"frameon": False, "fontsize": 8, "title_fontsize": 8, "alignment": "left"}
    legend = figure.legend(handles, ["x"] * len(texts), loc=f"outside lower {side}", **style)
    for text, said in zip(legend.get_texts(), texts, strict=True):  # matplotlib drops labels that begin with _
        text.set_text(said)


def told(found: Estimate, form: str = "+z.2f") -> str:
    """An estimate with its 95 % interval, if it has one; a dash where there is none."""
    if np.isnan(found.value):
        return "-"
    return f"{found.value:{form}}" + ("" if np.isnan(found.low) else f" [{found.low:{form}}, {found.high:{form}}]")


def is_vector(predictor: str) -> bool:
    """Whether a predictor of a study is a projection, not a baseline."""
    return predictor.endswith(" vector")


def prediction_scatter(prediction: Prediction) -> "Figure":
    """Projections before the answers beside what the answers scored; and how well other predictors foretell the same."""
    skills = (prediction.comparison.main, *prediction.comparison.others)
    figure, axes = empty_figure(3, width=4.3, height=max(5.0, 2.2 + 0.36 * len(skills)))
    axes[0].get_gridspec().set_width_ratios((1.5, 1, 1))
    _cells(figure, axes[0], prediction)
    colors = [POSITIVE, *("#f0b48a" if is_vector(s.name) else NEGATIVE for s in skills[1:])]
    _bars(axes[1], [s.correlations.overall for s in skills], colors, 0.0)
    _bars(axes[2], [s.auroc for s in skills], colors, 0.5)
    axes[1].set_yticks(range(len(skills)), [printed(s.name).replace(", ", ",\n") for s in skills], fontsize=8)
    axes[2].set_yticks([])
    axes[1].set(title="r over all cells", xlim=(-1, 1), ylim=(len(skills) - 0.4, -0.6))
    axes[2].set(title="AUROC: answers above 50", xlim=(0, 1), ylim=(len(skills) - 0.4, -0.6))
    for floor in prediction.floors:
        color, kind = ("black", "with the prompts' covariance") if floor.matched else ("#8a8a8a", "isotropic")
        for ax, reach in ((axes[1], floor.overall), (axes[2], floor.auroc)):
            for value, style, what in ((reach.mean, ":", "mean"), (reach.high, "--", "95 %")):
                if np.isfinite(value):
                    ax.axvline(value, color=color, ls=style, lw=1.2, zorder=4, label=f"{kind}, {what}")
    _floor_legend(figure, axes[1])
    return figure


def _cells(figure: Any, ax: Any, prediction: Prediction) -> None:
    """A point per condition and question, and each condition's mean with its number; dark to light in the order given."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    outcomes, r = prediction.outcomes, prediction.comparison.main.correlations
    n = len(outcomes.conditions)
    colours = [tuple(c) for c in colormaps["viridis"](np.linspace(0, 0.92, n))]  # its yellow is hard to see on white
    known = np.isfinite(prediction.projection) & np.isfinite(outcomes.score)
    for i, (x, y, kept) in enumerate(zip(prediction.projection, outcomes.score, known, strict=True)):
        ax.scatter(x[kept], y[kept], s=11, color=colours[i], alpha=0.6, lw=0, label=outcomes.conditions[i])
        if kept.any():
            at = float(x[kept].mean()), float(y[kept].mean())
            ink = "white" if i < 0.6 * n else "black"
            ax.scatter(*at, s=140, color=colours[i], edgecolors="white", zorder=4 + i, label=f"{outcomes.conditions[i]}: mean")
            ax.annotate(str(i + 1), at, ha="center", va="center_baseline", fontsize=7, zorder=4.5 + i, color=ink)
    figures = (("over all cells", r.overall), ("between conditions", r.between), ("within them", r.within))
    ax.set_title("\n".join(f"r {what}: {told(e)}" for what, e in figures), fontsize=9)
    trait = printed(prediction.trait)
    ax.set(
        xlabel=f"projection of the last prompt token on the {trait} vector\n(layer {prediction.layer}, residual-stream units)",
        ylabel=f"mean {trait} score of the answers (0-100)",
        ylim=(-4, 104),
    )
    shown = np.unique(np.linspace(0, n - 1, min(n, LISTED)).round().astype(int))
    names = [f"{i + 1}: {printed(outcomes.conditions[i])}" for i in shown]
    handles = [Line2D([], [], ls="", marker="o", color=colours[i]) for i in shown]
    columns = 4 if max(map(len, names)) <= 16 else 2
    _legend(figure, "left", list(zip(handles, names, strict=True)), ncols=columns)


def _bars(ax: Any, found: Sequence[Estimate], colors: Sequence[str], chance: float) -> None:
    """A bar per predictor, from what chance gives, with its 95 % interval."""
    for at, (estimate, color) in enumerate(zip(found, colors, strict=True)):
        if np.isnan(estimate.value):
            ax.annotate("-", (chance, at), ha="center", va="center")
            continue
        ax.barh(at, estimate.value - chance, left=chance, color=color, height=0.6)
        if np.isfinite(estimate.low):
            ax.plot([estimate.low, estimate.high], [at, at], color="black", lw=1.6, zorder=5, label="95 %")
    ax.axvline(chance, color=NEUTRAL, lw=0.8, label="chance")


def _floor_legend(figure: Any, ax: Any) -> None:
    lines = [(line, str(line.get_label())) for line in ax.lines if line.get_label() not in ("95 %", "chance")]
    _legend(figure, "right", lines, title="random directions, turned to where they foretell", ncols=2)


def calibration_figure(calibration: Calibration) -> "Figure":
    """What neutral answers score on each probe, and the highest that each neutral conversation does, with the thresholds."""
    names = calibration.names
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure, axes = empty_figure(columns, width=9.0 / columns + 0.6, height=2.7 * rows + 0.9, rows=rows)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    answers = calibration.with_any(calibration.neutral).reshape(-1, len(names))
    chats = calibration.with_any(highest(calibration.neutral))[:, -1]
    kinds: tuple[tuple[Literal["answer", "conversation"], np.ndarray, str], ...]
    kinds = (("answer", answers, NEGATIVE), ("conversation", chats, POSITIVE))
    read = "answers" if calibration.settings.observed == "answer" else "last prompt tokens"
    bins = int(np.clip(2 * np.sqrt(calibration.n), 8, 40))
    for k, (ax, name) in enumerate(zip(axes, names, strict=False)):
        found = [(what, v[np.isfinite(v[:, k]), k], color) for what, v, color in kinds]
        edges = np.histogram_bin_edges(np.concatenate([v for _, v, _ in found]), bins)
        for what, values, color in found:
            said = read if what == "answer" else f"highest of {calibration.settings.horizon} turns"
            shares = np.full(len(values), 1 / max(len(values), 1))
            step = "stepfilled" if what == "answer" else "step"
            ax.hist(values, edges, weights=shares, histtype=step, color=color, alpha=0.45 if what == "answer" else 1.0, label=said)
        for rate, style in zip(RATES, ("--", ":"), strict=True):
            for what, _, color in kinds:
                limit = threshold(calibration, rate, what)
                if limit is not None and np.isfinite(limit[k]):
                    ax.axvline(limit[k], color=color, ls=style, lw=1.3, label=f"alarm at {100 * rate:g} % ({what})")
        ax.set_title("any (in units of reach)" if name == ANY else printed(name), fontsize=10)
    figure.supxlabel("score (standard deviations above what is expected)", fontsize=9)
    figure.supylabel("share", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def threshold(calibration: Calibration, rate: float, per: Literal["answer", "conversation"]) -> Float[np.ndarray, " name"] | None:
    """The thresholds at a rate; None where there are too few conversations for it."""
    try:
        return calibration.threshold(rate, per)
    except MonitoringError:
        return None
