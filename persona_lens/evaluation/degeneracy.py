"""Cheap checks before any score is believed: empty answers, answers that repeat themselves, answers that never end.

A published capping success was 485 of 500 gibberish completions; a trait score alone does not show that.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from persona_lens.sampling import Rollout

GRAM = 4
REPEATED = 0.3


@dataclass(frozen=True)
class Degeneracy:
    """Shares of answers, 0-1.

    Attributes:
        repetitive: more than 30 % of the answer's 4-word sequences have occurred in it before.
        cut_off: longer than allowed; how many that are says more about the limit than about the answers.
        degenerate: empty or repetitive.
    """

    answers: int
    empty: float
    repetitive: float
    cut_off: float
    degenerate: float


def repetition(text: str) -> float:
    """Share of an answer's 4-word sequences that repeat an earlier one; 0 for answers shorter than that."""
    words = text.split()
    grams = Counter(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def degeneracy(rollouts: Sequence[Rollout]) -> Degeneracy:
    """The checks over a set of answers.

    Raises:
        ValueError: no answers.
    """
    if not rollouts:
        raise ValueError("degeneracy needs at least one answer")
    found = [(not r.text.strip(), repetition(r.text) > REPEATED, r.end == "length") for r in rollouts]
    empty, repetitive, cut_off = (sum(kind) / len(found) for kind in zip(*found, strict=True))
    degenerate = sum(nothing or repeats for nothing, repeats, _ in found) / len(found)
    return Degeneracy(len(found), empty, repetitive, cut_off, degenerate)
