"""What is read of a sample with gradients: how likely its answer is, and where its loss would move the residual stream.

The gradient signal is the cosine of a persona vector with the direction that the sample's loss wants its answer to move in: minus
the gradient of the mean loss of the answer's tokens with respect to the residuals they are predicted from, summed over them. One
backward pass from the loss to the lowest layer in use; each layer's gradient is reduced as it passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.activations import Span, right_pad, span_pass, token_batches
from persona_lens.errors import ActivationError
from persona_lens.models import ChatModel, forward_pass
from persona_lens.screening.directions import Direction

LOGITS: Final = 2**27  # numbers held at once


@dataclass(frozen=True)
class Losses:
    """Per span: mean nats per token of its answer (without the end token), and cosines of -dL/dh; NaN where not asked for."""

    loss: Float[Tensor, " span"]
    gradient: Float[Tensor, "span direction"]


def losses(
    model: ChatModel, spans: Sequence[Span], directions: Sequence[Direction], *, gradient: bool, batch_tokens: int
) -> Losses:
    """Losses of the spans' answers, in order.

    Args:
        gradient: also the cosines with the directions.

    Raises:
        ActivationError: a loss is not a number.
    """
    found = Losses(torch.full((len(spans),), torch.nan), torch.full((len(spans), len(directions)), torch.nan))
    budget = min(batch_tokens, max(1, LOGITS // model.hf.config.get_text_config().vocab_size))
    for indices in token_batches(spans, budget):
        batch = [spans[i] for i in indices]
        if gradient:
            loss, cosines = _with_gradient(model, batch, directions)
            found.gradient[indices] = cosines
        else:
            with torch.inference_mode():
                loss = _loss(model, batch)
        if not bool(loss.isfinite().all()):
            raise ActivationError(f"the loss of {batch[int((~loss.isfinite()).nonzero()[0])].name} is not a number")
        found.loss[indices] = loss.detach().cpu()
    return found


def _loss(model: ChatModel, batch: Sequence[Span]) -> Float[Tensor, " span"]:
    """Only the logits from the first answer of the batch on are made."""
    ids, mask = (x.to(model.device) for x in right_pad(batch, model.pad_id))
    width = ids.shape[1]
    first = min(len(s.prompt) for s in batch) - 1
    with forward_pass(span_pass(batch, width, model.device)):
        logits = model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=width - first).logits[:, :-1]
    learned = predicting(batch, width).to(model.device)[:, first : width - 1]
    nats = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, first + 1 :], reduction="none")
    return (nats * learned).sum(1) / learned.sum(1)


def _with_gradient(
    model: ChatModel, batch: Sequence[Span], directions: Sequence[Direction]
) -> tuple[Float[Tensor, " span"], Float[Tensor, "span direction"]]:
    layers = sorted({d.layer for d in directions})
    width = max(len(s) for s in batch)
    weights = predicting(batch, width).to(model.device, torch.float32)
    sums: dict[int, Tensor] = {}
    leaf: list[Tensor] = []

    def hook_at(layer: int) -> Any:
        def keep(gradient: Tensor) -> None:
            sums[layer] = torch.einsum("sp,spd->sd", weights, gradient.float())

        def hook(residual: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
            lowest = layer == layers[0]
            if lowest:  # nothing below is differentiated
                residual = residual.detach().requires_grad_(True)
                leaf.append(residual)
            residual.register_hook(keep)
            return residual if lowest else None

        return hook

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        model.hooks([(model.hook_name(layer), hook_at(layer)) for layer in layers]),
    ):
        loss = _loss(model, batch)
        torch.autograd.backward(loss.sum(), inputs=leaf)
    along = [sums[d.layer] @ d.unit.to(model.device) / sums[d.layer].norm(dim=1) for d in directions]
    return loss, -torch.stack(along, 1).cpu()


def predicting(batch: Sequence[Span], width: int) -> Bool[Tensor, "span position"]:
    """The positions that the answers' tokens are predicted from."""
    position = torch.arange(width)
    start, stop = (torch.tensor(n)[:, None] for n in ([len(s.prompt) for s in batch], [len(s) for s in batch]))
    return (position >= start - 1) & (position < stop - 1)
