"""Long conversations of the pocket world whose persona is known turn by turn: neutral ones, drifting ones, changes of topic.

*Planted* conversations are answered by the grammar: the default persona throughout, or another one from some turn on. As *scripts*
they are left to the model, which wanders by itself when it talks for long (`sampling.converse`); there a drift is announced by
the user, as in the corpus.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final

from persona_lens.pocket.grammar import answer
from persona_lens.pocket.instructions import trait_clause
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import LEVELS, MOODS, Persona, conditional, default_persona, persona_of
from persona_lens.pocket.questions import Question, Split, draw
from persona_lens.pocket_lab.corpus import ANNOUNCED, ANNOUNCEMENT, MOOD_SHARE, asked
from persona_lens.sampling import Script

TURNS: Final = 20
CHANGE_AT: Final = 5  # the turn, from 1, at which a persona drifts or a topic changes
Chat = list[dict[str, str]]


def _questions(rng: random.Random, turns: int, split: Split) -> list[Question]:
    """Questions as in the corpus, of a user who may be in a mood."""
    mood = rng.choice(tuple(MOODS)) if rng.random() < MOOD_SHARE else None
    shown = [mood is not None and rng.random() < (0.9 if i == 0 else 0.35) for i in range(turns)]
    return [asked(rng, mood, shows=shows, split=split) for shows in shown]


def _questions_of(rng: random.Random, kind: str, turns: int, at: int, split: Split) -> list[Question]:
    """Questions as in the corpus, and of one kind from the `at`-th on."""
    return [*_questions(rng, at - 1, split), *(draw(rng, kind, split) for _ in range(turns - at + 1))]


def _answered(rng: random.Random, questions: Sequence[Question], persona: Callable[[int], Persona]) -> Chat:
    """Questions answered by the grammar; `persona` says who answers the turn (from 1), before the user's mood moves them."""
    mood = next((q.mood for q in questions if q.mood), None)
    chat: Chat = []
    for turn, question in enumerate(questions, start=1):
        chat.append({"role": "user", "content": question.text})
        chat.append({"role": "assistant", "content": answer(question, persona(turn).in_mood(mood), rng)})
    return chat


def neutral_chat(seed: int, index: int, turns: int = TURNS, split: Split = "development") -> Chat:
    """The default persona throughout."""
    rng = random.Random(f"planted/neutral/{seed}/{index}")
    persona = default_persona(rng)
    return _answered(rng, _questions(rng, turns, split), lambda _: persona)


def drifting_chat(
    trait: str, seed: int, index: int, turns: int = TURNS, at: int = CHANGE_AT, level: float = 1.0, split: Split = "development"
) -> Chat:
    """The default persona, and from turn `at` on one of the prior with the trait at a level; nobody says so."""
    if trait not in TRAITS or level not in LEVELS:
        raise ValueError(f"no trait {trait!r} at level {level} in the pocket world: traits {TRAITS}, levels {LEVELS}")
    rng = random.Random(f"planted/drift/{trait}/{level}/{seed}/{index}")
    table = conditional({trait: level})
    before, after = default_persona(rng), persona_of(table[rng.randrange(len(table))])
    return _answered(rng, _questions(rng, turns, split), lambda turn: before if turn < at else after)


def changing_chat(kind: str, seed: int, index: int, turns: int = TURNS, at: int = CHANGE_AT, split: Split = "development") -> Chat:
    """The default persona throughout; from turn `at` on all questions are of one kind."""
    rng = random.Random(f"planted/topic/{kind}/{seed}/{index}")
    persona = default_persona(rng)
    return _answered(rng, _questions_of(rng, kind, turns, at, split), lambda _: persona)


def neutral_script(seed: int, index: int, turns: int = TURNS, split: Split = "development") -> Script:
    """A conversation in which nobody asks for any persona."""
    rng = random.Random(f"neutral/{seed}/{index}")
    return Script(f"neutral/{seed}/{index}", tuple(q.text for q in _questions(rng, turns, split)))


def drifting_script(
    trait: str, seed: int, index: int, turns: int = TURNS, at: int = CHANGE_AT, split: Split = "development"
) -> Script:
    """The same, but with its `at`-th message the user announces a persona with the trait at its highest level."""
    rng = random.Random(f"drift/{trait}/{seed}/{index}")
    users = [q.text for q in _questions(rng, turns, split)]
    clause = trait_clause(rng, trait, 1.0, rng.choice(ANNOUNCED))
    users[at - 1] = ANNOUNCEMENT.format(clause=clause, question=users[at - 1])
    return Script(f"drift/{trait}/{seed}/{index}", tuple(users))
