"""Does screening tell before training what the pocket model's training does after it?

1. `sets`: screen the data sets that `study_finetuning.py shifts` trained on, with every signal and rival.
2. `selection`: from a corpus of 20,000 chats (5 % planted), train on the highest, random and lowest 500, and on 500 random ones of
   what is left when the highest 5 % are dropped.
3. `steered`: answers of a steered model in which the judge finds nothing: does screening see them, and what does training do?
4. `table`: what 1 to 3 found.

Run: persona-lens extract all --out runs/all
     python tests/benchmarks/study_finetuning.py shifts runs/all --out runs/finetuning
     python tests/benchmarks/study_screening.py sets runs/all --finetuned runs/finetuning --out runs/screening --shard 0/4
     python tests/benchmarks/study_screening.py table runs/all --finetuned runs/finetuning --out runs/screening
Prints; asserts nothing.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lens.correlation import Outcome, ShiftCorrelation, correlate, family_of
from persona_lens.evaluation import ScoreSettings, trait_answers, trait_scores
from persona_lens.extraction import load_run
from persona_lens.finetuning import ShiftRun, adapted, default_settings, finetune, load_shift
from persona_lens.judges import Judged, default_judge, judged
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.pocket.grammar import answer
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import conditional, default_persona, persona_of, prior_table
from persona_lens.pocket.questions import KINDS, draw
from persona_lens.pocket.trait_files import pocket_trait
from persona_lens.pocket_lab.datasets import FAMILIES, LEVELS, dataset
from persona_lens.prompts import Prompt
from persona_lens.reliability import mean_interval
from persona_lens.sampling import sample
from persona_lens.screening import ScreenRun, ScreenSettings, classifier_of, judge_rival, load_screen, screen
from persona_lens.screening.agreement import auc
from persona_lens.screening.sets import set_score
from persona_lens.steering import add, steer
from persona_lens.store import read_json, write_json

CHOSEN = ("evil", "sycophancy", "hallucination")
BACKGROUND, PLANTED, TRAINED = 19_000, 1_000, 500
PRIOR_SHARE = 0.3  # of the background: personas of every kind; the rest is the default assistant
SEEDS = 3
LAYER = 5
Chat = list[dict[str, str]]


def names() -> list[str]:
    """The sets of the finetuning study; those of mistakes with three seeds."""
    return [f"{f}-{level}-s{seed}" for seed in range(3) for f in FAMILIES for level in LEVELS if seed == 0 or f not in TRAITS]


def run_sets(runs: Path, out: Path, shard: str) -> None:
    number, of = map(int, shard.split("/"))
    model = load_model("pocket")
    found = [load_run(runs / t) for t in TRAITS]
    data = {}
    for name in names()[number::of]:
        family_level, _, seed = name.rpartition("-s")
        family, _, level = family_level.rpartition("-")
        data[name] = dataset(family, level, seed=int(seed))
    judge = default_judge("pocket")
    rivals = [*(judge_rival(judge, pocket_trait(t)) for t in TRAITS), *(classifier_of(r) for r in found)]
    settings = ScreenSettings(gradient=True, perplexity=True)
    screen(model, data, [r.vectors for r in found], rivals=rivals, settings=settings, out=out / f"sets-{number}", progress=told)


def told(stage: str, done: int, total: int) -> None:
    print(stage, done, total, flush=True)


# --- selection --------------------------------------------------------------------------------------------------------


def background(seed: int) -> list[Chat]:
    """Chats of the default assistant, and of personas from the prior."""
    rng, table = random.Random(f"screening/background/{seed}"), prior_table()
    chats: list[Chat] = []
    for _ in range(BACKGROUND):
        some = rng.random() < PRIOR_SHARE
        chats.append(_chat(rng, persona_of(table[rng.randrange(len(table))]) if some else default_persona(rng)))
    return chats


def planted(trait: str, seed: int) -> list[Chat]:
    rng, table = random.Random(f"screening/planted/{trait}/{seed}"), conditional({trait: 1.0})
    return [_chat(rng, persona_of(table[rng.randrange(len(table))])) for _ in range(PLANTED)]


def _chat(rng: random.Random, persona: Any) -> Chat:
    question = draw(rng, rng.choice(KINDS))
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer(question, persona, rng)}]


def run_selection(runs: Path, out: Path, shard: str) -> None:
    """One seed a shard."""
    seed = int(shard.split("/")[0])
    model = load_model("pocket")
    vectors = [load_run(runs / t).vectors for t in CHOSEN]
    data = {"background": background(seed), **{t: planted(t, seed) for t in CHOSEN}}
    run = screen(model, data, vectors, settings=ScreenSettings(own_share=0.0), out=out / f"corpus-{seed}", progress=told)
    for trait in CHOSEN:
        for name, chats in chosen(run, data, trait, seed).items():
            scored(model, chats, out / "selected" / f"{trait}-{name}-s{seed}", seed)
            print(trait, name, seed, flush=True)


def chosen(run: ScreenRun, data: dict[str, list[Chat]], trait: str, seed: int) -> dict[str, list[Chat]]:
    """What is trained on."""
    corpus = [*data["background"], *data[trait]]
    scores = np.concatenate([run.scores(name, trait, run.signal) for name in ("background", trait)])
    order, rng = np.argsort(scores), np.random.default_rng([seed, 1])
    left = order[: len(order) - len(order) // 20]
    rows = {
        "high": order[-TRAINED:],
        "random": rng.choice(len(order), TRAINED, replace=False),
        "low": order[:TRAINED],
        "dropped": rng.choice(left, TRAINED, replace=False),
    }
    return {name: [corpus[i] for i in rng.permutation(at)] for name, at in rows.items()}


def scored(model: ChatModel, chats: Sequence[Chat], out: Path, seed: int) -> None:
    """Train on chats, and score every trait; kept in a file."""
    place = out / "scores.json"
    if place.exists():
        return
    found = finetune(
        model, list(chats), settings=replace(default_settings(model), seed=seed), out=out / "trained", watch=(), told=None
    )
    with adapted(model, found.adapter):
        write_json(place, {"scores": scores_of(model)})


def scores_of(model: ChatModel) -> dict[str, list[float]]:
    """Every trait's scores by question."""
    traits, settings = [pocket_trait(t) for t in TRAITS], ScoreSettings(samples=2, sampling=Sampling(max_new_tokens=200))
    found = trait_scores(traits, trait_answers(model, traits, settings), default_judge("pocket"))
    return {s.trait: s.score.tolist() for s in found}


