"""Decoding conversations: many of them side by side, each with its own turns, on one key-value cache that is never built twice.

Every step gives each row one token: one that its next message holds, or one that is sampled. So rows that are at different
places of different conversations stay aligned, and nothing is padded after the first messages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from persona_lens.models.generation import EndReason, Generated, Sampling, Step, choose, decode, require_numbers, shared_prefill

if TYPE_CHECKING:
    from persona_lens.models.chat_model import ChatModel

Proceed = Callable[[int, Generated], Sequence[int] | None]  # row and its answer -> tokens up to the next answer, or None: the end


@dataclass
class _Row:
    """One conversation while it is decoded."""

    draws: Callable[[int], Float[np.ndarray, " step"]]
    ahead: list[int] = field(default_factory=list[int])  # tokens of the next message that are still to be given, in order
    answer: list[int] = field(default_factory=list[int])
    turn: int = 0
    uniforms: Float[np.ndarray, " step"] | None = None

    def draw(self) -> float:
        """The uniform number of the next token of the answer; 0 where the next token is given."""
        if self.ahead:
            return 0.0
        if self.uniforms is None:
            self.uniforms = self.draws(self.turn)
        return float(self.uniforms[len(self.answer)])

    def answered(self, end: EndReason) -> Generated:
        found = Generated(tuple(self.answer), end)
        self.answer, self.uniforms, self.turn = [], None, self.turn + 1
        return found


@torch.inference_mode()
def converse_tokens(
    model: "ChatModel",
    openings: Sequence[Sequence[int]],
    proceed: Proceed,
    draws: Callable[[int, int], Float[np.ndarray, " step"]],
    sampling: Sampling,
    *,
    row_ids: Sequence[int] | None = None,
) -> None:
    """Decode conversations until `proceed` ends each of them.

    Args:
        openings: token ids up to the first answer, one per row.
        proceed: is told each answer when it is complete, and says which tokens come before the next (or None: that was the last).
        draws: uniform numbers for an answer, by row and turn (from 0); at least `sampling.max_new_tokens`.
        row_ids: what the rows are called in `Pass.rows`; default 0, 1, 2 ...

    Raises:
        ActivationError: the logits are not numbers.
    """
    device = model.device
    names = torch.tensor(list(row_ids) if row_ids is not None else list(range(len(openings))), device=device)
    cache, mask = shared_prefill(model, openings, names, lambda: [()] * len(openings))  # no answer lies before the first
    rows = [_Row(lambda turn, i=i: draws(i, turn)) for i in range(len(openings))]
    alive, tokens = list(range(len(openings))), [opening[-1] for opening in openings]
    prompt = [True] * len(alive)  # whether the token that is given now belongs to a prompt
    checked = False
    while alive:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        responding = [not asked or not rows[i].ahead for i, asked in zip(alive, prompt, strict=True)]
        step = Step(names[alive], torch.tensor(prompt, device=device), torch.tensor(responding, device=device))
        logits = decode(model, torch.tensor(tokens, device=device), mask, cache, step)
        if not checked:
            require_numbers(model, logits)
            checked = True
        uniforms = torch.tensor([rows[i].draw() for i in alive], dtype=torch.float64, device=device)
        sampled = choose(logits, uniforms, sampling).tolist()
        following = [_next(model, i, rows[i], token, proceed, sampling) for i, token in zip(alive, sampled, strict=True)]
        kept = [n for n, found in enumerate(following) if found is not None]
        if len(kept) < len(alive):
            at = torch.tensor(kept, dtype=torch.long, device=device)
            cache.batch_select_indices(at)
            mask = mask[at]
        alive = [alive[n] for n in kept]
        tokens, prompt = [following[n][0] for n in kept], [following[n][1] for n in kept]  # pyright: ignore[reportOptionalSubscript]


def _next(model: "ChatModel", i: int, row: _Row, sampled: int, proceed: Proceed, sampling: Sampling) -> tuple[int, bool] | None:
    """The token that a row is given next and whether it belongs to a prompt; None where its conversation is over."""
    if row.ahead:
        return row.ahead.pop(0), True
    stopped = sampled in model.stop_ids
    if not stopped:
        row.answer.append(sampled)
        if len(row.answer) < sampling.max_new_tokens:
            return sampled, False
    coming = proceed(i, row.answered("stop" if stopped else "length"))
    if coming is None:
        return None
    row.ahead = list(coming)
    return (row.ahead.pop(0), True) if stopped else (sampled, False)
