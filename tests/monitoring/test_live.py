"""Reading while decoding: the same numbers as a teacher-forced pass, row by row, and nothing left behind."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

import persona_lens as pl
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel, Sampling, generate_tokens, uniforms
from persona_lens.monitoring import Probe, monitor, read
from persona_lens.monitoring.live import Monitor, TokenReading
from persona_lens.monitoring.reading import Part, Rendered
from persona_lens.sampling import Script, converse
from persona_lens.steering import add, steer

QUESTIONS = (
    "How should I handle my dog?",
    "What is 2 plus 2?",
    "How should I handle my dog?",
    "Tell me about the pretzel, please.",
)


def probes_of(model: ChatModel) -> list[Probe]:
    directions = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(1))
    return [Probe(f"p{i}", layer, d / d.norm()) for i, (layer, d) in enumerate(zip((5, 2, 5), directions, strict=True))]


def sampled(model: ChatModel, tokens: int = 60) -> tuple[list[list[int]], list[Any], Monitor]:
    prompts = [model.render([{"role": "user", "content": q}]) for q in QUESTIONS]
    draws = np.stack([uniforms(0, str(i), tokens) for i in range(len(prompts))])
    with monitor(model, probes_of(model)) as seen:
        answers = generate_tokens(model, prompts, draws, Sampling(tokens))
    return prompts, answers, seen


def forced(model: ChatModel, prompt: list[int], answer: tuple[int, ...]) -> torch.Tensor:
    """The same tokens in one teacher-forced pass."""
    parts = (Part(1, "user", 1, len(prompt) - 1), Part(1, "assistant", len(prompt), len(prompt) + len(answer)))
    [found] = read(model, [Rendered("x", (*prompt, *answer), parts)], probes_of(model))
    return found.values


def test_streaming_equals_offline(pocket: ChatModel) -> None:
    prompts, answers, seen = sampled(pocket)
    found = {a.row: a for a in seen.answers}
    assert sorted(found) == [0, 1, 2, 3]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        a = found[row]
        given = answer.token_ids if answer.end == "stop" else answer.token_ids[:-1]
        assert (a.prompt_ids, a.ids) == (tuple(prompt), given)
        assert torch.equal(a.before, a.prompt[-1])
        streamed = torch.cat([a.prompt, a.values])
        offline = forced(pocket, prompt, answer.token_ids)[: len(streamed)]
        assert ((streamed - offline).abs() / offline.norm(dim=-1, keepdim=True)).max() < 1e-4


def test_rows_that_share_a_prefill_have_it_each(pocket: ChatModel) -> None:
    prompts, _, seen = sampled(pocket, 3)
    found = {a.row: a for a in seen.answers}
    assert prompts[0] == prompts[2]
    assert torch.equal(found[0].prompt, found[2].prompt)
    assert not torch.equal(found[0].values, found[2].values)


def test_an_answer_that_reaches_its_limit_lacks_the_token_that_was_never_given(pocket: ChatModel) -> None:
    _, answers, seen = sampled(pocket, 3)
    assert {a.end for a in answers} == {"length"}
    assert [len(a.ids) for a in seen.answers] == [2, 2, 2, 2]


def test_every_token_is_told_as_it_passes(pocket: ChatModel) -> None:
    told: list[TokenReading] = []
    with monitor(pocket, probes_of(pocket), told.append) as seen:
        pocket.chat("What is 2 plus 2?", max_new_tokens=30)
    assert told == seen.tokens
    kinds = [t.kind for t in told]
    n = len(pocket.render([{"role": "user", "content": "What is 2 plus 2?"}]))
    assert kinds[:n] == ["prompt"] * (n - 1) + ["before"]
    assert set(kinds[n:]) == {"answer"}
    [answer] = seen.answers
    assert [t.token for t in told[n:]] == list(answer.ids)
    assert told[n].values == pytest.approx(dict(zip(("p0", "p1", "p2"), answer.values[0].tolist(), strict=True)))


def test_several_answers_of_a_row_are_told_apart(pocket: ChatModel) -> None:
    with monitor(pocket, probes_of(pocket)) as seen:
        first, second = (
            pocket.chat("What is 2 plus 2?", max_new_tokens=40),
            pocket.chat("Tell me about the cat.", max_new_tokens=40),
        )
    assert [pocket.decode(a.ids) for a in seen.answers] == [first, second]
    with monitor(pocket, probes_of(pocket)) as seen:
        [talk] = converse(pocket, [Script("x", QUESTIONS)], Sampling(80))
    said = [m["content"] for m in talk.messages if m["role"] == "assistant"]
    assert [pocket.decode(a.ids) for a in seen.answers] == said
    assert [tuple(a.prompt_ids[-3:]) for a in seen.answers] == [tuple(pocket.render(talk.messages[:1])[-3:])] * 4


def test_inside_a_steering_context_it_reads_what_the_steering_left(pocket: ChatModel, small_run: ExtractionRun) -> None:
    v, layer = small_run.vectors, 5
    mine = Probe("optimism", layer, v.unit(layer))

    def before(*, outside: bool) -> float:
        steered = steer(pocket, add(v, layer, 1.0))
        with ExitStack() as stack:
            if not outside:
                stack.enter_context(steered)
            seen = stack.enter_context(monitor(pocket, mine))
            if outside:
                stack.enter_context(steered)
            pocket.chat("What is 2 plus 2?", max_new_tokens=1)
        return float(seen.answers[0].before[0])

    with monitor(pocket, mine) as plain:
        pocket.chat("What is 2 plus 2?", max_new_tokens=1)
    unsteered = float(plain.answers[0].before[0])
    assert before(outside=False) - unsteered == pytest.approx(float(v[layer].norm()), rel=1e-4)
    assert before(outside=True) == pytest.approx(unsteered, rel=1e-5)


def test_monitoring_changes_no_answer_and_leaves_nothing_behind(pocket: ChatModel) -> None:
    plain = pocket.chat("How should I handle my dog?", max_new_tokens=40)

    def fails(reading: TokenReading) -> None:
        raise RuntimeError("mine")

    with monitor(pocket, probes_of(pocket)) as seen:
        assert pocket.chat("How should I handle my dog?", max_new_tokens=40) == plain
    n = len(seen.tokens)
    with pytest.raises(RuntimeError, match="mine"), monitor(pocket, probes_of(pocket), fails):
        pocket.chat("How should I handle my dog?", max_new_tokens=5)
    assert pocket.chat("How should I handle my dog?", max_new_tokens=40) == plain
    assert len(seen.tokens) == n
    assert not pocket.hf._forward_pre_hooks
    assert not pocket.hf._forward_hooks


def test_a_pass_of_ones_own_is_read_without_guessing_an_answer(pocket: ChatModel) -> None:
    ids = torch.tensor([pocket.render([{"role": "user", "content": "What is 2 plus 2?"}])] * 2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with monitor(pocket, probes_of(pocket)) as seen:
        pocket.hf(input_ids=ids, attention_mask=mask)
    assert len(seen.tokens) == 2 * ids.shape[1] - 3
    assert {t.kind for t in seen.tokens} == {"prompt"}
    assert seen.answers == []


def test_ones_own_generation_is_read_too(pocket: ChatModel) -> None:
    ids = torch.tensor([pocket.render([{"role": "user", "content": "What is 2 plus 2?"}])])
    with monitor(pocket, probes_of(pocket)) as seen:
        out = pocket.hf.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=pocket.pad_id)
    [answer] = seen.answers
    assert answer.prompt_ids == tuple(ids[0].tolist())
    assert answer.ids == tuple(out[0, ids.shape[1] : -1].tolist())


def test_the_public_name(pocket: ChatModel, small_run: ExtractionRun) -> None:
    with pl.monitor(pocket, small_run.vectors) as seen:
        pocket.chat("What is 2 plus 2?", max_new_tokens=4)
    assert seen.answers[0].probes == ("optimism",)
