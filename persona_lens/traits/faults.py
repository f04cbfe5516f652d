"""What is wrong with a trait that a language model wrote: the schema first, then what makes questions and rubrics usable.

Each fault names its field. Limits were set with the shipped traits, whose questions overlap by 0.29 at most, and the two sides of
whose instructions differ in length by a factor of 1.28 at most.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from persona_lens.traits.replies import strings, unprintable
from persona_lens.traits.trait import Adjectives, InstructionPair, Strict, Text, Trait

NEAR: Final = 0.5  # Jaccard overlap of pairs of neighbouring words from which on two questions count as one
UNEVEN: Final = 2.0  # how many times as long one side of an instruction pair may be
_NUMBER_ONLY: Final = re.compile(r"only[^.\n]*number|number[^.\n]*only|nothing (else|but)", re.IGNORECASE)


@dataclass(frozen=True)
class Fault:
    """A rule that is broken, and the field to write anew: "rubric", "extraction_questions.3", or "" for the whole reply."""

    field: str
    text: str

    def __str__(self) -> str:
        return f"field {self.field}: {self.text}" if self.field else self.text


class Draft(Strict):
    """What a language model is asked to write: a trait without name and description."""

    adjectives: Adjectives
    instructions: tuple[InstructionPair, ...]
    extraction_questions: tuple[Text, ...]
    evaluation_questions: tuple[Text, ...]
    rubric: Text


@dataclass(frozen=True)
class Wanted:
    """What was asked for: name, description, how many items each list has, and which traits there are already."""

    name: str
    description: str
    counts: Mapping[str, int]
    known: Sequence[Trait]


def trait_of(record: Mapping[str, Any], wanted: Wanted) -> tuple[Trait | None, list[Fault]]:
    """The trait of a record, or everything that is wrong with it."""
    if faults := _characters(record):
        return None, faults
    try:
        draft = Draft.model_validate(record)
    except ValidationError as error:
        return None, _of_schema(error)
    if faults := list(_of_draft(draft, wanted)):
        return None, faults
    whole = {"schema": 1, "name": wanted.name, "description": wanted.description, **draft.model_dump()}
    try:
        return Trait.model_validate(whole), []
    except ValidationError as error:
        return None, _of_schema(error)


def shown(text: str) -> str:
    """A text from a reply, short enough for a message."""
    return repr(text if len(text) <= 160 else text[:160] + "...")


def _field(path: Sequence[str | int]) -> str:
    """The field to write anew for a fault at a path: a list's item, or a whole field."""
    return ".".join(str(part) for part in path[: 2 if len(path) > 1 and isinstance(path[1], int) else 1])


def _characters(record: Mapping[str, Any]) -> list[Fault]:
    found = ((path, unprintable(text)) for path, text in strings(dict(record)))
    return [Fault(_field(path), f"holds the control character {bad}") for path, bad in found if bad]


def _of_schema(error: ValidationError) -> list[Fault]:
    faults: list[Fault] = []
    for one in error.errors():
        field = _field(one["loc"])
        inner = ".".join(str(part) for part in one["loc"])[len(field) :].strip(".")
        faults.append(Fault(field, f"{inner}: {one['msg']}" if inner else str(one["msg"])))
    return faults


def _of_draft(draft: Draft, wanted: Wanted) -> Generator[Fault]:
    for field, count in wanted.counts.items():
        yield from (
            Fault(f"{field}.{i}", f"is missing, {count} are needed and there are {len(getattr(draft, field))}")
            for i in range(len(getattr(draft, field)), count)
        )
    yield from _of_pairs(draft)
    yield from _of_questions(draft, wanted)
    yield from (Fault("rubric", text) for text in _of_rubric(draft.rubric))


