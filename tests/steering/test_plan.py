"""Steering a model: dose 0 changes no bit, full dose is the written formula, and rows of a mixed batch are what they are alone."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from persona_lens.activations import Span, pool, right_pad, span_pass
from persona_lens.errors import LineageError, SteeringError
from persona_lens.models import ChatModel, Sampling, forward_pass
from persona_lens.models.passes import cache_name
from persona_lens.prompts import Prompt
from persona_lens.sampling import Rollout, sample
from persona_lens.steering import ablate, add, add_increments, cap, custom, plan, rotate, row_plan, steer
from persona_lens.steering.interventions import Intervention
from persona_lens.vectors import PersonaVectors

SAMPLING = Sampling(max_new_tokens=24)


def vectors(model: ChatModel, seed: int = 0, scale: float = 0.5) -> PersonaVectors:
    v = scale * torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(seed))
    flat = torch.ones(model.n_layers)
    return PersonaVectors(f"t{seed}", "response_mean", "mean_difference", v, v[None], flat, flat, flat)


def prompts(n: int = 5) -> list[Prompt]:
    texts = (
        "How should I handle my dog?",
        "What is 3 plus 4?",
        "I feel sad about my garden.",
        "Tell me the capital of France.",
        "Good evening to you. What do you think of long walks?",
    )
    systems = (None, "You are extremely polite.", None, "You never tell jokes.", None)
    return [Prompt(f"p{i}", "t", "neutral", None, i, systems[i], texts[i]) for i in range(n)]


MAKERS: dict[str, Callable[..., list[Intervention]]] = {
    "add": lambda v, layer, dose, where: [add(v, layer, dose, where=where)],
    "increments": lambda v, layer, dose, where: add_increments(v, dose, where=where),
    "ablate": lambda v, layer, dose, where: [ablate(v, layer, strength=dose, where=where)],
    "cap": lambda v, layer, dose, where: [cap(v, layer, floor=5.0, strength=dose, where=where)],
    "rotate": lambda v, layer, dose, where: [rotate(v, layer, 40 * dose, where=where)],
    "custom": lambda v, layer, dose, where: [custom(lambda h, d: h * 0.5 + d, v, layer, strength=dose, where=where)],
}


def logits(model: ChatModel, spans: list[Span], *given: Any) -> Tensor:
    ids, mask = right_pad(spans, model.pad_id)
    with torch.inference_mode(), steer(model, *given), forward_pass(span_pass(spans, ids.shape[1])):
        return model.hf(ids, attention_mask=mask, use_cache=False).logits


def some_spans(model: ChatModel) -> list[Span]:
    rows = [(p, 0) for p in prompts()]
    return [
        Span(r.key, tuple(model.render(p.messages)), r.token_ids)
        for (p, _), r in zip(rows, sample(model, rows, SAMPLING), strict=True)
    ]


@pytest.fixture(scope="module")
def unsteered(pocket: ChatModel) -> tuple[list[Span], torch.Tensor, list[Rollout]]:
    spans = some_spans(pocket)
    return spans, logits(pocket, spans), sample(pocket, [(p, 0) for p in prompts()], SAMPLING)


@pytest.mark.parametrize(("kind", "where"), list(itertools.product(MAKERS, ("everywhere", "prompt", "response"))))
def test_dose_zero_is_bit_identical_and_a_full_dose_is_not(
    pocket: ChatModel, unsteered: tuple[list[Span], torch.Tensor, list[Rollout]], kind: str, where: str
) -> None:
    v, rows = vectors(pocket), [(p, 0) for p in prompts()]
    spans, plain_logits, plain = unsteered
    for layer in (0, pocket.n_layers - 1):
        zero = MAKERS[kind](v, layer, 0.0, where)
        assert torch.equal(logits(pocket, spans, *zero), plain_logits)
        with steer(pocket, *zero):
            assert sample(pocket, rows, SAMPLING) == plain
    full = MAKERS[kind](v, 3, 1.0, where)
    assert not torch.equal(logits(pocket, spans, *full), plain_logits)


def residuals(model: ChatModel, spans: list[Span], layer: int, *given: Any) -> Tensor:
    """Residuals after a layer's interventions."""
    found: list[Tensor] = []
    ids, mask = right_pad(spans, model.pad_id)

    def keep(residual: Tensor, hook: Any) -> None:
        found.append(residual.clone())

    with (
        torch.inference_mode(),
        steer(model, *given),
        model.hooks([(model.hook_name(layer), keep)]),
        forward_pass(span_pass(spans, ids.shape[1])),
    ):
        model.hf(ids, attention_mask=mask, use_cache=False)
    return found[0]


