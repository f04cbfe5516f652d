"""Judges: rubric and answer -> score. A judge is a function; `oracle` parses the pocket world, `scripted` wraps any scorer.

A language model judges behind a server (`endpoint_judge`) or on this machine (`local_judge`); `check_judge` compares a judge with
labels. What needs torch or scikit-learn is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from persona_lens.judges.endpoint import endpoint_judge, endpoint_role_judge
from persona_lens.judges.judge import (
    Adherence,
    Judge,
    Judged,
    Outside,
    RoleJudge,
    Score,
    default_outside,
    default_role_judge,
    grouped,
    judged,
    scripted,
)
from persona_lens.judges.named import default_judge, judge_named
from persona_lens.judges.oracle import oracle, outside_pocket_world, role_oracle

if TYPE_CHECKING:
    from persona_lens.judges.checking import JudgeCheck, Labelled, Repeatability, check_judge, repeatability
    from persona_lens.judges.local import local_judge, local_role_judge

_HOME: Final = {
    "JudgeCheck": "checking",
    "Labelled": "checking",
    "Repeatability": "checking",
    "check_judge": "checking",
    "local_judge": "local",
    "local_role_judge": "local",
    "repeatability": "checking",
}

__all__ = [
    "Adherence",
    "Judge",
    "JudgeCheck",
    "Judged",
    "Labelled",
    "Outside",
    "Repeatability",
    "RoleJudge",
    "Score",
    "check_judge",
    "default_judge",
    "default_outside",
    "default_role_judge",
    "endpoint_judge",
    "endpoint_role_judge",
    "grouped",
    "judge_named",
    "judged",
    "local_judge",
    "local_role_judge",
    "oracle",
    "outside_pocket_world",
    "repeatability",
    "role_oracle",
    "scripted",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'persona_lens.judges' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"persona_lens.judges.{_HOME[name]}"), name)
    globals()[name] = value
    return value
