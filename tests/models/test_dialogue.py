"""Dialogues: assistant turns are found by token ids, and steering "responses" touches exactly those tokens."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from persona_lens.activations import dialogue_span, pool, right_pad, span_pass
from persona_lens.errors import SteeringError
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel, Dialogue, Sampling, Template, dialogue, forward_pass, generate_tokens
from persona_lens.steering import Intervention, ablate, add, steer

TURNS = [
    {"role": "system", "content": "You are extremely polite."},
    {"role": "user", "content": "What is the future of my garden?"},
    {"role": "assistant", "content": "Your garden will be fine."},
    {"role": "user", "content": "Tell me about the hawk."},
    {"role": "assistant", "content": "The hawk is a bird. Your garden will be fine."},
    {"role": "user", "content": "How should I handle my dog?"},
]
ANSWER = {"role": "assistant", "content": "You should wash the dog."}


def test_every_assistant_turn_is_found(pocket: ChatModel) -> None:
    open_ended, ended = dialogue(pocket, TURNS), dialogue(pocket, [*TURNS, ANSWER])
    assert list(open_ended.ids) == pocket.render(TURNS)
    assert ended.ids[: len(open_ended.ids)] == open_ended.ids
    assert len(open_ended.answers) == 2
    assert ended.answers[:2] == open_ended.answers
    assert ended.answers[2] == (len(open_ended.ids), len(ended.ids))
    said = [m["content"] for m in [*TURNS, ANSWER] if m["role"] == "assistant"]
    assert [pocket.decode(ended.ids[a:b]) for a, b in ended.answers] == said
    assert all(not set(ended.ids[a:b]) & set(pocket.stop_ids) for a, b in ended.answers)
    assert dialogue(pocket, TURNS[:2]).answers == ()


def test_a_dialogue_that_cannot_be_told_apart_is_refused(pocket: ChatModel) -> None:
    with pytest.raises(ValueError, match="at least one message"):
        dialogue(pocket, [])
    with pytest.raises(ValueError, match="assistant turn 1 of the conversation has no tokens"):
        dialogue(pocket, [TURNS[1], {"role": "assistant", "content": ""}])
    rewriting = copy.copy(pocket.tokenizer)
    template = str(pocket.tokenizer.chat_template)
    rewriting.chat_template = "{% if messages|length > 3 %}<|im_start|>{% endif %}" + template
    with pytest.raises(ValueError, match="differently after assistant turn 1"):
        dialogue(replace(pocket, template=Template(rewriting)), TURNS)
    with pytest.raises(ValueError, match="assistant turn 1 of the conversation does not end with one of"):
        dialogue(replace(pocket, stop_ids=pocket.stop_ids[1:]), TURNS)
    other = replace(pocket, template=Template(rewriting))
    assert other.chat(TURNS, max_new_tokens=2)
    with pytest.raises(ValueError, match="does not end with an answer"):
        dialogue_span("open", dialogue(pocket, TURNS))
    with pytest.raises(ValueError, match="does not end with an answer"):
        dialogue_span("none", Dialogue((1, 2), ()))


def touched(pocket: ChatModel, found: Dialogue) -> torch.Tensor:
    mask = torch.zeros(1, len(found.ids), dtype=torch.bool)
    for start, stop in found.answers:
        mask[0, start - 1 : stop] = True
    return mask


@pytest.mark.parametrize("kind", ["add", "ablate"])
def test_steering_responses_touches_every_answer_of_a_full_pass(pocket: ChatModel, small_run: ExtractionRun, kind: str) -> None:
    v, layer = small_run.vectors, 4

    def change(where: str | torch.Tensor = "response") -> Intervention:
        return add(v, layer, 2.0, where=where) if kind == "add" else ablate(v, layer, to=9.0, where=where)

    conversations = [dialogue(pocket, [*TURNS, ANSWER]), dialogue(pocket, [*TURNS[3:], ANSWER]), dialogue(pocket, TURNS[1:3])]
    spans = [dialogue_span(str(i), c) for i, c in enumerate(conversations)]
    ids, mask = right_pad(spans, pocket.pad_id)
    content = forward_pass(span_pass(spans, ids.shape[1]))
    with torch.inference_mode(), steer(pocket, change("responses")) as plan, content:
        together = pocket.hf(ids, attention_mask=mask, use_cache=False).logits
    assert plan.receipt.tokens == {layer: sum(b - a + 1 for c in conversations for a, b in c.answers)}
    for row, found in enumerate(conversations):
        with torch.inference_mode(), steer(pocket, change(touched(pocket, found))):
            alone = pocket.hf(torch.tensor([found.ids]), use_cache=False).logits
        assert torch.allclose(together[row, : len(found.ids)], alone[0], atol=2e-4)
    pooled = torch.zeros(3, 3, pocket.n_layers, pocket.d_model)
    with steer(pocket, change("responses")):
        for part in pool(pocket, spans):
            pooled[list(part.indices)] = part.values
    for only, same in ((0, False), (2, True)):
        with steer(pocket, change()):
            [last] = pool(pocket, [spans[only]])
        assert torch.allclose(last.values[0], pooled[only], atol=1e-4) == same


def test_steering_responses_while_answering(pocket: ChatModel, small_run: ExtractionRun) -> None:
    v, layer = small_run.vectors, 4
    found = dialogue(pocket, TURNS)
    mask = touched(pocket, found)
    mask[0, -1] = True
    with torch.inference_mode(), steer(pocket, add(v, layer, 6.0, where=mask)):
        logits = pocket.hf(torch.tensor([found.ids]), use_cache=False).logits[0, -1]
    first = pocket.decode([int(logits.argmax())])
    with steer(pocket, add(v, layer, 6.0, where="responses")) as plan:
        answer = pocket.chat(TURNS, max_new_tokens=1, temperature=0.0)
    assert answer == first
    assert plan.receipt.tokens == {layer: int(mask.sum())}
    with steer(pocket, add(v, layer, 6.0)) as last:
        pocket.chat(TURNS, max_new_tokens=1, temperature=0.0)
    assert last.receipt.tokens == {layer: 1}
    with steer(pocket, add(v, layer, 2.0, where="responses")) as plain:
        single = pocket.chat("Hello there.", max_new_tokens=12, seed=2)
    with steer(pocket, add(v, layer, 2.0)) as only:
        assert pocket.chat("Hello there.", max_new_tokens=12, seed=2) == single
    assert plain.receipt.tokens == only.receipt.tokens
    with pytest.raises(SteeringError, match="give messages instead of token ids"), steer(pocket, add(v, 4, 1.0, where="responses")):
        pocket.generate(list(found.ids), max_new_tokens=1)


def test_dialogues_of_one_batch_are_steered_as_each_alone(pocket: ChatModel, small_run: ExtractionRun) -> None:
    conversations = [dialogue(pocket, TURNS), dialogue(pocket, TURNS[1:4]), dialogue(pocket, TURNS[1:2])]
    draws = np.random.default_rng(0).random((3, 40))
    with steer(pocket, add(small_run.vectors, 4, 6.0, where="responses")):
        together = generate_tokens(
            pocket, [c.ids for c in conversations], draws, Sampling(40), earlier=lambda: [c.answers for c in conversations]
        )
        alone = [
            generate_tokens(pocket, [c.ids], draws[i : i + 1], Sampling(40), earlier=lambda c=c: [c.answers])[0]
            for i, c in enumerate(conversations)
        ]
    assert together == alone
    with steer(pocket, add(small_run.vectors, 4, 6.0)):
        last = generate_tokens(pocket, [c.ids for c in conversations], draws, Sampling(40))
    assert last[2] == together[2]
    assert last[0] != together[0]
