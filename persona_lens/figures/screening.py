"""Figures of a screening: data sets by score, their rows' scores, sets by two traits, exact scores beside cheap ones.

Names of sets are anyone's text: what could be markup or cannot be drawn is replaced. Where there are more than twelve sets, the
highest and the lowest ones are shown, and the figure says so. Intervals are 95 %, over prompts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Int

from persona_lens.errors import ScreeningError, UnknownNameError
from persona_lens.figures.finetuning import COLOURS, MARKS
from persona_lens.figures.monitoring import PALE, printed
from persona_lens.figures.screened import LISTED, SAID, Screened, Standing, screened, spearman
from persona_lens.figures.style import NEGATIVE, NEUTRAL, POSITIVE, empty_figure
from persona_lens.screening.run import ScreenRun
from persona_lens.screening.sets import SetScore
from persona_lens.vectors import hook_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: Final = 12  # traits of a figure
CROSSED: Final = 6  # traits that are drawn against each other
LONGEST: Final = 40  # characters of a panel's title
UNITS: Final = "residual-stream units"


def set_ranking(run: ScreenRun | Screened) -> "Figure":
    """Data sets from the highest to the lowest score, trait by trait, with 95 % intervals."""
    found = screened(run)
    traits = found.standings[:PANELS]
    columns = min(len(traits), 2)
    lines = max(len(_spaced(found, s)) for s in traits)
    rows = -(-len(traits) // columns)
    figure, axes = empty_figure(columns, width=7.2 if columns == 1 else 5.4, height=rows * (1.1 + 0.24 * lines) + 0.5, rows=rows)
    for ax, standing in zip(axes, traits, strict=False):
        _places(ax, found, standing)
    _hide(axes[len(traits) :])
    handles, texts = [_line(color=POSITIVE, marker="o", ls="-", ms=4)], ["mean of a set, 95 % interval over prompts"]
    if found.reference:
        handles.append(_line(color=NEGATIVE, marker="s", ls="-", ms=4))
        texts.append(f"reference: {printed(found.reference)}")
    _legend(figure, handles, texts)
    _title(figure, found, len(traits))
    return figure


def _spaced(found: Screened, standing: Standing) -> list[str | int]:
    """The sets that are shown, and how many are left out between them."""
    at = {name: i for i, name in enumerate(standing.names)}
    lines: list[str | int] = []
    before = -1
    for name in found.listed(standing):
        between = at[name] - before - 1
        lines += [between, name] if between else [name]
        before = at[name]
    return lines


def _places(ax: Any, found: Screened, standing: Standing) -> None:
    lines = _spaced(found, standing)
    if standing.kind != "cheap":
        ax.axvline(0, color=NEUTRAL, lw=0.8, zorder=1, label="zero")
    for place, name in enumerate(lines):
        ranked = standing.of(name) if isinstance(name, str) else None
        if ranked is not None:
            _place(ax, place, ranked.name, ranked.score, known=name == found.reference)
    ax.set_yticks(range(len(lines)), [f"{n} more" if isinstance(n, int) else printed(n) for n in lines], fontsize=8)
    for text, name in zip(ax.get_yticklabels(), lines, strict=True):
        text.set(color=NEUTRAL if isinstance(name, int) else "black", style="italic" if isinstance(name, int) else "normal")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(max(len(lines), 1) - 0.5, -0.5)
    ax.margins(x=0.06)
    ax.set_title(_heading(standing), fontsize=9)
    ax.set_xlabel(f"mean {SAID[standing.kind]}\n({UNITS})", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    if not lines:
        _empty(ax)


def _place(ax: Any, at: int, name: str, score: SetScore, *, known: bool) -> None:
    color, mark = (NEGATIVE, "s") if known else (POSITIVE, "o")
    if known and np.isfinite(score.low):
        ax.axvspan(score.low, score.high, color=NEGATIVE, alpha=0.12, lw=0, zorder=0, label="reference")
    ax.errorbar(score.mean, at, xerr=_ends(score), fmt=mark, color=color, ms=4, capsize=2, lw=1.3, label=name)


def row_histograms(run: ScreenRun | Screened, trait: str) -> "Figure":
    """The scores of each set's rows, with the reference's outline behind and the score from which rows are flagged.

    Raises:
        UnknownNameError: no such trait.
    """
    found = screened(run)
    standing = next((s for s in found.standings if s.trait == trait), None)
    if standing is None:
        raise UnknownNameError("trait", trait, found.run.traits)
    shown = [n for n in found.listed(standing) if standing.counts[n].any()]
    n = max(len(shown), 1)
    figure, axes = empty_figure(1, width=7.6, height=0.5 * n + 1.7, rows=n)
    for ax, name in zip(axes, shown, strict=False):
        _histogram(ax, found, standing, name)
        ax.tick_params(axis="x", labelbottom=ax is axes[len(shown) - 1], labelsize=8)
    axes[-1].set_xlabel(f"{SAID[found.rows]} ({UNITS})", fontsize=9)
    if not shown:
        _empty(axes[0])
    _histogram_legend(figure, found, standing)
    more = f"{found.some(standing)}, " if len(shown) < len(standing.sets) else ""
    title = f"{printed(trait)}, {hook_name(standing.layer)}\nshare of each set's rows by score ({more}heights differ)"
    figure.suptitle(title, fontsize=9)
    return figure


def _histogram(ax: Any, found: Screened, standing: Standing, name: str) -> None:
    known = name == found.reference
    share = _shares(standing.counts[name])
    ax.stairs(share, standing.edges, fill=True, color=NEGATIVE if known else POSITIVE, alpha=0.75, lw=0, zorder=2, label=name)
    top = float(share.max())
    behind = standing.counts.get(found.reference or "")
    if behind is not None and behind.any() and not known:
        ax.stairs(_shares(behind), standing.edges, color=NEUTRAL, lw=0.9, zorder=3, label="reference")
        top = max(top, float(_shares(behind).max()))
    if (limit := limit_of(found, standing.trait)) is not None:
        ax.axvline(limit, color="black", ls="--", lw=1, zorder=4, label="threshold")
    ax.set(ylim=(0, 1.08 * top), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.set_ylabel(printed(name), rotation=0, ha="right", va="center", fontsize=8)
    ax.annotate(_told_rows(found, standing, name), (1.01, 0.5), xycoords="axes fraction", va="center", fontsize=7.5)
    ax.margins(x=0.01)


def _told_rows(found: Screened, standing: Standing, name: str) -> str:
    rows = int(standing.counts[name].sum())
    text = f"{rows:,} row{'s' if rows != 1 else ''}"
    count = found.flags.counts.get(name) if found.flags else None
    if count is None or standing.trait not in count.by_trait:
        return text
    return f"{text}\n{count.by_trait[standing.trait]:,} flagged"


def limit_of(found: Screened, trait: str) -> float | None:
    """The score above which rows are flagged by a trait alone; None where nothing was flagged by these scores."""
    flags = found.flags
    return flags.thresholds[trait].value if flags and flags.signal == found.run.signal and trait in flags.thresholds else None


def _histogram_legend(figure: Any, found: Screened, standing: Standing) -> None:
    from matplotlib.patches import Patch

    handles, texts = [Patch(color=POSITIVE, alpha=0.75, lw=0)], ["a set's rows"]
    if found.reference in standing.counts:
        handles += [Patch(color=NEGATIVE, alpha=0.75, lw=0), _line(color=NEUTRAL, lw=0.9)]
        texts += [f"reference: {printed(found.reference or '')}", "outline of the reference"]
    if found.flags and limit_of(found, standing.trait) is not None:
        handles.append(_line(color="black", ls="--", lw=1))
        texts.append(f"{100 * found.flags.rate:g} % of the reference, by this trait alone")
    _legend(figure, handles, texts)


def _shares(counts: Int[np.ndarray, " bin"]) -> Any:
    return counts / max(int(counts.sum()), 1)


def set_scatter(run: ScreenRun | Screened) -> "Figure":
    """Data sets by their scores for two traits, for each pair of the first six.

    Raises:
        ScreeningError: only one trait was screened for.
    """
    found = screened(run)
    traits = found.standings[:CROSSED]
    if len(traits) < 2:
        raise ScreeningError("sets were screened for one trait only: give vectors of two or more to draw them against each other")
    n = len(traits) - 1
    width, height = (5.8, 4.6) if n == 1 else (max(2.3, 6.4 / n), 2.1 * n + 1.2)
    figure, axes = empty_figure(n, width=width, height=height, rows=n)
    grid, named = axes.reshape(n, n), _named(found, traits)
    _hide(grid[i, j] for i in range(n) for j in range(i + 1, n))
    for j, i in combinations(range(n + 1), 2):
        _zeros(grid[i - 1, j], x=traits[j].kind != "cheap", y=traits[i].kind != "cheap")
        places = [(r, traits[i].of(r.name)) for r in traits[j].sets]
        _crosses(grid[i - 1, j], named, {a.name: (a.score, b.score) for a, b in places if b is not None})
    for i in range(n):
        grid[i, 0].set_ylabel(printed(traits[i + 1].trait), fontsize=9)
        grid[n - 1, i].set_xlabel(printed(traits[i].trait), fontsize=9)
    _names(figure, found, named)
    _title(figure, found, n + 1, f"each set's mean {SAID[traits[0].kind]}, with 95 % intervals\n({UNITS})")
    return figure


def signal_scatter(run: ScreenRun | Screened) -> "Figure":
    """Each set's mean projection difference beside its mean cheap score, over the rows that have both, trait by trait.

    Raises:
        ScreeningError: no own answers were made.
    """
    found = screened(run)
    traits = [s for s in found.standings[:PANELS] if s.both]
    if not traits:
        raise ScreeningError("no own answers were made, so there is nothing to draw the cheap scores against: raise own_share")
    columns = min(len(traits), 3)
    rows = -(-len(traits) // columns)
    figure, axes = empty_figure(columns, width=max(3.2, 5.8 / columns), height=2.9 * rows + 1.0, rows=rows)
    named = _named(found, traits)
    for ax, standing in zip(axes, traits, strict=False):
        _zeros(ax, x=False, y=True)
        _crosses(ax, named, {name: (cheap, exact) for name, (exact, cheap) in standing.both.items()})
        exact, cheap = np.array([[s.mean for s in pair] for pair in standing.both.values()]).T
        rho, n = spearman(cheap, exact)
        order = f"\nSpearman {rho:+.2f} over {n} sets" if np.isfinite(rho) else ""
        ax.set_title(_heading(standing) + order, fontsize=8)
        ax.set_xlabel("minus the last prompt token's", fontsize=8)
    for ax in axes[::columns]:
        ax.set_ylabel("minus the own answer's", fontsize=8)
    _hide(axes[len(traits) :])
    _names(figure, found, named)
    _title(figure, found, len(traits), f"mean projection of the data's answers, with 95 % intervals ({UNITS})")
    return figure


def screening_figures(run: ScreenRun | Screened) -> dict[str, "Figure"]:
    """What a report shows: the ranking, rows by trait, and scatters where there are sets to compare."""
    found = screened(run)
    figures = {"ranking": set_ranking(found)}
    figures |= {histogram_name(i, s.trait): row_histograms(found, s.trait) for i, s in enumerate(found.standings)}
    if len(found.standings) > 1 and any(len(s.sets) > 1 for s in found.standings):
        figures["traits"] = set_scatter(found)
    if any(len(s.both) > 1 for s in found.standings):
        figures["signals"] = signal_scatter(found)
    return figures


def histogram_name(number: int, trait: str) -> str:
    """The name of a trait's histograms as a file's."""
    return f"rows-{number + 1}-{re.sub('[^a-z0-9]+', '-', trait)[:40].strip('-')}".strip("-")


def _crosses(ax: Any, named: Mapping[str, tuple[str, str]], points: Mapping[str, tuple[SetScore, SetScore]]) -> None:
    """A point per set with both intervals; the sets that are not named lie pale behind."""
    for name, (x, y) in points.items():
        color, mark = named.get(name, (PALE, "."))
        style: dict[str, Any] = {"color": color, "ms": 5, "lw": 0.9, "zorder": 4 if name in named else 2, "label": name}
        ax.errorbar(x.mean, y.mean, xerr=_ends(x), yerr=_ends(y), fmt=mark, **style)
    ax.tick_params(labelsize=7)
    ax.margins(0.08)


def _zeros(ax: Any, *, x: bool, y: bool) -> None:
    """Lines at no difference to the own answers; 0 of a cheap score has no meaning."""
    if y:
        ax.axhline(0, color=NEUTRAL, lw=0.6, zorder=1, label="zero")
    if x:
        ax.axvline(0, color=NEUTRAL, lw=0.6, zorder=1, label="zero")


def _named(found: Screened, traits: Sequence[Standing]) -> dict[str, tuple[str, str]]:
    """Colour and mark of the sets whose names are told: all, or the highest ones of each trait in turn and the reference."""
    names = {n for standing in traits for n in standing.names}
    if len(names) > LISTED:
        highest = dict.fromkeys(n for place in zip(*(s.names for s in traits), strict=False) for n in place)
        names = {*list(highest)[:LISTED], *([found.reference] if found.reference in names else [])}
    ordered = [n for n in found.run.sets if n in names]
    return {name: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, name in enumerate(ordered)}


def _names(figure: Any, found: Screened, named: Mapping[str, tuple[str, str]]) -> None:
    others = len(found.run.sets) - len(named)
    handles = [_line(color=color, marker=mark, ls="", ms=5) for color, mark in named.values()]
    texts = [printed(name) + (" (reference)" if name == found.reference else "") for name in named]
    if others and len(named) >= LISTED:
        handles.append(_line(color=PALE, marker=".", ls="", ms=5))
        texts.append(f"{others} more sets")
    _legend(figure, handles, texts)


def _heading(standing: Standing) -> str:
    """A trait and where it was read, in two lines where one is too long."""
    parts = printed(standing.trait), hook_name(standing.layer)
    return (", " if sum(map(len, parts)) <= LONGEST else ",\n").join(parts)


def _ends(score: SetScore) -> Any:
    """The lengths of an interval on both sides; none where there is no interval."""
    return [[score.mean - score.low], [score.high - score.mean]]


def _title(figure: Any, found: Screened, shown: int, what: str = "") -> None:
    total = len(found.standings)
    some = f"the first {shown} of {total} traits" if shown < total else ""
    if what or some:
        figure.suptitle("\n".join(filter(None, (what, some))), fontsize=9)


def _hide(axes: Iterable[Any]) -> None:
    for ax in axes:
        ax.set_visible(False)


def _empty(ax: Any) -> None:
    ax.set(xticks=[], yticks=[])
    ax.annotate("no scores", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=NEUTRAL)


def _line(**style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _legend(figure: Any, handles: Sequence[Any], texts: Sequence[str]) -> None:
    """One legend below all panels, in as many columns as fit."""
    if not handles:
        return
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.075 * max(map(len, texts)))))
    style: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 8}
    legend = figure.legend(handles, ["x" * len(t) for t in texts], **style)
    for drawn, text in zip(legend.get_texts(), texts, strict=True):  # matplotlib drops labels that begin with _
        drawn.set_text(text)
