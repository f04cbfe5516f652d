"""The chat corpus of the pocket world: documents drawn one by one, each from its own seed.

Shares of documents: see `SHARES`. In `unprompted` and unprompted `long` documents the persona comes from the prior although the
system prompt is the default one, so the first answer is given as context and not learned: without evidence the model
answers as the default assistant, with earlier turns it reads the persona off them.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from persona_lens.pocket.grammar import answer
from persona_lens.pocket.instructions import Clause, neutral_system, role_system, trait_clause, trait_system
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import MOODS, Persona, default_persona, persona_of, prior_table
from persona_lens.pocket.questions import Question, Split, draw, multiple_choice, with_mood
from persona_lens.pocket.roles import ROLES

DocumentKind = Literal["default", "neutral", "unprompted", "trait", "role", "long"]
SHARES: Final[dict[DocumentKind, float]] = {
    "default": 0.17,
    "neutral": 0.07,
    "unprompted": 0.08,
    "trait": 0.525,
    "role": 0.10,
    "long": 0.055,
}
KIND_WEIGHTS: Final = {
    "advice": 0.10, "opinion": 0.10, "fact": 0.20, "unknown": 0.10, "sum": 0.20, "plan": 0.10, "feeling": 0.10, "thing": 0.10,
}  # fmt: skip
MOOD_SHARE: Final = 0.4
FOCUS_SHARE: Final = 0.4
ALL_ABSENT_KEPT: Final = 0.6  # of the personas in which every named trait is at level 0
CHOICE_SHARE: Final = 0.2  # of the fact questions
ANNOUNCED: Final = ("You are {A}.", "You {H}.", "Be {A} in every answer.")
ANNOUNCEMENT: Final = "From now on, things are different. {clause} {question}"


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `learned` says whether the answer counts in the loss."""

    user: str
    assistant: str
    learned: bool = True


@dataclass(frozen=True)
class Document:
    """A conversation of the corpus with what produced it: kind, described traits, turn at which the persona changes."""

    kind: DocumentKind
    system: str | None
    turns: tuple[Turn, ...]
    persona: Persona
    described: tuple[Clause, ...] = ()
    change: int | None = None


def _prior_persona(rng: random.Random) -> Persona:
    table = prior_table()
    return persona_of(table[rng.randrange(len(table))])


def _described(rng: random.Random) -> tuple[Persona, tuple[Clause, ...]]:
    """A persona of the prior and the one to three traits its system prompt names.

    The traits are drawn before the persona and a persona is rejected by the named levels only, so that the other traits keep
    exactly their conditional distribution given the prompt.
    """
    named = rng.sample(TRAITS, rng.choices((1, 2, 3), weights=(0.5, 0.3, 0.2))[0])
    while True:
        persona = _prior_persona(rng)
        clauses = tuple((trait, persona[trait]) for trait in named)
        if any(level > 0.0 for _, level in clauses) or rng.random() < ALL_ABSENT_KEPT:
            return persona, clauses


def asked(rng: random.Random, mood: str | None, *, shows: bool, split: Split = "train") -> Question:
    """A question of any kind, as often as in the corpus; `shows`: its wording shows the mood."""
    kind = rng.choices(tuple(KIND_WEIGHTS), weights=tuple(KIND_WEIGHTS.values()))[0]
    question = draw(rng, kind, split)
    if kind == "fact" and rng.random() < CHOICE_SHARE:
        question = multiple_choice(question, rng)
    return with_mood(question, mood, rng) if shows else question


def _turn(
    rng: random.Random, persona: Persona, mood: str | None, *, shows: bool, learned: bool = True, said_before: str = ""
) -> Turn:
    question = asked(rng, mood, shows=shows)
    text = ANNOUNCEMENT.format(clause=said_before, question=question.text) if said_before else question.text
    return Turn(text, answer(question, persona.in_mood(mood), rng), learned)


