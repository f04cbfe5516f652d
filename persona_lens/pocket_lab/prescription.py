"""What the world prescribes: the scores its own grammar gives a persona, by simulation. The model is graded against these."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from persona_lens.pocket.grammar import answer
from persona_lens.pocket.oracle import read
from persona_lens.pocket.persona import Persona, conditional, default_persona, persona_of
from persona_lens.pocket.questions import Question


@dataclass(frozen=True)
class Prescription:
    """Mean oracle scores of a trait's questions: the ceiling (level 1), what a negative prompt and what no prompt should give."""

    ceiling: float
    negative: float
    none: float
    auc: float


def _scores(trait: str, questions: Sequence[Question], personas: Sequence[Persona], rng: random.Random) -> list[float]:
    scores: list[float] = []
    for i, persona in enumerate(personas):
        question = questions[i % len(questions)]
        scores.append(read(question, answer(question, persona.in_mood(question.mood), rng)).trait(trait))
    return scores


def _drawn(trait: str, level: float, n: int, rng: random.Random) -> list[Persona]:
    table = conditional({trait: level})
    return [persona_of(table[rng.randrange(len(table))]) for _ in range(n)]


def prescribe(trait: str, questions: Sequence[Question], *, n: int = 4000, seed: int = 0) -> Prescription:
    """Simulate the world on these questions. The other traits follow the prior given the trait's level."""
    rng = random.Random(f"prescribe/{trait}/{seed}")
    high = _scores(trait, questions, _drawn(trait, 1.0, n, rng), rng)
    low = _scores(trait, questions, _drawn(trait, 0.0, n, rng), rng)
    none = _scores(trait, questions, [default_persona(rng) for _ in range(n)], rng)
    auc = roc_auc_score(np.repeat([1, 0], [len(high), len(low)]), high + low)
    return Prescription(float(np.mean(high)), float(np.mean(low)), float(np.mean(none)), float(auc))
