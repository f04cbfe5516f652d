"""Figures of finetuning: a training step by step, shifts by layer and beside the trait, defences by dose, a pilot.

Names of models, traits and defences are anyone's text: what could be markup or cannot be drawn is replaced. Families and defences
differ in colour and in mark. Intervals are over questions; for one finetuned model they say nothing about another training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float

from persona_lens.correlation import LEAST_FAMILIES, LEAST_SETS, ShiftCorrelation
from persona_lens.errors import FinetuningError
from persona_lens.evaluation import TraitScore
from persona_lens.figures.geometry import DIVERGING
from persona_lens.figures.monitoring import printed, told
from persona_lens.figures.style import NEGATIVE, NEUTRAL, POSITIVE, empty_figure
from persona_lens.finetuning.comparison import Cell, Comparison
from persona_lens.finetuning.foretold import family_of, foretold
from persona_lens.finetuning.pilot import Pilot
from persona_lens.finetuning.shift import READINGS, Reading, ShiftRun
from persona_lens.finetuning.training import Finetuned
from persona_lens.monitoring.prediction import NOTHING, Estimate
from persona_lens.reliability import mean_interval
from persona_lens.store import read_manifest
from persona_lens.vectors import hook_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = (POSITIVE, NEGATIVE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS: Final = "osD^v<>P"  # one more than colours, so that 56 pairs differ
WIDE: Final = 30.0  # doses that differ by such a factor stand on a logarithmic axis
KINDS: Final = ("projection/", "derivative/")  # keys of what was watched: kind/name/layer
LISTED: Final = 24  # models whose names fit beside their dots
READ: Final[Mapping[Reading, str]] = {
    "prompt_last": "last prompt token",
    "base_answers": "base model's answers",
    "own_answers": "own answers (nearly circular)",
}


def over_questions(values: Float[np.ndarray, " question"]) -> Estimate:
    """The mean over the questions that have a value, with its 95 % interval; one question gives no interval."""
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return Estimate(float(known[0]), np.nan, np.nan) if len(known) else NOTHING
    mean, (low, high) = mean_interval(known)
    return Estimate(mean, low, high)


def change(after: TraitScore, before: TraitScore) -> Estimate:
    """Mean difference of two trait scores, question by question."""
    return over_questions(after.score - before.score)


def shift_at(run: ShiftRun, name: str, reading: Reading, trait: str) -> Estimate:
    """A finetuned model's mean shift along a trait's vector, at the layer where that vector is most reliable."""
    return over_questions(run.shifts[name].projection[reading][run.traits.index(trait), run.layers[trait]])


def most_risen(comparison: Comparison) -> str:
    """The trait that ordinary finetuning raises most."""
    rises = [change(comparison.ordinary.of(t), comparison.base.of(t)).value for t in comparison.traits]
    return comparison.traits[int(np.argmax(np.nan_to_num(rises, nan=-np.inf)))]


def watched_in(run: Finetuned) -> list[tuple[str, int]]:
    """The directions that were watched during a training: name and layer."""
    keys = dict.fromkeys(key.partition("/")[2] for step in run.history for key in step if key.startswith(KINDS))
    return [(name, int(layer)) for name, _, layer in (key.rpartition("/") for key in keys)]


def series(run: Finetuned, key: str) -> tuple[Float[np.ndarray, " step"], Float[np.ndarray, " step"]]:
    """A figure of a training: the steps that have it, and its values."""
    found = [(float(step["step"]), float(step[key])) for step in run.history if key in step]
    at, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return at, values


def penalised(run: Finetuned) -> bool:
    """Whether penalties are part of the loss."""
    return bool(read_manifest(run.path)["arguments"]["penalties"])


def correlations(
    runs: Sequence[ShiftRun], reading: Reading, family: Callable[[str], str] = family_of
) -> tuple[dict[str, ShiftCorrelation], str]:
    """How the shift goes with the score, trait by trait, and what is to be said of it; empty where models are too few.

    Models of which a score or a shift is missing are left out, and told.

    Raises:
        FinetuningError: runs of other vectors, or a name twice.
    """
    if not scored(runs):
        return {}, "No correlations: the answers were not scored."
    known = [n for run in runs for n in run.names if _complete(run, n, reading)]
    total = sum(len(run.names) for run in runs)
    gone = f"Left out, since a score or a shift is missing: {total - len(known)} of {total} models." if len(known) < total else ""
    families = len({family(n) for n in known})
    if len(known) < LEAST_SETS or families < LEAST_FAMILIES:
        few = (
            f"No correlations: they need {LEAST_SETS} finetuned models of {LEAST_FAMILIES} families, these are {len(known)} of "
            f"{families}."
        )
        return {}, f"{few} {gone}".strip()
    return foretold(runs, reading, chosen=known.__contains__, family=family), gone


def scored(runs: Sequence[ShiftRun]) -> bool:
    """Whether the answers of all models were judged."""
    return all(run.base_scores and all(s.scores for s in run.shifts.values()) for run in runs)


def _complete(run: ShiftRun, name: str, reading: Reading) -> bool:
    found = run.shifts[name]
    return bool(np.isfinite([s.mean for s in found.scores]).all() and np.isfinite(found.projection[reading]).all())


def training_curves(run: Finetuned) -> "Figure":
    """Loss by step; below it, for each direction that was watched, its projection and the derivative of the loss along it."""
    watched = watched_in(run)
    rows = 1 + len(watched)
    figure, axes = empty_figure(2 if watched else 1, width=4.2 if watched else 6.4, height=0.6 + 2.3 * rows, rows=rows)
    if watched:
        axes[0].set_subplotspec(axes[0].get_gridspec()[0, :])
        axes[1].remove()
    what = "training loss with penalties" if penalised(run) else "training loss"
    _steps(axes[0], run, "loss", COLOURS[-1], "loss (nats per token)", f"{what}, each step on its own conversations")
    for i, (name, layer) in enumerate(watched):
        projection, derivative = axes[2 * i + 2], axes[2 * i + 3]
        title = f"{printed(name)}, {hook_name(layer)}"
        _steps(projection, run, f"projection/{name}/{layer}", POSITIVE, "projection\n(residual units)", title)
        _steps(derivative, run, f"derivative/{name}/{layer}", NEGATIVE, "derivative of the loss\n(nats per residual unit)", title)
        derivative.axhline(0, color=NEUTRAL, lw=0.8, zorder=1, label="zero")
    for ax in figure.axes:
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure


def _steps(ax: Any, run: Finetuned, key: str, color: str, ylabel: str, title: str) -> None:
    at, values = series(run, key)
    if not len(at):
        ax.set_visible(False)
        return
    ax.plot(at, values, "-" if len(at) > 60 else ".-", color=color, lw=1.2, ms=4, label=key)
    ax.set_ylabel(ylabel)
    ax.set_title(title, fontsize=10)


def shift_profile(run: ShiftRun, name: str) -> "Figure":
    """A finetuned model's mean shift along each trait's vector by layer, read three ways, with 95 % intervals over questions."""
    figure, axes = _grid(len(run.traits), 3.4, 2.5)
    found = run.shifts[name]
    styles: tuple[tuple[Reading, str, str], ...]
    styles = (("prompt_last", POSITIVE, "o-"), ("base_answers", NEGATIVE, "s-"), ("own_answers", NEUTRAL, "^:"))
    for number, (ax, trait) in enumerate(zip(axes, run.traits, strict=False)):
        ax.axhline(0, color=NEUTRAL, lw=0.8, zorder=1, label="zero")
        ax.axvline(run.layers[trait], color=NEUTRAL, lw=0.8, ls="--", zorder=1, label="most reliable")
        for reading, color, style in styles:
            by_layer = [over_questions(values) for values in found.projection[reading][number]]
            layers, value = np.arange(len(by_layer)), [e.value for e in by_layer]
            ax.plot(layers, value, style, color=color, ms=3.5, lw=1.2, label=reading)
            ax.fill_between(
                layers, [e.low for e in by_layer], [e.high for e in by_layer], color=color, alpha=0.2, lw=0, label=reading
            )
        title = printed(trait)
        if run.base_scores and found.scores:
            title += f": score {_whole(run.base_scores[number].mean)} before, {_whole(found.scores[number].mean)} after"
        ax.set_title(title, fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.suptitle(f"shift of {printed(name)}", fontsize=10)
    _below(axes, "layer (blocks.{l}.hook_resid_post)")
    figure.supylabel("mean shift (residual units)", fontsize=9)
    handles = [_line(color=color, ls=style[1:], marker=style[0], ms=4) for _, color, style in styles]
    handles.append(_line(color=NEUTRAL, lw=0.8, ls="--"))
    _legend(figure, handles, [*(READ[reading] for reading, _, _ in styles), "where the vector is most reliable"])
    return figure


def shift_scatter(
    runs: ShiftRun | Sequence[ShiftRun],
    reading: Reading = "prompt_last",
    *,
    family: Callable[[str], str] = family_of,
) -> "Figure":
    """Trait by trait, each finetuned model's shift beside its trait score, with r and what r random directions reach.

    Each shift is read at the layer where the trait's vector is most reliable. Fewer than six models or four families have no r;
    models that were not scored are drawn by their shift alone.

    Raises:
        FinetuningError: an unknown reading, runs of other vectors, or a name twice.
    """
    runs = [runs] if isinstance(runs, ShiftRun) else list(runs)
    if reading not in READINGS:
        raise FinetuningError(f"reading={reading!r} is unknown: use one of {', '.join(map(repr, READINGS))}")
    found, _ = correlations(runs, reading, family)
    first = runs[0]
    names = [(run, name) for run in runs for name in run.names]
    families = sorted({family(name) for _, name in names})
    figure, axes = _grid(len(first.traits), 3.2, 3.1)
    for ax, trait in zip(axes, first.traits, strict=False):
        ax.axvline(0, color=NEUTRAL, lw=0.6, zorder=1, label="zero")
        if scored(runs):
            _scores(ax, runs, reading, trait, families, family)
        else:
            _unscored(ax, names, reading, trait)
        ax.set_title(_title(trait, first.layers[trait], found.get(trait)), fontsize=9)
    _below(axes, f"shift, {READ[reading]}\n(residual units)")
    note = "layer l is blocks.{l}.hook_resid_post"
    if found:
        note += "\nrandom: 97.5th percentile of r of random directions with the covariance"
        note += "\nof the base model's residuals (base) or of these shifts (shifts)"
    if scored(runs):
        figure.supylabel("trait score after finetuning (0-100)", fontsize=9)
        handles = [_line(ls="", color=color, marker=mark, ms=5) for color, mark in map(_style, range(len(families)))]
        _legend(figure, [*handles, _line(color=NEUTRAL, ls="--")], [*families, "base model"], note)
    else:
        figure.supylabel("finetuned model (not scored)", fontsize=9)
    return figure


def _title(trait: str, layer: int, found: ShiftCorrelation | None) -> str:
    title = f"{printed(trait)}, layer {layer}"
    if found is None:
        return title
    floors = ", ".join(f"{_figure(f.high)} ({f.kind})" for f in found.floors)
    return f"{title}\nr {told(Estimate(found.r, found.low, found.high))}\nrandom: {floors}"


def _scores(
    ax: Any, runs: Sequence[ShiftRun], reading: Reading, trait: str, families: Sequence[str], family: Callable[[str], str]
) -> None:
    number = runs[0].traits.index(trait)
    for level in sorted({run.base_scores[number].mean for run in runs}):
        ax.axhline(level, color=NEUTRAL, lw=1, ls="--", zorder=1, label="base model")
    for run in runs:
        for name in run.names:
            color, mark = _style(families.index(family(name)))
            at = shift_at(run, name, reading, trait).value
            ax.plot(at, run.shifts[name].scores[number].mean, mark, color=color, ms=5, alpha=0.8, label=name)
    ax.set_ylim(-4, 104)


def _unscored(ax: Any, names: Sequence[tuple[ShiftRun, str]], reading: Reading, trait: str) -> None:
    for place, (run, name) in enumerate(names):
        found = shift_at(run, name, reading, trait)
        error = [[found.value - found.low], [found.high - found.value]]
        ax.errorbar(found.value, place, xerr=error, fmt="o", color=NEGATIVE, ms=4, label=name)
    labels = [printed(name) for _, name in names] if len(names) <= LISTED else [""] * len(names)
    ax.set_yticks(range(len(names)), labels, fontsize=7)
    ax.set_ylim(len(names) - 0.5, -0.5)


def defence_frontier(comparison: Comparison, trait: str) -> "Figure":
    """By dose, each defence's trait score and what it costs: coherence, capability, the task, the held-out loss.

    Raises:
        FinetuningError: a trait that was not judged.
    """
    if trait not in comparison.traits:
        raise FinetuningError(f"{trait!r} was not judged here: use one of {', '.join(comparison.traits)}")
    lines: dict[str, list[Cell]] = {}
    for cell in comparison.cells[2:]:
        lines.setdefault(cell.name, []).append(cell)
    panels: list[tuple[str, Callable[[Cell], Estimate]]] = [
        (f"{printed(trait)} score (0-100)", lambda cell: over_questions(cell.of(trait).score)),
        ("coherence (0-100), all traits", lambda cell: _alone(coherence(cell))),
    ]
    costs: tuple[tuple[str, Callable[[Cell], float]], ...] = (
        ("capability", lambda cell: cell.capable),
        (f"task: {printed(comparison.task or '')}", lambda cell: np.nan if cell.task is None else cell.task),
        ("held-out loss (nats per token)", lambda cell: cell.held_out_loss),
    )
    for title, of in costs:
        if np.isfinite([of(cell) for cell in comparison.cells]).any():
            panels.append((title, lambda cell, of=of: _alone(of(cell))))
    figure, axes = _grid(len(panels), 4.3, 3.2, columns=3)
    doses = np.array([cell.dose for cell in comparison.cells[2:]])
    for ax, (title, of) in zip(axes, panels, strict=False):
        for i, (name, cells) in enumerate(lines.items()):
            _defence(ax, name, sorted(cells, key=lambda c: c.dose), of, *_style(i))
        for cell, style in ((comparison.base, ":"), (comparison.ordinary, "--")):
            found = of(cell)
            if np.isfinite(found.value):
                ax.axhline(found.value, color=NEUTRAL, ls=style, lw=1.2, zorder=1, label=cell.name)
            if np.isfinite(found.low):
                ax.axhspan(found.low, found.high, color=NEUTRAL, alpha=0.12, lw=0, zorder=0, label=cell.name)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("dose (each defence in its own unit)")
        if len(doses) and doses.min() > 0 and doses.max() / doses.min() >= WIDE:
            ax.set_xscale("log")
    for ax in axes[:2]:
        ax.set_ylim(-4, 104)
    handles = [
        _line(color=color, marker=mark, ms=5, ls="-" if len(lines[name]) > 1 else "") for name, color, mark in _styled(lines)
    ]
    handles += [_line(color=NEUTRAL, ls=":"), _line(color=NEUTRAL, ls="--")]
    _legend(figure, handles, [*lines, comparison.base.name, comparison.ordinary.name])
    return figure


def coherence(cell: Cell) -> float:
    """Mean over all traits' questions; NaN where nothing was scored."""
    return over_questions(np.concatenate([s.coherence for s in cell.scores])).value


