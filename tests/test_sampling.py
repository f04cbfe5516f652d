"""Sampling rollouts: the same rollouts whatever the batch size and the order of the prompts."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.models import ChatModel, Sampling, uniforms
from persona_lens.prompts import evaluation_prompts, extraction_prompts
from persona_lens.sampling import Rollout, Row, rows_of, sample
from persona_lens.traits import load_trait


def rows(samples: int) -> list:
    return rows_of(extraction_prompts(load_trait("humor", "pocket"), "positive")[::7], samples)


def test_batch_size_and_order_give_the_same_rollouts(pocket: ChatModel) -> None:
    wanted = rows(3)
    shuffled = wanted.copy()
    random.Random(0).shuffle(shuffled)
    reference = {r.key: r for r in sample(pocket, wanted, Sampling(100), batch_rows=64)}
    assert len(reference) == len(wanted)
    for batch_rows, order in ((7, wanted), (16, shuffled)):
        assert {r.key: r for r in sample(pocket, order, Sampling(100), batch_rows=batch_rows)} == reference


def test_rollouts_come_in_the_order_of_the_rows(pocket: ChatModel) -> None:
    wanted = rows(2)[::-1]
    found = sample(pocket, wanted, Sampling(20))
    assert [(r.prompt_id, r.sample) for r in found] == [(p.id, i) for p, i in wanted]


def test_seed_and_sample_number_change_the_answer(pocket: ChatModel) -> None:
    prompt = evaluation_prompts(load_trait("humor", "pocket"))[3]
    texts = {sample(pocket, [(prompt, i)], Sampling(60), seed=s)[0].text for i in (0, 1, 2) for s in (0, 1)}
    assert len(texts) > 3


def test_a_rollout_records_span_and_end(pocket: ChatModel) -> None:
    prompt = evaluation_prompts(load_trait("humor", "pocket"))[0]
    rollout = sample(pocket, [(prompt, 0)], Sampling(200))[0]
    assert rollout.prompt_tokens == len(pocket.render(prompt.messages))
    assert pocket.decode(rollout.token_ids) == rollout.text
    assert rollout.end == "stop"
    assert sample(pocket, [], Sampling(5)) == []


@given(st.text(), st.lists(st.integers(0, 1999), max_size=20), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_a_rollout_survives_its_record(text: str, ids: list[int], number: int) -> None:
    rollout = Rollout("t/positive/i0/x00", number, 7, 12, tuple(ids), text, "stop")
    assert Rollout.from_dict(rollout.as_dict()) == rollout


def distance_to_the_other_token(pocket: ChatModel, row: Row, one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """How far the draw lies from the edge of what `one` drew where the two answers part, in probability."""
    step = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    drawn = (one if step < len(one) else other)[step]  # the answer that ended there drew a stop token
    with torch.inference_mode():
        ids = torch.tensor([[*pocket.render(row[0].messages), *one[:step]]])
        cumulative = pocket.hf(ids, use_cache=False).logits[0, -1].double().softmax(-1).cumsum(-1)
    draw = float(uniforms(0, f"{row[0].id}#{row[1]}", step + 1)[step] * cumulative[-1])
    edges = (float(cumulative[drawn - 1]) if drawn else 0.0, float(cumulative[drawn]))
    return min(abs(draw - edge) for edge in edges)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_thousand_answers_do_not_depend_on_the_batch(pocket: ChatModel) -> None:
    """But for counted near-ties: draws so close to the edge between two tokens that the rounding of the logits decides."""
    wanted = rows_of(extraction_prompts(load_trait("humor", "pocket"), "positive"), 20)
    shuffled = wanted.copy()
    random.Random(1).shuffle(shuffled)
    reference = {r.key: r.token_ids for r in sample(pocket, wanted, Sampling(160), batch_rows=64)}
    for batch_rows in (1, 7):
        found = {r.key: r.token_ids for r in sample(pocket, shuffled, Sampling(160), batch_rows=batch_rows)}
        pairs = [(row, reference[key], found[key]) for row in wanted for key in [f"{row[0].id}#{row[1]}"]]
        parted = [pair for pair in pairs if pair[1] != pair[2]]
        gaps = [distance_to_the_other_token(pocket, *pair) for pair in parted]
        print(f"batch size {batch_rows}: {len(parted)} of {len(reference)} answers part at near-ties, distances {gaps}")
        assert all(gap < 1e-4 for gap in gaps)
        assert len(parted) <= len(reference) // 400


def test_prompts_of_the_same_text_have_streams_of_their_own(pocket: ChatModel) -> None:
    prompt = evaluation_prompts(load_trait("humor", "pocket"))[3]
    twins = [(replace(prompt, id=f"{prompt.id}/{k}"), 0) for k in range(4)]
    assert len({r.text for r in sample(pocket, twins, Sampling(60))}) > 1


def test_every_rollout_records_its_own_prompt_and_its_seed(pocket: ChatModel) -> None:
    wanted = [(p, 0) for p in evaluation_prompts(load_trait("humor", "pocket"))[:6]]
    found = sample(pocket, wanted, Sampling(10), seed=5)
    lengths = [len(pocket.render(p.messages)) for p, _ in wanted]
    assert len(set(lengths)) > 1
    assert [r.prompt_tokens for r in found] == lengths
    assert {r.seed for r in found} == {5}


def test_rows_go_prompt_by_prompt() -> None:
    first, second = extraction_prompts(load_trait("humor", "pocket"), "positive")[:2]
    assert rows_of([first, second], 2) == [(first, 0), (first, 1), (second, 0), (second, 1)]


def test_the_context_to_sample_in_is_active(pocket: ChatModel) -> None:
    wanted = rows(1)[:4]
    hook = (pocket.hook_name(3), lambda residual, hook: residual * 1.5)
    plain = sample(pocket, wanted, Sampling(20))
    assert sample(pocket, wanted, Sampling(20), within=pocket.hooks([hook])) != plain
    assert sample(pocket, wanted, Sampling(20)) == plain
