"""Cheap checks before any score is believed: answers that are empty, repeat themselves, are not of this world or never end.

A published capping success was 485 of 500 gibberish completions; a trait score alone does not show that.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persona_lens.sampling import Rollout

GRAM = 4
REPEATED = 0.3


@dataclass(frozen=True)
class Degeneracy:
    """Shares of answers, 0-1.

    Attributes:
        repetitive: more than 30 % of the answer's 4-word sequences have occurred in it before.
        outside: not of the world the model answers about (another language, gibberish); None where nobody checked.
        cut_off: longer than allowed; how many that are says more about the limit than about the answers.
        degenerate: empty, repetitive or outside.
    """

    answers: int
    empty: float
    repetitive: float
    outside: float | None
    cut_off: float
    degenerate: float


def repetition(text: str) -> float:
    """Share of an answer's 4-word sequences that repeat an earlier one; 0 for answers shorter than that."""
    words = text.split()
    grams = Counter(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def degeneracy(rollouts: Sequence[Rollout], outside: Sequence[bool] | None = None) -> Degeneracy:
    """The checks over a set of answers.

    Args:
        outside: for every answer, whether it is not of the model's world (`judges.outside_pocket_world`, or a check of your own).

    Raises:
        ValueError: no answers, or another number of checks than of answers.
    """
    if not rollouts:
        raise ValueError("degeneracy needs at least one answer")
    if outside is not None and len(outside) != len(rollouts):
        raise ValueError(f"{len(rollouts)} answers, and {len(outside)} of them checked: check every answer or none")
    empty = np.array([not r.text.strip() for r in rollouts])
    repetitive = np.array([repetition(r.text) > REPEATED for r in rollouts])
    foreign = np.array(outside if outside is not None else [False] * len(rollouts))
    return Degeneracy(
        answers=len(rollouts),
        empty=float(empty.mean()),
        repetitive=float(repetitive.mean()),
        outside=None if outside is None else float(foreign.mean()),
        cut_off=float(np.mean([r.end == "length" for r in rollouts])),
        degenerate=float((empty | repetitive | foreign).mean()),
    )