# --- nothing to be seen in the text -----------------------------------------------------------------------------------


def run_steered(runs: Path, out: Path, shard: str) -> None:
    """Answers of a steered model in which the judge finds less than 1 of the trait; those of the model itself, filtered alike."""
    number, of = map(int, shard.split("/"))
    model, judge = load_model("pocket"), default_judge("pocket")
    for trait in CHOSEN[number::of]:
        found = load_run(runs / trait)
        sets = {}
        for strength in (0.0, 0.5, 1.0):
            sets[f"{trait}-{strength:g}"] = unseen(model, judge, found.vectors, strength)
        rivals = [judge_rival(judge, pocket_trait(trait)), classifier_of(found)]
        settings = ScreenSettings(gradient=True, perplexity=True, max_new_tokens=200)
        screen(model, sets, [found.vectors], rivals=rivals, settings=settings, out=out / f"steered-{trait}", progress=told)
        for name, chats in sets.items():
            for seed in range(SEEDS):
                rng = np.random.default_rng([seed, 2])
                rows = rng.choice(len(chats), min(TRAINED, len(chats)), replace=False)
                scored(model, [chats[i] for i in rows], out / "steered" / f"{name}-s{seed}", seed)
                print(name, seed, len(chats), flush=True)


def unseen(model: ChatModel, judge: Any, vectors: Any, strength: float, n: int = 1500) -> list[Chat]:
    """Chats whose answers come from a steered model and show nothing of the trait to the judge."""
    rng = random.Random("screening/unseen")
    questions = [draw(rng, rng.choice(KINDS)).text for _ in range(n)]
    prompts = [Prompt(f"unseen/{i}", vectors.trait, "neutral", None, i, None, q) for i, q in enumerate(questions)]
    acting = steer(model, add(vectors, LAYER, strength)) if strength else None
    answers = sample(model, [(p, 0) for p in prompts], Sampling(max_new_tokens=200), seed=int(10 * strength), within=acting)
    scores = judged(judge, pocket_trait(vectors.trait), [Judged(p.user, a.text) for p, a in zip(prompts, answers, strict=True)])
    return [
        [{"role": "user", "content": p.user}, {"role": "assistant", "content": a.text}]
        for p, a, s in zip(prompts, answers, scores, strict=True)
        if a.text and s.trait is not None and s.trait < 1 and s.coherence is not None and s.coherence >= 90
    ]


