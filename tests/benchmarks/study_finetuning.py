"""What finetuning does to the pocket model's persona, and what prevents it.

1. `shifts`: finetune on 39 data sets (those of mistakes with three seeds), measure shifts and trait scores.
2. `vaccine`: for each trait's set II, preventative and inference-time steering over five strengths.
3. `balanced`: the same sets with strengths of all seven vectors that leave no shift.
4. `comparison`: every defence on three sets: evil answers, bare mistakes, 100 new facts.
5. `table`: what 1 to 4 found.

Run: persona-lens extract all --out runs/all; then
     python tests/benchmarks/study_finetuning.py shifts runs/all --out runs/finetuning --shard 0/4   (several shards side by side)
     python tests/benchmarks/study_finetuning.py table runs/all --out runs/finetuning
Prints; asserts nothing.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from persona_lens.evaluation import ScoreSettings
from persona_lens.extraction import load_run
from persona_lens.finetuning import (
    Cell,
    ComparisonSettings,
    ShiftRun,
    Task,
    ablate_concept,
    balanced_strengths,
    default_settings,
    defend,
    finetune,
    foretold,
    inoculate,
    load_shift,
    matched_strengths,
    mix_in,
    negative_prompt,
    penalise,
    prevent,
    shift,
    stay_near,
    steer_against,
)
from persona_lens.models import Sampling, load_model
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.trait_files import pocket_trait
from persona_lens.pocket_lab.capability import capability_of_world
from persona_lens.pocket_lab.datasets import FAMILIES, LEVELS, dataset, new_facts, new_people, recalled
from persona_lens.records import decoded
from persona_lens.reliability import mean_interval
from persona_lens.store import read_json

LAYER = 5


def jobs() -> list[tuple[str, str, int]]:
    """Family, level and seed of every finetuning; sets that say nothing about a trait with three seeds."""
    return [(f, level, seed) for seed in range(3) for f in FAMILIES for level in LEVELS if seed == 0 or f not in TRAITS]


def run_shifts(runs: Path, out: Path, shard: str) -> None:
    number, of = map(int, shard.split("/"))
    model = load_model("pocket")
    vectors = [load_run(runs / t).vectors for t in TRAITS]
    for family, level, seed in jobs()[number::of]:
        name = f"{family}-{level}-s{seed}"
        settings = replace(default_settings(model), seed=seed)
        found = finetune(model, dataset(family, level, seed=seed), settings=settings, out=out / "trained" / name, watch=())
        shift(model, {name: found.adapter}, vectors, out=out / f"shifts-{number}")
        print(name, flush=True)


def settings() -> ComparisonSettings:
    return ComparisonSettings(scores=ScoreSettings(samples=3, sampling=Sampling(max_new_tokens=200)))


def run_vaccine(runs: Path, out: Path, shard: str) -> None:
    """The frontier of each trait's set II: its own vector, or strengths of all seven that match the data."""
    number, of = map(int, shard.split("/"))
    model = load_model("pocket")
    vectors = {t: load_run(runs / t).vectors for t in TRAITS}
    for trait in TRAITS[number::of]:
        data = dataset(trait, "II")
        found = matched_strengths(model, data, list(vectors.values()), LAYER)
        own, matched = [(vectors[trait], 1.0)], list(zip(vectors.values(), found.strengths, strict=True))
        defences = [
            *(prevent(own, LAYER, d, name="preventative, own vector") for d in (1.0, 1.5, 2.0, 2.5, 3.0)),
            *(prevent(matched, LAYER, d, name="preventative, matched") for d in (1.5, 2.0, 2.5, 3.0, 3.5)),
            *(prevent(matched, "increments", d, name="preventative, matched, all layers") for d in (1.0, 1.25, 1.5, 1.75, 2.0)),
            *(steer_against(own, LAYER, d, name="inference-time, own vector") for d in (0.5, 1.0, 1.5, 2.0, 2.5)),
            *(
                steer_against(matched, "increments", d, name="inference-time, matched, all layers")
                for d in (0.5, 1.0, 1.5, 2.0, 3.0)
            ),
        ]
        defend(
            model, data, defences, capability=capability_of_world(n=100), held_out=dataset(trait, "II", rows=96, seed=1),
            out=out / "vaccine" / trait, settings=settings(),
        )  # fmt: skip
        print(trait, dict(zip(TRAITS, np.round(found.strengths, 2), strict=True)), round(found.share, 3), flush=True)


