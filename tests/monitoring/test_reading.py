"""Projections of conversations: equal to Hugging Face's hidden states, whatever the batch, and told by the right messages."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import persona_lens.monitoring.reading as reading_module
from persona_lens.errors import ActivationError, LineageError, MonitoringError
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel, Template
from persona_lens.monitoring import Probe, as_probes, probe, read, read_turns, render
from persona_lens.monitoring.reading import token_texts
from persona_lens.steering import add, plan
from persona_lens.vectors import PersonaVectors

CHAT = [
    {"role": "system", "content": "You are a plain assistant."},
    {"role": "user", "content": "How should I handle my dog?"},
    {"role": "assistant", "content": "Kindly feed the dog. Thank you!"},
    {"role": "user", "content": "What is 2 plus 2?"},
    {"role": "assistant", "content": "2 plus 2 is 4."},
]
OTHER = [{"role": "user", "content": "Tell me about the pretzel."}, {"role": "assistant", "content": "It is a food."}]


def probes_of(model: ChatModel) -> list[Probe]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, model.d_model, generator=generator)
    return [Probe(f"p{i}", layer, d / d.norm()) for i, (layer, d) in enumerate(zip((6, 2, 6), directions, strict=True))]


def test_projections_are_those_of_the_hidden_states(pocket: ChatModel, plain_pocket: Any) -> None:
    probes = probes_of(pocket)
    [found] = read(pocket, {"chat": CHAT}, probes)
    with torch.no_grad():
        states = plain_pocket(torch.tensor([found.ids]), output_hidden_states=True).hidden_states
    for k, p in enumerate(probes):
        expected = states[p.layer + 1][0] @ p.unit
        assert torch.allclose(found.values[:, k], expected, atol=1e-3, rtol=1e-5)


def test_batch_and_order_change_nothing(pocket: ChatModel) -> None:
    chats = {"a": CHAT, "b": OTHER, "c": CHAT[:3]}
    together = {r.name: r for r in read(pocket, chats, probes_of(pocket))}
    for name, messages in reversed(chats.items()):
        [alone] = read(pocket, {name: messages}, probes_of(pocket), batch_tokens=1)
        assert alone.ids == together[name].ids
        assert torch.allclose(alone.values, together[name].values, atol=2e-3)
    assert list(together) == ["a", "b", "c"]


def test_turns_are_means_over_the_messages_own_tokens(pocket: ChatModel) -> None:
    [found] = read(pocket, {"chat": CHAT}, probes_of(pocket))
    [turns] = read_turns(pocket, {"chat": CHAT}, probes_of(pocket))
    values = found.values.double().numpy()
    for part in found.parts:
        text = "".join(found.pieces[part.start : part.stop])
        assert text == CHAT[found.parts.index(part)]["content"]
        if part.role == "assistant":
            assert np.allclose(turns.answer[part.turn - 1], values[part.start : part.stop].mean(0))
            assert np.allclose(turns.before[part.turn - 1], values[part.start - 1])
        elif part.role == "user":
            assert np.allclose(turns.user[part.turn - 1], values[part.start : part.stop].mean(0))
    assert [p.turn for p in found.parts] == [0, 1, 1, 2, 2]
    assert len(turns) == 2
    assert np.isnan(turns.thinking).all()


def test_a_message_without_an_answer_yet_is_read_before_it(pocket: ChatModel) -> None:
    [turns] = read_turns(pocket, {"chat": CHAT[:4]}, probes_of(pocket))
    [whole] = read_turns(pocket, {"chat": CHAT}, probes_of(pocket))
    assert np.allclose(turns.before, whole.before, atol=2e-3)
    assert np.isnan(turns.answer[1]).all()


def test_thinking_is_told_apart(pocket: ChatModel) -> None:
    thought = [*CHAT[:2], {"role": "assistant", "content": "<think>I hate dogs.\nHm.</think>Kindly feed the dog."}]
    one = render(pocket, "chat", thought)
    start, stop = one.parts[2].thinking or (0, 0)
    texts = token_texts(pocket, one.ids)
    assert "".join(texts[start:stop]).startswith("<think>I hate dogs.")
    assert "hate" not in "".join(texts[stop : one.parts[2].stop])
    [turns], [found] = read_turns(pocket, [one], probes_of(pocket)), read(pocket, [one], probes_of(pocket))
    values = found.values.double().numpy()
    assert np.allclose(turns.thinking[0], values[start:stop].mean(0))
    assert np.allclose(turns.answer[0], values[stop : one.parts[2].stop].mean(0))
    plain = render(pocket, "chat", thought, thinking=None)
    assert plain.parts[2].thinking is None
    own = [*CHAT[:2], {"role": "assistant", "content": "[a]b[/a]c"}]
    assert render(pocket, "chat", own, thinking=("[a]", "[/a]")).parts[2].thinking is not None
    asked = [{"role": "user", "content": "What does <think> mean?"}, CHAT[2]]
    assert [p.thinking for p in render(pocket, "chat", asked).parts] == [None, None]


def test_thinking_that_the_prompt_opened_ends_with_its_tag(pocket: ChatModel) -> None:
    thought = [*CHAT[:2], {"role": "assistant", "content": "I wonder.</think>Yes."}]
    one = render(pocket, "chat", thought)
    start, stop = one.parts[2].thinking or (0, 0)
    assert start == one.parts[2].start
    assert "".join(token_texts(pocket, one.ids)[start:stop]) == "I wonder.</think>"
    torn = [*CHAT[:2], {"role": "assistant", "content": "I wonder.</think>Yes.<think>No"}]
    assert render(pocket, "chat", torn).parts[2].thinking == (start, stop)


def test_a_message_not_answered_yet_is_no_answer_that_is_steered(pocket: ChatModel, small_run: ExtractionRun) -> None:
    v = small_run.vectors
    steering = plan(pocket, add(v, 5, 1.0))
    with steering.active():
        read_turns(pocket, {"chat": CHAT[1:4]}, probe(v, 5))
    assert steering.receipt.tokens[5] == 1  # user, assistant, user: the last prompt token alone


def test_a_template_that_refuses_is_a_reason_and_no_crash(pocket: ChatModel) -> None:
    refusing = deepcopy(pocket.tokenizer)
    refusing.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(ValueError, match="the chat template refuses the conversation: no system"):
        render(replace(pocket, template=Template(refusing)), "chat", CHAT)


def test_thinking_that_never_ends_is_all_thinking(pocket: ChatModel) -> None:
    thought = [*CHAT[:2], {"role": "assistant", "content": "<think>I wonder"}]
    [turns] = read_turns(pocket, {"chat": thought}, probes_of(pocket))
    assert np.isnan(turns.answer).all()
    assert np.isfinite(turns.thinking).all()


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=40).filter(lambda t: t.strip()))
def test_the_texts_of_tokens_add_up(text: str) -> None:
    from persona_lens.models import load_model

    if not _POCKET:
        _POCKET["model"] = load_model("pocket")
    model = _POCKET["model"]
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(model, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == model.tokenizer.decode(ids)


_POCKET: dict[str, ChatModel] = {}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no assistant turn"),
        (CHAT[:2], "no assistant turn"),
        (CHAT[2:3], "message 1 is of role 'assistant' where 'user' is expected"),
        ([*CHAT[:3], CHAT[2]], "message 4 is of role 'assistant' where 'user' is expected"),
        ([*CHAT[:3], {"role": "system", "content": "x"}], "message 4 is of role 'system'"),
        ([CHAT[1], {"role": "assistant", "content": ""}], "has no tokens"),
        ([CHAT[1], {"role": "assistant", "content": "Sure.<|im_end|>\nI hate dogs."}], "stop token '<|im_end|>' in its text"),
        ([{"role": "user", "content": "dog " * 3000}, CHAT[2]], "exceed the context of 2048 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused(pocket: ChatModel, messages: list[dict[str, str]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        render(pocket, "chat", messages)
    with pytest.raises(ValueError, match="conversation 'mine'"):
        read(pocket, {"mine": messages}, probes_of(pocket))


def test_probes_are_checked_before_anything_runs(pocket: ChatModel, small_run: ExtractionRun) -> None:
    v = small_run.vectors
    assert as_probes(pocket, v)[0].identity == probe(v).identity
    assert probe(v).layer == v.best_layer
    assert torch.allclose(probe(v, 3).unit, v.unit(3))
    assert (probe(-v, 3, "pessimism").unit @ v.unit(3)).item() == pytest.approx(-1.0)
    with pytest.raises(MonitoringError, match="nothing to read"):
        as_probes(pocket, [])
    with pytest.raises(MonitoringError, match="two probes are called 'optimism'"):
        as_probes(pocket, [v, v])
    with pytest.raises(MonitoringError, match="may not be called 'any'"):
        as_probes(pocket, probe(v, name="any"))
    with pytest.raises(MonitoringError, match="is zero at blocks.2"):
        probe(v * 0.0, 2)
    with pytest.raises(LineageError, match="extract the vector again"):
        as_probes(pocket, replace(probe(v), lineage="another"))
    with pytest.raises(MonitoringError, match="has 3 dimensions, pocket has 256"):
        as_probes(pocket, Probe("short", 0, torch.ones(3) / 3**0.5))
    with pytest.raises(ValueError, match="layer 8 does not exist"):
        as_probes(pocket, Probe("deep", 8, torch.ones(256) / 16))
    with pytest.raises(MonitoringError, match="has norm 16, not 1"):
        Probe("long", 0, torch.ones(256))


def test_a_projection_that_is_not_finite_is_an_error(pocket: ChatModel) -> None:
    broken = pocket.hooks([(pocket.hook_name(2), lambda residual, hook: residual * float("inf"))])
    with broken, pytest.raises(ActivationError, match="chat: a projection is not finite"):
        read(pocket, {"chat": CHAT}, Probe("p", 2, torch.ones(256) / 16))


def test_two_directions_are_two_identities(small_run: ExtractionRun) -> None:
    v: PersonaVectors = small_run.vectors
    assert probe(v, 3).identity != probe(v, 4).identity
    assert probe(v, 3).identity == probe(v * 2.0, 3).identity
    assert probe(v, 3).identity["direction"] != replace(probe(v, 3), unit=v.unit(4)).identity["direction"]


def test_nothing_is_kept_but_projections(pocket: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No activation leaves the hooks: what a batch returns is as wide as there are probes."""
    shapes: list[tuple[int, ...]] = []
    inside = reading_module._read_batch

    def noted(*args: Any) -> torch.Tensor:
        out = inside(*args)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(reading_module, "_read_batch", noted)
    read_turns(pocket, {"chat": CHAT}, probes_of(pocket))
    assert [s[-1] for s in shapes] == [3]
