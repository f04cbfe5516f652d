"""Judges: rubric and answer -> score. A judge is a function; `oracle` parses the pocket world, `scripted` wraps any scorer."""

from persona_lens.judges.judge import Judge, Judged, Outside, Score, default_judge, default_outside, scripted
from persona_lens.judges.oracle import oracle, outside_pocket_world

__all__ = ["Judge", "Judged", "Outside", "Score", "default_judge", "default_outside", "oracle", "outside_pocket_world", "scripted"]
