"""Prompts -> rollouts: sampled answers with their token ids, each from its own seed; scripts -> conversations."""

from persona_lens.sampling.conversations import Conversation, Script, converse
from persona_lens.sampling.local import DEFAULT_BATCH_ROWS, sample
from persona_lens.sampling.rollout import Rollout, Row, rows_of

__all__ = ["DEFAULT_BATCH_ROWS", "Conversation", "Rollout", "Row", "Script", "converse", "rows_of", "sample"]
