"""Chat templates of the families: where a system prompt goes, where thoughts stand, and what is refused."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, OPEN, QWEN3, TURN, tiny, with_template
from transformers import PreTrainedTokenizerBase

from persona_lens.activations import pool, rollout_span
from persona_lens.errors import ModelLoadError, PersonaLensError
from persona_lens.models import (
    ChatModel,
    Sampling,
    current_pass,
    dialogue,
    generate_tokens,
    last_answer,
    load_model,
    message_spans,
    uniforms,
)
from persona_lens.models.template import Template, checked_template
from persona_lens.monitoring import neutral_conversations
from persona_lens.prompts import Prompt
from persona_lens.sampling import Rollout, Script, converse, sample
from persona_lens.steering import add, steer
from persona_lens.vectors import PersonaVectors

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "How should I handle my dog?"}
ANSWER = {"role": "assistant", "content": "You should wash the dog."}
AGAIN = {"role": "user", "content": "Tell me about the hawk."}
CHAT = [SYSTEM, USER, ANSWER, AGAIN, {"role": "assistant", "content": "The hawk is a bird."}]


@pytest.fixture
def thinker(tokenizer: PreTrainedTokenizerBase) -> ChatModel:
    own = with_template(tokenizer, QWEN3)
    return load_model((tiny("qwen3", own), own), thinking=True)


@pytest.fixture
def answerer(tokenizer: PreTrainedTokenizerBase) -> ChatModel:
    """The same model without thinking."""
    own = with_template(tokenizer, QWEN3)
    return load_model((tiny("qwen3", own), own))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_of_every_family_is_found(tokenizer: PreTrainedTokenizerBase, pocket: ChatModel, family: str) -> None:
    own = with_template(tokenizer, FAMILIES[family].template)
    model = replace(pocket, template=checked_template(own, family))
    whole, spans = message_spans(model, CHAT)
    assert [model.decode(whole.ids[a:b]).strip() for a, b in spans[1:]] == [m["content"] for m in CHAT[1:]]
    assert SYSTEM["content"] in model.decode(whole.ids[slice(*spans[0])])
    assert whole == dialogue(model, CHAT)
    assert last_answer(model, CHAT).answers == whole.answers[-1:]
    assert list(dialogue(model, CHAT[:4]).ids) == model.render(CHAT[:4])
    assert model.render(CHAT).count(own.bos_token_id) == (family not in ("qwen2", "qwen3", "phi3", "gpt-neox"))


@pytest.mark.parametrize(("family", "system_role"), [("gemma2", False), ("mistral", False), ("gemma3", True), ("llama3", True)])
def test_a_system_prompt_without_a_role_begins_the_first_user_message(
    tokenizer: PreTrainedTokenizerBase, pocket: ChatModel, family: str, system_role: bool
) -> None:
    """Gemma 2 refuses a system prompt; Mistral moves it to the last user message, so that it wanders through a conversation."""
    model = replace(pocket, template=checked_template(with_template(tokenizer, FAMILIES[family].template), family))
    assert model.template.system_role is system_role
    assert ("system_role" in model.identity) is not system_role
    if not system_role:
        said = [{"role": "user", "content": f"{SYSTEM['content']}\n\n{USER['content']}"}, *CHAT[2:]]
        assert model.render(CHAT, answered=True) == model.render(said, answered=True)
        assert model.identity["system_role"] == "first user message"
    asked = replace(model, system=SYSTEM["content"])
    assert asked.render(CHAT[1:]) == model.render(CHAT)


def test_a_system_prompt_that_wanders_to_the_last_message_is_kept_at_the_first(tokenizer: PreTrainedTokenizerBase) -> None:
    wandering = with_template(
        tokenizer,
        "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' %}{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages if m['role'] != 'system' %}{% if s and m['content'] == messages[ns.last]['content'] %}{{ s }}\n\n"
        "{% endif %}" + TURN + "{% endfor %}" + OPEN,
    )
    assert not checked_template(wandering, "wandering").system_role


def test_a_template_that_drops_the_system_prompt_gets_it_in_the_user_message(tokenizer: PreTrainedTokenizerBase) -> None:
    deaf = with_template(tokenizer, "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + OPEN)
    template = checked_template(deaf, "deaf")
    assert not template.system_role
    assert "Be kind." in template.text([SYSTEM, USER])


def test_a_template_that_can_hold_no_system_prompt_at_all_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    mute = with_template(tokenizer, "{% for m in messages if m['role'] == 'assistant' %}" + TURN + "{% endfor %}" + OPEN)
    with pytest.raises(ModelLoadError, match="chat template of mute leaves out the system prompt"):
        checked_template(mute, "mute")
    strict = with_template(tokenizer, "{{ raise_exception('not today') }}")
    with pytest.raises(ModelLoadError, match="cannot render a system, user, assistant conversation: not today"):
        checked_template(strict, "strict")


def test_thinking_is_off_unless_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    own = with_template(tokenizer, QWEN3)
    plain, thinking = checked_template(own, "x"), checked_template(own, "x", thinking=True)
    assert plain.text([USER]).endswith("<think>\n\n</think>\n\n")
    assert thinking.text([USER]).endswith("assistant\n")
    with pytest.raises(ModelLoadError, match="no switch for thinking"):
        checked_template(tokenizer, "pocket", thinking=True)
    without = copy.deepcopy(tokenizer)
    without.chat_template = QWEN3
    with pytest.raises(ModelLoadError, match="no token </think>"):
        checked_template(without, "x", thinking=True)


def test_thoughts_are_split_from_the_answer(thinker: ChatModel) -> None:
    encode = thinker.tokenizer.encode
    thought, said = encode("<think>\nMy dog.\n</think>\n\n", add_special_tokens=False), encode("You should wash the dog.")
    assert thinker.template.split([*thought, *said]) == (tuple(thought), tuple(said))
    assert thinker.template.split(said) == (tuple(said), ()), "thinking that never ends has no answer"
    assert replace(thinker.template, thinking=False).split([*thought, *said]) == ((), (*thought, *said))
    assert thinker.template.split([*thought, *thought, *said])[1] == tuple(said)
    assert thinker.template.after_thoughts([*thought, *said]) == len(thought)
    assert replace(thinker.template, thinking=False).after_thoughts([*thought, *said]) is None


def test_no_average_and_no_text_holds_a_thought(thinker: ChatModel) -> None:
    prompt = Prompt("t/neutral/-/x00", "t", "neutral", None, 0, None, USER["content"])
    encode = thinker.tokenizer.encode
    thought, said = encode("<think>\nMy dog.\n</think>\n\n", add_special_tokens=False), encode("You should wash the dog.")
    rollout = Rollout(prompt.id, 0, 0, 1, tuple(said), "You should wash the dog.", "stop", tuple(thought))
    [found] = pool(thinker, [rollout_span(thinker, prompt, rollout)])
    ids = torch.tensor([[*thinker.render(prompt.messages), *thought, *said]])
    with torch.inference_mode():
        hidden = thinker.hf(ids, output_hidden_states=True, use_cache=False).hidden_states
    n = len(thinker.render(prompt.messages))
    for layer in range(thinker.n_layers - 1):
        torch.testing.assert_close(found.values[0, 0, layer], hidden[layer + 1][0, -len(said) :].mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.values[0, 1, layer], hidden[layer + 1][0, :n].mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.values[0, 2, layer], hidden[layer + 1][0, n - 1], atol=1e-5, rtol=1e-4)
    assert Rollout.from_dict(rollout.as_dict()) == rollout
    assert "thinking" not in replace(rollout, thinking=()).as_dict()


def test_sampled_thoughts_stand_apart(thinker: ChatModel) -> None:
    """Random weights never end a thought on their own: the bias of its end decides."""
    prompt = Prompt("t/neutral/-/x00", "t", "neutral", None, 0, None, USER["content"])
    sampling = Sampling(max_new_tokens=12)
    [endless] = sample(thinker, [(prompt, 0)], sampling)
    assert (endless.token_ids, endless.text, len(endless.thinking)) == ((), "", 12)
    end = thinker.tokenizer.convert_tokens_to_ids("</think>")
    seen: list[int] = []

    def after_three(module: Any, args: Any, output: Any) -> Any:
        seen.append(1)
        output.logits[..., end] = 1e4 if len(seen) == 5 else -1e4  # the prefill is the first pass
        return output

    handle = thinker.hf.register_forward_hook(after_three)
    try:
        [found] = sample(thinker, [(prompt, 0)], sampling)
    finally:
        handle.remove()
    assert found.thinking[3] == end
    assert len(found.thinking) + len(found.token_ids) == 12
    assert found.text == thinker.decode(found.token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_messages_do_not_overlap(tokenizer: PreTrainedTokenizerBase, pocket: ChatModel, family: str) -> None:
    """Also where a system prompt begins the first user message: the newlines between them belong to one of them."""
    model = replace(pocket, template=checked_template(with_template(tokenizer, FAMILIES[family].template), family))
    newlines = [{**m, "content": f"\n{m['content']}\n"} if m["role"] != "assistant" else m for m in CHAT]
    for messages in (CHAT, newlines):
        _, spans = message_spans(model, messages)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert all(start < stop for start, stop in spans)


@pytest.mark.parametrize(("system", "user"), [("You are kind.", "You there?"), ("Hello", "Hello"), ("Be kind.", "Be"), ("a", "aa")])
def test_a_message_keeps_its_tokens_where_the_one_before_begins_alike(
    tokenizer: PreTrainedTokenizerBase, pocket: ChatModel, system: str, user: str
) -> None:
    model = replace(pocket, template=checked_template(with_template(tokenizer, FAMILIES["gemma2"].template), "gemma2"))
    whole, spans = message_spans(model, [{"role": "system", "content": system}, {"role": "user", "content": user}, ANSWER])
    assert [model.decode(whole.ids[a:b]).strip() for a, b in spans] == [system, user, ANSWER["content"]]


def test_rows_keep_their_names_when_a_conversation_has_ended(answerer: ChatModel) -> None:
    """So that rows that are steered apart stay so."""
    seen: list[list[int]] = []

    def note(residual: Any, hook: Any) -> None:
        content = current_pass()
        assert content is not None
        seen.append(content.rows.tolist())

    scripts = [Script("a", ("Hello", "Hello")), Script("b", ("Hello", "Tell me about the hawk.", "Hello"))]
    with answerer.hooks([(answerer.hook_name(0), note)]):
        converse(answerer, scripts, Sampling(max_new_tokens=3))
    assert [0, 1] in seen
    assert seen[-1] == [1]


def test_a_conversation_that_is_rendered_anew_ends_before_the_context_is_full(answerer: ChatModel) -> None:
    [found] = converse(answerer, [Script("long", ("Tell me about the hawk.",) * 60)], Sampling(max_new_tokens=60))
    assert found.end == "context"
    asked = [*found.messages, {"role": "user", "content": "Tell me about the hawk."}]
    assert len(answerer.render(asked)) + 60 > (answerer.context or 0) >= len(answerer.render(found.messages[:-1])) + 60


@pytest.mark.parametrize("thinks", [True, False], ids=["anew", "side by side"])
def test_all_answers_of_a_conversation_can_be_steered(answerer: ChatModel, pocket: ChatModel, thinks: bool) -> None:
    model = answerer if thinks else pocket
    directions = torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(0))
    flat = torch.ones(model.n_layers)
    v = PersonaVectors("evil", "response_mean", "m", directions, directions[None], flat, flat, flat, provenance={"model": {}})
    scripts = [Script("a", ("Hello", "How should I handle my dog?")), Script("b", ("Hello",))]
    plain = converse(model, scripts, Sampling(max_new_tokens=8))
    with steer(model, add(v, 1, 5.0, where="responses")):
        assert converse(model, scripts, Sampling(max_new_tokens=8)) != plain


def test_conversations_are_rendered_anew_where_the_template_rewrites_answers(answerer: ChatModel) -> None:
    """Qwen3 renders an answer without the place for thoughts once it lies in the past: the model reads what a server would send."""
    scripts = [
        Script("a", ("Hello", "How should I handle my dog?", "Tell me about the hawk."), system="Be kind."),
        Script("b", ("What is 2 plus 2?", "Tell me about the hawk.")),
        Script("c", ("Tell me about the hawk.",)),
    ]
    sampling = Sampling(max_new_tokens=30)
    found = converse(answerer, scripts, sampling, seed=3)
    for script, conversation in zip(scripts, found, strict=True):
        messages = list(script.opening)
        for turn in range(len(script.users)):
            draws = uniforms(3, f"{script.id}#{turn}", 30)[None]
            [answer] = generate_tokens(answerer, [answerer.render(messages)], draws, sampling)
            messages.append({"role": "assistant", "content": answerer.decode(answer.token_ids)})
            messages += [{"role": "user", "content": u} for u in script.users[turn + 1 : turn + 2]]
        assert (list(conversation.messages), conversation.end) == (messages, "script")
    assert converse(answerer, scripts[::-1], sampling, seed=3, batch_rows=1) == found[::-1]


def test_earlier_answers_are_steered_anew_by_what_says_so(answerer: ChatModel) -> None:
    seen: list[int] = []

    def note(residual: Any, hook: Any) -> None:
        content = current_pass()
        assert content is not None
        seen.append(0 if content.earlier is None or residual.shape[1] == 1 else int(content.earlier().sum()))

    with answerer.hooks([(answerer.hook_name(0), note)]):
        [found] = converse(answerer, [Script("a", ("Tell me about the hawk.", "What is 2 plus 2?"))], Sampling(max_new_tokens=20))
    answer = dialogue(answerer, found.messages[:3]).answers[0]
    assert max(seen) == answer[1] - answer[0] + 1, "the token before the answer, and the answer's own"


def test_thoughts_stay_out_of_a_conversation_and_can_use_it_up(thinker: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import persona_lens.models.generation as generation

    said = [*thinker.tokenizer.encode("Hm. It is.</think>\n\nFour.", add_special_tokens=False), thinker.stop_ids[0]]
    script = Script("s", ("What is 2 plus 2?", "And 3 plus 3?"))

    def scripted(tokens: list[int]) -> Any:
        given = iter(tokens * 2)
        return lambda logits, draws, sampling: torch.full((len(logits),), next(given))

    monkeypatch.setattr(generation, "choose", scripted(said))
    [found] = converse(thinker, [script], Sampling(max_new_tokens=40))
    assert ([m["content"] for m in found.messages[1::2]], found.end) == (["Four.", "Four."], "script")
    monkeypatch.setattr(generation, "choose", scripted(said))
    [found] = converse(thinker, [script], Sampling(max_new_tokens=3))
    assert (found.messages, found.end) == ((), "thinking")


def test_a_calibration_that_the_model_leads_itself_is_refused_to_one_that_thinks(thinker: ChatModel, tmp_path: Path) -> None:
    """Its thoughts would use up the answers' tokens, and nothing would be left to calibrate with."""
    with pytest.raises(PersonaLensError, match="a calibration that the model leads itself does not tell thoughts from answers"):
        neutral_conversations(thinker, [Script("s", ("Hello",))], tmp_path / "neutral")
    assert not (tmp_path / "neutral").exists()


def test_screening_does_not_know_thoughts_and_says_so(thinker: ChatModel) -> None:
    with pytest.raises(PersonaLensError, match="does not tell thoughts from answers: load .* without thinking"):
        thinker.require_no_thinking("screening")
    assert thinker.identity["thinking"] is True


def test_thoughts_in_transcripts_are_not_part_of_an_answer(thinker: ChatModel) -> None:
    found = dialogue(thinker, [USER, ANSWER])
    assert thinker.decode(found.ids[slice(*found.answers[0])]) == ANSWER["content"]
    off = replace(thinker, template=replace(thinker.template, thinking=False))
    assert dialogue(off, [USER, ANSWER]) == found
    assert np.array_equal(dialogue(off, CHAT).ids, dialogue(thinker, CHAT).ids)


def test_a_template_knows_the_system_prompt_of_its_model(pocket: ChatModel) -> None:
    assert isinstance(pocket.template, Template)
    assert pocket.template.system_role
    assert not pocket.template.switchable
    assert "thinking" not in pocket.identity
