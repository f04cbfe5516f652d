"""Rollouts -> pooled residuals: one teacher-forced pass gives every layer and every pooling, reduced inside the hooks in fp32.

No activation cache and no logits: each hook multiplies the residual with a small matrix of pooling weights and returns None.
Spans come from token ids (prompt ids + answer ids), never from text.
"""

from collections.abc import Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_lens.errors import ActivationError
from persona_lens.models import ChatModel, Dialogue, Interval, Pass, earlier_tokens, forward_pass, in_parts
from persona_lens.prompts import Prompt
from persona_lens.sampling import Rollout

Pooling = Literal["response_mean", "prompt_mean", "prompt_last"]
POOLINGS: Final[tuple[Pooling, ...]] = ("response_mean", "prompt_mean", "prompt_last")
DEFAULT_BATCH_TOKENS: Final = 8192


@dataclass(frozen=True)
class Span:
    """One conversation as token ids, cut where the answer begins.

    Attributes:
        name: what errors call it.
        prompt, thinking, answer: token ids, which follow each other.
        earlier: [start, stop) of the earlier answers of a dialogue in the prompt.
    """

    name: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    earlier: tuple[Interval, ...] = ()
    thinking: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """All token ids."""
        return self.prompt + self.thinking + self.answer

    def __len__(self) -> int:
        return len(self.prompt) + len(self.thinking) + len(self.answer)


def rollout_span(model: ChatModel, prompt: Prompt, rollout: Rollout) -> Span:
    """The span of a sampled answer."""
    return Span(rollout.key, tuple(model.render(prompt.messages)), rollout.token_ids, thinking=rollout.thinking)


def dialogue_span(name: str, conversation: Dialogue) -> Span:
    """The span of a conversation that ends with an answer.

    Raises:
        ValueError: it does not.
    """
    *earlier, (start, stop) = conversation.answers or ((0, 0),)
    if stop != len(conversation.ids) or not stop:
        raise ValueError(f"{name}: the conversation does not end with an answer")
    return Span(name, conversation.ids[:start], conversation.ids[start:], tuple(earlier))


@dataclass(frozen=True)
class Pooled:
    """Pooled residuals of a batch.

    Attributes:
        indices: which spans, as indices into the input.
        values: fp32, residual-stream units, in the order of `POOLINGS` and of the layers that were read.
    """

    indices: tuple[int, ...]
    values: Float[Tensor, "batch pooling layer d_model"]


def token_batches(spans: Sequence[Sized], batch_tokens: int) -> list[list[int]]:
    """Indices of what has a length in tokens, sorted by it and cut where a padded batch would exceed the token budget."""
    batches: list[list[int]] = []
    current: list[int] = []
    for index in sorted(range(len(spans)), key=lambda i: (len(spans[i]), i)):
        if current and (len(current) + 1) * len(spans[index]) > batch_tokens:
            batches.append(current)
            current = []
        current.append(index)
    return [*batches, current] if current else batches


def right_pad(spans: Sequence[Span], pad: int) -> tuple[Int[Tensor, "batch position"], Int[Tensor, "batch position"]]:
    """Token ids of whole conversations padded on the right, and the mask that says which are real (1) or padding (0).

    Args:
        pad: the token id to pad with.
    """
    width = max(len(s) for s in spans)
    ids = torch.full((len(spans), width), pad, dtype=torch.long)
    mask = torch.zeros((len(spans), width), dtype=torch.long)
    for row, span in enumerate(spans):
        ids[row, : len(span)] = torch.tensor(span.ids)
        mask[row, : len(span)] = 1
    return ids, mask


def span_pass(spans: Sequence[Span], width: int, device: torch.device | str = "cpu") -> Pass:
    """What a full pass over right-padded conversations holds; its rows are numbered as the spans are.

    Args:
        width: of the padded batch, in tokens.
    """
    position = torch.arange(width, device=device)
    prompt, total = (torch.tensor(n, device=device)[:, None] for n in ([len(s.prompt) for s in spans], [len(s) for s in spans]))
    real = position < total

    def earlier() -> Tensor:
        return earlier_tokens([s.earlier for s in spans], [0] * len(spans), width, device)

    return Pass(torch.arange(len(spans), device=device), real, position < prompt, real & (position >= prompt - 1), earlier)


