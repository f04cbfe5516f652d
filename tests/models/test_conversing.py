"""Decoding conversations side by side gives what turn-by-turn generation gives, whoever else is in the batch."""

from typing import Any

import numpy as np
import pytest
import torch

from persona_lens.errors import PersonaLensError
from persona_lens.models import ChatModel, Sampling, continuation, current_pass, generate_tokens, message_spans, uniforms
from persona_lens.sampling import Conversation, Script, converse

USERS = ("How should I handle my dog?", "What is 2 plus 2?", "Tell me about the pretzel.", "What do you think of robots?")
SCRIPTS = [
    Script("a", USERS),
    Script("b", USERS[2:], system="You are extremely optimistic."),
    Script("c", USERS[1:2]),
    Script("d", tuple(reversed(USERS))),
]


def one_by_one(model: ChatModel, script: Script, sampling: Sampling, seed: int = 0) -> list[str]:
    """The answers of a script, each generated from the ids of everything before it."""
    messages, ids, answers = script.opening, model.render(script.opening), list[str]()
    for turn in range(len(script.users)):
        draws = uniforms(seed, f"{script.id}#{turn}", sampling.max_new_tokens)[None]
        [found] = generate_tokens(model, [ids], draws, sampling)
        answers.append(model.decode(found.token_ids))
        messages = [*messages, {"role": "assistant", "content": answers[-1]}]
        if turn + 1 < len(script.users):
            message = {"role": "user", "content": script.users[turn + 1]}
            ids = [*ids, *found.token_ids, *continuation(model, messages, message)]
            messages = [*messages, message]
    return answers


def answers(conversation: Conversation) -> list[str]:
    return [m["content"] for m in conversation.messages if m["role"] == "assistant"]


@pytest.mark.parametrize(
    "sampling", [Sampling(80), Sampling(6), Sampling(60, temperature=0.0)], ids=["sampled", "cut off", "greedy"]
)
def test_side_by_side_is_one_by_one(pocket: ChatModel, sampling: Sampling) -> None:
    found = converse(pocket, SCRIPTS, sampling)
    assert [c.id for c in found] == ["a", "b", "c", "d"]
    for script, conversation in zip(SCRIPTS, found, strict=True):
        assert answers(conversation) == one_by_one(pocket, script, sampling)
        assert tuple(m["content"] for m in conversation.messages if m["role"] == "user") == script.users
        assert conversation.end == "script"


def test_batch_and_order_change_nothing_and_the_seed_does(pocket: ChatModel) -> None:
    reference = {c.id: c for c in converse(pocket, SCRIPTS, Sampling(40))}
    for batch in (1, 3):
        for found in converse(pocket, SCRIPTS[::-1], Sampling(40), batch_rows=batch):
            assert found == reference[found.id]
    assert answers(converse(pocket, SCRIPTS[:1], Sampling(40), seed=1)[0]) != answers(reference["a"])


def test_a_conversation_ends_before_the_context_is_full(pocket: ChatModel) -> None:
    script = Script("long", USERS * 40)
    [found] = converse(pocket, [script], Sampling(max_new_tokens=1850))
    assert found.end == "context"
    assert found.messages[-1]["role"] == "assistant"
    asked = [*found.messages, {"role": "user", "content": script.users[len(answers(found))]}]
    assert len(pocket.render(asked)) + 1850 > (pocket.context or 0) >= len(pocket.render(found.messages[:-1])) + 1850