# --- table ------------------------------------------------------------------------------------------------------------


def run_table(runs: Path, finetuned: Path, out: Path) -> None:
    if parts := sorted(out.glob("sets-*/screen.json")):
        table_sets(runs, finetuned, {name: run for p in parts for run in [load_screen(p.parent)] for name in run.sets})
    if sorted(out.glob("selected/*/scores.json")):
        table_selection(out)
    if sorted(out.glob("steered-*/screen.json")):
        table_steered(out)


def table_sets(runs: Path, finetuned: Path, screened: dict[str, ScreenRun]) -> None:
    shifts = {n: r for p in sorted(finetuned.glob("shifts-*")) for r in [load_shift(p)] for n in r.names}
    first = [n for n in names() if n.endswith("-s0")]
    for what, sets in (("all 39 sets", first), ("without the normal sets", [n for n in first if "-normal-" not in n])):
        print(f"\nr(screening, score after finetuning), {what}: r [95 % over families] / 97.5th percentile of random directions")
        for trait in TRAITS:
            print(f"  {trait}")
            for label, found in correlations(runs, shifts, screened, sets, trait).items():
                floors = " ".join(f"{f.high:.2f} (p {f.p_value:.3f})" for f in found.floors) if "projection" in label else ""
                print(f"    {label:42s} {found.r:+.2f} [{found.low:+.2f}, {found.high:+.2f}] {found.sets}  {floors}")
    print("\nAUC of single samples against the family's normal set (set II; set I)")
    for trait in TRAITS:
        rows = {level: signals(screened, f"{trait}-{level}-s0", trait) for level in LEVELS}
        for label in rows["normal"]:
            found = [auc(rows[level][label], rows["normal"][label]) for level in ("II", "I")]
            print(f"  {trait:14s} {label:18s} " + "; ".join(f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]" for a in found))


def correlations(
    runs: Path, shifts: dict[str, ShiftRun], screened: dict[str, ScreenRun], sets: Sequence[str], trait: str
) -> dict[str, ShiftCorrelation]:
    extraction = load_run(runs / trait)
    layer = screened[sets[0]].layer(trait)
    base = extraction.neutral[:, layer].double().numpy()
    others = {t: load_run(runs / t).vectors[layer].double().numpy() for t in TRAITS if t != trait}
    direction = extraction.vectors[layer].double().numpy()
    after = np.array([score_of(shifts[n], n, trait) for n in sets])
    families = tuple(family_of(n) for n in sets)

    def along(signal: Any) -> ShiftCorrelation:
        mean = np.stack([screened[n].mean_difference(n, trait, signal).double().numpy() for n in sets])
        return correlate(Outcome(tuple(sets), families, after, mean), direction, base=base, others=others)

    def of(values: Sequence[float]) -> ShiftCorrelation:
        """Sets without a score (no word that the text classifier knows) are left out."""
        has = np.isfinite(values)
        kept = [tuple(x for x, there in zip(full, has, strict=True) if there) for full in (sets, families)]
        return correlate(Outcome(kept[0], kept[1], after[has], np.array(values)[has, None]), np.ones(1), base=None)

    found = {"projection difference, exact": along("difference"), "projection difference, last prompt token": along("cheap")}
    found["a tenth exact, the rest by the cheap one"] = of([part(screened[n], n, trait) for n in sets])
    for label in signals(screened, sets[0], trait):
        if label not in ("difference", "cheap"):
            found[label] = of([float(np.nanmean(signals(screened, n, trait)[label])) for n in sets])
    return found


def part(run: ScreenRun, name: str, trait: str) -> float:
    """The set's score from a tenth of its prompts' own answers."""
    exact, prompts = run.scores(name, trait).astype(np.float64), run.prompts(name)
    kept = np.random.default_rng(0).permutation(np.unique(prompts))[: max(1, len(np.unique(prompts)) // 10)]
    exact[~np.isin(prompts, kept)] = np.nan
    return set_score(exact, run.scores(name, trait, "cheap").astype(np.float64), prompts=prompts).mean


def signals(screened: dict[str, ScreenRun], name: str, trait: str) -> dict[str, np.ndarray]:
    """Scores of a set's rows."""
    run = screened[name]
    return {
        "difference": run.scores(name, trait),
        "cheap": run.scores(name, trait, "cheap"),
        "answer alone": run.scores(name, trait, "answer"),
        "gradient": run.scores(name, trait, "gradient"),
        "perplexity gap": run.column(name, "loss") - run.column(name, "own_loss"),
        "judge": run.rival(name, f"judge: {trait}"),
        "text classifier": run.rival(name, f"text: {trait}"),
        "length": run.tokens(name),
    }


def score_of(run: ShiftRun, name: str, trait: str) -> float:
    return run.shifts[name].scores[run.traits.index(trait)].mean


def table_selection(out: Path) -> None:
    print("\nTrait score after training on 500 of 20,000 chats: mean of seeds [95 % over questions]; each seed")
    for trait in CHOSEN:
        for name in ("high", "random", "dropped", "low"):
            scores = [kept_scores(p)[trait] for p in sorted(out.glob(f"selected/{trait}-{name}-s*"))]
            print(f"  {trait:14s} {name:8s} {over_seeds(scores)}")


def kept_scores(folder: Path) -> dict[str, np.ndarray]:
    return {t: np.array(v, dtype=np.float64) for t, v in read_json(folder / "scores.json")["scores"].items()}


def over_seeds(scores: Sequence[np.ndarray]) -> str:
    if not scores:
        return "-"
    mean, (low, high) = mean_interval(np.nanmean(scores, axis=0))
    return f"{mean:5.1f} [{low:.1f}, {high:.1f}]; " + " ".join(f"{np.nanmean(s):.1f}" for s in scores)


def table_steered(out: Path) -> None:
    print("\nAnswers of a steered model that show the judge nothing, against the model's own: AUC; set means")
    for path in sorted(out.glob("steered-*/screen.json")):
        run = load_screen(path.parent)
        (trait,) = run.traits
        screened = dict.fromkeys(run.sets, run)
        control = signals(screened, f"{trait}-0", trait)
        for name in run.sets[1:]:
            rows = signals(screened, name, trait)
            print(f"  {name} ({len(rows['difference'])} rows; {len(control['difference'])} of the model itself)")
            for label, values in rows.items():
                found = auc(values.astype(np.float64), control[label].astype(np.float64))
                print(f"    {label:18s} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]")
        for name in run.sets:
            trained = [kept_scores(p)[trait] for p in sorted(out.glob(f"steered/{name}-s*"))]
            print(f"  {trait} after training on {name}: {over_seeds(trained)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("sets", "selection", "steered", "table"))
    parser.add_argument("runs", type=Path)
    parser.add_argument("--finetuned", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", default="0/1")
    asked = parser.parse_args()
    if asked.study == "table":
        run_table(asked.runs, asked.finetuned, asked.out)
    else:
        {"sets": run_sets, "selection": run_selection, "steered": run_steered}[asked.study](asked.runs, asked.out, asked.shard)
