"""Steering of the pocket model on held-out questions: seven traits, every layer and the increments, with everything beside them.

For each trait of an `extract all` folder: a sweep of the response-mean vectors (20 random directions, prompt baseline), the same
for the prompt-last vectors, and negative strengths under the positive prompts. Then, for the first trait, capability by the pocket
world's own tasks at three strengths (extra `eval`). Resumable; prints a table and writes JSON; asserts nothing.

Run: persona-lens extract all --out runs/all && python tests/benchmarks/study_steering.py runs/all --out runs/steering
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from persona_lens import pocket_lab
from persona_lens.extraction import ExtractionRun, load_run
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.trait_files import QUESTIONS, trait_questions
from persona_lens.pocket_lab.prescription import prescribe
from persona_lens.sweeps import INCREMENTS, Sweep, SweepSettings, Target, sweep

STRENGTHS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
NEGATIVE = (-0.5, -1.0, -1.5, -2.0, -2.5)
ANSWER = Sampling(max_new_tokens=200)


def furthest(found: Sweep, *, increments: bool) -> dict[str, Any] | None:
    """The coherent cell of the highest score, among single layers or the increments."""
    best: dict[str, Any] | None = None
    for i, target in enumerate(found.targets):
        for j, strength in enumerate(found.strengths):
            coherent = found.coherence[i, j] >= found.record["coherence_floor"]
            if (target == INCREMENTS) == increments and coherent and (best is None or found.score[i, j] > best["score"]):
                best = {
                    "layer": target,
                    "strength": strength,
                    "score": float(found.score[i, j]),
                    "coherence": float(found.coherence[i, j]),
                }
    return best


def line(found: Sweep) -> dict[str, Any]:
    """What a sweep reports, flat."""
    r = found.report
    flat = {k: v for k, v in vars(r).items() if k not in ("cell", "capability")}
    return {"layer": r.cell.target, "strength": r.cell.strength, **flat}


def study(model: ChatModel, run: ExtractionRun, out: Path) -> dict[str, Any]:
    """The three sweeps of a trait."""
    layers: list[Target] = list(range(model.n_layers))
    toward = SweepSettings(sampling=ANSWER)
    small = SweepSettings(samples=1, random_directions=0, sampling=ANSWER)
    against = SweepSettings(samples=1, report_samples=20, random_directions=0, sampling=ANSWER, polarity="positive")
    v = run.vectors
    main = sweep(model, v, layers=[*layers, INCREMENTS], strengths=STRENGTHS, out=out / "toward", settings=toward)
    last = sweep(model, run.vectors_for("prompt_last"), layers=layers, strengths=STRENGTHS, out=out / "prompt_last", settings=small)
    middle = layers[model.n_layers // 2 - 2 : model.n_layers // 2 + 3]
    down = sweep(model, v, layers=[*middle, INCREMENTS], strengths=NEGATIVE, out=out / "against", settings=against)
    ceiling = prescribe(run.trait, trait_questions(run.trait, "development")[QUESTIONS:]).ceiling
    base = main.report.unsteered
    return {
        "ceiling": ceiling,
        "toward": {**line(main), "share_of_ceiling": main.report.score / ceiling},
        "single": furthest(main, increments=False),
        "increments": furthest(main, increments=True),
        "score": main.score.tolist(),
        "coherence": main.coherence.tolist(),
        "divergence": main.divergence.tolist(),
        "reliability": main.reliability[:-1].tolist(),
        "prompt_last": {**line(last), "reliability": last.reliability.tolist(), "score_by_layer": last.score.tolist()},
        "against": {**line(down), "reduction": 1.0 - down.report.score / down.report.unsteered, "none": base},
    }


def capability_at(model: ChatModel, run: ExtractionRun, layer: int, strengths: tuple[float, ...]) -> dict[str, Any]:
    """The pocket world's tasks through lm-evaluation-harness at several strengths."""
    from persona_lens.evaluation import capability
    from persona_lens.steering import add

    folder = Path(pocket_lab.__file__).parent / "tasks"
    tasks = sorted(p.stem for p in folder.glob("*.yaml"))
    return {f"{s:g}": capability(model, tasks, add(run.vectors, layer, s), include=folder) for s in strengths}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    parser.add_argument("--traits", nargs="*", default=list(TRAITS))
    arguments = parser.parse_args()
    model = load_model("pocket")
    record: dict[str, Any] = {}
    for trait in arguments.traits:
        record[trait] = study(model, load_run(arguments.runs / trait), arguments.out / trait)
        t = record[trait]["toward"]
        print(
            f"{trait:<14} layer {t['layer']} strength {t['strength']:g}: {t['score']:.0f} "
            f"({t['share_of_ceiling']:.0%} of the ceiling) at coherence {t['coherence']:.0f}; prompt {t['prompted']:.0f}, "
            f"none {t['unsteered']:.0f}, random {t['random_effect']:+.1f} {np.round(t['random_interval'], 1).tolist()}; "
            f"prompt_last prefers layer {record[trait]['prompt_last']['layer']}; "
            f"against the prompt -{record[trait]['against']['reduction']:.0%} at {record[trait]['against']['coherence']:.0f}",
            flush=True,
        )
    mean = {k: float(np.mean([r["toward"][k] for r in record.values()])) for k in ("share_of_ceiling", "coherence")}
    print(json.dumps(mean))
    first = arguments.traits[0]
    layer = record[first]["single"]["layer"] if record[first]["single"] else model.n_layers // 2
    capable = capability_at(model, load_run(arguments.runs / first), layer, (0.0, 1.0, 2.0))
    print(json.dumps(capable))
    (arguments.out / "study.json").write_text(json.dumps({"traits": record, "mean": mean, "capability": capable}, indent=1))


if __name__ == "__main__":
    main()