def _of_pairs(draft: Draft) -> Generator[Fault]:
    if _words(draft.adjectives.positive) == _words(draft.adjectives.negative):
        yield Fault("adjectives", "both sides are the same")
    for i, pair in enumerate(draft.instructions):
        sides = [_words(pair.positive), _words(pair.negative)]
        lengths = sorted(max(1, len(side)) for side in sides)
        if sides[0] == sides[1]:
            yield Fault(f"instructions.{i}", "both sides are the same")
        elif lengths[1] > UNEVEN * lengths[0]:
            yield Fault(
                f"instructions.{i}",
                f"the sides have {len(sides[0])} and {len(sides[1])} words: both must have the same form and about one length",
            )
        earlier = ((f"instructions.{j}", draft.instructions[j].positive) for j in range(i))
        if near := nearest(pair.positive, earlier):
            yield Fault(f"instructions.{i}", f"says nearly the same as {near}")


def _of_questions(draft: Draft, wanted: Wanted) -> Generator[Fault]:
    """Questions that name the trait, and near-duplicates of earlier ones (of either set) and of the known traits' questions."""
    terms = [wanted.name, draft.adjectives.positive, draft.adjectives.negative]
    before = [
        (f"a question of the trait {trait.name}", question)
        for trait in wanted.known
        for question in (*trait.extraction_questions, *trait.evaluation_questions)
    ]
    for field in ("extraction_questions", "evaluation_questions"):
        for i, question in enumerate(getattr(draft, field)):
            if term := next((t for t in terms if _names(question, t)), None):
                yield Fault(f"{field}.{i}", f"{shown(question)} names {term!r}: it must bring the trait out without naming it")
            if near := nearest(question, before):
                yield Fault(f"{field}.{i}", f"{shown(question)} is nearly the same as {near}")
            before.append((f"{field}.{i}", question))


def _of_rubric(rubric: str) -> Generator[str]:
    for placeholder in ("{question}", "{answer}"):
        if rubric.count(placeholder) != 1:
            yield f"must contain {placeholder} exactly once, found {rubric.count(placeholder)}"
    if re.search(r"[{}]", rubric.replace("{question}", "").replace("{answer}", "")):
        yield "must contain no other braces than those of {question} and {answer}"
    for anchor in (0, 100):
        if not re.search(rf"(?mi)^\W*(about |score )?{anchor}\s*[:=(–—-]", rubric):
            yield f'has no line that says what {anchor} means: write a line that begins with "About {anchor}:"'
    if not _NUMBER_ONLY.search(rubric):
        yield "must tell the grader to reply with only the number"
    if "REFUSAL" not in rubric:
        yield "must tell the grader to reply REFUSAL where the answer is a refusal to engage with the question"


def nearest(text: str, others: "Sequence[tuple[str, str]] | Generator[tuple[str, str]]") -> str | None:
    """The first of the others (name, text) that is nearly the same text: its name and text."""
    own = _shingles(text)
    for name, other in others:
        theirs = _shingles(other)
        if len(own & theirs) >= NEAR * len(own | theirs):
            return f"{name}, {shown(other)}"
    return None


def _words(text: str) -> list[str]:
    """Words and signs of arithmetic, without case and punctuation."""
    return re.findall(r"[\w']+|[+*/=<>-]", text.casefold())


def _shingles(text: str) -> set[tuple[str, ...]]:
    """Pairs of neighbouring words; a text of one word is its own."""
    words = _words(text)
    return {tuple(words[i : i + 2]) for i in range(max(1, len(words) - 1))}


def _names(question: str, term: str) -> bool:
    """Whether a question holds a term, or (terms of 4 letters and more) a word made of it with an ending of up to 4 letters."""
    words, wanted = _words(question), _words(term.replace("_", " ").replace("-", " "))
    return any(
        words[i : i + len(wanted) - 1] == wanted[:-1] and _inflected(words[i + len(wanted) - 1], wanted[-1])
        for i in range(len(words) - len(wanted) + 1)
    )


def _inflected(word: str, stem: str) -> bool:
    return word == stem or (len(stem) >= 4 and word.startswith(stem) and len(word) - len(stem) <= 4)