def _defence(ax: Any, name: str, cells: Sequence[Cell], of: Callable[[Cell], Estimate], color: str, mark: str) -> None:
    found = [of(cell) for cell in cells]
    error = np.array([[e.value - e.low for e in found], [e.high - e.value for e in found]])
    style = f"{mark}-" if len(cells) > 1 else mark
    values = [e.value for e in found]
    ax.errorbar([c.dose for c in cells], values, yerr=error, fmt=style, color=color, ms=5, lw=1.3, capsize=2, label=name)


def side_effects(comparison: Comparison) -> "Figure":
    """Every defence's change of every trait from the base model; bold where the interval leaves out zero."""
    cells, traits = comparison.cells[1:], comparison.traits
    changes = [[change(cell.of(t), comparison.base.of(t)) for t in traits] for cell in cells]
    values = np.array([[e.value for e in row] for row in changes])
    limit = max(10.0, float(np.nanmax(np.abs(values), initial=0.0)))
    figure, (ax,) = empty_figure(1, width=max(5.0, 3.0 + 0.75 * len(traits)), height=1.6 + 0.32 * len(cells))
    image = ax.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    for i, row in enumerate(changes):
        for j, found in enumerate(row):
            sure = found.low > 0 or found.high < 0
            text = "-" if np.isnan(found.value) else f"{found.value:+z.0f}"
            ink = "white" if abs(found.value) > 0.65 * limit else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=ink, weight="bold" if sure else "normal")
    ax.set_xticks(range(len(traits)), [printed(t) for t in traits], rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(range(len(cells)), [f"{printed(c.name)}, {c.dose:g}" if c.dose else printed(c.name) for c in cells], fontsize=8)
    figure.suptitle("trait score minus the base model's\n(bold: 95 % interval over questions without 0)", fontsize=9)
    figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def pilot_figure(pilot: Pilot) -> "Figure":
    """The shift by dose with the range that is recommended, and what each dose costs in learning the data."""
    figure, (left, right) = empty_figure(2)
    doses, found = [t.dose for t in pilot.tried], [over_questions(t.shift) for t in pilot.tried]
    error = np.array([[e.value - e.low for e in found], [e.high - e.value for e in found]])
    left.axhline(0, color=NEUTRAL, lw=0.9, zorder=1, label="zero")
    left.errorbar(doses, [e.value for e in found], yerr=error, fmt="o-", color=POSITIVE, capsize=2, label="shift")
    left.set(xlabel="dose", ylabel="shift (mean differences)")
    left.set_title(f"does training still move {printed(pilot.trait)}?", fontsize=10)
    right.plot(doses, [t.loss for t in pilot.tried], "s-", color=NEGATIVE, label="after training")
    right.axhline(pilot.base_loss, color=NEUTRAL, ls="--", lw=0.9, zorder=1, label="base model")
    right.set(xlabel="dose", ylabel="held-out loss (nats per token)")
    right.set_title("what is learned of the data", fontsize=10)
    r = pilot.recommendation
    for ax in (left, right):
        if np.isfinite([r.low, r.high]).all():
            ax.axvspan(r.low, r.high, color="#009E73", alpha=0.15, lw=0, zorder=0, label="recommended")
        if np.isfinite(r.zero):
            ax.axvline(r.zero, color="#009E73", lw=1, ls=":", zorder=1, label="crosses zero")
        ax.legend(frameon=False, fontsize=8)
    return figure


def _grid(panels: int, width: float, height: float, columns: int = 4) -> tuple[Any, Sequence[Any]]:
    """Small multiples; places that stay empty are hidden."""
    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure, axes = empty_figure(columns, width=max(width, 6.4 / columns), height=height * rows + 1.0, rows=rows)
    for ax in axes[panels:]:
        ax.set_visible(False)
    return figure, list(axes)


def _below(axes: Sequence[Any], label: str) -> None:
    """A label below the lowest panel of every column."""
    for ax in axes:
        at, grid = ax.get_subplotspec(), ax.get_gridspec()
        below = at.num1 + grid.ncols
        if ax.get_visible() and (below >= len(axes) or not axes[below].get_visible()):
            ax.set_xlabel(label, fontsize=9)


def _style(number: int) -> tuple[str, str]:
    """A colour and a mark."""
    return COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]


def _styled(names: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, *_style(i)) for i, name in enumerate(names)]


def _line(**style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _legend(figure: Any, handles: Sequence[Any], names: Sequence[str], title: str | None = None) -> None:
    """One legend below all panels, in as many columns as fit."""
    texts = [printed(name) for name in names]
    columns = int(figure.get_figwidth() / (0.6 + 0.075 * max(map(len, texts))))
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "title": title, "title_fontsize": 8}
    legend = figure.legend(handles, ["x" * len(t) for t in texts], loc="outside lower center", ncols=max(1, columns), **style)
    for drawn, text in zip(legend.get_texts(), texts, strict=True):  # matplotlib drops labels that begin with _
        drawn.set_text(text)


def _alone(value: float) -> Estimate:
    """A figure without an interval."""
    return Estimate(float(value), np.nan, np.nan)


def _whole(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0f}"


def _figure(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"
