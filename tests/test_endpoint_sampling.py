"""Answers from a server are those of the model here: same prompts, same tokens, same directions; what is not certain is a gap.

The quick tests talk to a small server on this machine that answers with the pocket model itself, the slow ones to
`transformers serve`.
"""

import copy
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from persona_lens.endpoints import Endpoint
from persona_lens.errors import EndpointError, PersonaLensError, RunFolderError
from persona_lens.extraction import ExtractionSettings, extract, pipeline
from persona_lens.models import ChatModel, Generated, Sampling, generate_tokens, uniforms
from persona_lens.pocket import weights_folder
from persona_lens.prompts import Prompt, evaluation_prompts, extraction_prompts
from persona_lens.sampling import (
    Asked,
    Rollout,
    Row,
    Wording,
    endpoint_sampler,
    for_chat,
    for_llama_cpp,
    for_transformers,
    for_vllm,
    rows_of,
    sample,
    sampled,
)
from persona_lens.sampling.endpoint import seed_of
from persona_lens.sampling.replies import Reply, answers, read
from persona_lens.traits import Trait, load_trait

WORDINGS = (for_vllm, for_llama_cpp, for_transformers, for_chat)
GREEDY = Sampling(24, temperature=0.0)
Key = tuple[tuple[int, ...], int, float, int]


def few(n: int = 5) -> list[Row]:
    """Rows with and without a system prompt, and one with an example before the question."""
    trait = load_trait("humor", "pocket")
    with_system = extraction_prompts(trait, "positive")[::17][: n - 2]
    plain = evaluation_prompts(trait)[0]
    example = replace(plain, id="humor/example", earlier=(("How are you?", "I would say it is fine."),))
    return [(p, 0) for p in [*with_system, plain, example]]


@dataclass
class Server:
    """An OpenAI-compatible server that answers with a model of this process, and the ways in which servers differ.

    Attributes:
        reads: what it makes of a prompt's token ids.
        says: changes the reply to a prompt.
        ends: whether it counts the end token.
        left: how many requests it answers before it dies.
    """

    model: ChatModel
    reads: Callable[[list[int]], list[int]] = lambda ids: ids
    says: Callable[[dict[str, Any], list[int]], None] = lambda reply, ids: None
    ends: bool = True
    left: int = 10**6
    asked: list[dict[str, Any]] = field(default_factory=list)
    known: dict[Key, Generated] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def endpoint(self, **options: Any) -> Generator[Endpoint]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    if server.left <= 0:
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    server.left -= 1
                    reply = json.dumps(server.reply(self.path.removeprefix("/v1/"), body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None: ...

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield Endpoint(f"http://127.0.0.1:{http.server_port}/v1", "pocket", **{"attempts": 1, "timeout": 30.0, **options})
        finally:
            http.shutdown()
            http.server_close()

    def reply(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        chat = route == "chat/completions"
        prompt = body.get("prompt")
        if chat:
            ids = self.model.template.ids(body["messages"])
        else:
            ids = list(prompt) if isinstance(prompt, list) else list(self.model.tokenizer(prompt)["input_ids"])
        ids = self.reads(ids)
        made = self.generated((tuple(ids), body["max_tokens"], body["temperature"], body.get("seed", 0)))
        raw = [*made.token_ids, *(self.model.stop_ids[:1] if made.end == "stop" else ())]
        text = self.model.decode(made.token_ids)
        choice: dict[str, Any] = {"index": 0, "finish_reason": made.end}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("return_token_ids"):
            choice |= {"token_ids": raw, "prompt_token_ids": ids}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"id": i, "token": "", "logprob": -1.0} for i in raw]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(raw) if self.ends else len(made.token_ids)}
        reply = {"id": "1", "choices": [choice], "usage": usage}
        self.says(reply, ids)
        return reply

    def generated(self, key: Key) -> Generated:
        ids, most, temperature, seed = key
        if key not in self.known:
            draws = uniforms(seed, "served", most)[None]
            self.known[key] = generate_tokens(self.model, [ids], draws, Sampling(most, temperature))[0]
        return self.known[key]


@pytest.fixture(scope="module")
def known(pocket: ChatModel) -> dict[Key, Generated]:
    """Greedy answers that tests share."""
    return Server(pocket).known


@pytest.fixture
def server(pocket: ChatModel, known: dict[Key, Generated]) -> Server:
    return Server(pocket, known=known)


