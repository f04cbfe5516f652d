"""Sampling unsteered answers through an OpenAI-compatible server that serves the weights of a model that is loaded here, too.

Prompts are rendered here, and every reply says how many tokens the server read: another number ends the run. What is certain of an
answer's tokens depends on how the server is asked (`wording`):

- `for_vllm`, `for_llama_cpp`: the very ids are sent (so there is the one BOS of the template), and the server's ids come back.
- `for_transformers`: text is sent that encodes to the ids; the answer's text is encoded here. The ids decode to that very text and
  are as many as the server counted. Another split of the same text into equally many tokens would not be noticed.
- `for_chat`: the server renders. Equal counts are all that is known of the prompt; the answer as with `for_transformers`.

An answer whose tokens cannot be told is a gap: a rollout without tokens that says why, and that no filter keeps.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from persona_lens.endpoints import Endpoint, Failed, Request, ask
from persona_lens.errors import EndpointError
from persona_lens.models import ChatModel, Sampling
from persona_lens.prompts import Prompt
from persona_lens.sampling.replies import Answer, Reply, answers, read
from persona_lens.sampling.rollout import Rollout, Row
from persona_lens.sampling.wording import Asked, Wording

MOST_GAPS: Final = 0.05


def endpoint_sampler(
    endpoint: Endpoint, model: ChatModel, wording: Wording, *, cache: Path | None = None, most_gaps: float = MOST_GAPS
) -> "EndpointSampler":
    """A sampler for `extract(..., sampler=...)` that asks a server.

    Greedy answers (temperature 0) are those of `sample` if the server computes as the model here does: in float32 up to ties at
    rounding. At other temperatures only distributions are comparable between engines: seeds are sent, one per sample, but every
    engine draws in its own way. That the server has the same weights is the caller's to know.

    Args:
        model: whose template and tokenizer are used; nothing is computed with it.
        wording: how the server is asked: `for_vllm`, `for_llama_cpp`, `for_transformers`, `for_chat`, or a function like them.
        cache: a file that keeps replies as they arrive, so that what was interrupted asks for the missing ones only. Replies of
            other weights (those of `model` count) are not taken.
        most_gaps: share of the answers of a call that may be gaps.

    Raises:
        ValueError: `most_gaps` is no share.

    Calling it raises `EndpointError` as `endpoints.ask` does, where the server reads other tokens than were meant, and where too
    many answers are gaps.
    """
    if not 0 <= most_gaps <= 1:
        raise ValueError(f"most_gaps is a share from 0 to 1, not {most_gaps}")
    return EndpointSampler(endpoint, model, wording, cache, most_gaps)


@dataclass(eq=False)
class EndpointSampler:
    """A sampler that asks a server; made by `endpoint_sampler`, whose arguments these are."""

    endpoint: Endpoint
    model: ChatModel
    wording: Wording
    cache: Path | None
    most_gaps: float
    _checked: bool = False

    @property
    def name(self) -> str:
        """Wording and endpoint."""
        return f"{getattr(self.wording, '__name__', 'wording')} {self.endpoint}"

    def __call__(self, rows: Sequence[Row], sampling: Sampling, seed: int, /) -> list[Rollout]:
        """One rollout per row, in the order of the rows.

        Raises:
            EndpointError: the server cannot be used or stops answering, reads other prompts than were meant, or gives too many
                answers whose tokens cannot be told; the model is steered here.
        """
        self._require_free()
        asked = {prompt: self._asked(prompt) for prompt, _ in rows}
        self._check(list(asked.values()), sampling)
        replies = self._replies([(asked[prompt], number) for prompt, number in rows], sampling, seed)
        found = answers(self.model, replies, sampling.max_new_tokens)
        self._require_few_gaps([a.gap for a in found if a.gap], len(found))
        return [self._rollout(row, len(asked[row[0]].ids), seed, a) for row, a in zip(rows, found, strict=True)]

    def _rollout(self, row: Row, prompt_tokens: int, seed: int, answer: Answer) -> Rollout:
        thinking, said = self.model.template.split(answer.ids)
        text = self.model.decode(said)
        return Rollout(row[0].id, row[1], seed, prompt_tokens, said, text, answer.end, thinking=thinking, gap=answer.gap)

    def _require_free(self) -> None:
        if busy := [name for name, point in self.model.bridge.hook_dict.items() if point.fwd_hooks]:
            raise EndpointError(
                f"{self.model.name} has hooks at {busy[0]}, which {self.endpoint} has not: leave that context first"
            )

    def _asked(self, prompt: Prompt) -> Asked:
        messages = prompt.messages
        if self.model.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.model.system}, *messages]
        said = self.model.template.conversation(messages)
        return Asked(prompt.id, tuple(said), tuple(self.model.render(prompt.messages)))

    def _check(self, asked: Sequence[Asked], sampling: Sampling) -> None:
        """Before anything else is asked: the shortest prompt, the longest, and one with a system prompt, one token each."""
        if self._checked or not asked:
            return
        ordered = sorted(asked, key=lambda a: len(a.ids))
        system = [a for a in ordered if a.messages[0]["role"] == "system"][:1]
        one = Sampling(1, sampling.temperature, sampling.top_p)
        for reply in self._replies([(a, 0) for a in dict.fromkeys((ordered[0], ordered[-1], *system))], one, 0):
            if isinstance(reply, Failed):
                raise EndpointError(f"{self.endpoint}: the reply cannot be read: {reply.reason}")
        self._checked = True

    def _replies(self, wanted: Sequence[tuple[Asked, int]], sampling: Sampling, seed: int) -> list[Reply | Failed]:
        """Replies to prompts that the server read as they were meant."""
        requests = [self._request(a, number, sampling, seed) for a, number in wanted]
        replies = ask(self.endpoint, requests, read, cache=self.cache, weights=self.model.fingerprint.weights)
        for (a, _), reply in zip(wanted, replies, strict=True):
            if not isinstance(reply, Failed):
                self._require_same_prompt(a, reply)
        return replies

    def _request(self, asked: Asked, number: int, sampling: Sampling, seed: int) -> Request:
        """Greedy answers need no seed: the samples of a prompt are then one request."""
        drawn: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
        }
        if sampling.temperature > 0:
            drawn["seed"] = seed_of(seed, f"{asked.name}#{number}")
        plain = self.wording(self.model, asked)
        return Request(plain.route, {**plain.body, **drawn})

    def _require_same_prompt(self, asked: Asked, reply: Reply) -> None:
        if reply.prompt_ids is not None and reply.prompt_ids != asked.ids:
            raise EndpointError(f"{self.endpoint} read other tokens than {asked.name} has: it changes the prompts it is sent")
        if (more := reply.prompt_tokens - len(asked.ids)) != 0:
            why = "it adds a BOS, or " if more == 1 else ""
            raise EndpointError(
                f"{self.endpoint} read {reply.prompt_tokens} tokens where {asked.name} has {len(asked.ids)}: {why}its chat "
                f"template or tokenizer is not that of {self.model.name}. Serve the model's own, or send token ids (for_vllm)"
            )

    def _require_few_gaps(self, gaps: Sequence[str], n: int) -> None:
        if len(gaps) > self.most_gaps * n:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(gaps).most_common(3))
            raise EndpointError(
                f"{self.endpoint}: {len(gaps)} of {n} answers cannot be used, at most {self.most_gaps:.0%} may be gaps "
                f"({reasons}): use a server that gives token ids (for_vllm, for_llama_cpp), or raise most_gaps"
            )


def seed_of(seed: int, key: str) -> int:
    """The seed of one sample, in the 31 bits that every server takes."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x00{key}".encode(), digest_size=4).digest(), "big") >> 1
