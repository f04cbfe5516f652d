"""Sampling on the hooked model itself, steered or not."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import numpy as np

from persona_lens.models import ChatModel, Generated, Interval, Sampling, dialogue, generate_tokens, in_parts, uniforms
from persona_lens.prompts import Prompt
from persona_lens.sampling.rollout import Rollout, Row

DEFAULT_BATCH_ROWS: Final = 128
"""Answers decoded together, unless told otherwise."""


def sample(
    model: ChatModel,
    rows: Sequence[Row],
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_rows: int = DEFAULT_BATCH_ROWS,
    within: AbstractContextManager[Any] | None = None,
) -> list[Rollout]:
    """One rollout per row (prompt, sample number), in the order of the rows.

    In float32 a rollout depends on the seed, its prompt's id and its sample number alone: batch size and order change nothing
    (up to ties at the rounding of the logits). In bfloat16 the logits depend on the batch, so the same batches are needed.

    Args:
        rows: see `sampling.rows_of`.
        batch_rows: answers decoded together; memory grows with it.
        within: a context to sample in, for instance a steering context.

    Raises:
        ValueError: prompt and answer would not fit into the model's context.
        ActivationError: the logits are not numbers, or not even one row fits into memory.

    Example:
        >>> from persona_lens.models import Sampling
        >>> from persona_lens.prompts import evaluation_prompts
        >>> from persona_lens.sampling import rows_of
        >>> prompts = evaluation_prompts(pl.load_trait("optimism", "pocket"))
        >>> answers = pl.sample(model, rows_of(prompts[:2], samples=2), Sampling(max_new_tokens=20))
        >>> [answer.key for answer in answers]
        ['optimism/neutral/-/e00#0', 'optimism/neutral/-/e00#1', 'optimism/neutral/-/e01#0', 'optimism/neutral/-/e01#1']
    """
    ids = [tuple(model.render(prompt.messages)) for prompt, _ in rows]
    order = sorted(range(len(rows)), key=lambda i: (len(ids[i]), ids[i]))
    rollouts: list[Rollout | None] = [None] * len(rows)

    def answered(batch: list[int]) -> list[Generated]:
        draws = np.stack([uniforms(seed, _key(rows[i]), sampling.max_new_tokens) for i in batch])
        earlier = lambda: [_earlier(model, rows[i][0]) for i in batch]  # noqa: E731
        return generate_tokens(model, [ids[i] for i in batch], draws, sampling, row_ids=batch, earlier=earlier)

    with within or nullcontext():
        for start in range(0, len(order), batch_rows):
            for batch, answers in in_parts(order[start : start + batch_rows], answered):
                for i, answer in zip(batch, answers, strict=True):
                    prompt, number = rows[i]
                    thinking, said = model.template.split(answer.token_ids)
                    rollouts[i] = Rollout(prompt.id, number, seed, len(ids[i]), said, model.decode(said), answer.end, thinking)
    return [rollout for rollout in rollouts if rollout is not None]


def _earlier(model: ChatModel, prompt: Prompt) -> tuple[Interval, ...]:
    """Where the answers of a prompt's examples lie in its tokens."""
    return dialogue(model, prompt.messages).answers if prompt.earlier else ()


def _key(row: Row) -> str:
    return f"{row[0].id}#{row[1]}"