def pooling_weights(spans: Sequence[Span], width: int) -> Float[Tensor, "batch pooling position"]:
    """Row weights that turn residuals into `POOLINGS` (every span has prompt and answer tokens).

    Args:
        width: of the padded batch, in tokens.
    """
    weights = torch.zeros(len(spans), len(POOLINGS), width)
    for row, span in enumerate(spans):
        p, n = len(span.prompt), len(span)
        weights[row, 0, n - len(span.answer) : n] = 1.0 / len(span.answer)
        weights[row, 1, :p] = 1.0 / p
        weights[row, 2, p - 1] = 1.0
    return weights


class _Enough(Exception):
    """Every layer that is read has been read: the rest of the pass is left out."""


def _reducer(
    out: Float[Tensor, "batch pooling layer d_model"], place: int, weights: Float[Tensor, "batch pooling position"], last: bool
) -> Any:
    def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
        out[:, :, place] = torch.bmm(weights.to(residual.device), residual.float()).to(out.device)
        if last:
            raise _Enough

    return hook


def pool(
    model: ChatModel,
    spans: Sequence[Span],
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> Iterator[Pooled]:
    """Pooled residuals of all layers and poolings, batch by batch (in order of length).

    Args:
        layers: those that are read, ascending; the pass ends after the highest. Default: all.
        batch_tokens: padded tokens per forward pass.

    Raises:
        ValueError: a span without prompt or answer tokens, or longer than the model's context; no layers, or not ascending.
        ActivationError: a residual is not finite (layer and span are named).
    """
    read = list(range(model.n_layers) if layers is None else layers)
    if not read or read != sorted(set(read)):
        raise ValueError(f"layers to pool must be ascending, and one at least, not {read}")
    for span in spans:
        check_span(span, model)
    for indices in token_batches(spans, batch_tokens):
        for part, values in in_parts(indices, lambda part: _pool_batch(model, [spans[i] for i in part], read)):
            _check_finite(values, [spans[i] for i in part], model, read)
            yield Pooled(tuple(part), values)


@torch.inference_mode()
def _pool_batch(model: ChatModel, batch: Sequence[Span], layers: Sequence[int]) -> Float[Tensor, "batch pooling layer d_model"]:
    ids, mask = (x.to(model.device) for x in right_pad(batch, model.pad_id))
    weights = pooling_weights(batch, ids.shape[1]).to(model.device)
    out = torch.empty(len(batch), len(POOLINGS), len(layers), model.d_model, device=model.device)
    hooks = [
        (model.hook_name(layer), _reducer(out, place, weights, last=place == len(layers) - 1 and layer < model.n_layers - 1))
        for place, layer in enumerate(layers)
    ]
    with suppress(_Enough), model.hooks(hooks), forward_pass(span_pass(batch, ids.shape[1], model.device)):
        model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return out.cpu()


def check_span(span: Span, model: ChatModel) -> None:
    """Raise unless a span can be pooled.

    Raises:
        ValueError: no prompt or answer tokens, or longer than the model's context.
    """
    if not span.prompt or not span.answer:
        what = "prompt" if not span.prompt else "answer"
        raise ValueError(f"{span.name}: the {what} has no tokens, so there is nothing to average")
    if model.context and len(span) > model.context:
        raise ValueError(f"{span.name}: {len(span)} tokens exceed the context of {model.context} tokens of {model.name}")


def _check_finite(
    values: Float[Tensor, "batch pooling layer d_model"], batch: Sequence[Span], model: ChatModel, layers: Sequence[int]
) -> None:
    finite = values.isfinite().all(-1).all(1)
    if not bool(finite.all()):
        row, place = (int(x) for x in (~finite).nonzero()[0])
        raise ActivationError(
            f"activations are not finite at {model.hook_name(layers[place])} for {batch[row].name}: "
            "load the model in float32 or bfloat16 (float16 overflows on many models)"
        )


class CellMeans:
    """Accumulates means per cell (a combination of indices such as polarity, instruction, question) in fp64.

    Attributes:
        sums: of the values, per cell.
        counts: how many values, per cell.
    """

    def __init__(self, shape: Sequence[int], pooled_shape: Sequence[int]) -> None:
        self.sums = torch.zeros(*shape, *pooled_shape, dtype=torch.float64)
        self.counts = torch.zeros(*shape, dtype=torch.int64)

    def update(self, cell: tuple[int, ...], value: Tensor) -> None:
        """Add one pooled value to a cell."""
        self.sums[cell] += value.double()
        self.counts[cell] += 1

    @property
    def means(self) -> Tensor:
        """fp32 means; cells without values are NaN."""
        counts = self.counts.reshape(*self.counts.shape, *[1] * (self.sums.ndim - self.counts.ndim))
        return (self.sums / counts).float()