@pytest.fixture(scope="module")
def here(pocket: ChatModel) -> list[Rollout]:
    """The answers of the model itself to `few()`."""
    return sample(pocket, few(), GREEDY)


@pytest.mark.parametrize("wording", WORDINGS)
def test_greedy_answers_are_those_of_the_model_itself(server: Server, here: list[Rollout], wording: Wording) -> None:
    with server.endpoint() as endpoint:
        assert endpoint_sampler(endpoint, server.model, wording)(few(), GREEDY, 0) == here
    assert {r.end for r in here} == {"stop", "length"}


def test_answers_of_other_weights_are_not_taken_from_the_cache(server: Server, pocket: ChatModel, tmp_path: Path) -> None:
    """A server may serve a finetuned model under the old name."""
    finetuned = replace(pocket, fingerprint=replace(pocket.fingerprint, weights="0123"))
    asked = list[int]()
    with server.endpoint() as endpoint:
        for model in (pocket, finetuned, pocket):
            endpoint_sampler(endpoint, model, for_vllm, cache=tmp_path / "c.jsonl")(few(3), GREEDY, 0)
            asked.append(len(server.asked))
    assert 0 < asked[0] < asked[1] == asked[2]


@pytest.mark.parametrize("wording", [for_vllm, for_transformers])
def test_order_and_concurrency_change_nothing(server: Server, wording: Wording) -> None:
    rows = rows_of([p for p, _ in few()[2:]], 2)
    shuffled = rows.copy()
    random.Random(0).shuffle(shuffled)
    found = []
    for order, concurrency in ((rows, 1), (shuffled, 8)):
        with server.endpoint(concurrency=concurrency) as endpoint:
            made = endpoint_sampler(endpoint, server.model, wording)(order, Sampling(12), 3)
        assert [(r.prompt_id, r.sample) for r in made] == [(p.id, i) for p, i in order]
        found.append({r.key: r for r in made})
    assert found[0] == found[1]
    assert len({r.text for r in found[0].values()}) == len(rows)


def test_every_sample_is_sent_a_seed_of_its_own_that_belongs_to_run_prompt_and_number(server: Server) -> None:
    rows = rows_of([p for p, _ in few()[:2]], 3)
    with server.endpoint() as endpoint:
        sampler = endpoint_sampler(endpoint, server.model, for_vllm)
        sampler(rows, Sampling(4), 7)
        first = [b["seed"] for b in server.asked if b["max_tokens"] == 4]
        sampler(rows, Sampling(4), 8)
    second = {b["seed"] for b in server.asked if b["max_tokens"] == 4} - set(first)
    assert sorted(first) == sorted(seed_of(7, f"{p.id}#{i}") for p, i in rows)
    assert len(set(first)) == len(second) == len(rows)
    assert all(0 <= s < 2**31 for s in {*first, *second})


def test_greedy_samples_of_a_prompt_are_asked_for_once(server: Server, here: list[Rollout]) -> None:
    with server.endpoint() as endpoint:
        found = endpoint_sampler(endpoint, server.model, for_vllm)(rows_of([few()[0][0]], 4), GREEDY, 0)
    assert [replace(r, sample=0) for r in found] == here[:1] * 4
    assert [b["max_tokens"] for b in server.asked] == [1, GREEDY.max_new_tokens]
    assert not any("seed" in b for b in server.asked)


def test_what_is_drawn_from_is_said_and_not_left_to_the_server(pocket: ChatModel) -> None:
    asked = Asked("a", tuple(few()[0][0].messages), tuple(pocket.render(few()[0][0].messages)))
    vllm, llama = for_vllm(pocket, asked).body, for_llama_cpp(pocket, asked).body
    assert vllm["prompt"] == llama["prompt"] == list(asked.ids)
    assert (vllm["top_k"], vllm["min_p"], vllm["repetition_penalty"]) == (0, 0.0, 1.0)
    assert (llama["top_k"], llama["min_p"], llama["repeat_penalty"]) == (0, 0.0, 1.0)
    assert vllm["stop_token_ids"] == list(pocket.stop_ids)
    config = json.loads(for_transformers(pocket, asked).body["generation_config"])
    assert (config["do_sample"], config["top_k"], config["repetition_penalty"]) == (True, 0, 1.0)
    assert config["eos_token_id"] == list(pocket.stop_ids)


