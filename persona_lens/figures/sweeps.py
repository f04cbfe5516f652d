"""Figures of a sweep: layers x strengths, the furthest each layer gets, dose and response."""

from typing import TYPE_CHECKING

import numpy as np

from persona_lens.figures.style import NEGATIVE, NEUTRAL, POSITIVE, empty_figure
from persona_lens.sweeps import INCREMENTS, Sweep
from persona_lens.vectors import hook_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_heat_map(sweep: Sweep) -> "Figure":
    """Trait score and coherence by layer and strength."""
    figure, axes = empty_figure(2, width=4.8, height=0.9 + 0.32 * len(sweep.targets))
    for ax, values, title, color in zip(
        axes, (sweep.score, sweep.coherence), (f"{sweep.trait} score", "coherence"), ("OrRd", "Blues"), strict=True
    ):
        image = ax.imshow(values, aspect="auto", cmap=color, vmin=0, vmax=100)
        for (i, j), value in np.ndenumerate(values):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 60 else "black")
        ax.set(xlabel="strength", ylabel="layer", title=title)
        ax.set_xticks(range(len(sweep.strengths)), [f"{s:g}" for s in sweep.strengths])
        ax.set_yticks(range(len(sweep.targets)), [str(t) for t in sweep.targets])
        figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def sweep_profile(sweep: Sweep) -> "Figure":
    """By layer: the furthest coherent score (the paper's criterion for choosing a layer), beside the vector's reliability.

    A description over all questions: the strength shown is the best on the same answers. The unbiased figure is in the report.
    """
    figure, (ax,) = empty_figure(1, width=max(6.4, 0.36 * len(sweep.targets)))
    names, at = ["all" if t == INCREMENTS else str(t) for t in sweep.targets], np.arange(len(sweep.targets))
    toward = np.sign(sweep.strengths)  # negative strengths reach furthest where the score is lowest
    effect = (sweep.score - sweep.record["unsteered"]) * toward
    coherent = np.where((sweep.coherence >= sweep.record["coherence_floor"]) & np.isfinite(effect), effect, -np.inf)
    best = coherent.argmax(1)
    reached = np.where(np.isfinite(coherent.max(1)), sweep.score[at, best], np.nan)
    ax.bar(at, reached, color=POSITIVE, alpha=0.75, label=f"furthest {sweep.trait} score while coherent")
    for x, column, value in zip(at, best, reached, strict=True):
        text = "never coherent" if np.isnan(value) else f"at {sweep.strengths[column]:g}"
        ax.text(x, 2, text, ha="center", va="bottom", rotation=90, fontsize=7, color="black")
    ax.axhline(sweep.record["unsteered"], color=NEUTRAL, lw=0.9, label="unsteered")
    ax.plot(at, 100 * sweep.reliability, "o-", color=NEGATIVE, label="reliability of the vector x 100")
    ax.set_xticks(at, names)
    ax.set(
        xlabel="layer (blocks.{l}.hook_resid_post; all = increments)",
        ylabel="score (0-100)",
        ylim=(min(0.0, float(np.nanmin(100 * sweep.reliability, initial=0.0))), 108),
    )
    ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def dose_response(sweep: Sweep) -> "Figure":
    """Score and coherence against strength at the chosen layer, with the unsteered, prompted and random answers beside them."""
    figure, (ax,) = empty_figure(1, width=7.4)
    r = sweep.report
    row = sweep.targets.index(r.cell.target)  # pyright: ignore[reportArgumentType]
    ax.plot(sweep.strengths, sweep.score[row], "o-", color=POSITIVE, label=f"{sweep.trait} score")
    ax.plot(sweep.strengths, sweep.coherence[row], "s--", color=NEGATIVE, label="coherence")
    ax.plot(sweep.strengths, 100 * sweep.degenerate[row], "^:", color=NEGATIVE, lw=0.8, label="degenerate answers (%)")
    ax.axhline(r.unsteered, color=NEUTRAL, lw=0.9, label="unsteered")
    ax.axhline(r.prompted, color=NEUTRAL, lw=0.9, ls="--", label="positive prompt")
    if r.random_effect is not None:
        ax.axhline(r.unsteered + r.random_effect, color=NEUTRAL, lw=0.9, ls=":", label="random directions")
    ax.axvline(r.cell.strength, color=NEUTRAL, lw=0.5)
    place = "all layers (increments)" if r.cell.target == INCREMENTS else hook_name(int(r.cell.target or 0))
    ax.set(xlabel=f"strength at {place}", ylabel="score (0-100)", ylim=(0, 100))
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure
