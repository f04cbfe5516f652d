"""Which rollouts count (Chen et al. 2025, section 2.2 and code): positive >= 50, negative < 50, coherence >= 50 on both sides.

`independent` keeps each side's survivors; `pairwise`, as the authors' code, drops a positive and a negative rollout of the same
instruction, question and sample together. Answers without score or without tokens never count.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from persona_lens.errors import FilterError
from persona_lens.judges import Score
from persona_lens.prompts import Polarity
from persona_lens.reliability import MINIMUM_QUESTIONS
from persona_lens.sampling import Rollout


@dataclass(frozen=True)
class Thresholds:
    """Scores (0-100): positive answers reach `trait`, negative ones stay below it, both reach `coherence`."""

    trait: float = 50.0
    coherence: float = 50.0


@dataclass(frozen=True)
class Counts:
    """What became of one side's rollouts."""

    polarity: str
    total: int
    unscored: int
    empty: int
    incoherent: int
    off_trait: int
    kept: int
    cut_off: int = 0  # answers that reached max_new_tokens; they may be among the kept

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _verdict(rollout: Rollout, score: Score, polarity: Polarity, thresholds: Thresholds) -> str:
    if score.trait is None or score.coherence is None:
        return "unscored"
    if not rollout.token_ids:
        return "empty"
    if score.coherence < thresholds.coherence:
        return "incoherent"
    if polarity != "neutral" and (score.trait >= thresholds.trait) != (polarity == "positive"):
        return "off_trait"
    return "kept"


def keep_independent(
    rollouts: Sequence[Rollout], scores: Sequence[Score], polarity: Polarity, thresholds: Thresholds
) -> tuple[list[bool], Counts]:
    """Which rollouts of one polarity survive on their own, and the counts by reason."""
    verdicts = [_verdict(r, s, polarity, thresholds) for r, s in zip(rollouts, scores, strict=True)]
    number = {reason: verdicts.count(reason) for reason in ("unscored", "empty", "incoherent", "off_trait", "kept")}
    cut_off = sum(r.end == "length" for r in rollouts)
    return [v == "kept" for v in verdicts], Counts(polarity, len(verdicts), **number, cut_off=cut_off)


def keep_pairwise(positive: Sequence[bool], negative: Sequence[bool]) -> list[bool]:
    """Pairs whose two sides both survive; the rows of both sides must correspond."""
    return [p and n for p, n in zip(positive, negative, strict=True)]


def require_enough(trait: str, questions: Sequence[int], counts: Sequence[Counts]) -> None:
    """Raise unless enough questions survive on both sides.

    Raises:
        FilterError: says how many survive, and why the others do not.
    """
    if len(questions) >= MINIMUM_QUESTIONS:
        return
    sides = "; ".join(
        f"{c.polarity}: {c.kept} of {c.total} kept ({c.off_trait} on the wrong side of the threshold, {c.incoherent} incoherent, "
        f"{c.empty} empty, {c.unscored} without score)"
        for c in counts
    )
    raise FilterError(
        f"{trait}: {len(questions)} questions survive the filter on both sides, at least {MINIMUM_QUESTIONS} are needed. {sides}. "
        "Rollouts and scores are kept; check that the model follows the instructions, or lower the thresholds"
    )
