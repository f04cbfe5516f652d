"""Sampling tokens: left-padded batches, one shared prefill per distinct prompt, and a seed per sample.

A row draws one uniform number per step from its own stream and turns it into a token by the inverse of the fp64 cumulative
distribution, so in float32 its sample does not depend on the batch it travels in (up to ties at the rounding of the logits).
"""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache as cache_result
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from persona_lens.errors import ActivationError
from persona_lens.models.dialogue import Interval
from persona_lens.models.passes import Pass, cache_name, earlier_tokens, forward_pass, prefill_key

if TYPE_CHECKING:
    from persona_lens.models.chat_model import ChatModel

EndReason = Literal["stop", "length"]
"""Why an answer ended: at an end token, or at max_new_tokens."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; nothing is inherited from a generation config.

    Attributes:
        max_new_tokens: longest answer, in tokens; thoughts count.
        top_p: draw from the most likely tokens that together have this probability; 1: from all.

    Raises:
        ValueError: max_new_tokens below 1, a negative temperature, or a top_p outside (0, 1].
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")


@dataclass(frozen=True)
class Generated:
    """A sampled answer: its token ids without the end token, and why it ended.

    Attributes:
        end: "stop" at an end token, "length" at max_new_tokens.
    """

    token_ids: tuple[int, ...]
    end: EndReason


def uniforms(seed: int, key: str, n: int) -> Float[np.ndarray, " step"]:
    """The first `n` uniform numbers of the stream that belongs to (seed, key); a longer request extends a shorter one."""
    digest = hashlib.blake2b(f"{seed}\x00{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big"))).random(n)


class _GrowingLayer(DynamicLayer):
    """A cache layer with room to grow: same content as `DynamicLayer` without copying the past at every step."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < after:
            shape = (*key_states.shape[:-2], after + 64)
            keys, values = (x.new_empty((*shape, x.shape[-1])) for x in (key_states, value_states))
            if before:
                keys[..., :before, :], values[..., :before, :] = cast(tuple[Tensor, Tensor], (self.keys, self.values))
            self._room = (keys, values)
        keys, values = self._room
        keys[..., before:after, :], values[..., before:after, :] = key_states, value_states
        self.keys, self.values = keys[..., :after, :], values[..., :after, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = None


def _cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def choose(logits: Float[Tensor, "batch vocab"], draws: Float[Tensor, " batch"], sampling: Sampling) -> Int[Tensor, " batch"]:
    """The token of each row: argmax at temperature 0, else the inverse CDF at the row's draw, in fp64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= sampling.top_p
        probabilities = probabilities.scatter(-1, order, ranked.masked_fill(outside, 0.0))
    cumulative = probabilities.cumsum(-1)
    target = (draws * cumulative[:, -1]).unsqueeze(-1)
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).to(torch.int8).argmax(-1)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True).squeeze(-1), last)


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "batch position"], Int[Tensor, "batch position"]]:
    """Token ids padded on the left, and the mask that says which are real."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask


@torch.inference_mode()
def generate_tokens(
    model: "ChatModel",
    prompts: Sequence[Sequence[int]],
    draws: Float[np.ndarray, "batch step"],
    sampling: Sampling,
    *,
    row_ids: Sequence[int] | None = None,
    earlier: Callable[[], Sequence[Sequence[Interval]]] | None = None,
) -> list[Generated]:
    """Sample one answer per prompt row, all rows in one batch.

    All but the last token of equal prompts is computed once; the last prompt token and the answer are each row's own.

    Args:
        prompts: token ids up to the answer, one per row; at least one token each.
        draws: uniform numbers, at least `sampling.max_new_tokens` per row.
        row_ids: what the rows are called in `Pass.rows`, where rows are steered apart; default 0, 1, 2 ...
        earlier: finds where the earlier answers of a dialogue lie in each prompt, if they are steered; default: not known.

    Raises:
        ValueError: prompt and answer would not fit into the model's context.
        ActivationError: the logits are not numbers.
    """
    longest = max(len(p) for p in prompts)
    if model.context and longest + sampling.max_new_tokens > model.context:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed the context of {model.context} "
            f"tokens of {model.name}: shorten the conversation or lower max_new_tokens"
        )
    names = torch.tensor(list(row_ids) if row_ids is not None else list(range(len(prompts))), device=model.device)
    cache, mask = shared_prefill(model, prompts, names, earlier)
    stream = torch.from_numpy(draws).to(model.device)
    stops = torch.tensor(model.stop_ids, device=model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    ends: list[EndReason] = ["length"] * len(prompts)
    rows = torch.arange(len(prompts), device=model.device)  # which prompt each row of the live batch belongs to
    tokens = torch.tensor([p[-1] for p in prompts], device=model.device)
    for step in range(sampling.max_new_tokens):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        yes = torch.ones_like(tokens, dtype=torch.bool)
        logits = decode(model, tokens, mask, cache, Step(names[rows], yes if step == 0 else ~yes, yes))
        if step == 0:
            require_numbers(model, logits)
        tokens = choose(logits, stream[rows, step], sampling)
        stopped = torch.isin(tokens, stops)
        for row, token, stop in zip(rows.tolist(), tokens.tolist(), stopped.tolist(), strict=True):
            if stop:
                ends[row] = "stop"
            else:
                answers[row].append(token)
        if bool(stopped.all()):
            break
        if bool(stopped.any()):
            alive = (~stopped).nonzero().squeeze(-1)
            cache.batch_select_indices(alive)
            rows, tokens, mask = rows[alive], tokens[alive], mask[alive]
    return [Generated(tuple(a), e) for a, e in zip(answers, ends, strict=True)]


def shared_prefill(
    model: "ChatModel",
    prompts: Sequence[Sequence[int]],
    names: Int[Tensor, " batch"],
    earlier: Callable[[], Sequence[Sequence[Interval]]] | None,
) -> tuple[DynamicCache, Int[Tensor, "batch position"]]:
    """Cache of all prompt tokens but the last, computed once per distinct prompt (and steering of it), and its mask, per row."""
    keys = [(tuple(p[:-1]), prefill_key(name)) for p, name in zip(prompts, names.tolist(), strict=True)]
    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    place = {key: i for i, key in enumerate(first)}
    owner = torch.tensor([place[key] for key in keys], device=model.device)
    cache = _cache(model.hf.config)
    ids, mask = (x.to(model.device) for x in left_pad([prompts[row][:-1] for row in first.values()], model.pad_id))
    if ids.shape[1]:
        real = mask.bool()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        rows = list(first.values())

        @cache_result
        def before() -> Tensor:
            known = cast("Callable[[], Sequence[Sequence[Interval]]]", earlier)()
            offsets = [ids.shape[1] - len(prompts[row]) + 1 for row in rows]
            return earlier_tokens([known[row] for row in rows], offsets, ids.shape[1], model.device)

        told = None if earlier is None else before
        shared: list[list[int]] = [[] for _ in rows]
        for at, name in zip(owner.tolist(), names.tolist(), strict=True):
            shared[at].append(name)
        with forward_pass(Pass(names[rows], real, real, torch.zeros_like(real), told, tuple(map(tuple, shared)))):
            model.hf(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **_named(model, cache))
        cache.batch_select_indices(owner)
    return cache, mask[owner]


@dataclass(frozen=True, eq=False)
class Step:
    """What one token per row is: whether it belongs to a prompt, and whether the next one belongs to an answer."""

    rows: Int[Tensor, " batch"]
    prompt: Bool[Tensor, " batch"]
    response: Bool[Tensor, " batch"]


def decode(
    model: "ChatModel",
    tokens: Int[Tensor, " batch"],
    mask: Int[Tensor, "batch position"],
    cache: DynamicCache,
    step: Step,
) -> Float[Tensor, "batch vocab"]:
    """Logits after one more token per row."""
    prompt, response = step.prompt[:, None], step.response[:, None]
    yes = torch.ones_like(prompt)
    with forward_pass(Pass(step.rows, yes, prompt, response, lambda: ~yes)):
        output = model.hf(
            tokens[:, None],
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            use_cache=True,
            **_named(model, cache),
        )
    return output.logits[:, -1]


def _named(model: "ChatModel", cache: DynamicCache) -> dict[str, DynamicCache]:
    return {cache_name(type(model.hf)): cache}


def require_numbers(model: "ChatModel", logits: Float[Tensor, "batch vocab"]) -> None:
    if bool(logits.isnan().any()):
        raise ActivationError(f"{model.name} computes logits that are not numbers: load it in float32 or bfloat16")
