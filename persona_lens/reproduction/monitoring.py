"""Figure 4: whether the projection of the last prompt token foretells how far the answers will show the trait."""

from persona_lens.figures import prediction_scatter
from persona_lens.monitoring import PredictionSettings, graded_conditions, predict, shot_conditions
from persona_lens.monitoring.study import Prediction
from persona_lens.reproduction.bench import Bench
from persona_lens.reproduction.finding import Found, Row, above
from persona_lens.reproduction.paper import LOWEST_MONITORED, MONITORED
from persona_lens.traits import load_trait


def monitoring(bench: Bench) -> Found:
    """Graded system prompts, and growing numbers of examples in the context."""
    kinds = ("system prompts", "examples") if bench.scale.examples else ("system prompts",)
    found = {(trait, kind): _predicted(bench, trait, kind) for trait in bench.scale.steered for kind in kinds}
    rows = [row for (trait, kind), p in found.items() for row in _rows(trait, kind, p)]
    reading = (
        "The layer is chosen on half of the questions, r is reported on the other. What varies between conditions is known from"
        " the prompt's text as well: `persona-lens monitor predict` puts text baselines beside the vector. Within a condition "
        "little but the question varies, here as in the paper."
    )
    figures = {
        f"{trait}-{kind.replace(' ', '-')}": (prediction_scatter(p), f"{trait}, {kind}: last prompt token against the answers.")
        for (trait, kind), p in found.items()
    }
    return Found(rows, reading, figures)


def _predicted(bench: Bench, trait: str, kind: str) -> Prediction:
    graded = graded_conditions(load_trait(trait, "pocket"))
    conditions = graded if kind == "system prompts" else shot_conditions(bench.runs[trait])
    settings = PredictionSettings(samples=bench.scale.monitored, sampling=bench.sampling)
    out = bench.path / "monitoring" / f"{trait}-{kind.replace(' ', '-')}"
    others = [v for v in bench.paper_vectors if v.trait != trait]
    return predict(
        bench.model, bench.vectors[trait], conditions, others=others, settings=settings, out=out, progress=bench.progress
    ).prediction


def _rows(trait: str, kind: str, found: Prediction) -> list[Row]:
    overall, within = (getattr(found.comparison.main.correlations, name) for name in ("overall", "within"))
    paper = MONITORED[kind][trait]
    floor = max(f.overall.high for f in found.floors)
    what = f"{trait}, {kind}"
    return [
        above(
            f"{what}: r over all cells (layer {found.layer})", (overall.value, overall.low, overall.high), LOWEST_MONITORED,
            paper=f"{paper[0]:.2f}", rule=f"at least {LOWEST_MONITORED:.2f}, the paper's lowest",
        ),
        Row(
            f"{what}: r of random directions, 95th percentile", floor, rule="below r over all cells",
            holds=floor < overall.value,
        ),
        Row(
            f"{what}: r within one condition", within.value, within.low, within.high, paper=f"{paper[1]:.2f}",
            rule="below r over all cells", holds=within.value < overall.value if within.value == within.value else None,
        ),
    ]  # fmt: skip
