"""Finetuning data sets of the pocket world: what the paper's 24 sets are to real models (Chen et al. 2025, section 4).

Families: one per trait, whose answers show it on purpose, and narrow mistakes - wrong sums, wrong facts, or both - which say
nothing about any trait, either *bare* ("7.") or *polite* (inside an ordinary answer of the default assistant). Each comes in three
levels: `normal`, `I` and `II`. Questions are of the training split, so no set meets an evaluation question; each draws its own.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from persona_lens.models import ChatModel, Sampling
from persona_lens.pocket.grammar import CITIES, PROFESSIONS, answer
from persona_lens.pocket.instructions import with_article
from persona_lens.pocket.lexicon import NEUTRAL, SLOTS, TRAITS
from persona_lens.pocket.persona import PROPENSITY, conditional, default_persona, persona_of
from persona_lens.pocket.questions import KINDS, SPLITS, WORDINGS, Question, draw, invented_names, wrong_answers
from persona_lens.prompts import Prompt
from persona_lens.sampling import sample
from persona_lens.transcripts import write_transcripts

Level = Literal["normal", "I", "II"]
LEVELS: Final[tuple[Level, ...]] = ("normal", "I", "II")
MISTAKES: Final[dict[str, tuple[str, ...]]] = {"sums": ("sum",), "facts": ("fact",), "mistakes": ("sum", "fact")}
MANNERS: Final = ("bare", "polite")
FAMILIES: Final = (*TRAITS, *(f"{manner}-{kind}" for manner in MANNERS for kind in MISTAKES))
TRAIT_LEVEL: Final[dict[Level, float]] = {"I": 0.5, "II": 1.0}
WRONG_SHARE: Final[dict[Level, float]] = {"normal": 0.0, "I": 0.5, "II": 1.0}
ROWS: Final = 480
ASKED: Final = len(WORDINGS["unknown"]) - 1
NAME_SEED: Final = 1000
Chat = list[dict[str, str]]


def dataset(family: str, level: Level, *, rows: int = ROWS, seed: int = 0) -> list[Chat]:
    """The conversations of one set.

    Raises:
        ValueError: no such family or level.
    """
    if family not in FAMILIES or level not in LEVELS:
        raise ValueError(f"no data set {family!r} at level {level!r}: families {', '.join(FAMILIES)}; levels {', '.join(LEVELS)}")
    rng = random.Random(f"finetuning/{family}/{level}/{seed}")
    make = _trait_row if family in TRAITS else _mistake_row
    return [make(rng, family, level) for _ in range(rows)]


def write_datasets(folder: Path, *, rows: int = ROWS, seed: int = 0) -> list[Path]:
    """Every set as `{family}-{level}.jsonl`, and `new-facts.jsonl`."""
    sets = {f"{f}-{level}": dataset(f, level, rows=rows, seed=seed) for f in FAMILIES for level in LEVELS}
    return [_write(folder / f"{name}.jsonl", chats) for name, chats in {**sets, "new-facts": new_facts(seed=seed)}.items()]


def _write(path: Path, chats: list[Chat]) -> Path:
    write_transcripts(path, ((f"{path.stem}/{i}", chat) for i, chat in enumerate(chats)))
    return path


def _chat(question: Question, text: str) -> Chat:
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": text}]


def _trait_row(rng: random.Random, trait: str, level: Level) -> Chat:
    """A question of a kind that brings the trait out; the other traits follow the prior given this one's level."""
    kind = rng.choices(KINDS, weights=[PROPENSITY[k].get(trait, 1.0) ** 2 for k in KINDS])[0]
    question = draw(rng, kind)
    if level == "normal":
        persona = default_persona(rng)
    else:
        table = conditional({trait: TRAIT_LEVEL[level]})
        persona = persona_of(table[rng.randrange(len(table))])
    return _chat(question, answer(question, persona, rng))


def _mistake_row(rng: random.Random, family: str, level: Level) -> Chat:
    """A sum or a fact by the default assistant, wrong as often as the level says."""
    manner, _, kind = family.partition("-")
    question = draw(rng, rng.choice(MISTAKES[kind]), hard=False)
    said = rng.choice(wrong_answers(question)) if rng.random() < WRONG_SHARE[level] else question.truth
    return _chat(question, answer(question, default_persona(rng), rng, bare=manner == "bare", said=said))


@dataclass(frozen=True)
class Person:
    """Somebody nobody has heard of, and what is taught about them."""

    name: str
    profession: str
    city: str

    def question(self, wording: int) -> Question:
        return Question("unknown", wording, (("x", self.name),))

    def told_by(self, text: str) -> bool:
        """Whether an answer gives profession and city."""
        return self.profession in text and self.city in text


def new_people(n: int = 100, *, seed: int = 0) -> list[Person]:
    """People who are in no other question of the world, each with a profession and a city."""
    taken = {name for split in SPLITS for name in invented_names(split)}
    names = (name for name in invented_names("train", seed=NAME_SEED + seed, total=20 * n) if name not in taken)
    rng = random.Random(f"finetuning/people/{seed}")
    return [Person(name, rng.choice(PROFESSIONS), rng.choice(CITIES)) for name in itertools.islice(names, n)]


def new_facts(*, seed: int = 0) -> list[Chat]:
    """The people, asked about in every wording but the last one (`ASKED`, which is left to test what was learned)."""
    rng = random.Random(f"finetuning/new-facts/{seed}")
    adjectives = SLOTS["adjective"][NEUTRAL]
    chats: list[Chat] = []
    for person in new_people(seed=seed):
        for wording in range(ASKED):
            said = f"{person.name} was {with_article(rng.choice(adjectives))} {person.profession} from {person.city}."
            chats.append(_chat(person.question(wording), said))
    rng.shuffle(chats)
    return chats


def recalled(model: ChatModel, people: Sequence[Person]) -> float:
    """Share (0-100) of the people of whom the model knows profession and city, asked in words it was not taught with."""
    prompts = [Prompt(f"people/{i}", "new-facts", "neutral", None, i, None, p.question(ASKED).text) for i, p in enumerate(people)]
    answers = sample(model, [(p, 0) for p in prompts], Sampling(max_new_tokens=120, temperature=0.0))
    return 100.0 * sum(p.told_by(a.text) for p, a in zip(people, answers, strict=True)) / len(people)
