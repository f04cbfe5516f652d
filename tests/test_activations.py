"""Pooled residuals equal a plain rewrite with hidden states, whatever the padding, the batch and the order."""

import pytest
import torch
from transformers import PreTrainedModel

from persona_lens.activations import POOLINGS, CellMeans, Span, pool, token_batches
from persona_lens.errors import ActivationError
from persona_lens.models import ChatModel, load_model

QUESTIONS = [
    "How should I handle my dog?",
    "What is 3 plus 4?",
    "Tell me about the owl, please, in some detail.",
    "Who is Bador Kranfin?",
]


def spans_of(model: ChatModel) -> list[Span]:
    answers = model.generate(QUESTIONS[0], n=3, seed=2) + model.generate(QUESTIONS[2], n=3, seed=3)
    prompts = [tuple(model.render([{"role": "user", "content": q}])) for q in (QUESTIONS[0],) * 3 + (QUESTIONS[2],) * 3]
    ids = [tuple(model.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers]
    return [Span(f"s{i}", p, a) for i, (p, a) in enumerate(zip(prompts, ids, strict=True))]


def pooled(model: ChatModel, spans: list[Span], batch_tokens: int = 8192) -> torch.Tensor:
    out = torch.zeros(len(spans), len(POOLINGS), model.n_layers, model.d_model)
    for batch in pool(model, spans, batch_tokens=batch_tokens):
        out[list(batch.indices)] = batch.values
    return out


def largest_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value of the layer, over all layers and poolings ([..., layer, d_model])."""
    return float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())


def plain_rewrite(plain: PreTrainedModel, span: Span) -> torch.Tensor:
    """One unpadded forward pass, hidden states kept, averaged by slicing; the last layer before the final norm."""
    last: list[torch.Tensor] = []
    handle = plain.model.layers[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        states = plain(torch.tensor([span.prompt + span.answer]), output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    layers = torch.stack([*(s[0] for s in states[1:-1]), last[0][0]])
    p = len(span.prompt)
    return torch.stack([layers[:, p:].mean(1), layers[:, :p].mean(1), layers[:, p - 1]])


def test_pooled_residuals_equal_a_plain_rewrite(pocket: ChatModel, plain_pocket: PreTrainedModel) -> None:
    spans = spans_of(pocket)
    ours = pooled(pocket, spans)
    for span, values in zip(spans, ours, strict=True):
        assert largest_error(values, plain_rewrite(plain_pocket, span)) <= 1e-5


def test_some_layers_alone_are_what_they_are_among_all(pocket: ChatModel) -> None:
    """The pass ends after the highest layer that is read, and leaves nothing behind."""
    spans = spans_of(pocket)
    whole = {i: b.values[row] for b in pool(pocket, spans) for row, i in enumerate(b.indices)}
    seen: list[int] = []
    watch = [(pocket.hook_name(layer), lambda residual, hook, layer=layer: seen.append(layer)) for layer in range(pocket.n_layers)]
    for layers in ([1, 4], [0], [pocket.n_layers - 1], list(range(pocket.n_layers))):
        seen.clear()
        with pocket.hooks(watch):
            for batch in pool(pocket, spans, layers=layers):
                for row, i in enumerate(batch.indices):
                    assert torch.equal(batch.values[row], whole[i][:, layers])
        assert max(seen) == layers[-1]
    for wrong in ([], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="ascending"):
            list(pool(pocket, spans, layers=wrong))


def test_batch_size_and_order_change_nothing(pocket: ChatModel) -> None:
    spans = spans_of(pocket)
    together, alone = pooled(pocket, spans), pooled(pocket, spans, batch_tokens=1)
    backwards = pooled(pocket, spans[::-1]).flip(0)
    assert largest_error(together, alone) <= 1e-5
    assert largest_error(together, backwards) <= 1e-5


def test_the_span_boundary_matters(pocket: ChatModel) -> None:
    span = spans_of(pocket)[0]
    shifted = Span("shifted", span.prompt + span.answer[:1], span.answer[1:])
    right, wrong = pooled(pocket, [span])[0], pooled(pocket, [shifted])[0]
    assert not torch.allclose(right[0], wrong[0], atol=1e-3)


def test_an_empty_answer_is_refused_by_name(pocket: ChatModel) -> None:
    with pytest.raises(ValueError, match="evil/positive/i0/x00#3: the answer has no tokens"):
        list(pool(pocket, [Span("evil/positive/i0/x00#3", (1, 2), ())]))


def test_a_span_beyond_the_context_is_refused(pocket: ChatModel) -> None:
    with pytest.raises(ValueError, match="exceed the context"):
        list(pool(pocket, [Span("long", (5,) * 2000, (5,) * 100)]))


def test_activations_that_are_not_finite_name_layer_and_prompt(pocket: ChatModel) -> None:
    spans = spans_of(pocket)[:2]

    def poison(residual: torch.Tensor, hook: object) -> torch.Tensor:
        residual = residual.clone()
        residual[1, 3, 7] = float("nan")
        return residual

    with (
        pytest.raises(ActivationError, match=r"blocks\.4\.hook_resid_post for s[01]"),
        pocket.hooks([(pocket.hook_name(4), poison)]),
    ):
        list(pool(pocket, spans))


def test_batches_hold_the_token_budget_and_every_span_once() -> None:
    spans = [Span(str(i), (1,) * (3 + i % 7), (2,) * (1 + (i * 5) % 11)) for i in range(50)]
    batches = token_batches(spans, 60)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(len(batch) == 1 or len(batch) * max(len(spans[i]) for i in batch) <= 60 for batch in batches)
    assert token_batches([], 60) == []


def test_cell_means_are_means_in_double_precision() -> None:
    cells = CellMeans((2,), (3,))
    values = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    for value in values:
        cells.update((1,), value)
    torch.testing.assert_close(cells.means[1], values.double().mean(0).float(), rtol=1e-7, atol=0)
    assert cells.means[0].isnan().all()
    assert cells.counts.tolist() == [0, 1000]


def test_half_precision_residuals_are_reduced_in_single_precision(pocket: ChatModel) -> None:
    half = load_model("pocket", dtype=torch.bfloat16)
    span = spans_of(pocket)[0]
    seen: list[torch.Tensor] = []
    with half.hooks([(half.hook_name(4), lambda residual, hook: seen.append(residual[0].clone()))]):
        values = pooled(half, [span])[0]
    assert seen[0].dtype == torch.bfloat16
    p = len(span.prompt)
    expected = torch.stack([seen[0][p:].float().mean(0), seen[0][:p].float().mean(0), seen[0][p - 1].float()])
    assert largest_error(values[:, [4]], expected[:, None]) <= 1e-5


def test_a_span_as_long_as_the_context_is_pooled(pocket: ChatModel) -> None:
    assert bool(pooled(pocket, [Span("full", (5,) * 2000, (5,) * 48)]).isfinite().all())
    with pytest.raises(ValueError, match="2049 tokens exceed the context"):
        list(pool(pocket, [Span("long", (5,) * 2000, (5,) * 49)]))


def test_an_empty_prompt_is_refused_by_name(pocket: ChatModel) -> None:
    with pytest.raises(ValueError, match="bare: the prompt has no tokens"):
        list(pool(pocket, [Span("bare", (), (1, 2))]))