def test_temperature_top_p_and_length_are_sent(server: Server) -> None:
    with server.endpoint() as endpoint:
        endpoint_sampler(endpoint, server.model, for_vllm)(few()[:1], Sampling(3, 0.7, 0.9), 0)
    assert [(b["max_tokens"], b["temperature"], b["top_p"]) for b in server.asked] == [(1, 0.7, 0.9), (3, 0.7, 0.9)]


def test_a_server_with_another_template_is_found_before_anything_is_sampled(server: Server) -> None:
    server.reads = lambda ids: [*ids[:-2], 7, 7, *ids[-2:]]
    with server.endpoint() as endpoint, pytest.raises(EndpointError, match="tokens where humor/"):
        endpoint_sampler(endpoint, server.model, for_chat)(few(), GREEDY, 0)
    assert {b["max_tokens"] for b in server.asked} == {1}


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_server_that_reads_some_kind_of_prompt_otherwise_is_found_before_anything_is_sampled(server: Server, odd: int) -> None:
    """The shortest, one with a system prompt though neither the shortest nor the longest has one, the longest."""
    plain = few()[-2][0]
    system = replace(plain, id="with/system", system="You are a brief assistant who is always kind.")
    prompts = [plain, system, replace(plain, id="long", user=plain.user * 20)]
    rendered = [server.model.render(p.messages) for p in prompts]
    assert sorted(rendered, key=len) == rendered
    server.reads = lambda ids: [*ids, 7, 7] if ids == rendered[odd] else ids
    with (
        server.endpoint() as endpoint,
        pytest.raises(EndpointError, match=f"where {prompts[odd].id} has.*template or tokenizer is not"),
    ):
        endpoint_sampler(endpoint, server.model, for_chat)([(p, 0) for p in prompts[::-1]], GREEDY, 0)
    assert {b["max_tokens"] for b in server.asked} == {1}


def test_the_server_is_checked_once(server: Server) -> None:
    with server.endpoint() as endpoint:
        sampler = endpoint_sampler(endpoint, server.model, for_vllm)
        for _ in range(2):
            sampler(few()[:1], GREEDY, 0)
    assert [b["max_tokens"] for b in server.asked] == [1, GREEDY.max_new_tokens, GREEDY.max_new_tokens]


def test_a_prompt_that_is_read_otherwise_later_ends_the_run_too(server: Server) -> None:
    lengths = sorted(few(), key=lambda row: len(server.model.render(row[0].messages)))
    odd = server.model.render(lengths[-2][0].messages)
    server.reads = lambda ids: [*ids, 7] if ids == odd else ids
    with server.endpoint() as endpoint, pytest.raises(EndpointError, match=lengths[-2][0].id):
        endpoint_sampler(endpoint, server.model, for_transformers)(few(), GREEDY, 0)


def test_a_server_that_reads_as_many_but_other_tokens_is_refused_where_it_says_which(server: Server) -> None:
    server.reads = lambda ids: [*ids[:-3], 7, *ids[-2:]]
    with server.endpoint() as endpoint, pytest.raises(EndpointError, match="other tokens"):
        endpoint_sampler(endpoint, server.model, for_vllm)(few(), GREEDY, 0)


def with_bos(model: ChatModel) -> ChatModel:
    """The model with a tokenizer that begins with a BOS, whether the template or encoding puts it there."""
    tokenizer = copy.deepcopy(model.tokenizer)
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    tokenizer.chat_template = "<|endoftext|>" + str(tokenizer.chat_template)
    return replace(model, template=replace(model.template, tokenizer=tokenizer))


def test_a_text_is_sent_without_the_bos_that_encoding_adds(server: Server) -> None:
    server.model = with_bos(server.model)
    prompt = few()[0][0]
    ids = server.model.tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    sent = for_transformers(server.model, Asked("a", tuple(prompt.messages), tuple(ids)))
    assert "<|endoftext|>" not in sent.body["prompt"]
    assert server.model.tokenizer(sent.body["prompt"])["input_ids"] == ids
    assert ids.count(ids[0]) == 1


def test_a_server_that_adds_a_bos_is_refused(server: Server) -> None:
    server.reads = lambda ids: [1997, *ids]
    with server.endpoint() as endpoint, pytest.raises(EndpointError, match="it adds a BOS"):
        endpoint_sampler(endpoint, server.model, for_transformers)(few(), GREEDY, 0)


