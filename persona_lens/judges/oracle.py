"""The oracle of the pocket world as a judge: it knows the grammar, so it reads every sentence (see `pocket.oracle`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from persona_lens.errors import PersonaLensError, UnknownNameError
from persona_lens.judges.judge import Adherence, Judge, Judged, RoleJudge, Score
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.oracle import outside_share, read
from persona_lens.pocket.questions import parse_question
from persona_lens.pocket.roles import ROLES
from persona_lens.traits import Role, Trait

_ROLES = tuple(r.name for r in ROLES)


@dataclass(frozen=True)
class _Oracle:
    name: str = "oracle"

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
        if trait.name not in TRAITS:
            unknown = UnknownNameError("trait of the pocket world", trait.name, TRAITS)
            raise PersonaLensError(
                f"{unknown}. The oracle knows the world's own traits only, by their names. For another one give another judge: "
                "--judge openai:MODEL@URL, or in Python judge=judges.scripted(...)"
            )
        return [_score(trait.name, answer) for answer in answers]


def oracle() -> Judge:
    """The judge of the pocket world."""
    return _Oracle()


@dataclass(frozen=True)
class _RoleOracle:
    name: str = "oracle"

    def __call__(self, role: Role, rubric: str, answers: Sequence[Judged], /) -> list[Adherence]:  # noqa: ARG002
        if role.name not in _ROLES:
            raise UnknownNameError("role of the pocket world", role.name, _ROLES)
        asked = [parse_question(a.question) for a in answers]
        return [
            Adherence(None, "the question is not of the pocket world")
            if q is None
            else Adherence(read(q, a.answer).role(role.name))
            for q, a in zip(asked, answers, strict=True)
        ]


def role_oracle() -> RoleJudge:
    """The judge of the pocket world's roles: a role's opener counts 1, one of its sentences 2."""
    return _RoleOracle()


def outside_pocket_world(judged: Judged) -> bool:
    """Whether at least half of an answer's sentences have no form that the world knows, on topic or not."""
    return outside_share(parse_question(judged.question), judged.answer) >= 0.5


def _score(trait: str, judged: Judged) -> Score:
    question = parse_question(judged.question)
    if question is None:
        return Score(None, None, "the question is not of the pocket world")
    reading = read(question, judged.answer)
    return Score(round(reading.trait(trait), 4), round(reading.coherence, 4))
