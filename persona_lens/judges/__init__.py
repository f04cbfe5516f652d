"""Judges: rubric and answer -> score. A judge is a function; `oracle` parses the pocket world, `scripted` wraps any scorer."""

from persona_lens.judges.judge import (
    Adherence,
    Judge,
    Judged,
    Outside,
    RoleJudge,
    Score,
    default_judge,
    default_outside,
    default_role_judge,
    judged,
    scripted,
)
from persona_lens.judges.oracle import oracle, outside_pocket_world, role_oracle

__all__ = [
    "Adherence",
    "Judge",
    "Judged",
    "Outside",
    "RoleJudge",
    "Score",
    "default_judge",
    "default_outside",
    "default_role_judge",
    "judged",
    "oracle",
    "outside_pocket_world",
    "role_oracle",
    "scripted",
]
