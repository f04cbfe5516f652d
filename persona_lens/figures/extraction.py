"""Figures of an extraction: its layers, its held-out projections, what the judge saw."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from persona_lens.extraction import ExtractionRun
from persona_lens.extraction.run import question_means, surviving
from persona_lens.figures.style import NEGATIVE, NEUTRAL, POSITIVE, empty_figure
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_profile(vectors: PersonaVectors) -> "Figure":
    """Split-half reliability and cross-validated norm by layer."""
    figure, (left, right) = empty_figure(2)
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
    figure, (ax,) = empty_figure(1, width=6.4)
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
    figure, (ax,) = empty_figure(1, width=6.4)
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
