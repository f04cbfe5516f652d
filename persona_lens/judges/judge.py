"""What a judge is: `(trait, answers) -> scores`, batched. What it cannot read is a gap with a reason, never a zero."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol, runtime_checkable

from persona_lens.errors import PersonaLensError
from persona_lens.traits import Role, Trait

_NUMBERS: Final = re.compile(r"\d+(?:\.\d+)?")
_QUOTED: Final = re.compile(r""": (?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")  # what a judge wrote, as `reply.shown` quotes it


@dataclass(frozen=True)
class Judged:
    """What a judge reads: the user's message and the answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Score:
    """Trait and coherence, 0-100 each; None with a reason where the judge gave none.

    Raises:
        ValueError: a score outside 0-100, or a missing one without a reason.
    """

    trait: float | None
    coherence: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        for value in (self.trait, self.coherence):
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"a score lies in 0-100, not {value}")
        if (self.trait is None or self.coherence is None) and not self.reason:
            raise ValueError("a missing score needs a reason")

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Score":
        """The score that `as_dict` made a record of.

        Raises:
            KeyError: a field is missing.
            ValueError: as `Score`.
        """
        return cls(record["trait"], record["coherence"], record.get("reason"))


def grouped(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, the most frequent first; reasons that differ in numbers or quoted replies alone are one."""
    return dict(Counter(_NUMBERS.sub("…", _QUOTED.sub("", reason)) for reason in reasons).most_common())


@dataclass(frozen=True)
class Adherence:
    """How far an answer is in its role: 0 not at all, 1 a trace, 2 mostly, 3 fully (arXiv 2601.10387); None with a reason.

    Raises:
        ValueError: another value, or a missing one without a reason.
    """

    value: int | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.value is not None and self.value not in (0, 1, 2, 3):
            raise ValueError(f"role adherence is 0, 1, 2 or 3, not {self.value}")
        if self.value is None and not self.reason:
            raise ValueError("a missing adherence needs a reason")


@runtime_checkable
class RoleJudge(Protocol):
    """A judge of how far answers are in a role, by the role set's rubric. `name` goes into the run's record."""

    @property
    def name(self) -> str:
        """What the judge is called; it should name all that its scores depend on."""
        ...

    def __call__(self, role: Role, rubric: str, answers: Sequence[Judged], /) -> list[Adherence]: ...


Outside = Callable[[Judged], bool]
"""Whether an answer is not of the model's world: another language, gibberish."""


@runtime_checkable
class Judge(Protocol):
    """A judge of answers. `name` goes into the run's record."""

    @property
    def name(self) -> str:
        """What the judge is called; it should name all that its scores depend on."""
        ...

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]: ...


def judged(judge: Judge, trait: Trait, answers: Sequence[Judged]) -> list[Score]:
    """A judge's scores, one per answer.

    Raises:
        PersonaLensError: it returned another number.
    """
    scores = judge(trait, answers)
    if len(scores) != len(answers):
        raise PersonaLensError(
            f"judge {judge.name!r} returned {len(scores)} scores for {len(answers)} answers: "
            "it must return one per answer, in order"
        )
    return scores


@dataclass(frozen=True)
class _Scripted:
    name: str
    score: Callable[[Trait, Judged], Score]

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
        return [self.score(trait, answer) for answer in answers]


def scripted(score: Callable[[Trait, Judged], Score], name: str = "scripted") -> Judge:
    """A judge from a function that scores one answer.

    Args:
        name: goes into the record of runs; another function wants another one.

    Example:
        >>> from persona_lens.judges import Judged, Score
        >>> def long(trait, judged):
        ...     return Score(trait=min(100.0, 5.0 * len(judged.answer.split())), coherence=100.0)
        >>> judge = pl.judges.scripted(long, "five points a word")
        >>> judge(pl.load_trait("humor"), [Judged("How are you?", "Fine, thank you.")])
        [Score(trait=15.0, coherence=100.0, reason=None)]
    """
    return _Scripted(name, score)


def default_outside(trait_set: str) -> Outside | None:
    """The check that needs no choice: the grammar of the pocket world; None for any other model."""
    if trait_set != "pocket":
        return None
    from persona_lens.judges.oracle import outside_pocket_world

    return outside_pocket_world


def default_role_judge(trait_set: str) -> RoleJudge:
    """The judge of roles that needs no choice: the oracle on the pocket model.

    Raises:
        PersonaLensError: any other model needs a judge to be passed.
    """
    if trait_set != "pocket":
        raise PersonaLensError("no judge of roles given, and the oracle reads pocket models only: pass judge= from Python")
    from persona_lens.judges.oracle import role_oracle

    return role_oracle()
