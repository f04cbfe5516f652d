"""The record of one sampled answer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from persona_lens.models import EndReason
from persona_lens.prompts import Prompt

Row = tuple[Prompt, int]
"""A prompt and the number of its sample."""


@dataclass(frozen=True)
class Rollout:
    """One answer: token ids without the end token, its text, and why it ended.

    Attributes:
        sample: its number among the answers to the prompt, from 0.
        seed: of the run; the answer's own stream belongs to seed, prompt and sample.
        prompt_tokens: how long the rendered prompt was.
        thinking: tokens that a thinking model sampled before the answer; they are in no text and in no average.
        gap: why an answer that a server gave could not be used: the rollout then has no tokens.
    """

    prompt_id: str
    sample: int
    seed: int
    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    end: EndReason
    thinking: tuple[int, ...] = ()
    gap: str | None = None

    @property
    def key(self) -> str:
        """Prompt id and sample number; unique in a run."""
        return f"{self.prompt_id}#{self.sample}"

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values; without `thinking` and `gap` where there are none."""
        return {k: v for k, v in asdict(self).items() if v or k not in ("thinking", "gap")}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Rollout":
        """The rollout that `as_dict` made a record of.

        Raises:
            KeyError: a field is missing.
        """
        return cls(
            record["prompt_id"],
            record["sample"],
            record["seed"],
            record["prompt_tokens"],
            tuple(record["token_ids"]),
            record["text"],
            record["end"],
            tuple(record.get("thinking", ())),
            record.get("gap"),
        )


def rows_of(prompts: Sequence[Prompt], samples: int) -> list[Row]:
    """Every prompt with every sample number, in order."""
    return [(prompt, i) for prompt in prompts for i in range(samples)]