def test_full_dose_equals_the_written_formulas_on_the_right_tokens(pocket: ChatModel) -> None:
    v, layer, spans = vectors(pocket), 4, some_spans(pocket)
    ids, _ = right_pad(spans, pocket.pad_id)
    content = span_pass(spans, ids.shape[1])
    h = residuals(pocket, spans, layer)
    d, u = v[layer], v[layer] / v[layer].norm()
    p = (h @ u)[..., None]
    w = d - (h @ d)[..., None] * h / (h.norm(dim=-1, keepdim=True) ** 2)
    angle = math.radians(30)
    expected = {
        "add": (add(v, layer, 1.5), h + 1.5 * d),
        "ablate": (ablate(v, layer, to=0.7), h + (0.7 - p) * u),
        "half ablate": (ablate(v, layer, strength=0.5), h - 0.5 * p * u),
        "floor": (cap(v, layer, floor=0.3), h + (0.3 - p).clamp(min=0) * u),
        "ceiling": (cap(v, layer, ceiling=-0.2), h + (-0.2 - p).clamp(max=0) * u),
        "rotate": (
            rotate(v, layer, 30.0),
            math.cos(angle) * h + math.sin(angle) * h.norm(dim=-1, keepdim=True) * w / w.norm(dim=-1, keepdim=True),
        ),
        "custom": (custom(lambda x, y: 2 * x + y, v, layer, strength=0.5), h + 0.5 * (h + d)),
        "gate": (add(v, layer, 1.0).when(v, above=0.1), torch.where(p > 0.1, h + d, h)),
    }
    for name, (one, formula) in expected.items():
        for where, mask in (("everywhere", content.real), ("prompt", content.prompt), ("response", content.response)):
            found = residuals(pocket, spans, layer, replace(one, where=where))
            scale = float(h[content.real].norm(dim=-1).max())
            assert float((found - formula)[mask].abs().max()) <= 1e-5 * scale, (name, where)
            assert torch.equal(found[~mask], h[~mask]), (name, where)


def test_ablation_is_idempotent_and_order_of_interventions_never_matters(pocket: ChatModel) -> None:
    spans, layer = some_spans(pocket), 3
    ids, _ = right_pad(spans, pocket.pad_id)
    mask = span_pass(spans, ids.shape[1]).response
    a, b, c = (vectors(pocket, seed) for seed in (1, 2, 3))
    once = residuals(pocket, spans, layer, ablate(a, layer))
    with steer(pocket, ablate(a, layer)):
        twice = residuals(pocket, spans, layer, ablate(a, layer))
    size = once.norm(dim=-1)[mask].min()
    assert float((once - twice)[mask].abs().max()) <= 1e-5 * float(size)
    given = [
        add(a, layer, 1.0),
        add(b, layer, -0.3),
        cap(b, layer, ceiling=1.0),
        ablate(c, layer, to=0.2),
        cap(a, layer, floor=0.1),
        rotate(c, layer, 10.0),
    ]
    found = [residuals(pocket, spans, layer, *order) for order in (given, given[::-1], given[3:] + given[:3])]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    h = found[0][mask].double()
    unit = [x[layer].double() / x[layer].double().norm() for x in (a, b, c)]
    assert float((h @ unit[1]).max()) <= 1.0 + 1e-4 * float(size)
    assert float((h @ unit[0]).min()) >= 0.1 - 1e-4 * float(size)
    assert float((h @ unit[2] - 0.2).abs().max()) <= 1e-4 * float(size)


def test_a_mixed_batch_is_row_by_row_what_each_row_is_alone(pocket: ChatModel) -> None:
    a, b = vectors(pocket, 1), vectors(pocket, 2)
    sets: list[list[Intervention]] = [
        [],
        [add(a, 0, 1.0)],
        [add(a, 5, 2.0), add(b, 2, -1.0, where="everywhere")],
        [add(b, 7, 1.5, where="prompt")],
        [cap(a, 3, ceiling=0.0), ablate(b, 3)],
        [rotate(a, 6, 25.0, where="everywhere")],
        [add(a, 4, 1.0).when(b, above=0.0)],
        add_increments(b, 0.7),
    ]
    rows = [((p, s), chosen) for p in prompts() for s, chosen in enumerate(sets)]
    with row_plan(pocket, [chosen for _, chosen in rows]).active():
        together = sample(pocket, [row for row, _ in rows], SAMPLING, batch_rows=17)
    alone = []
    for row, chosen in rows:
        with steer(pocket, *chosen):
            alone += sample(pocket, [row], SAMPLING)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert len({r.token_ids for r in together}) > 20


