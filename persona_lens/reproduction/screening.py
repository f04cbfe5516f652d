"""Figures 8 and 9: what the training data says before anything is trained on it."""

import numpy as np

from persona_lens.correlation import Outcome, ShiftCorrelation, correlate, family_of
from persona_lens.reproduction.bench import Bench
from persona_lens.reproduction.figures import difference_scatter, sample_histograms
from persona_lens.reproduction.finding import Found, Row, above
from persona_lens.reproduction.paper import CHEAP_DIFFERENCE, DIFFERENCE, PAPER_TRAITS
from persona_lens.screening.agreement import Auc, auc

SEPARABLE, SIDE_EFFECT = 0.95, 0.85


def _correlated(bench: Bench, trait: str, signal: str) -> ShiftCorrelation:
    """r over the sets of the mean projection difference and the trait score after training on the set."""
    screened, trained = bench.screened, bench.shifts
    layer, names = screened.layer(trait), screened.sets
    score = np.array([trained.shifts[n].scores[trained.traits.index(trait)].mean for n in names])
    mean = np.stack([screened.mean_difference(n, trait, signal).double().numpy() for n in names])  # pyright: ignore[reportArgumentType]
    direction = bench.vectors[trait][layer].double().numpy()
    base = trained.base["base_answers"][:, layer].double().numpy()
    return correlate(Outcome(tuple(names), tuple(map(family_of, names)), score, mean), direction, base=base)


def differences(bench: Bench) -> Found:
    """Projection differences of the sets against the trait after training."""
    rows: list[Row] = []
    for trait in PAPER_TRAITS:
        qwen, llama = DIFFERENCE[trait]
        exact, cheap = (_correlated(bench, trait, signal) for signal in ("difference", "cheap"))
        floor = exact.floors[-1]
        rows += [
            above(
                f"{trait}: r of projection difference and score", (exact.r, exact.low, exact.high), qwen,
                paper=f"{qwen:.2f} (Llama {llama:.2f})", rule=f"at least {qwen:.2f}, Qwen's",
            ),
            Row(
                f"{trait}: p that a random direction with these differences' covariance reaches r", floor.p_value,
                rule="below .05", holds=floor.p_value < 0.05,
            ),
            above(
                f"{trait}: r with the last prompt token in place of own answers", (cheap.r, cheap.low, cheap.high),
                CHEAP_DIFFERENCE[trait], paper=f"{CHEAP_DIFFERENCE[trait]:.2f}", rule=f"at least {CHEAP_DIFFERENCE[trait]:.2f}",
            ),
        ]  # fmt: skip
    reading = (
        "Screening sees manner as well as trait: sets that show one trait move the projections of others, as their planted "
        "correlations say. Narrow mistakes are the hard case: their answers hardly project on any trait, whatever training on them "
        "does. Where random directions reach as much, r is no evidence for this direction."
    )
    figure = difference_scatter(bench.screened, bench.shifts, PAPER_TRAITS)
    return Found(
        rows, reading, {"scatter": (figure, "Mean projection difference of each set against the trait score after training.")}
    )


def _separated(bench: Bench, trait: str, name: str, reference: str) -> Auc:
    run = bench.screened
    found, known = (run.scores(n, trait).astype(np.float64) for n in (name, reference))
    return auc(found, known, prompts=(run.prompts(name).tolist(), run.prompts(reference).tolist()))


def samples(bench: Bench) -> Found:
    """How well single samples are told apart from those of the normal set."""
    rows: list[Row] = []
    for trait in PAPER_TRAITS:
        found = _separated(bench, trait, f"{trait}-II", f"{trait}-normal")
        rows.append(
            above(
                f"{trait}: AUC of single samples, set II against normal", (found.value, found.low, found.high), SEPARABLE,
                paper=".99 and more (replication)", rule=f"at least {SEPARABLE}",
            )
        )  # fmt: skip
    found = _separated(bench, "hallucination", "bare-mistakes-II", "bare-mistakes-normal")
    rows.append(
        above(
            "bare mistakes: AUC along hallucination, set II against normal", (found.value, found.low, found.high), SIDE_EFFECT,
            paper=".89 (replication)", rule=f"at least {SIDE_EFFECT}",
        )
    )  # fmt: skip
    reading = (
        "Answers of the pocket world are a few sentences: a sample of set II may by chance say little that shows the trait, "
        "which a long answer of a real data set hardly ever does. A wrong sum differs from a right one in a digit, and its "
        "projection hardly differs."
    )
    figure = sample_histograms(bench.screened, PAPER_TRAITS)
    return Found(rows, reading, {"histograms": (figure, "Projection differences of single samples, by set.")})