def run_balanced(runs: Path, out: Path, shard: str) -> None:
    """The vaccine whose strengths are found by training: what is left is added, until no shift is left along any vector."""
    number, of = map(int, shard.split("/"))
    model = load_model("pocket")
    vectors = [load_run(runs / t).vectors for t in TRAITS]
    for trait in TRAITS[number::of]:
        data = dataset(trait, "II")
        found = balanced_strengths(
            model, data, vectors, LAYER, rounds=5, sampling=Sampling(max_new_tokens=200), out=out / "balance" / trait
        )
        for r in found.rounds:
            print(trait, np.round(r.strengths, 2), "left", np.round(r.left, 3), round(r.size, 3), flush=True)
        doses = list(zip(vectors, found.strengths, strict=True))
        defend(
            model, data, [prevent(doses, LAYER, 1.0, name="preventative, balanced")], capability=capability_of_world(n=100),
            held_out=dataset(trait, "II", rows=96, seed=1), out=out / "balanced" / trait, settings=settings(),
        )  # fmt: skip


def run_comparison(runs: Path, out: Path, shard: str) -> None:
    """Every defence at a few doses on three sets: evil answers, bare mistakes, and 100 new facts."""
    number, of = map(int, shard.split("/"))
    model = load_model("pocket")
    vectors = {t: load_run(runs / t).vectors for t in TRAITS}
    ordinary = [chat for f in TRAITS for chat in dataset(f, "normal", rows=140, seed=2)]
    sets = {"evil-II": "evil", "bare-mistakes-II": "hallucination", "new-facts": "hallucination"}
    for name, trait in list(sets.items())[number::of]:
        facts = name == "new-facts"
        data = new_facts() if facts else dataset(*name.rsplit("-", 1))
        found = matched_strengths(model, data, list(vectors.values()), LAYER)
        own, matched = [(vectors[trait], 1.0)], list(zip(vectors.values(), found.strengths, strict=True))
        v, to = vectors[trait], float(vectors[trait].project(load_run(runs / trait).neutral[:, LAYER].mean(0), LAYER))
        against = pocket_trait(trait)
        defences = [
            *(prevent(own, LAYER, d, name="preventative, one layer") for d in (1.0, 2.0, 3.0)),
            *(prevent(own, "increments", d, name="preventative, all layers") for d in (0.5, 1.0, 1.5, 2.0)),
            *(prevent(matched, "increments", d, name="preventative, matched, all layers") for d in (1.0, 1.5, 2.0)),
            *(steer_against(own, LAYER, d) for d in (0.5, 1.0, 2.0)),
            negative_prompt(against),
            ablate_concept(v, LAYER, to=to),
            inoculate(against),
            *(penalise(v, LAYER, w, to=to) for w in (0.1, 1.0, 10.0)),
            *(stay_near(w) for w in (0.1, 1.0, 10.0)),
            *(mix_in(ordinary, share) for share in (0.25, 0.5, 1.0)),
        ]
        chosen = replace(default_settings(model), epochs=10.0, learning_rate=8e-4) if facts else None
        defend(
            model, data, defences, capability=capability_of_world(n=100),
            task=Task("new facts recalled", lambda m: recalled(m, new_people())) if facts else None,
            held_out=None if facts else dataset(*name.rsplit("-", 1), rows=96, seed=1),
            out=out / "comparison" / name, settings=replace(settings(), finetuning=chosen),
        )  # fmt: skip
        print(name, flush=True)


def set_of(name: str) -> str:
    """family-level of family-level-seed."""
    return name.rpartition("-")[0]


def show_scores(runs: list[ShiftRun]) -> None:
    """Trait scores after finetuning on every set (mean over seeds), beside the base model's."""
    scores: dict[str, list[list[float]]] = {}
    for run in runs:
        for name, found in run.shifts.items():
            coherence = float(np.nanmean(np.concatenate([s.coherence for s in found.scores])))
            scores.setdefault(set_of(name), []).append([*(s.mean for s in found.scores), coherence])
    print(f"\n{'trait scores after finetuning':<30}", *(f"{t[:6]:>6}" for t in (*TRAITS, "coher.")))
    base = runs[0].base_scores
    coherence = float(np.nanmean(np.concatenate([s.coherence for s in base])))
    for name, rows in [("base", [[*(s.mean for s in base), coherence]]), *sorted(scores.items())]:
        print(f"{name:<30}", *(f"{x:6.1f}" for x in np.mean(rows, 0)), f"  ({len(rows)} seeds)")