def test_an_empty_answer_ends_it_and_is_left_out(pocket: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import persona_lens.models.conversing as conversing

    def stop_at_once(logits: Any, draws: Any, sampling: Any) -> torch.Tensor:
        return torch.full((len(logits),), pocket.stop_ids[0])

    monkeypatch.setattr(conversing, "choose", stop_at_once)
    [found] = converse(pocket, SCRIPTS[:1], Sampling(5))
    assert (found.end, found.messages) == ("empty", ())


def test_what_cannot_be_said_is_refused_before_anything_runs(pocket: ChatModel) -> None:
    with pytest.raises(PersonaLensError, match="script 'none' has no messages"):
        converse(pocket, [Script("none", ())], Sampling(5))
    with pytest.raises(PersonaLensError, match="exceed the context of 2048 tokens"):
        converse(pocket, [Script("long", ("dog " * 3000,))], Sampling(5))


def test_every_pass_says_which_tokens_answer(pocket: ChatModel) -> None:
    """The tokens that are answered from - the last of each prompt and each answer's own - are told, and no others."""
    told: list[tuple[int, bool, bool]] = []

    def note(residual: Any, hook: Any) -> None:
        content = current_pass()
        assert content is not None
        if content.real.shape[1] == 1:
            flags = zip(content.rows.tolist(), content.prompt[:, 0].tolist(), content.response[:, 0].tolist(), strict=True)
            told.extend(flags)

    with pocket.hooks([(pocket.hook_name(0), note)]):
        [found] = converse(pocket, [Script("x", USERS[:2])], Sampling(4))
    whole, spans = message_spans(pocket, found.messages)
    flags = [(asked, answering) for _, asked, answering in told]
    assert flags.count((True, True)) == 2  # two last prompt tokens
    assert flags.count((False, True)) == 4 + 3  # answers; the very last token of a cut-off answer is never given
    assert flags.count((True, False)) == len(whole.ids) - len(pocket.render(found.messages[:1])) - 4 - 4 - 1
    assert (False, False) not in flags
    assert spans[1][1] - spans[1][0] == 4


def test_spans_of_messages_are_their_content(pocket: ChatModel) -> None:
    messages = [
        {"role": "system", "content": "You are very, very polite."},
        {"role": "user", "content": "How should I handle my dog?"},
        {"role": "assistant", "content": "Kindly feed the dog."},
        {"role": "user", "content": "  Ünïcode\nand 語, <|im_end|> too"},
        {"role": "assistant", "content": "I see."},
    ]
    whole, spans = message_spans(pocket, messages)
    for message, (start, stop) in zip(messages, spans, strict=True):
        assert pocket.tokenizer.decode(list(whole.ids[start:stop])) == message["content"]
    ahead = message_spans(pocket, messages[:4])
    assert ahead[1] == spans[:4]
    assert ahead[0].ids == tuple(pocket.render(messages[:4]))


def test_a_default_system_prompt_belongs_to_no_message(pocket: ChatModel) -> None:
    whole, ((start, stop),) = message_spans(pocket, [{"role": "user", "content": "What is 2 plus 2?"}])
    assert pocket.tokenizer.decode(list(whole.ids[start:stop])) == "What is 2 plus 2?"
    assert "helpful assistant" in pocket.tokenizer.decode(list(whole.ids[:start]))


def test_a_continuation_completes_the_conversation(pocket: ChatModel) -> None:
    said = [*SCRIPTS[0].opening, {"role": "assistant", "content": "Kindly feed the dog."}]
    coming = continuation(pocket, said, {"role": "user", "content": USERS[1]})
    whole, spans = message_spans(pocket, [*said, {"role": "user", "content": USERS[1]}])
    assert whole.ids[spans[1][1] :] == coming
    with pytest.raises(ValueError, match="has no tokens"):
        continuation(pocket, [*SCRIPTS[0].opening, {"role": "assistant", "content": ""}], {"role": "user", "content": "Hi"})


def test_uniforms_are_drawn_once_per_answer(pocket: ChatModel) -> None:
    """A turn's sample depends on its own stream only, not on how long the turns before it were."""
    short = converse(pocket, [Script("x", USERS[:2])], Sampling(80))[0]
    assert np.allclose(uniforms(0, "x#1", 5), uniforms(0, "x#1", 80)[:5])
    assert answers(short) == one_by_one(pocket, Script("x", USERS[:2]), Sampling(80))
