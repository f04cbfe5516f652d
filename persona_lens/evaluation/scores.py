"""How far a model shows its traits: the mean judged score of its answers to each trait's evaluation questions.

The unit is the question. Every trait is judged on answers to its own questions, asked without a system prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from persona_lens.errors import PersonaLensError
from persona_lens.judges import Judge, Judged, judged
from persona_lens.models import ChatModel, Sampling
from persona_lens.prompts import Prompt, evaluation_prompts
from persona_lens.reliability import mean_interval
from persona_lens.sampling import DEFAULT_BATCH_ROWS, Rollout, rows_of, sample
from persona_lens.traits import Trait


@dataclass(frozen=True, eq=False)
class TraitScore:
    """One trait's scores, 0-100, question by question; NaN where no answer of a question could be scored.

    Attributes:
        gaps: answers without a score.
        score, coherence: mean over a question's answers.
    """

    trait: str
    score: Float[np.ndarray, " question"]
    coherence: Float[np.ndarray, " question"]
    gaps: int

    @property
    def mean(self) -> float:
        """Mean score over the questions; NaN where none was scored."""
        return _mean(self.score)

    @property
    def mean_coherence(self) -> float:
        """Mean coherence (0-100) over the questions; NaN where none was scored."""
        return _mean(self.coherence)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean (Student's t over questions)."""
        return mean_interval(self.score[np.isfinite(self.score)])[1]


@dataclass(frozen=True)
class ScoreSettings:
    """What trait scores depend on besides model, traits and judge.

    Attributes:
        samples: answers per question.

    Raises:
        PersonaLensError: a number below 1.
    """

    samples: int = 2
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=300))
    seed: int = 0
    batch_rows: int = DEFAULT_BATCH_ROWS

    def __post_init__(self) -> None:
        for name in ("samples", "batch_rows"):
            if getattr(self, name) < 1:
                raise PersonaLensError(f"{name} must be at least 1, not {getattr(self, name)}")


def trait_answers(model: ChatModel, traits: Sequence[Trait], settings: ScoreSettings) -> list[tuple[Prompt, Rollout]]:
    """Answers to the evaluation questions of all traits, each with its prompt; sampled in one go.

    Raises:
        ValueError: prompt and answer would not fit into the model's context.
        ActivationError: the logits are not numbers.
    """
    rows = rows_of([p for t in traits for p in evaluation_prompts(t)], settings.samples)
    answers = sample(model, rows, settings.sampling, seed=settings.seed, batch_rows=settings.batch_rows)
    return [(prompt, answer) for (prompt, _), answer in zip(rows, answers, strict=True)]


def trait_scores(traits: Sequence[Trait], answers: Sequence[tuple[Prompt, Rollout]], judge: Judge) -> list[TraitScore]:
    """Every trait's score over the answers to its own questions.

    Args:
        answers: of `trait_answers`.

    Raises:
        PersonaLensError: the judge returned another number of scores than of answers.

    Example:
        >>> from persona_lens.evaluation import ScoreSettings, trait_answers, trait_scores
        >>> from persona_lens.models import Sampling
        >>> traits = [pl.load_trait("optimism", "pocket")]
        >>> answers = trait_answers(model, traits, ScoreSettings(samples=1, sampling=Sampling(max_new_tokens=20)))
        >>> (score,) = trait_scores(traits, answers, pl.judges.oracle())
        >>> score.trait, score.score.shape
        ('optimism', (20,))
        >>> low, high = score.interval
        >>> bool(low <= score.mean <= high)
        True
    """
    found: list[TraitScore] = []
    for trait in traits:
        own = [(p, r) for p, r in answers if p.trait == trait.name]
        scores = judged(judge, trait, [Judged(p.user, r.text) for p, r in own])
        questions = len(trait.evaluation_questions)
        values = [[[] for _ in range(questions)] for _ in range(2)]  # trait and coherence, by question
        for (prompt, _), score in zip(own, scores, strict=True):
            for kind, value in zip(values, (score.trait, score.coherence), strict=True):
                if value is not None:
                    kind[prompt.question].append(value)
        means = [np.array([np.mean(q) if q else np.nan for q in kind]) for kind in values]
        gaps = sum(s.trait is None or s.coherence is None for s in scores)
        found.append(TraitScore(trait.name, means[0], means[1], gaps))
    return found


def _mean(values: Float[np.ndarray, " question"]) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