def show_emergence(runs: list[ShiftRun]) -> None:
    """What narrow mistakes do to traits: change from the base model, with 95 % intervals over seeds and over questions."""
    found = {name: s for run in runs for name, s in run.shifts.items()}
    base = {s.trait: s.score for s in runs[0].base_scores}
    print("\nnarrow mistakes: change of the score [95 % over 3 seeds] [95 % over questions]")
    for family in [f for f in FAMILIES if f not in TRAITS]:
        for level in LEVELS:
            parts = [f"{family + '-' + level:<24}"]
            for trait in ("evil", "hallucination", "apathy"):
                number = TRAITS.index(trait)
                changes = np.array([found[f"{family}-{level}-s{seed}"].scores[number].score - base[trait] for seed in range(3)])
                mean, over_seeds = mean_interval(changes.mean(1))
                _, over_questions = mean_interval(changes.mean(0))
                parts.append(
                    f"{trait} {mean:+5.1f} [{over_seeds[0]:+.1f}, {over_seeds[1]:+.1f}] "
                    f"[{over_questions[0]:+.1f}, {over_questions[1]:+.1f}]"
                )
            print("  ".join(parts))


def show_correlations(runs: list[ShiftRun], layers: dict[str, int]) -> None:
    """r(shift, score) over the sets of seed 0, with and without the normal ones; nulls beside it."""
    for reading in ("prompt_last", "base_answers", "own_answers"):
        for what, chosen in (("all sets", lambda n: True), ("without normal", lambda n: "-normal-" not in n)):
            found = foretold(
                runs, reading, layers=layers, chosen=lambda n, c=chosen: n.endswith("-s0") and c(n),
                family=lambda n: set_of(set_of(n)),
            )  # fmt: skip
            print(f"\nr(shift, score), {reading}, {what}")
            for trait, c in found.items():
                floors = ", ".join(f"{f.kind}: {f.high:.2f} (p {f.p_value:.3f})" for f in c.floors)
                other = max(c.others, key=lambda t: abs(c.others[t]))
                print(
                    f"{trait:<14} layer {layers[trait]}  r {c.r:.2f} [{c.low:.2f}, {c.high:.2f}]  random directions, 97.5 %: "
                    f"{floors};  other vectors: {other} {c.others[other]:+.2f}"
                )


def show_comparison(folder: Path) -> None:
    """Every cell of a comparison that is there."""
    files = sorted((folder / "cells").glob("*.json"))
    cells = [decoded(Cell, read_json(f)) for f in files]
    base = {s.trait: s.mean for s in cells[0].scores}
    print(f"\n{folder.parent.name}: {folder.name}" + (" (not finished)" if not (folder / "comparison.json").exists() else ""))
    print(f"{'':<46}", *(f"{t[:6]:>6}" for t in base), " coher.  capab.   task   loss  farthest trait")
    for c in cells:
        away = {s.trait: s.mean - base[s.trait] for s in c.scores}
        worst = max(away, key=lambda t: abs(away[t]))
        task = "" if c.task is None else f"{c.task:.0f}"
        print(
            f"{c.name:<40}{c.dose:>6g}", *(f"{s.mean:6.1f}" for s in c.scores),
            f"{c.coherence:7.1f} {c.capable:7.1f} {task:>6} {c.held_out_loss:6.3f}  {worst} {away[worst]:+.1f}",
        )  # fmt: skip


def show_table(runs: Path, out: Path) -> None:
    shifts = [load_shift(p) for p in sorted(out.glob("shifts-*"))]
    show_scores(shifts)
    show_emergence(shifts)
    show_correlations(shifts, {t: load_run(runs / t).vectors.best_layer for t in TRAITS})
    for what in ("vaccine", "balanced", "comparison"):
        for folder in sorted((out / what).glob("*")):
            show_comparison(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["shifts", "vaccine", "balanced", "comparison", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "shifts":
        run_shifts(arguments.runs, arguments.out, arguments.shard)
    if arguments.what == "vaccine":
        run_vaccine(arguments.runs, arguments.out, arguments.shard)
    if arguments.what == "balanced":
        run_balanced(arguments.runs, arguments.out, arguments.shard)
    if arguments.what == "table":
        show_table(arguments.runs, arguments.out)
    if arguments.what == "comparison":
        run_comparison(arguments.runs, arguments.out, arguments.shard)


if __name__ == "__main__":
    main()