def test_a_prompt_whose_text_encodes_to_other_tokens_is_not_sent_as_text(pocket: ChatModel) -> None:
    split = [*pocket.render(few()[0][0].messages), *pocket.tokenizer("h")["input_ids"], *pocket.tokenizer("e")["input_ids"]]
    with pytest.raises(EndpointError, match="a/b: its text does not encode to its token ids"):
        for_transformers(pocket, Asked("a/b", (), tuple(split)))


def test_the_system_prompt_of_the_model_is_said_to_the_server_too(server: Server) -> None:
    model = replace(server.model, system="You are a cheerful assistant.")
    rows = few()[-2:]
    with server.endpoint() as endpoint:
        assert endpoint_sampler(endpoint, model, for_chat)(rows, GREEDY, 0) == sample(model, rows, GREEDY)


def test_a_template_with_a_date_or_a_switch_for_thinking_is_told_ours(pocket: ChatModel) -> None:
    asked = Asked("a", tuple(few()[0][0].messages), ())
    assert "chat_template_kwargs" not in for_chat(pocket, asked).body
    tokenizer = copy.deepcopy(pocket.tokenizer)
    tokenizer.chat_template = "{{ date_string }} {% if enable_thinking %}{% endif %}"
    dated = replace(pocket, template=replace(pocket.template, tokenizer=tokenizer))
    assert for_chat(dated, asked).body["chat_template_kwargs"] == {"date_string": "26 Jul 2024", "enable_thinking": False}


def test_an_answer_that_does_not_encode_to_itself_is_a_gap(server: Server, here: list[Rollout]) -> None:
    odd = [server.model.render(p.messages) for p, _ in few()[1:3]]

    def says(reply: dict[str, Any], ids: list[int]) -> None:
        if ids in odd:
            reply["choices"][0]["text"] += "e\u0301"  # two characters that the tokenizer takes for one

    server.says = says
    with server.endpoint() as endpoint:
        with pytest.raises(EndpointError, match="2 of 5 answers .*at most 5% .*2 x the answer's text does not"):
            endpoint_sampler(endpoint, server.model, for_transformers)(few(), GREEDY, 0)
        found = endpoint_sampler(endpoint, server.model, for_transformers, most_gaps=0.4)(few(), GREEDY, 0)
    for number, (one, other) in enumerate(zip(found, here, strict=True)):
        gap = "the answer's text does not encode to itself" if number in (1, 2) else None
        assert one == (replace(other, token_ids=(), text="", end="stop", gap=gap) if gap else other)
        assert Rollout.from_dict(json.loads(json.dumps(one.as_dict()))) == one
        assert ("gap" in one.as_dict()) == bool(gap)


def test_a_reply_that_cannot_be_read_is_refused_at_first_and_a_gap_later(server: Server) -> None:
    server.says = lambda reply, ids: reply.pop("usage")
    with server.endpoint() as endpoint, pytest.raises(EndpointError, match="cannot be read: .*usage"):
        endpoint_sampler(endpoint, server.model, for_vllm)(few(), GREEDY, 0)
    server.says = lambda reply, ids: reply["choices"].clear() if server.asked[-1]["max_tokens"] > 1 else None
    with server.endpoint() as endpoint:
        found = endpoint_sampler(endpoint, server.model, for_vllm, most_gaps=1.0)(few()[:2], GREEDY, 0)
    assert all(r.gap and "0 answers" in r.gap and not r.token_ids for r in found)


@pytest.mark.parametrize("wording", [for_llama_cpp, for_chat])
def test_a_server_that_does_not_count_the_end_token_is_understood(server: Server, here: list[Rollout], wording: Wording) -> None:
    server.ends = False
    with server.endpoint() as endpoint:
        assert endpoint_sampler(endpoint, server.model, wording)(few(), GREEDY, 0) == here


def text_reply(text: str, tokens: int, finish: str | None = "stop") -> Reply:
    return Reply(text, None, None, 3, tokens, finish)


def ids_reply(ids: Sequence[int], tokens: int, finish: str | None = "stop") -> Reply:
    return Reply("", tuple(ids), None, 3, tokens, finish)


def encoded(model: ChatModel, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer(text)["input_ids"])