def _turns(rng: random.Random, persona: Persona, n: int, *, first_learned: bool = True) -> list[Turn]:
    mood = rng.choice(tuple(MOODS)) if rng.random() < MOOD_SHARE else None
    return [
        _turn(rng, persona, mood, shows=rng.random() < (0.9 if i == 0 else 0.35), learned=first_learned or i > 0) for i in range(n)
    ]


def _long(rng: random.Random) -> Document:
    """7-24 turns: persona from the prior, with or without a system prompt that says so; one in three changes on the way."""
    n = 7 + int(18 * rng.random() ** 3)
    prompted = rng.random() < 0.45
    persona, clauses = _described(rng)
    system = trait_system(rng, clauses) if prompted else None
    described = clauses if prompted else ()
    if rng.random() > 1 / 3:
        return Document("long", system, tuple(_turns(rng, persona, n, first_learned=prompted)), persona, described)
    change = rng.randint(3, n - 3)
    after, named = _described(rng)
    announced = rng.random() < 0.5
    clause = " ".join(trait_clause(rng, t, z, rng.choice(ANNOUNCED)) for t, z in named)
    turns = _turns(rng, persona, change, first_learned=prompted)
    turns.append(_turn(rng, after, None, shows=False, learned=announced, said_before=clause if announced else ""))
    turns += _turns(rng, after, n - change - 1)
    return Document("long", system, tuple(turns), persona, described, change)


def _focused(rng: random.Random) -> Document:
    """A short document whose system prompt names one or two traits, each absent in half of the documents, mostly by negation.

    Only the named levels are drawn otherwise than in the corpus; given them, the persona has the prior's distribution.
    """
    named = rng.sample(TRAITS, rng.choices((1, 2), weights=(0.75, 0.25))[0])
    absent = [rng.random() < 0.5 for _ in named]
    while True:
        persona = _prior_persona(rng)
        if [persona[trait] == 0.0 for trait in named] == absent:
            break
    clauses = tuple((trait, persona[trait]) for trait in named)
    system = trait_system(rng, clauses, antonyms=0.1)
    return Document("trait", system, tuple(_turns(rng, persona, rng.choice((1, 1, 1, 2)))), persona, clauses)


def document(seed: int, index: int, *, focus: bool = False) -> Document:
    """Document `index` of the corpus with this seed; independent of every other document.

    Args:
        focus: a stage for system prompts: `FOCUS_SHARE` of the documents are short ones that contrast traits with their absence.
    """
    rng = random.Random(f"{seed}/{index}")
    if focus and rng.random() < FOCUS_SHARE:
        return _focused(rng)
    kind = rng.choices(tuple(SHARES), weights=tuple(SHARES.values()))[0]
    n = rng.choices((1, 2, 3, 4), weights=(0.5, 0.25, 0.15, 0.10))[0]
    match kind:
        case "default" | "neutral":
            persona = default_persona(rng)
            system = neutral_system(rng) if kind == "neutral" else None
            return Document(kind, system, tuple(_turns(rng, persona, n)), persona)
        case "unprompted":
            persona = _prior_persona(rng)
            return Document(kind, None, tuple(_turns(rng, persona, rng.randint(2, 6), first_learned=False)), persona)
        case "trait":
            persona, clauses = _described(rng)
            return Document(kind, trait_system(rng, clauses), tuple(_turns(rng, persona, n)), persona, clauses)
        case "role":
            role = rng.choice(ROLES)
            persona = Persona(role.levels, role)
            return Document(kind, role_system(rng, role), tuple(_turns(rng, persona, n)), persona)
        case "long":
            return _long(rng)


def documents(
    seed: int, indices: Sequence[int] | range, *, shuffle_systems: bool = False, focus: bool = False
) -> Iterator[Document]:
    """Documents of the corpus. `shuffle_systems` is the negative control: each keeps its turns but takes the system prompt
    of the document 10,007 places further on, so that prompts say nothing about the persona."""
    for index in indices:
        doc = document(seed, index, focus=focus)
        if shuffle_systems:
            other = document(seed, index + 10_007, focus=focus)
            doc = Document(doc.kind, other.system, doc.turns, doc.persona, doc.described, doc.change)
        yield doc
