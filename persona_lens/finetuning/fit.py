"""How well a model says the answers of a data set: the mean negative log-probability of their tokens."""

from collections.abc import Sequence

import torch

from persona_lens.activations import DEFAULT_BATCH_TOKENS, token_batches
from persona_lens.finetuning.data import IGNORE, Example, batch_of
from persona_lens.models import ChatModel, Pass, forward_pass


@torch.inference_mode()
def answer_loss(model: ChatModel, examples: Sequence[Example], *, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> float:
    """Mean loss per answer token, in nats, as in training: over all tokens of all answers (each with its end token)."""
    total, count = 0.0, 0
    for chosen in token_batches(examples, batch_tokens):
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
