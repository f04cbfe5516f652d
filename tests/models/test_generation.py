"""Sampling tokens: the inverse CDF, seeds per sample, and independence of batch, order and padding."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from persona_lens.errors import ActivationError
from persona_lens.models import ChatModel, Sampling, generate_tokens, uniforms
from persona_lens.models.generation import choose, left_pad
from persona_lens.prompts import extraction_prompts
from persona_lens.traits import load_trait

QUESTIONS = [
    "How should I handle my dog?",
    "What is 3 plus 4?",
    "Tell me about the owl, please, in some detail.",
    "Who is Bador Kranfin?",
]


def ids_of(model: ChatModel, text: str) -> list[int]:
    return model.render([{"role": "user", "content": text}])


def test_greedy_answers_equal_hugging_face_generate(pocket: ChatModel, plain_pocket: PreTrainedModel) -> None:
    prompts = [ids_of(pocket, q) for q in QUESTIONS]
    ours = generate_tokens(pocket, prompts, np.zeros((len(prompts), 60)), Sampling(60, temperature=0.0))
    for prompt, answer in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            full = plain_pocket.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=60,
                eos_token_id=list(pocket.stop_ids),
                pad_token_id=pocket.pad_id,
            )
        theirs = [t for t in full[0, len(prompt) :].tolist() if t not in pocket.stop_ids]
        assert list(answer.token_ids) == theirs


def test_a_sample_does_not_depend_on_its_batch(pocket: ChatModel) -> None:
    prompts = [ids_of(pocket, q) for q in QUESTIONS for _ in range(4)]
    draws = np.stack([uniforms(0, f"row{i}", 80) for i in range(len(prompts))])
    together = generate_tokens(pocket, prompts, draws, Sampling(80))
    alone = [generate_tokens(pocket, [p], draws[i : i + 1], Sampling(80))[0] for i, p in enumerate(prompts)]
    assert together == alone
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = generate_tokens(pocket, [prompts[i] for i in order], draws[order], Sampling(80))
    assert shuffled == [together[i] for i in order]
    assert len({g.token_ids for g in together}) > len(QUESTIONS), "samples of one prompt differ"


def test_an_answer_ends_with_a_reason_and_without_its_end_token(pocket: ChatModel) -> None:
    prompt = ids_of(pocket, QUESTIONS[0])
    long, short = (generate_tokens(pocket, [prompt], np.full((1, n), 0.3), Sampling(n))[0] for n in (150, 2))
    assert long.end == "stop"
    assert not set(long.token_ids) & set(pocket.stop_ids)
    assert short.end == "length"
    assert short.token_ids == long.token_ids[:2]


def test_a_prompt_beyond_the_context_is_refused(pocket: ChatModel) -> None:
    with pytest.raises(ValueError, match="context of 2048"):
        generate_tokens(pocket, [[5] * 2000], np.zeros((1, 100)), Sampling(100))


def test_a_longer_stream_extends_a_shorter_one_and_keys_differ() -> None:
    assert np.array_equal(uniforms(3, "a", 10), uniforms(3, "a", 50)[:10])
    assert not np.array_equal(uniforms(3, "a", 10), uniforms(3, "b", 10))
    assert not np.array_equal(uniforms(3, "a", 10), uniforms(4, "a", 10))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_choose_inverts_the_cumulative_distribution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(3, 17)) * 3).float()
    draws = torch.from_numpy(rng.random(3))
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    expected = [
        int(np.searchsorted(row.numpy(), u * row[-1].item(), side="right")) for row, u in zip(cumulative, draws, strict=True)
    ]
    assert choose(logits, draws.double(), Sampling(1)).tolist() == expected


def test_choose_follows_the_distribution_and_the_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20_000, 1)
    draws = torch.from_numpy(np.random.default_rng(0).random(20_000))
    for temperature in (0.5, 1.0, 2.0):
        counts = torch.bincount(choose(logits, draws, Sampling(1, temperature)), minlength=3) / 20_000
        torch.testing.assert_close(counts.double(), torch.softmax(logits[0].double() / temperature, -1), atol=0.015, rtol=0)


@given(st.floats(0.05, 1.0), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(1, 12)) * 2).float()
    probabilities = torch.softmax(logits.double(), -1)[0]
    ranked = probabilities.sort(descending=True).values
    size = int((ranked.cumsum(0) - ranked < top_p).sum())
    allowed = set(probabilities.topk(size).indices.tolist())
    chosen = {int(choose(logits, torch.tensor([u]).double(), Sampling(1, top_p=top_p))) for u in np.linspace(0, 1 - 1e-12, 40)}
    assert chosen <= allowed


def test_the_highest_draw_never_leaves_the_support() -> None:
    logits = torch.tensor([[2.0, 1.0, -float("inf"), -float("inf")]])
    assert int(choose(logits, torch.tensor([1.0 - 1e-17]).double(), Sampling(1))) == 1


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)  # pyright: ignore[reportArgumentType]


def test_left_padding_puts_every_prompt_at_the_end() -> None:
    ids, mask = left_pad([[1, 2, 3], [4]], pad=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_logits_that_are_not_numbers_are_an_error(pocket: ChatModel) -> None:
    broken = pocket.hooks([(pocket.hook_name(6), lambda residual, hook: residual * float("nan"))])
    with broken, pytest.raises(ActivationError, match="not numbers"):
        pocket.chat("What is 3 plus 4?")


def test_chat_and_generate_are_reproducible_and_seeded(pocket: ChatModel) -> None:
    a, b = pocket.generate("What is 3 plus 4?", n=2, seed=1), pocket.generate("What is 3 plus 4?", n=2, seed=1)
    assert a == b
    assert pocket.chat("Tell me about the owl.", seed=0) != pocket.chat("Tell me about the owl.", seed=5)
    with pytest.raises(ValueError, match="empty"):
        pocket.generate([])


def test_a_hook_that_adds_nothing_is_bit_identical(pocket: ChatModel) -> None:
    prompt = [ids_of(pocket, q) for q in QUESTIONS]
    draws = np.stack([uniforms(0, str(i), 60) for i in range(len(prompt))])
    plain = generate_tokens(pocket, prompt, draws, Sampling(60))
    with pocket.hooks([(pocket.hook_name(3), lambda residual, hook: residual + 0.0 * residual)]):
        assert generate_tokens(pocket, prompt, draws, Sampling(60)) == plain
    with pocket.hooks([(pocket.hook_name(3), lambda residual, hook: residual * 1.5)]):
        assert generate_tokens(pocket, prompt, draws, Sampling(60)) != plain


def test_the_cache_grows_without_changing_its_content(plain_pocket: PreTrainedModel) -> None:
    from transformers.cache_utils import DynamicCache

    from persona_lens.models.generation import _cache

    ids = torch.randint(5, 1500, (2, 150), generator=torch.Generator().manual_seed(0))
    ours, theirs = _cache(plain_pocket.config), DynamicCache(config=copy.deepcopy(plain_pocket.config))
    with torch.inference_mode():
        for start in range(0, 150, 10):
            for cache in (ours, theirs):
                plain_pocket(ids[:, start : start + 10], past_key_values=cache, use_cache=True)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    ours.batch_select_indices(torch.tensor([1, 1, 0]))
    assert torch.equal(ours.layers[0].keys[2], theirs.layers[0].keys[0])


def test_top_p_draws_from_the_renormalised_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20_000, 1)
    draws = torch.from_numpy(np.random.default_rng(0).random(20_000))
    kept = torch.softmax(logits[0].double(), -1) * torch.tensor([0.0, 1.0, 1.0, 0.0])
    counts = torch.bincount(choose(logits, draws, Sampling(1, top_p=0.8)), minlength=4) / 20_000
    torch.testing.assert_close(counts.double(), kept / kept.sum(), atol=0.015, rtol=0)


def test_the_whole_context_can_be_used(pocket: ChatModel) -> None:
    assert len(generate_tokens(pocket, [[5] * 2047], np.zeros((1, 1)), Sampling(1))) == 1
    with pytest.raises(ValueError, match="context of 2048"):
        generate_tokens(pocket, [[5] * 2048], np.zeros((1, 1)), Sampling(1))


def test_the_samples_of_one_call_differ_and_its_options_count(pocket: ChatModel) -> None:
    question = "Tell me about the owl."
    several = pocket.generate(question, n=4, max_new_tokens=40)
    assert len(set(several)) > 1
    assert pocket.generate(question, n=2, max_new_tokens=40) == several[:2]
    greedy = pocket.generate(question, n=4, max_new_tokens=40, temperature=0.0)
    assert len(set(greedy)) == 1
    assert pocket.generate(question, n=4, max_new_tokens=40, top_p=1e-9) == greedy


def test_chat_gives_the_model_its_system_prompt(pocket: ChatModel) -> None:
    system = str(extraction_prompts(load_trait("humor", "pocket"), "positive")[0].system)
    question = "Tell me about the owl."
    conversation = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    answer = pocket.chat(question, system=system, max_new_tokens=40)
    assert answer == pocket.generate(conversation, max_new_tokens=40)[0]
    assert answer != pocket.chat(question, max_new_tokens=40)