def test_ids_are_the_servers_where_it_lists_them_all() -> None:
    """Beside the text (vLLM) or the log-probabilities (llama.cpp, which leaves out tokens that are half a character)."""
    choice: dict[str, Any] = {"text": "ab", "finish_reason": "stop"}
    listed = {"logprobs": {"content": [{"id": 9}, {"id": 4}]}}
    partly = {"logprobs": {"content": [{"id": 9}, {"token": "b"}]}}
    for more, ids in (({"token_ids": [9, 4]}, (9, 4)), (listed, (9, 4)), (partly, None), ({"logprobs": {"tokens": ["a"]}}, None)):
        reply = read({"choices": [{**choice, **more}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
        assert reply == Reply("ab", ids, None, 3, 2, "stop")


def test_a_token_that_the_text_does_not_show_is_a_gap(pocket: ChatModel) -> None:
    text = "I would say the dog needs a plan."
    n = len(encoded(pocket, text))
    counting = answers(pocket, [text_reply(text, n + 1), text_reply(text, n + 2), text_reply(text, n + 1)], 99)
    assert [a.gap is None for a in counting] == [True, False, True]
    silent = answers(pocket, [text_reply(text, n), text_reply(text, n), text_reply(text, n + 1)], 99)
    assert [a.gap is None for a in silent] == [True, True, False]
    assert counting[0].ids == silent[0].ids == encoded(pocket, text)


def test_the_end_is_the_servers_unless_its_tokens_say_otherwise(pocket: ChatModel) -> None:
    text, stop = "I would say", pocket.stop_ids[0]
    ids = encoded(pocket, text)
    n = len(ids)
    found = answers(pocket, [text_reply(text, n, "length"), ids_reply([*ids, stop], n + 1, "length")], n)
    assert [(a.ids, a.end, a.gap) for a in found] == [(ids, "length", None), (ids, "stop", None)]
    cut = answers(pocket, [text_reply(text, n, "length"), ids_reply(ids, n, "length")], n + 1)
    assert all(a.gap and "before max_new_tokens" in a.gap for a in cut)
    hidden = answers(pocket, [text_reply(text, n + 1, "length")], n + 1)
    assert "does not show" in str(hidden[0].gap)


@pytest.mark.parametrize("finish", ["content_filter", "tool_calls", None])
def test_an_answer_that_ended_for_another_reason_is_a_gap(pocket: ChatModel, finish: str | None) -> None:
    found = answers(pocket, [text_reply("I", 2, finish), ids_reply([5], 1, finish)], 9)
    assert all(a.gap and str(finish) in a.gap and not a.ids for a in found)


def test_ids_that_the_model_cannot_have_said_are_gaps(pocket: ChatModel) -> None:
    stop = pocket.stop_ids[-1]
    found = answers(pocket, [ids_reply([5, stop, 6], 3), ids_reply([5, len(pocket.tokenizer)], 3), ids_reply([5], 7)], 9)
    assert [bool(a.gap) for a in found] == [True, True, True]
    assert "stop token" in str(found[0].gap)
    assert "does not know" in str(found[1].gap)


def test_an_empty_answer_is_empty_and_no_gap(pocket: ChatModel) -> None:
    for reply in (text_reply("", 1), ids_reply([pocket.stop_ids[0]], 1), text_reply("", 0)):
        assert [(a.ids, a.end, a.gap) for a in answers(pocket, [reply], 9)] == [((), "stop", None)]


def test_what_reads_like_a_special_token_is_text(pocket: ChatModel) -> None:
    text = "Hello <|im_end|> you"
    ids = tuple(pocket.tokenizer(text, split_special_tokens=True)["input_ids"])
    assert not set(ids) & set(pocket.stop_ids)
    found = answers(pocket, [text_reply(text, len(ids) + 1)], 99)[0]
    assert (found.ids, found.gap) == (ids, None)
    assert pocket.decode(found.ids) == text


@given(st.lists(st.lists(st.integers(0, 1996), max_size=12), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_encoded_answers_decode_to_the_text_and_are_as_many_as_counted(pocket: ChatModel, said: list[list[int]]) -> None:
    """And where the tokens were the text's own encoding, they are the very tokens."""
    texts = [pocket.decode(ids) for ids in said]
    found = answers(pocket, [text_reply(t, len(ids) + 1) for t, ids in zip(texts, said, strict=True)], 99)
    for answer, text, ids in zip(found, texts, said, strict=True):
        if answer.gap is None:
            assert pocket.decode(answer.ids) == text
            assert len(answer.ids) in (len(ids), len(ids) + 1)
    if all(encoded(pocket, t) == tuple(ids) for t, ids in zip(texts, said, strict=True)):
        assert [a.ids for a in found] == [tuple(ids) for ids in said]
        assert not any(a.gap for a in found)


def test_a_steered_model_is_not_sampled_elsewhere(server: Server) -> None:
    hook = (server.model.hook_name(3), lambda residual, hook: residual)
    with (
        server.endpoint() as endpoint,
        server.model.hooks([hook]),
        pytest.raises(EndpointError, match=r"hooks at blocks\.3\."),
    ):
        endpoint_sampler(endpoint, server.model, for_vllm)(few(), GREEDY, 0)
    assert not server.asked


def test_no_rows_ask_for_nothing(server: Server) -> None:
    with server.endpoint() as endpoint:
        assert endpoint_sampler(endpoint, server.model, for_vllm)([], GREEDY, 0) == []
    assert not server.asked


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_most_gaps_is_a_share(server: Server, share: float) -> None:
    with server.endpoint() as endpoint, pytest.raises(ValueError, match="most_gaps"):
        endpoint_sampler(endpoint, server.model, for_vllm, most_gaps=share)


@dataclass(frozen=True)
class Broken:
    """A sampler that does not keep to its rows."""

    made: list[Rollout]
    name: str = "broken"

    def __call__(self, rows: Sequence[Row], sampling: Sampling, seed: int, /) -> list[Rollout]:
        return self.made


def test_a_sampler_must_keep_to_its_rows(here: list[Rollout]) -> None:
    assert sampled(Broken(here), few(), GREEDY, 0) == here
    for made in (here[:-1], here[::-1], [*here[:-1], replace(here[-1], sample=1)]):
        with pytest.raises(PersonaLensError, match="sampler 'broken'"):
            sampled(Broken(made), few(), GREEDY, 0)


GREEDY_RUN = ExtractionSettings(samples=1, neutral=8, sampling=Sampling(60, temperature=0.0), batch_rows=64)


@pytest.fixture(scope="module")
def small() -> Trait:
    """A trait of few prompts."""
    trait = load_trait("optimism", "pocket")
    few = {"instructions": trait.instructions[:2], "extraction_questions": trait.extraction_questions[:12]}
    return trait.model_copy(update=few)


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CHUNK_ROWS", 16)
        yield


@pytest.fixture(scope="module")
def local_run(pocket: ChatModel, small: Trait, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(pocket, small, out=tmp_path_factory.mktemp("local") / "run", settings=GREEDY_RUN).path


@pytest.fixture(scope="module")
def whole(pocket: ChatModel, small: Trait) -> dict[Key, Generated]:
    """The server's answers to all prompts of the extraction, decoded in one batch."""
    prompts: list[Prompt] = [p for polarity in ("positive", "negative", "neutral") for p in extraction_prompts(small, polarity)]
    ids = sorted({tuple(pocket.render(p.messages)) for p in prompts}, key=len)
    most = GREEDY_RUN.sampling.max_new_tokens
    made = generate_tokens(pocket, ids, np.zeros((len(ids), most)), GREEDY_RUN.sampling)
    return {(i, most, 0.0, 0): g for i, g in zip(ids, made, strict=True)}


def same_run(one: Path, other: Path) -> bool:
    """Rollouts and scores byte for byte, and the directions."""
    same = all((one / f).read_bytes() == (other / f).read_bytes() for f in ("rollouts.jsonl", "scores.jsonl", "means.safetensors"))
    first, second = (pipeline.ExtractionRun(p).vectors.directions for p in (one, other))
    return same and torch.equal(first, second)


def test_extraction_through_a_server_that_dies_on_the_way_ends_as_the_one_without_a_server(
    server: Server, small: Trait, whole: dict[Key, Generated], local_run: Path, run_folder: Path, tmp_path: Path
) -> None:
    server.known, server.left = whole, 30
    with server.endpoint() as endpoint:
        sampler = endpoint_sampler(endpoint, server.model, for_transformers, cache=tmp_path / "replies.jsonl")
        with pytest.raises(EndpointError):
            extract(server.model, small, sampler=sampler, out=run_folder, settings=GREEDY_RUN)
        assert len((run_folder / "rollouts.jsonl").read_bytes().splitlines()) == 16
        before = len(server.asked)
        server.left = 10**6
        run = extract(server.model, small, sampler=sampler, out=run_folder, settings=GREEDY_RUN)
        total = len({json.dumps(b, sort_keys=True) for b in server.asked})
        assert len(server.asked) == total
        assert before == 30
        assert same_run(run.path, local_run)
        assert run.manifest["arguments"]["sampler"] == f"for_transformers {endpoint}"
        assert "gaps" not in run.summary
        assert "sampler" not in json.loads((local_run / "run.json").read_text())["arguments"]
        with pytest.raises(RunFolderError, match="sampler"):
            extract(server.model, small, out=run_folder, settings=GREEDY_RUN)
        with pytest.raises(RunFolderError, match="sampler"):
            extract(server.model, small, sampler=sampler, out=local_run, settings=GREEDY_RUN)


def test_gaps_are_counted_in_the_summary_and_move_no_direction_of_their_own(
    server: Server, small: Trait, whole: dict[Key, Generated], local_run: Path, run_folder: Path
) -> None:
    lost = pipeline.ExtractionRun(local_run).rollouts()[7]
    ids = server.model.render(extraction_prompts(small, "positive")[7].messages)
    server.known = whole
    server.says = lambda reply, asked: reply["choices"][0].update(finish_reason="abort") if asked == ids else None
    with server.endpoint() as endpoint:
        sampler = endpoint_sampler(endpoint, server.model, for_transformers, most_gaps=0.1)
        run = extract(server.model, small, sampler=sampler, out=run_folder, settings=GREEDY_RUN)
    assert run.summary["gaps"] == {"the server ended the answer for another reason: abort": 1}
    assert [r.key for r in run.rollouts() if r.gap] == [lost.key]
    kept = {c["polarity"]: c["kept"] for c in run.summary["counts"]}
    full = {c["polarity"]: c["kept"] for c in pipeline.ExtractionRun(local_run).summary["counts"]}
    assert kept == {**full, "positive": full["positive"] - 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` on this machine, in float32 as the pocket model is here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (tmp_path_factory.mktemp("serve") / "log.txt").open("wb")
    process = subprocess.Popen([*command, "--device", "cpu", "--dtype", "float32"], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert process.poll() is None, Path(log.name).read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def peculiar(folder: Path) -> Path:
    """The pocket model with a generation config that draws otherwise."""
    shutil.copytree(weights_folder(), folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"repetition_penalty": 1.5, "top_k": 2, "top_p": 0.5, "temperature": 0.3, "no_repeat_ngram_size": 2}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_transformers_serve_gives_the_same_answers_and_the_same_directions(served: str, pocket: ChatModel, tmp_path: Path) -> None:
    """Also where the generation config of the served model holds penalties; over messages only where it holds none."""
    settings = replace(GREEDY_RUN, neutral=20, sampling=Sampling(120, temperature=0.0))
    local = extract(pocket, "optimism", out=tmp_path / "local", settings=settings)
    endpoint = Endpoint(served, str(peculiar(tmp_path / "peculiar")), timeout=300.0)
    sampler = endpoint_sampler(endpoint, pocket, for_transformers)
    run = extract(pocket, "optimism", sampler=sampler, out=tmp_path / "run", settings=settings)
    assert len(run.rollouts()) == 220
    assert same_run(run.path, local.path)
    rows = few(8)
    here = sample(pocket, rows, settings.sampling)
    for model, same in ((str(weights_folder()), True), (endpoint.model, False)):
        chat = endpoint_sampler(replace(endpoint, model=model), pocket, for_chat, most_gaps=1.0)
        assert (chat(rows, settings.sampling, 0) == here) == same


@pytest.mark.slow
def test_transformers_serve_takes_seeds_one_request_at_a_time(served: str, pocket: ChatModel) -> None:
    sampler = endpoint_sampler(Endpoint(served, str(weights_folder()), concurrency=1, timeout=300.0), pocket, for_transformers)
    rows = rows_of([few()[0][0]], 6)
    first, again = (sampler(order, Sampling(60), 1) for order in (rows, rows[::-1]))
    assert first == again[::-1]
    assert len({r.text for r in first}) > 3
