"""The model's own answers: what the projection difference subtracts from the data's (Chen et al. 2025, section 6).

Greedy, one per distinct prompt of a shard, and read while they are decoded: every token of an answer that ends by itself passes
through the model anyway. What was not seen passing - the last token of an answer that reached its longest length, an answer that
was there already - is read in a forced pass.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_lens.activations import Span, pool
from persona_lens.models import ChatModel, Sampling, current_pass, generate_tokens

Tokens = tuple[int, ...]
PREFILL: Final = 8  # times batch_tokens: padded prompt tokens read together before decoding


@dataclass(frozen=True, eq=False)
class Own:
    """Own answers to the prompts of some rows, each distinct prompt once.

    Attributes:
        answers: token ids without the end token.
        spans: prompt and answer; an answer that ends at once is read at its end token.
        means: residuals averaged over each answer's tokens, at the layers in use.
        of: which answer is a row's; -1 for none.
    """

    answers: tuple[Tokens, ...]
    spans: tuple[Span, ...]
    means: Float[Tensor, "answer layer d_model"]
    of: Int[np.ndarray, " row"]

    @property
    def times(self) -> Float[Tensor, " answer"]:
        """How many rows each answer belongs to."""
        return torch.from_numpy(np.bincount(self.of[self.of >= 0], minlength=len(self.spans))).float()

    def spread(self, values: Float[np.ndarray, " answer"]) -> Float[np.ndarray, " row"]:
        """Values of the answers for the rows they belong to; NaN for the others."""
        return np.append(values, np.float32(np.nan))[self.of].astype(np.float32)


def own_answers(
    model: ChatModel,
    asked: Sequence[Span | None],
    layers: Sequence[int],
    *,
    max_new_tokens: int,
    batch_rows: int,
    batch_tokens: int,
    known: Mapping[int, Tokens],
) -> Own:
    """Answer the prompts of rows.

    Args:
        asked: the rows' data, whose prompts are answered; None for rows that get no answer.
        layers: in use, ascending.
        known: answers that are there already, by the prompt's hash.
    """
    numbers: dict[int, int] = {}
    first: list[Span] = []
    for span in asked:
        if span is not None and (key := prompt_hash(span.prompt)) not in numbers:
            numbers[key] = len(first)
            first.append(span)
    of = np.array([-1 if s is None else numbers[prompt_hash(s.prompt)] for s in asked], dtype=np.int64)
    seen = _Seen(model, layers, len(first))
    answers = [known.get(key, ()) for key in numbers]
    fresh = [i for i, key in enumerate(numbers) if key not in known]
    fresh.sort(key=lambda i: (len(first[i].prompt), first[i].prompt))
    for batch in _batches(fresh, [len(s.prompt) for s in first], batch_rows, PREFILL * batch_tokens):
        draws = np.zeros((len(batch), max_new_tokens))  # nothing is drawn
        greedy = Sampling(max_new_tokens, temperature=0.0)
        with seen.hooks():
            made = generate_tokens(model, [first[i].prompt for i in batch], draws, greedy, row_ids=batch)
        for i, answer in zip(batch, made, strict=True):
            answers[i] = answer.token_ids
    spans = tuple(Span(s.name, s.prompt, a or model.stop_ids[:1]) for s, a in zip(first, answers, strict=True))
    means = seen.means()
    unseen = [i for i, answer in enumerate(answers) if not answer or int(seen.counts[i]) < len(answer)]
    for pooled in pool(model, [spans[i] for i in unseen], layers=layers, batch_tokens=batch_tokens):
        means[[unseen[i] for i in pooled.indices]] = pooled.values[:, 0]
    return Own(tuple(answers), spans, means, of)


def _batches(order: Sequence[int], lengths: Sequence[int], most_rows: int, most_tokens: int) -> list[list[int]]:
    """Prompts decoded together, ascending in length: so many rows, and so many padded tokens of prompts, at most."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or len(batches[-1]) == most_rows or (len(batches[-1]) + 1) * lengths[i] > most_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def prompt_hash(prompt: Tokens) -> int:
    """64 bits that tell prompts apart."""
    return int.from_bytes(blake2b(np.array(prompt, dtype="<i8").tobytes(), digest_size=8).digest(), "little", signed=True)


class _Seen:
    """Accumulates the residuals of answers' tokens that pass while they are decoded, in fp32."""

    def __init__(self, model: ChatModel, layers: Sequence[int], rows: int) -> None:
        self.model, self.layers = model, list(layers)
        self.sums = torch.zeros(rows, len(self.layers), model.d_model, device=model.device)
        self.counts = torch.zeros(rows, dtype=torch.long, device=model.device)

    def hooks(self) -> AbstractContextManager[Any]:
        return self.model.hooks([(self.model.hook_name(layer), self._hook(n)) for n, layer in enumerate(self.layers)])

    def means(self) -> Float[Tensor, "answer layer d_model"]:
        return (self.sums / self.counts.clamp(min=1)[:, None, None]).cpu()

    def _hook(self, place: int) -> Any:
        def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
            now = current_pass()
            assert now is not None
            answered = ~now.prompt[:, -1]  # a step of decoding is all prompt or all answer
            if bool(answered.all()):
                self.sums[now.rows, place] += residual[:, -1].float()
                if place == 0:
                    self.counts[now.rows] += 1

        return hook
