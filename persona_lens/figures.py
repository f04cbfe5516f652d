"""Record -> matplotlib figure. Nothing here touches a model; colours are told apart by colour-blind readers too."""

from functools import singledispatch
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Float

from persona_lens.extraction import ExtractionRun
from persona_lens.extraction.run import question_means, surviving
from persona_lens.sweeps import INCREMENTS, Sweep
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSITIVE: Final = "#D55E00"
NEGATIVE: Final = "#0072B2"
NEUTRAL: Final = "#666666"


def _figure(columns: int = 1, *, width: float = 4.6, height: float = 3.2) -> Any:
    """An empty figure without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def layer_profile(vectors: PersonaVectors) -> "Figure":
    """Split-half reliability and cross-validated norm by layer."""
    figure, (left, right) = _figure(2)
    layers = np.arange(vectors.n_layers)
    left.plot(layers, vectors.reliability, "o-", color=POSITIVE)
    left.set(
        xlabel="layer (blocks.{l}.hook_resid_post)",
        ylabel="split-half reliability",
        ylim=(min(0.0, float(vectors.reliability.min())), 1.02),
    )
    left.axhline(0.9, color=NEUTRAL, lw=0.8, ls=":")
    left.set_title(f"{vectors.trait}: can the direction be trusted?", fontsize=10)
    right.plot(layers, vectors.norm, "o-", color=NEGATIVE, label="cross-validated")
    right.plot(layers, vectors.directions.norm(dim=-1), "--", color=NEUTRAL, label="plain (inflated by noise)")
    right.set(xlabel="layer", ylabel="norm (residual units)", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    right.set_title("how long it is", fontsize=10)
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def held_out_projections(run: ExtractionRun, layer: int) -> Float[np.ndarray, "polarity question"]:
    """Each question's mean positive and negative projection on the direction of the *other* questions."""
    counts, cells = run.means["independent.counts"], run.means["independent.response_mean"]
    kept = surviving(counts)
    means = question_means(cells, counts)[:, kept, layer].double()
    differences = means[0] - means[1]
    others = (differences.sum(0) - differences) / (len(kept) - 1)
    units = others / others.norm(dim=-1, keepdim=True)
    return torch.einsum("pqd,qd->pq", means, units).numpy()


def projections(run: ExtractionRun, layer: int | None = None) -> "Figure":
    """Where positive and negative answers lie on the vector, question by question (left out of the direction they lie on)."""
    layer = run.vectors.best_layer if layer is None else layer
    values = held_out_projections(run, layer)
    figure, (ax,) = _figure(1, width=6.4)
    low, high = float(values.min()), float(values.max())
    bins = np.linspace(low, high, 24).tolist()
    for row, name, color in ((0, "positive", POSITIVE), (1, "negative", NEGATIVE)):
        ax.hist(values[row], bins=bins, color=color, alpha=0.65, label=f"{name} prompts")
    ax.set(xlabel=f"projection on the {run.trait} vector at blocks.{layer}.hook_resid_post", ylabel="questions")
    ax.legend(frameon=False, fontsize=8)
    ax.set_title("each question on the direction of the others", fontsize=10)
    return figure


def score_histogram(run: ExtractionRun) -> "Figure":
    """The judge's trait scores under positive, negative and no prompts."""
    figure, (ax,) = _figure(1, width=6.4)
    scores: dict[str, list[float]] = {"positive": [], "negative": [], "neutral": []}
    for rollout, score in zip(run.rollouts(), run.scores(), strict=True):
        if score.trait is not None:
            scores[rollout.prompt_id.split("/")[1]].append(score.trait)
    colors = {"positive": POSITIVE, "negative": NEGATIVE, "neutral": NEUTRAL}
    for name, values in scores.items():
        if values:
            weights = np.full(len(values), 1 / len(values))
            ax.hist(
                values,
                bins=np.linspace(0, 100, 26).tolist(),
                weights=weights,
                histtype="step",
                lw=1.8,
                color=colors[name],
                label=f"{name} (n={len(values)})",
            )
    ax.set(xlabel=f"{run.trait} score", ylabel="share of answers")
    ax.legend(frameon=False, fontsize=8)
    ax.set_title("what the judge saw", fontsize=10)
    return figure


def sweep_heat_map(sweep: Sweep) -> "Figure":
    """Trait score and coherence by layer and strength."""
    figure, axes = _figure(2, width=4.8, height=0.9 + 0.32 * len(sweep.targets))
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
    figure, (ax,) = _figure(1, width=max(6.4, 0.36 * len(sweep.targets)))
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
    figure, (ax,) = _figure(1, width=6.0)
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
    ax.set(xlabel=f"strength at {r.cell.target} (layer)", ylabel="score (0-100)", ylim=(0, 100))
    ax.legend(frameon=False, fontsize=8)
    return figure


@singledispatch
def plot(record: object) -> "Figure":
    """The figure of a record: vectors give their layer profile, a run its held-out projections, a sweep its heat map.

    Raises:
        TypeError: there is no figure for this kind of record.
    """
    raise TypeError(f"there is no figure for {type(record).__name__}: pass PersonaVectors, an ExtractionRun or a Sweep")


@plot.register(PersonaVectors)
def _(record: PersonaVectors) -> "Figure":
    return layer_profile(record)


@plot.register(ExtractionRun)
def _(record: ExtractionRun) -> "Figure":
    return projections(record)


@plot.register(Sweep)
def _(record: Sweep) -> "Figure":
    return sweep_heat_map(record)
