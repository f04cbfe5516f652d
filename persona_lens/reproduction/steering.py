"""Figures 2 and 3, and the appendix on positions: vectors are extracted, and the model is steered with them."""

from math import nan
from typing import Final

from persona_lens.activations import POOLINGS
from persona_lens.figures import layer_profile, projections, sweep_heat_map
from persona_lens.reproduction.bench import LAYER, Bench
from persona_lens.reproduction.figures import bars
from persona_lens.reproduction.finding import NOT_TESTED, Found, Row, above, surely_above
from persona_lens.reproduction.paper import STEERED, STEERING_LAYER
from persona_lens.sweeps import Sweep, SweepSettings, sweep
from persona_lens.vectors import hook_name

RELIABLE: Final = 0.8
POOLING_STRENGTH: Final = 1.5
LAST_LAYER: Final = (
    " Where the last layer does best, a pocket model differs from a large one: its sentences are short and its words few, so that "
    "moving the next word's probabilities directly is enough at a small coefficient; at a large one it is the first to lose "
    "coherence."
)


def extraction(bench: Bench) -> Found:
    """A vector per trait, and how reliable it is."""
    rows: list[Row] = []
    for trait, run in bench.runs.items():
        v, best = run.vectors, run.vectors.best_layer
        rows.append(
            above(
                f"{trait}: reliability of the vector at {hook_name(best)}", (float(v.reliability[best]), nan, nan), RELIABLE,
                rule=f"at least {RELIABLE}",
            )
        )  # fmt: skip
        rows.append(
            Row(f"{trait}: p that there is no direction at any layer", v.p_any, rule="below .05", holds=bool(v.p_any < 0.05))
        )
    first = next(iter(bench.runs.values()))
    reading = (
        "Reliability is the agreement of two halves of the questions, stepped up (Spearman-Brown); the paper prints none. It "
        "says that other questions of this kind would give the same direction, not that the direction is the trait."
    )
    figures = {
        "layers": (layer_profile(first.vectors), f"{first.trait}: reliability and norm by layer."),
        "projections": (projections(first), f"{first.trait}: each question's answers on the vector of the other questions."),
    }
    return Found(rows, reading, figures)


def swept(bench: Bench, trait: str) -> Sweep:
    scale = bench.scale
    settings = SweepSettings(
        samples=scale.sweep_samples, report_samples=scale.report_samples, random_directions=scale.random_directions,
        sampling=bench.sampling,
    )  # fmt: skip
    return sweep(
        bench.model, bench.vectors[trait], layers=scale.layers, strengths=scale.strengths, settings=settings,
        out=bench.path / "sweeps" / trait, progress=bench.progress,
    )  # fmt: skip


def steering(bench: Bench) -> Found:
    """Every layer at several coefficients; chosen on half of the questions, reported on the other."""
    sweeps = {trait: swept(bench, trait) for trait in bench.scale.steered}
    rows = [row for trait, found in sweeps.items() for row in _steered(trait, found)]
    reading = (
        "The cell is chosen on half of the questions and reported on the other, beside random directions of the same norm, "
        "which the paper does not have."
    )
    if any(r.holds is False and "layer" in r.claim for r in rows):
        reading += LAST_LAYER
    figures = {
        trait: (sweep_heat_map(found), f"{trait}: trait score and coherence by layer and coefficient.")
        for trait, found in sweeps.items()
    }
    return Found(rows, reading, figures)


def _steered(trait: str, found: Sweep) -> list[Row]:
    r, n = found.report, STEERING_LAYER[trait]
    layers = [int(t) for t in found.targets]
    layer = int(r.cell.target or 0)
    random = r.random_interval
    noise = "" if random is None else f" ({random[1]:.1f})"
    scores = found.score[layers.index(layer)]
    rises = float(scores[-1] - scores[0])
    inside = layers[0] < layer < layers[-1] if len(layers) > 2 else None
    return [
        surely_above(
            f"{trait}: points gained at layer {layer}, coefficient {r.cell.strength:g} (coherence {r.coherence:.0f})",
            (r.effect, *r.interval), 0.0 if random is None else random[1], paper=STEERED[trait],
            rule=f"interval above that of random directions{noise}",
        ),
        Row(
            f"{trait}: points between the smallest and the largest coefficient there", rises, paper="rises throughout",
            rule="above 0", holds=rises > 0,
        ),
        Row(
            f"{trait}: layer of the most effect, counted from 0 (of {len(layers)})", float(layer), paper=f"{n[0] - 1} of {n[1]}",
            rule="neither the first nor the last", holds=inside,
        ),
    ]  # fmt: skip


def pooling(bench: Bench) -> Found:
    """The same coefficient on vectors from different tokens, at one layer."""
    rows: list[Row] = []
    effects: dict[str, dict[str, tuple[float, float, float]]] = {}
    for trait in bench.scale.steered:
        for name in POOLINGS:
            settings = SweepSettings(
                samples=1, report_samples=bench.scale.report_samples, random_directions=0, sampling=bench.sampling
            )
            found = sweep(
                bench.model, bench.runs[trait].vectors_for(name), layers=[LAYER], strengths=[POOLING_STRENGTH],
                settings=settings, out=bench.path / "poolings" / f"{trait}-{name}", progress=bench.progress,
            ).report  # fmt: skip
            effects.setdefault(trait, {})[name] = (found.effect, *found.interval)
        ours = effects[trait]
        best = max(ours, key=lambda n: ours[n][0])
        for name in POOLINGS:
            mean = name == "response_mean"
            rows.append(
                Row(
                    f"{trait}: points gained by the {name} vector", *ours[name], paper="steers best" if mean else NOT_TESTED,
                    rule="the largest of the three" if mean else "", holds=best == name if mean else None,
                )
            )  # fmt: skip
    reading = (
        f"Coefficient {POOLING_STRENGTH:g} on the raw vector at {hook_name(LAYER)}, as the paper counts doses: the poolings "
        "differ in the vectors' norms as well as in their directions, and this says which does most at one coefficient."
    )
    caption = "Points gained over the unsteered answers, with 95 % intervals over questions."
    return Found(rows, reading, {"poolings": (bars(effects, "points gained"), caption)})