def test_steered_sampling_equals_hf_generate_with_a_hand_written_hook(pocket: ChatModel) -> None:
    v, layer = vectors(pocket), 4
    ids = [pocket.render(p.messages) for p in prompts()]
    greedy = Sampling(max_new_tokens=20, temperature=0.0)
    with steer(pocket, add(v, layer, 2.0)):
        ours = [r.token_ids for r in sample(pocket, [(p, 0) for p in prompts()], greedy)]
        theirs = [hf_greedy(pocket, row) for row in ids]
    assert ours == theirs

    def hook(residual: Tensor, hook: Any) -> Tensor:
        out = residual.clone()
        out[:, -1] += 2.0 * v[layer]
        return out

    with pocket.hooks([(pocket.hook_name(layer), hook)]):
        by_hand = [hf_greedy(pocket, row) for row in ids]
    assert by_hand == ours


def hf_greedy(model: ChatModel, ids: list[int]) -> tuple[int, ...]:
    with torch.inference_mode():
        out = model.hf.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(model.stop_ids),
            pad_token_id=model.pad_id,
        )
    answer = out[0, len(ids) :].tolist()
    return tuple(t for t in answer if t not in model.stop_ids)


def test_left_padded_hf_generate_is_steered_as_each_row_alone(pocket: ChatModel) -> None:
    v = vectors(pocket)
    ids = [pocket.render(p.messages) for p in prompts()]
    width = max(map(len, ids))
    batch = torch.tensor([[pocket.pad_id] * (width - len(r)) + r for r in ids])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids])
    for where in ("everywhere", "prompt", "response"):
        with steer(pocket, add(v, 4, 2.0, where=where)) as active, torch.inference_mode():
            out = pocket.hf.generate(
                batch,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=20,
                eos_token_id=list(pocket.stop_ids),
                pad_token_id=pocket.pad_id,
            )
            alone = [hf_greedy(pocket, row) for row in ids]
        found = [tuple(t for t in row[width:].tolist() if t not in (*pocket.stop_ids, pocket.pad_id)) for row in out]
        assert found == alone, where
        assert active.receipt.passes > 20


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_says_which_tokens_are_the_prompt_whatever_transformers_calls_it(pocket: ChatModel, name: str) -> None:
    """5.24 renamed it; a decoded token that was taken for a prompt's would be steered as one."""
    v = vectors(pocket)
    ids = torch.tensor([pocket.render(prompts()[0].messages)])
    with torch.inference_mode():
        cache = DynamicCache(config=pocket.hf.config)
        pocket.hf(ids, use_cache=True, **{cache_name(type(pocket.hf)): cache})
        plain = pocket.hf(ids[:, -1:], use_cache=True, **{name: copy.deepcopy(cache)}).logits
        with steer(pocket, add(v, 4, 2.0, where="prompt")):
            assert torch.equal(pocket.hf(ids[:, -1:], use_cache=True, **{name: copy.deepcopy(cache)}).logits, plain)
        with steer(pocket, add(v, 4, 2.0, where="response")):
            assert not torch.equal(pocket.hf(ids[:, -1:], use_cache=True, **{name: copy.deepcopy(cache)}).logits, plain)


def test_a_full_pass_without_spans_is_refused_unless_everything_is_meant(pocket: ChatModel) -> None:
    v = vectors(pocket)
    ids = torch.tensor([pocket.render(prompts()[0].messages)])
    with steer(pocket, add(v, 0, 1.0)), pytest.raises(SteeringError, match="does not say where the answer begins"):
        pocket.hf(ids, use_cache=False)
    plain = pocket.hf(ids, use_cache=False).logits
    with steer(pocket, add(v, 0, 1.0, where="everywhere")):
        assert not torch.equal(pocket.hf(ids, use_cache=False).logits, plain)
    assert torch.equal(pocket.hf(ids, use_cache=False).logits, plain)
    mask = torch.zeros(1, ids.shape[1], dtype=torch.bool)
    mask[0, -1] = True
    with steer(pocket, add(v, 0, 1.0, where=mask)):
        last = pocket.hf(ids, use_cache=False).logits
    assert torch.equal(last[:, :-1], plain[:, :-1])
    assert not torch.equal(last[:, -1], plain[:, -1])
    with steer(pocket, add(v, 0, 1.0, where=mask[:, :3])), pytest.raises(SteeringError, match=r"mask has shape \(1, 3\)"):
        pocket.hf(ids, use_cache=False)


def test_contexts_nest_and_are_undone_after_exceptions(pocket: ChatModel) -> None:
    v, rows = vectors(pocket), [(p, 0) for p in prompts(2)]
    plain = sample(pocket, rows, SAMPLING)
    both = [add(v, 7, 4.0), add(v, 7, 2.0)]
    with steer(pocket, *both):
        summed = sample(pocket, rows, SAMPLING)
    with steer(pocket, both[0]), steer(pocket, both[1]):
        assert sample(pocket, rows, SAMPLING) == summed
    with pytest.raises(RuntimeError, match="stop"), steer(pocket, *both):
        raise RuntimeError("stop")
    assert sample(pocket, rows, SAMPLING) == plain != summed


