"""Doses: relative strengths, the divergence of next-token distributions against a plain computation, and calibration to it."""

import pytest
import torch

from persona_lens.activations import Span
from persona_lens.errors import SteeringError
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel
from persona_lens.prompts import extraction_prompts
from persona_lens.steering import (
    add,
    calibrated_strength,
    next_token_divergence,
    next_token_divergences,
    relative_strength,
    residual_norms,
)
from persona_lens.traits import load_trait


@pytest.fixture(scope="module")
def spans(pocket: ChatModel, small_run: ExtractionRun) -> list[Span]:
    prompts = {p.id: p for p in extraction_prompts(load_trait("optimism", "pocket"), "neutral")}
    rollouts = [r for r in small_run.rollouts() if r.prompt_id in prompts and r.token_ids][:6]
    return [Span(r.key, tuple(pocket.render(prompts[r.prompt_id].messages)), r.token_ids) for r in rollouts]


def test_divergence_equals_a_plain_computation(pocket: ChatModel, small_run: ExtractionRun, spans: list[Span]) -> None:
    v, layer = small_run.vectors, 4
    found = next_token_divergence(pocket, spans, add(v, layer, 1.5))
    for span, value in zip(spans, found.tolist(), strict=True):
        ids, p = torch.tensor([span.prompt + span.answer]), len(span.prompt)

        def hook(residual: torch.Tensor, hook: object, p: int = p) -> torch.Tensor:
            out = residual.clone()
            out[:, p - 1 :] += 1.5 * v[layer]
            return out

        with torch.inference_mode():
            plain = pocket.hf(ids, use_cache=False).logits[0, p - 1 :].double().log_softmax(-1)
            with pocket.hooks([(pocket.hook_name(layer), hook)]):
                steered = pocket.hf(ids, use_cache=False).logits[0, p - 1 :].double().log_softmax(-1)
        assert value == pytest.approx(float((steered.exp() * (steered - plain)).sum(-1).mean()), rel=1e-4)
    assert torch.equal(next_token_divergence(pocket, spans, add(v, layer, 0.0)), torch.zeros(len(spans)))
    together = next_token_divergence(pocket, spans, add(v, layer, 1.5), batch_tokens=1)
    assert torch.allclose(together, found, rtol=1e-4, atol=1e-6)
    several = next_token_divergences(pocket, spans, [[], [add(v, layer, 1.5)], [add(v, 2, 1.0), add(v, 5, 1.0)]])
    assert torch.equal(several[0], torch.zeros(len(spans)))
    assert torch.equal(several[1], found)
    assert torch.equal(several[2], next_token_divergence(pocket, spans, add(v, 2, 1.0), add(v, 5, 1.0)))


def test_a_calibrated_strength_has_the_wanted_divergence(pocket: ChatModel, small_run: ExtractionRun, spans: list[Span]) -> None:
    found = [calibrated_strength(pocket, small_run.vectors, layer, spans, 0.3) for layer in (2, 5)]
    for layer, one in zip((2, 5), found, strict=True):
        again = float(next_token_divergence(pocket, spans, add(small_run.vectors, layer, one.strength)).mean())
        assert again == pytest.approx(0.3, rel=0.03) == one.divergence
    assert calibrated_strength(pocket, small_run.vectors, 2, spans, 0.1).strength < found[0].strength
    with pytest.raises(SteeringError, match="must be positive"):
        calibrated_strength(pocket, small_run.vectors, 2, spans, 0.0)
    with pytest.raises(SteeringError, match="no strength up to"):
        calibrated_strength(pocket, small_run.vectors, 2, spans, 1e6)


def test_relative_strength_is_a_share_of_the_median_residual(
    pocket: ChatModel, small_run: ExtractionRun, spans: list[Span]
) -> None:
    norms = residual_norms(pocket, spans)
    layer, v = 3, small_run.vectors
    lengths: list[torch.Tensor] = []
    for span in spans:
        with torch.inference_mode():
            states = pocket.hf(torch.tensor([span.prompt + span.answer]), output_hidden_states=True, use_cache=False).hidden_states
        lengths.append(states[layer + 1][0, len(span.prompt) - 1 :].norm(dim=-1))
    assert float(norms[layer]) == pytest.approx(float(torch.cat(lengths).median()), rel=1e-4)
    strength = relative_strength(v, layer, 0.25, norms)
    assert strength * float(v[layer].norm()) == pytest.approx(0.25 * float(norms[layer]), rel=1e-5)
    with pytest.raises(SteeringError, match="is zero"):
        relative_strength(v * 0.0, layer, 0.25, norms)
