"""Is the persona seen before the answer? Seven traits of the pocket world under graded system prompts and numbers of examples.

Run: python tests/benchmarks/study_prediction.py runs/all --out runs/predict. An interrupted study goes on where it stopped, and a
finished one is only analysed again. Prints a table per kind of condition; asserts nothing.
"""

import argparse
import time
from pathlib import Path

from persona_lens.extraction import load_run
from persona_lens.models import load_model
from persona_lens.monitoring.prediction import Estimate, Skill
from persona_lens.monitoring.study import Prediction, PredictionSettings, graded_conditions, predict, shot_conditions
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.traits import load_trait


def shown(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def line(skill: Skill) -> str:
    c = skill.correlations
    between = f"{shown(c.between)} (plain {c.between_plain:+.2f})"
    return f"samples {shown(c.overall)}  conditions {between}  within {shown(c.within)}  AUROC {shown(skill.auroc)}"


def table(kind: str, found: dict[str, Prediction]) -> None:
    print(f"\n== {kind}")
    for trait, p in found.items():
        means = " ".join(f"{x:.0f}" for x in p.outcomes.score.mean(1))
        out = f", left out: {', '.join(p.left_out)}" if p.left_out else ""
        print(f"{trait} (layer {p.layer}; mean scores {means}; {p.gaps} gaps{out}; r by layer {p.by_layer.round(2).tolist()})")
        for skill in (p.comparison.main, *p.comparison.others):
            print(f"    {skill.name:32} {line(skill)}")
        for advantage in p.comparison.advantages[:3]:
            print(f"    better than {advantage.over}: r {shown(advantage.overall)}, AUROC {shown(advantage.auroc)}")
        for floor in p.floors:
            reach = ", ".join(
                f"{n} {r.mean:.2f} (95 %: {r.high:.2f})"
                for n, r in (
                    ("samples", floor.overall),
                    ("conditions", floor.between),
                    ("within", floor.within),
                    ("AUROC", floor.auroc),
                )
            )
            print(f"    random directions{', matched' if floor.matched else ''}: {reach}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, help="folder with an extraction run per trait")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", default=["prompts", "examples"], choices=["prompts", "examples"])
    arguments = parser.parse_args()
    model = load_model("pocket")
    runs = {t: load_run(arguments.runs / t) for t in TRAITS}
    for kind in arguments.kinds:
        found: dict[str, Prediction] = {}
        for trait, run in runs.items():
            started = time.time()
            conditions = graded_conditions(load_trait(trait, "pocket")) if kind == "prompts" else shot_conditions(run)
            settings = PredictionSettings(samples=arguments.samples, batch_rows=128 if kind == "prompts" else 16)
            others = [r.vectors for r in runs.values()]
            done = predict(model, run.vectors, conditions, others=others, out=arguments.out / f"{kind}-{trait}", settings=settings)
            found[trait] = done.prediction
            print(f"{kind}, {trait}: {time.time() - started:.0f} s", flush=True)
        table(kind, found)


if __name__ == "__main__":
    main()
