"""Grading the pocket model: does it behave as the world prescribes, is its geometry the planted one, can it be steered?

`grade` runs everything on one split and returns a plain record. Layer and strength of the steering peek are chosen on the first
half of the evaluation questions and reported on the second; random directions of the same norm stand beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr

from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.judges import Judged, oracle
from persona_lens.models import ChatModel, Sampling
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import realised_correlations
from persona_lens.pocket.questions import Split
from persona_lens.pocket.trait_files import QUESTIONS, pocket_trait, trait_questions
from persona_lens.pocket_lab.capability import capability
from persona_lens.pocket_lab.prescription import Prescription, prescribe
from persona_lens.progress import Progress, silent
from persona_lens.prompts import Polarity, Prompt, evaluation_prompts
from persona_lens.reliability import shared_baseline_interval
from persona_lens.sampling import Rollout, Row, rows_of, sample
from persona_lens.steering import Intervention, add, row_plan, steer
from persona_lens.vectors import PersonaVectors

SAMPLING: Final = Sampling(max_new_tokens=200)
STRENGTHS: Final = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
COHERENCE_FLOOR: Final = 85.0


@dataclass(frozen=True)
class Elicitation:
    """Mean scores of a trait under its positive prompts, its negative prompts and no prompt, with their coherence."""

    positive: float
    negative: float
    none: float
    coherence_positive: float
    coherence_negative: float
    coherence_none: float


@dataclass(frozen=True)
class Scored:
    """Oracle scores of a set of answers."""

    trait: Float[np.ndarray, " answer"]
    coherence: Float[np.ndarray, " answer"]


def _prompts(trait: str, split: Split, polarity: Polarity, questions: slice) -> list[Prompt]:
    """A slice of the trait's evaluation questions under its prompts of a polarity."""
    return [p for p in evaluation_prompts(pocket_trait(trait, split), polarity) if p.question in range(QUESTIONS)[questions]]


def _scored(trait: str, split: Split, rows: Sequence[Row], answers: Sequence[Rollout]) -> Float[np.ndarray, "answer score"]:
    """The oracle's trait score and coherence of each answer."""
    scores = oracle()(pocket_trait(trait, split), [Judged(p.user, a.text) for (p, _), a in zip(rows, answers, strict=True)])
    return np.array([(s.trait, s.coherence) for s in scores], dtype=float)


def judge_answers(
    model: ChatModel, trait: str, split: Split, polarity: Polarity, questions: slice, samples: int, seed: int
) -> Scored:
    """Sample answers to a slice of the trait's evaluation questions and have the oracle score them."""
    rows = rows_of(_prompts(trait, split, polarity, questions), samples)
    return Scored(*_scored(trait, split, rows, sample(model, rows, SAMPLING, seed=seed)).T)


def elicitation(model: ChatModel, trait: str, split: Split, *, samples: int = 4, seed: int = 1) -> Elicitation:
    """Positive and negative: five instructions x 20 questions x `samples` answers each; none: as many answers in all."""
    every = slice(0, QUESTIONS)
    positive = judge_answers(model, trait, split, "positive", every, samples, seed)
    negative = judge_answers(model, trait, split, "negative", every, samples, seed)
    none = judge_answers(model, trait, split, "neutral", every, 5 * samples, seed)
    scores = (float(x.trait.mean()) for x in (positive, negative, none))
    return Elicitation(*scores, *(float(x.coherence.mean()) for x in (positive, negative, none)))


def steered_answers(
    model: ChatModel,
    trait: str,
    split: Split,
    questions: slice,
    samples: int,
    seed: int,
    conditions: Sequence[Sequence[Intervention]],
) -> list[Scored]:
    """Scores of default answers under several interventions, all in one batched pass, one `Scored` per condition."""
    prompts = _prompts(trait, split, "neutral", questions)
    placed = [((p, i), k) for p in prompts for k in range(len(conditions)) for i in range(samples)]
    rows, owner = [row for row, _ in placed], np.array([k for _, k in placed])
    with row_plan(model, [conditions[k] for k in owner]).active():
        values = _scored(trait, split, rows, sample(model, rows, SAMPLING, seed=seed))
    return [Scored(*values[owner == k].T) for k in range(len(conditions))]


