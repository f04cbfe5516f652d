"""How well a model says the answers of a data set: the mean negative log-probability of their tokens."""

from collections.abc import Sequence

import torch

from persona_lens.finetuning.data import IGNORE, Example, batch_of
from persona_lens.models import ChatModel, Pass, forward_pass

BATCH_TOKENS = 8192


@torch.inference_mode()
def answer_loss(model: ChatModel, examples: Sequence[Example], *, batch_tokens: int = BATCH_TOKENS) -> float:
    """Mean loss per answer token, in nats, as in training: over all tokens of all answers (each with its end token)."""
    total, count = 0.0, 0
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), i))
    for chosen in _batches(examples, order, batch_tokens):
        batch = batch_of([{"example": examples[i]} for i in chosen], model.pad_id)
        ids, mask, labels, prompt, response, earlier = (x.to(model.device) for x in batch.values())
        rows = torch.arange(len(ids), device=ids.device)
        with forward_pass(Pass(rows, mask.bool(), prompt, response, lambda earlier=earlier: earlier)):
            logits = model.hf(ids, attention_mask=mask, use_cache=False).logits
        learned = labels[:, 1:] != IGNORE
        losses = torch.nn.functional.cross_entropy(logits[:, :-1][learned].float(), labels[:, 1:][learned], reduction="none")
        total += float(losses.double().sum())
        count += losses.numel()
    return total / count


def _batches(examples: Sequence[Example], order: Sequence[int], batch_tokens: int) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for i in order:
        if found[-1] and (len(found[-1]) + 1) * len(examples[i].ids) > batch_tokens:
            found.append([])
        found[-1].append(i)
    return found
