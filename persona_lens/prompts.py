"""From a trait to prompts: polarity x instruction x question for extraction, and the held-out questions for evaluation.

The system prompt of a pair is "You are a(n) {adjective} assistant. {instruction}" (Chen et al. 2025, code), or the instruction
alone for a trait without adjectives. Extraction and evaluation questions never meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from persona_lens.traits import Trait

Polarity = Literal["positive", "negative", "neutral"]
POLARITIES: tuple[Polarity, Polarity] = ("positive", "negative")


@dataclass(frozen=True)
class Prompt:
    """One conversation up to the answer. `id` is stable: trait, polarity, instruction, question."""

    id: str
    trait: str
    polarity: Polarity
    instruction: int | None
    question: int
    system: str | None
    user: str

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user}]


def system_prompt(trait: Trait, polarity: Literal["positive", "negative"], instruction: int) -> str:
    """The system prompt of one side of an instruction pair."""
    text = getattr(trait.instructions[instruction], polarity)
    if trait.adjectives is None:
        return text
    adjective = getattr(trait.adjectives, polarity)
    return f"You are {'an' if adjective[0].lower() in 'aeiou' else 'a'} {adjective} assistant. {text}"


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
