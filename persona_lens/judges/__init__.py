"""Judges: rubric and answer -> score. A judge is a function; `oracle` parses the pocket world, `scripted` wraps any scorer."""

from persona_lens.judges.judge import Judge, Judged, Score, default_judge, scripted
from persona_lens.judges.oracle import oracle

__all__ = ["Judge", "Judged", "Score", "default_judge", "oracle", "scripted"]