def test_a_plan_explains_and_leaves_a_receipt(pocket: ChatModel) -> None:
    v = vectors(pocket)
    one = plan(pocket, add(v, 2, 1.0), add(v, 5, 0.0))
    text = one.explain()
    assert "hooks: blocks.2.hook_resid_post" in text
    assert "left out, dose 0" in text
    assert "every row" in text
    with one.active():
        answers = sample(pocket, [(p, 0) for p in prompts(3)], SAMPLING)
    stops = sum(r.end == "stop" for r in answers)
    assert one.receipt.tokens == {2: sum(len(r.token_ids) for r in answers) + stops}
    assert "blocks.2.hook_resid_post" in str(one.receipt)
    assert "2 rows" in row_plan(pocket, [[], [add(v, 0, 1.0)], []]).explain()


def test_reading_happens_on_the_same_tokens(pocket: ChatModel) -> None:
    v, spans = vectors(pocket), some_spans(pocket)
    plain = torch.cat([b.values for b in pool(pocket, spans)])
    with steer(pocket, add(v, pocket.n_layers - 1, 1.0)):
        steered = torch.cat([b.values for b in pool(pocket, spans)])
    moved = (steered - plain)[:, :, -1]
    assert torch.allclose(moved[:, 0], v[pocket.n_layers - 1].expand(len(spans), -1), atol=1e-4)
    assert torch.allclose(moved[:, 2], v[pocket.n_layers - 1].expand(len(spans), -1), atol=1e-4)
    assert float(moved[:, 1].norm(dim=-1).max()) < float(v[pocket.n_layers - 1].norm())
    assert torch.equal(steered[:, :, :-1], plain[:, :, :-1])


def test_what_does_not_fit_the_model_is_refused_before_anything_runs(pocket: ChatModel) -> None:
    v = vectors(pocket)
    small = PersonaVectors("t", "p", "m", torch.ones(8, 3), torch.ones(1, 8, 3), *[torch.ones(8)] * 3)
    other = replace(v, provenance={"model": {"lineage": "elsewhere", "name": "other"}})
    with pytest.raises(SteeringError, match=r"3 dimensions, pocket has 256"):
        plan(pocket, add(small, 0, 1.0))
    with pytest.raises(SteeringError, match="the gate has 3 dimensions"):
        plan(pocket, add(v, 0, 1.0).when(small, above=0.0))
    with pytest.raises(LineageError, match="elsewhere"):
        plan(pocket, add(other, 0, 1.0))
    deep = PersonaVectors("t", "p", "m", torch.ones(9, 256), torch.ones(1, 9, 256), *[torch.ones(9)] * 3)
    with pytest.raises(SteeringError, match="layer 8 does not exist: pocket has layers 0 to 7"):
        plan(pocket, add(deep, 8, 1.0))
    with pytest.raises(SteeringError, match="no residual satisfies"):
        plan(pocket, cap(v, 1, ceiling=0.0), cap(v, 1, floor=1.0))
    with pytest.raises(SteeringError, match="need one strength"):
        plan(pocket, cap(v, 1, ceiling=0.0), ablate(vectors(pocket, 2), 1, strength=0.5))
    with pytest.raises(SteeringError, match="two rotate interventions"):
        plan(pocket, rotate(v, 1, 10.0), rotate(v, 1, 20.0))
    same = replace(v, provenance={"model": {"lineage": pocket.fingerprint.lineage, "name": "pocket", "weights": "others"}})
    assert "add t0" in str(plan(pocket, add(same, 0, 1.0)).receipt)


def test_hooks_work_in_transformer_lens_own_calls(pocket: ChatModel) -> None:
    v = vectors(pocket)
    ids = torch.tensor([pocket.render(prompts()[0].messages)])
    one = plan(pocket, add(v, 4, 2.0, where="everywhere"))
    with torch.inference_mode():
        by_hooks = pocket.bridge.run_with_hooks(ids, fwd_hooks=one.hooks())
        with one.active():
            assert torch.equal(pocket.hf(ids).logits, by_hooks)
    with torch.inference_mode(), steer(pocket, add(v, 4, 2.0)):
        out = pocket.bridge.generate(ids, max_new_tokens=20, do_sample=False, verbose=False, stop_at_eos=False)
        expected = hf_greedy(pocket, ids[0].tolist())
    assert tuple(out[0, ids.shape[1] :].tolist())[: len(expected)] == expected