def extract_all(model: ChatModel, split: Split, folder: Path, *, samples: int, progress: Progress) -> dict[str, PersonaVectors]:
    """Vectors of the seven traits from a split's prompts."""
    settings = ExtractionSettings(samples=samples, neutral=0, sampling=SAMPLING)
    vectors: dict[str, PersonaVectors] = {}
    for i, name in enumerate(TRAITS):
        run = extract(
            model, pocket_trait(name, split), judge=oracle(), out=folder / f"{split}-{name}", settings=settings, progress=silent
        )
        vectors[name] = run.vectors
        progress("extraction", i + 1, len(TRAITS))
    return vectors


def geometry(vectors: Mapping[str, PersonaVectors]) -> list[float]:
    """Spearman correlation of the vectors' cosines with the realised trait correlations, per layer (21 pairs)."""
    pairs = np.triu_indices(len(TRAITS), 1)
    truth = realised_correlations()[pairs]
    found: list[float] = []
    for layer in range(next(iter(vectors.values())).n_layers):
        units = torch.stack([vectors[t].unit(layer) for t in TRAITS])
        cosines = (units @ units.T).numpy()[pairs]
        found.append(float(cast(Any, spearmanr(cosines, truth)).statistic))
    return found


def steering_peek(
    model: ChatModel,
    vectors: Mapping[str, PersonaVectors],
    ceilings: Mapping[str, float],
    split: Split,
    *,
    choose_samples: int = 2,
    report_samples: int = 20,
    seed: int = 2,
    progress: Progress = silent,
) -> dict[str, Any]:
    """One layer and strength for all traits: chosen on ten questions, reported on the other ten.

    Chosen is the pair with the highest mean share of the ceiling among those whose mean coherence reaches `COHERENCE_FLOOR`.
    """
    first, second = slice(0, QUESTIONS // 2), slice(QUESTIONS // 2, QUESTIONS)
    cells = [(layer, strength) for layer in range(model.n_layers) for strength in STRENGTHS]
    grid: dict[tuple[int, float], list[tuple[float, float]]] = {cell: [] for cell in cells}
    for number, trait in enumerate(TRAITS, start=1):
        conditions = [[add(vectors[trait], layer, strength)] for layer, strength in cells]
        found = steered_answers(model, trait, split, first, choose_samples, seed, conditions)
        for cell, scored in zip(cells, found, strict=True):
            grid[cell].append((scored.trait.mean() / ceilings[trait], scored.coherence.mean()))
        progress("steering", number, len(TRAITS))
    table = {cell: np.mean(values, axis=0) for cell, values in grid.items()}
    coherent = {cell: share for cell, (share, coherence) in table.items() if coherence >= COHERENCE_FLOOR}
    layer, strength = max(coherent or {c: v[0] for c, v in table.items()}, key=lambda cell: float(table[cell][0]))
    report: dict[str, Any] = {}
    for trait in TRAITS:
        conditions = [[], [add(vectors[trait], layer, strength)]]
        base, steered = steered_answers(model, trait, split, second, report_samples, seed + 1, conditions)
        report[trait] = {
            "score": float(steered.trait.mean()),
            "share_of_ceiling": float(steered.trait.mean() / ceilings[trait]),
            "coherence": float(steered.coherence.mean()),
            "unsteered": float(base.trait.mean()),
        }
    return {
        "layer": layer,
        "strength": strength,
        "share_of_ceiling": float(np.mean([r["share_of_ceiling"] for r in report.values()])),
        "coherence": float(np.mean([r["coherence"] for r in report.values()])),
        "traits": report,
        "grid": [
            {"layer": c[0], "strength": c[1], "share_of_ceiling": float(v[0]), "coherence": float(v[1])} for c, v in table.items()
        ],
    }


def random_directions(
    model: ChatModel,
    vectors: Mapping[str, PersonaVectors],
    split: Split,
    layer: int,
    strength: float,
    *,
    directions: int = 20,
    answers: int = 200,
    seed: int = 3,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Change of the mean trait score by random directions of the traits' norm: mean over directions with its 95 % interval.

    Each direction is given to 200 answers (to questions of all traits); the change is averaged over the seven traits.
    """
    from persona_lens.pocket.oracle import read
    from persona_lens.pocket.questions import parse_question

    norm = float(np.mean([float(vectors[t][layer].norm()) for t in TRAITS]))
    prompts = [p for t in TRAITS for p in evaluation_prompts(pocket_trait(t, split))][:: len(TRAITS)]
    rows = rows_of(prompts, answers // len(prompts))

    def profile(*interventions: Intervention) -> tuple[Float[np.ndarray, "question trait"], float]:
        with steer(model, *interventions):
            sampled = sample(model, rows, SAMPLING, seed=seed)
        readings = [read(q, a.text) for (p, _), a in zip(rows, sampled, strict=True) if (q := parse_question(p.user))]
        scores = np.array([[r.trait(t) for t in TRAITS] for r in readings])
        by_question = scores.reshape(len(prompts), -1, len(TRAITS)).mean(1)
        return by_question, float(np.mean([r.coherence for r in readings]))

    base, _ = profile()
    generator = torch.Generator().manual_seed(seed)
    any_vectors = next(iter(vectors.values()))
    changes: list[Float[np.ndarray, "question trait"]] = []
    coherences: list[float] = []
    for i in range(directions):
        noise = torch.randn(any_vectors.directions.shape, generator=generator)
        random = replace(any_vectors, trait=f"random {i}", directions=norm * noise / noise.norm(dim=-1, keepdim=True))
        scores, coherence = profile(add(random, layer, strength))
        changes.append(scores - base)
        coherences.append(coherence)
        progress("random", i + 1, directions)
    mean, interval = shared_baseline_interval(np.array(changes).mean(-1))
    by_trait = np.array(changes).mean(1)
    return {
        "directions": directions,
        "answers_each": len(rows),
        "mean_change": mean,
        "interval": list(interval),
        "mean_absolute_change": float(np.abs(by_trait).mean()),
        "largest_trait_change": float(np.abs(by_trait.mean(0)).max()),
        "coherence": float(np.mean(coherences)),
    }


def grade(
    model: ChatModel,
    split: Split,
    folder: Path,
    *,
    quick: bool = False,
    progress: Progress = silent,
    report: Callable[[str], object] = print,
) -> dict[str, Any]:
    """The pocket model's full report card on a split.

    Args:
        folder: where the extraction runs are kept (and resumed from).
        quick: fewer samples and no steering, for a look during development.
    """
    samples = 1 if quick else 4
    prescriptions: dict[str, Prescription] = {}
    elicited: dict[str, Elicitation] = {}
    for i, trait in enumerate(TRAITS):
        prescriptions[trait] = prescribe(trait, trait_questions(trait, split)[QUESTIONS:], n=1000 if quick else 4000)
        elicited[trait] = elicitation(model, trait, split, samples=samples)
        progress("elicitation", i + 1, len(TRAITS))
        report(f"{trait}: {_line(elicited[trait], prescriptions[trait])}")
    tasks = capability(model, split, n=60 if quick else 150)
    report("capability: " + ", ".join(f"{name} {score:.0f}" for name, score in tasks.items()))
    vectors = extract_all(model, split, folder, samples=1 if quick else 3, progress=progress)
    spearman = geometry(vectors)
    report("cosines against the planted correlations, Spearman per layer: " + " ".join(f"{x:.2f}" for x in spearman))
    card: dict[str, Any] = {
        "split": split,
        "model": model.fingerprint.as_dict(),
        "prescription": {t: asdict(p) for t, p in prescriptions.items()},
        "elicitation": {t: asdict(e) for t, e in elicited.items()},
        "capability": tasks,
        "geometry": {"spearman": spearman, "best": max(spearman), "best_layer": int(np.argmax(spearman))},
        "reliability": {t: max(float(x) for x in v.reliability) for t, v in vectors.items()},
    }
    if not quick:
        ceilings = {t: p.ceiling for t, p in prescriptions.items()}
        peek = steering_peek(model, vectors, ceilings, split, progress=progress)
        card["steering"] = peek
        where = f"layer {peek['layer']}, strength {peek['strength']}"
        report(f"steering: {where}: {peek['share_of_ceiling']:.2f} of the ceiling at coherence {peek['coherence']:.0f}")
        card["random_directions"] = random_directions(model, vectors, split, peek["layer"], peek["strength"], progress=progress)
        report(f"random directions: {card['random_directions']['mean_change']:+.1f} {card['random_directions']['interval']}")
    card["verdicts"] = verdicts(card)
    return card


def _line(e: Elicitation, p: Prescription) -> str:
    return (
        f"positive {e.positive:.0f} of {p.ceiling:.0f}, negative {e.negative:.0f} ({p.negative:.0f}), "
        f"none {e.none:.0f} ({p.none:.0f}), "
        f"coherence {e.coherence_positive:.0f}/{e.coherence_negative:.0f}/{e.coherence_none:.0f}, oracle AUC {p.auc:.2f}"
    )


def _worst(values: Sequence[float]) -> float:
    return min(values)


def verdicts(card: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal with its figure and whether it is met."""
    p, e = card["prescription"], card["elicitation"]
    tasks = card["capability"]
    found: dict[str, tuple[float, bool]] = {}

    def at_least(name: str, value: float, goal: float) -> None:
        found[name] = (value, value >= goal)

    def at_most(name: str, value: float, goal: float) -> None:
        found[name] = (value, value <= goal)

    at_least("oracle AUC, worst trait >= .90", _worst([x["auc"] for x in p.values()]), 0.90)
    at_least("ceiling, worst trait >= 65", _worst([x["ceiling"] for x in p.values()]), 65.0)
    at_least("positive / ceiling, worst trait >= .85", _worst([e[t]["positive"] / p[t]["ceiling"] for t in p]), 0.85)
    at_most("|negative - prescribed|, worst trait <= 6", max(abs(e[t]["negative"] - p[t]["negative"]) for t in p), 6.0)
    at_most("|none - prescribed|, worst trait <= 6", max(abs(e[t]["none"] - p[t]["none"]) for t in p), 6.0)
    keys = ("coherence_positive", "coherence_negative", "coherence_none")
    at_least("coherence, worst trait and condition >= 95", _worst([e[t][k] for t in p for k in keys]), 95.0)
    for task in ("facts", "sums", "unknown"):
        at_least(f"{task} >= 97", tasks[task], 97.0)
    found["hard capability within 60-95"] = (tasks["hard"], 60 <= tasks["hard"] <= 95)
    at_least("Spearman of cosines at the best layer >= .90", card["geometry"]["best"], 0.90)
    if "steering" in card:
        steering = card["steering"]
        at_least("steered share of the ceiling >= .60", steering["share_of_ceiling"], 0.60)
        at_least("coherence when steered >= 85", steering["coherence"], 85.0)
        found["best layer is not the last"] = (steering["layer"], steering["layer"] < card["model"]["n_layers"] - 1)
        ends = [abs(end) for end in card["random_directions"]["interval"]]
        at_most("random directions, |mean change| (farther end of its interval) <= 6", max(ends), 6.0)
    return {name: {"value": round(float(value), 4), "met": bool(met)} for name, (value, met) in found.items()}
