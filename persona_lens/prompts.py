"""From a trait to prompts: polarity x instruction x question for extraction, and the held-out questions for evaluation.

The system prompt of a pair is "You are a(n) {adjective} assistant. {instruction}" (Chen et al. 2025, code), or the instruction
alone for a trait without adjectives. Extraction and evaluation questions never meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from persona_lens.errors import TraitFileError
from persona_lens.traits import Trait

Polarity = Literal["positive", "negative", "neutral"]
POLARITIES: tuple[Polarity, Polarity] = ("positive", "negative")


@dataclass(frozen=True)
class Prompt:
    """One conversation up to the answer.

    Attributes:
        id: stable: trait, polarity, instruction, question.
        instruction, question: numbers in the trait's lists, from 0; no instruction: None.
        system: system prompt; None without one.
        user: the question's text.
        earlier: exchanges (question, answer) that come before the question: examples in the context.
    """

    id: str
    trait: str
    polarity: Polarity
    instruction: int | None
    question: int
    system: str | None
    user: str
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The same as messages with role and content."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = [(role, text) for exchange in self.earlier for role, text in zip(("user", "assistant"), exchange, strict=True)]
        return [*system, *({"role": role, "content": text} for role, text in said), {"role": "user", "content": self.user}]


def system_prompt(trait: Trait, polarity: Literal["positive", "negative"], instruction: int) -> str:
    """The system prompt of one side of an instruction pair."""
    text = getattr(trait.instructions[instruction], polarity)
    if trait.adjectives is None:
        return text
    adjective = getattr(trait.adjectives, polarity)
    return f"You are {'an' if adjective[0].lower() in 'aeiou' else 'a'} {adjective} assistant. {text}"


def graded_system_prompts(trait: Trait) -> list[str]:
    """System prompts from suppressing to promoting a trait: its own, or eight (as in Chen et al. 2025) of its adjectives.

    Raises:
        TraitFileError: it has neither.
    """
    if trait.graded:
        return list(trait.graded)
    if trait.adjectives is None:
        raise TraitFileError(
            f"trait {trait.name!r} has neither graded system prompts nor adjectives to make them of: add 'graded', a list of "
            "system prompts from suppressing to promoting, to its file"
        )
    ours, theirs = trait.adjectives.positive, trait.adjectives.negative
    plain = [theirs, *(f"{degree} {ours}" for degree in ("not at all", "slightly", "somewhat", "quite", "very"))]
    middle = [f"You are an assistant that is {manner}." for manner in plain]
    return [system_prompt(trait, "negative", 0), *middle, system_prompt(trait, "positive", 0)]


def _prompts(trait: Trait, questions: Sequence[str], prefix: str, polarity: Polarity) -> list[Prompt]:
    if polarity == "neutral":
        return [
            Prompt(f"{trait.name}/neutral/-/{prefix}{q:02d}", trait.name, polarity, None, q, None, text)
            for q, text in enumerate(questions)
        ]
    return [
        Prompt(f"{trait.name}/{polarity}/i{i}/{prefix}{q:02d}", trait.name, polarity, i, q, system_prompt(trait, polarity, i), text)
        for i in range(len(trait.instructions))
        for q, text in enumerate(questions)
    ]


def extraction_prompts(trait: Trait, polarity: Polarity) -> list[Prompt]:
    """Every instruction of a polarity with every extraction question (`neutral`: the questions without a system prompt)."""
    return _prompts(trait, trait.extraction_questions, "x", polarity)


def evaluation_prompts(trait: Trait, polarity: Polarity = "neutral") -> list[Prompt]:
    """The same with the evaluation questions, which extraction never sees."""
    return _prompts(trait, trait.evaluation_questions, "e", polarity)
