"""Figures that only the reproduction has: scores by data set, projection differences beside them, and single samples."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from persona_lens.correlation import family_of
from persona_lens.figures.style import NEGATIVE, NEUTRAL, POSITIVE, empty_figure
from persona_lens.finetuning import ShiftRun
from persona_lens.screening import ScreenRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS: Final = {"normal": NEUTRAL, "I": NEGATIVE, "II": POSITIVE}
BINS: Final = 40
MARKS: Final = "osD^v<>P"
COLOURS: Final = (POSITIVE, NEGATIVE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#666666")


def score_map(scores: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Trait scores [data set, trait] as a map with numbers."""
    names, traits = list(scores), list(next(iter(scores.values())))
    values = np.array([[scores[n][t] for t in traits] for n in names])
    figure, (ax,) = empty_figure(1, width=2.4 + 1.2 * len(traits), height=0.9 + 0.27 * len(names))
    image = ax.imshow(values, aspect="auto", cmap="OrRd", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 60 else "black")
    ax.set_xticks(range(len(traits)), traits)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    figure.colorbar(image, ax=ax, shrink=0.6, label="trait score")
    return figure


def difference_scatter(screened: ScreenRun, trained: ShiftRun, traits: Sequence[str]) -> "Figure":
    """Each set's mean projection difference against the trait score after finetuning on it; families by colour and mark."""
    figure, axes = empty_figure(len(traits), width=3.6, height=3.6)
    families = sorted({family_of(n) for n in screened.sets})
    for ax, trait in zip(axes, traits, strict=True):
        ax.axhline(trained.base_scores[trained.traits.index(trait)].mean, color=NEUTRAL, ls="--", lw=1)
        ax.axvline(0, color=NEUTRAL, lw=0.6)
        for name in screened.sets:
            number = families.index(family_of(name))
            score = trained.shifts[name].scores[trained.traits.index(trait)].mean
            style = {"marker": MARKS[number % len(MARKS)], "color": COLOURS[number % len(COLOURS)]}
            ax.plot(float(np.nanmean(screened.scores(name, trait))), score, ls="", ms=5, alpha=0.85, **style)
        ax.set(title=f"{trait}, layer {screened.layer(trait)}", xlabel="projection difference", ylim=(-4, 104))
    axes[0].set_ylabel("trait score after finetuning")
    _legend(figure, families, [(COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i in range(len(families))])
    return figure


def sample_histograms(screened: ScreenRun, traits: Sequence[str]) -> "Figure":
    """Projection differences of the rows of each trait's own sets, level by level."""
    figure, axes = empty_figure(len(traits), width=3.6, height=2.8)
    for ax, trait in zip(axes, traits, strict=True):
        levels = [level for level in LEVELS if f"{trait}-{level}" in screened.sets]
        rows = {level: screened.scores(f"{trait}-{level}", trait).astype(np.float64) for level in levels}
        kept = {level: r[np.isfinite(r)] for level, r in rows.items()}
        edges = np.linspace(min(r.min() for r in kept.values()), max(r.max() for r in kept.values()), BINS).tolist()
        for level, r in kept.items():
            ax.hist(r, bins=edges, density=True, histtype="stepfilled", alpha=0.45, color=LEVELS[level], label=level)
        ax.set(title=f"{trait}, layer {screened.layer(trait)}", xlabel="projection difference", yticks=[])
    axes[0].legend(frameon=False, fontsize=8, title="set", title_fontsize=8)
    axes[0].set_ylabel("share of samples")
    return figure


def bars(values: Mapping[str, Mapping[str, tuple[float, float, float]]], label: str) -> "Figure":
    """Figures with their intervals, grouped by trait."""
    figure, (ax,) = empty_figure(1, width=1.6 + 1.9 * len(values))
    kinds = list(next(iter(values.values())))
    for number, kind in enumerate(kinds):
        at = np.arange(len(values)) + (number - (len(kinds) - 1) / 2) * 0.26
        mean, low, high = np.array([by[kind] for by in values.values()]).T
        ax.bar(at, mean, width=0.24, color=COLOURS[number], alpha=0.8, label=kind)
        ax.errorbar(at, mean, yerr=[mean - low, high - mean], fmt="none", color="black", lw=1, capsize=2)
    ax.axhline(0, color=NEUTRAL, lw=0.8)
    ax.set_xticks(range(len(values)), list(values))
    ax.set_ylabel(label)
    ax.legend(frameon=False, fontsize=8)
    return figure


def _legend(figure: Any, names: Sequence[str], styles: Sequence[tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], ls="", color=color, marker=mark, ms=5) for color, mark in styles]
    figure.legend(handles, list(names), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
