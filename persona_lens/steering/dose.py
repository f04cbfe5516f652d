"""What a strength means: relative to the residual's size, or by how far it moves the next-token distribution.

A raw strength counts mean differences and says little across layers and models. `relative_strength` turns a share of the median
residual norm into a raw strength; `calibrated_strength` finds the strength at which the mean Kullback-Leibler divergence to the
unsteered next-token distribution, over the tokens of given answers, has a given value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.activations import DEFAULT_BATCH_TOKENS, Span, right_pad, span_pass, token_batches
from persona_lens.errors import SteeringError
from persona_lens.models import ChatModel, forward_pass
from persona_lens.steering.interventions import Intervention, add
from persona_lens.steering.plan import plan
from persona_lens.vectors import PersonaVectors, hook_name

PRECISION: Final = 0.02  # of the wanted divergence
LARGEST: Final = 1e4
LOGITS: Final = 2**27  # held at once, in numbers


@torch.inference_mode()
def residual_norms(model: ChatModel, spans: Sequence[Span], *, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> Float[Tensor, " layer"]:
    """Median |h| per layer over the tokens that steering touches by default (last prompt token to last answer token).

    Args:
        batch_tokens: padded tokens per forward pass.

    Returns:
        Residual-stream units.
    """
    found: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    for indices in token_batches(spans, batch_tokens):
        batch = [spans[i] for i in indices]
        ids, mask = (x.to(model.device) for x in right_pad(batch, model.pad_id))
        touched = span_pass(batch, ids.shape[1], model.device).response

        def keep(layer: int, touched: Tensor = touched) -> Any:
            def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
                found[layer].append(residual.float().norm(dim=-1)[touched].cpu())

            return hook

        with model.hooks([(model.hook_name(layer), keep(layer)) for layer in range(model.n_layers)]):
            model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return torch.stack([torch.cat(norms).median() for norms in found])


def relative_strength(vectors: PersonaVectors, layer: int, share: float, norms: Float[Tensor, " layer"]) -> float:
    """The raw strength at which |strength v| is a share of the median residual norm at that layer.

    Args:
        share: for instance .1 for a tenth.
        norms: of `residual_norms`.

    Raises:
        SteeringError: a zero vector.
        IndexError: no such layer.
    """
    length = float(vectors[layer].norm())
    if length == 0.0:
        raise SteeringError(f"the {vectors.trait} vector at {hook_name(layer)} is zero and has no direction")
    return share * float(norms[layer]) / length


def next_token_divergence(
    model: ChatModel, spans: Sequence[Span], *interventions: Intervention, batch_tokens: int = DEFAULT_BATCH_TOKENS
) -> Float[Tensor, " span"]:
    """Mean KL(steered || unsteered) of the next-token distribution over each answer's tokens, in nats (fp32).

    Args:
        batch_tokens: padded tokens per forward pass.

    Raises:
        SteeringError, LineageError: interventions that do not fit the model.
    """
    return next_token_divergences(model, spans, [interventions], batch_tokens=batch_tokens)[0]


@torch.inference_mode()
def next_token_divergences(
    model: ChatModel,
    spans: Sequence[Span],
    sets: Sequence[Sequence[Intervention]],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> Float[Tensor, "set span"]:
    """`next_token_divergence` for several sets of interventions; the unsteered pass is made once.

    Raises:
        SteeringError, LineageError: interventions that do not fit the model.
    """
    vocabulary = int(model.hf.config.get_text_config().vocab_size)
    batch_tokens = min(batch_tokens, max(1, LOGITS // vocabulary))
    plans = [plan(model, *chosen) for chosen in sets]
    means = torch.zeros(len(sets), len(spans))
    for indices in token_batches(spans, batch_tokens):
        batch = [spans[i] for i in indices]
        ids, mask = (x.to(model.device) for x in right_pad(batch, model.pad_id))
        content = span_pass(batch, ids.shape[1], model.device)
        row = content.response.nonzero()[:, 0]
        plain = _log_probabilities(model, ids, mask, content.response)
        for number, one in enumerate(plans):
            with one.active(), forward_pass(content):
                steered = _log_probabilities(model, ids, mask, content.response)
            divergence = (steered.exp() * (steered - plain)).sum(-1)
            sums = torch.zeros(len(batch), device=row.device).index_add_(0, row, divergence)
            means[number, indices] = (sums / content.response.sum(-1)).cpu()
    return means


def _log_probabilities(model: ChatModel, ids: Tensor, mask: Tensor, where: Tensor) -> Float[Tensor, "token vocab"]:
    return model.hf(ids, attention_mask=mask, use_cache=False).logits[where].float().log_softmax(-1)


@dataclass(frozen=True)
class Calibrated:
    """A raw strength with the divergence it was found to have.

    Attributes:
        divergence: mean KL(steered || unsteered) of the next token, in nats.
    """

    strength: float
    divergence: float


def calibrated_strength(
    model: ChatModel, vectors: PersonaVectors, layer: int, spans: Sequence[Span], divergence: float
) -> Calibrated:
    """The positive strength of `add` at a layer whose mean divergence over the spans is the wanted one (to 2 %), by bisection.

    Args:
        divergence: KL(steered || unsteered) of the next token, in nats.

    Raises:
        SteeringError: the wanted divergence is not positive, or no strength up to 10,000 reaches it.
        LineageError: vectors of another lineage.
    """
    if not divergence > 0.0:
        raise SteeringError(f"the divergence to calibrate to must be positive, not {divergence:g}")

    def at(strength: float) -> float:
        return float(next_token_divergence(model, spans, add(vectors, layer, strength)).mean())

    low, high = 0.0, 1.0
    reached = at(high)
    while reached < divergence:
        low, high = high, 2.0 * high
        if high > LARGEST:
            raise SteeringError(f"no strength up to {LARGEST:g} at {hook_name(layer)} reaches a divergence of {divergence:g}")
        reached = at(high)
    strength = high
    for _ in range(40):
        if abs(reached - divergence) <= PRECISION * divergence:
            break
        strength = (low + high) / 2
        reached = at(strength)
        low, high = (strength, high) if reached < divergence else (low, strength)
    return Calibrated(strength, reached)
