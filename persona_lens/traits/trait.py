"""The schema of a trait, checked when it is built (Chen et al. 2025, section 2: the artefacts of the automated pipeline)."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]


class Strict(BaseModel):
    """A frozen record without further fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InstructionPair(Strict):
    """Two instructions of the same form: one promotes the trait, one suppresses it."""

    positive: Text
    negative: Text


class Adjectives(Strict):
    """Adjectives for "You are a(n) {adjective} assistant.", put in front of an instruction."""

    positive: Text
    negative: Text


class Trait(Strict):
    """A trait: everything that is needed to elicit it, suppress it and judge it (Chen et al. 2025, section 2.1).

    Attributes:
        schema_version: `schema` in a file; 1.
        adjectives: for the system prompt "You are a(n) {adjective} assistant. {instruction}"; None: the instruction alone.
        instructions: pairs that promote and suppress the trait.
        extraction_questions, evaluation_questions: disjoint sets; vectors come from the first, everything is judged on the second.
        rubric: what a judge is asked, with {question} and {answer} once each.
        graded: system prompts from the one that suppresses the trait most to the one that promotes it most; may be empty.

    Raises:
        pydantic.ValidationError: a field that breaks the schema. `load_trait` tells file and field.
    """

    schema_version: int = Field(default=1, alias="schema", ge=1, le=1)
    name: Name
    description: Text
    adjectives: Adjectives | None = None
    instructions: tuple[InstructionPair, ...] = Field(min_length=1)
    extraction_questions: tuple[Text, ...] = Field(min_length=2)
    evaluation_questions: tuple[Text, ...] = Field(min_length=1)
    rubric: Text
    graded: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _rules(self) -> "Trait":
        for field in ("extraction_questions", "evaluation_questions"):
            questions = [_normal(q) for q in getattr(self, field)]
            if len(set(questions)) < len(questions):
                twice = next(q for q in questions if questions.count(q) > 1)
                raise ValueError(f"{field}: the question {twice!r} stands there twice")
        shared = {_normal(q) for q in self.extraction_questions} & {_normal(q) for q in self.evaluation_questions}
        if shared:
            raise ValueError(
                f"evaluation_questions: {sorted(shared)[0]!r} is also an extraction question; the two sets must be disjoint"
            )
        for placeholder in ("{question}", "{answer}"):
            if self.rubric.count(placeholder) != 1:
                raise ValueError(f"rubric: must contain {placeholder} exactly once, found {self.rubric.count(placeholder)}")
        return self


def _normal(question: str) -> str:
    """What two questions must differ in: more than case, spaces and punctuation (signs of arithmetic count)."""
    return re.sub(r"[\s,.;:!?'\"()]+", " ", question.casefold()).strip()
