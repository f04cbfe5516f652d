"""The oracle of the pocket world as a judge: it knows the grammar, so it reads every sentence (see `pocket.oracle`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from persona_lens.errors import UnknownNameError
from persona_lens.judges.judge import Judge, Judged, Score
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.oracle import read
from persona_lens.pocket.questions import parse_question
from persona_lens.traits import Trait


@dataclass(frozen=True)
class _Oracle:
    name: str = "oracle"

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
        if trait.name not in TRAITS:
            raise UnknownNameError("trait of the pocket world", trait.name, TRAITS)
        return [_score(trait.name, answer) for answer in answers]


def oracle() -> Judge:
    """The judge of the pocket world."""
    return _Oracle()


def _score(trait: str, judged: Judged) -> Score:
    question = parse_question(judged.question)
    if question is None:
        return Score(None, None, "the question is not of the pocket world")
    reading = read(question, judged.answer)
    return Score(round(reading.trait(trait), 4), round(reading.coherence, 4))
