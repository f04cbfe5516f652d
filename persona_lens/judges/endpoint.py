"""A language model behind an OpenAI-compatible server as a judge: one request for the trait, one for coherence, per answer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import digits
from typing import Any, Final, Literal

from persona_lens.endpoints import Endpoint, Failed, Request, UnreadableReply, Usage, ask, key_of
from persona_lens.errors import EndpointError, PersonaLensError
from persona_lens.judges.judge import Adherence, Judged, Score
from persona_lens.judges.reply import NUMBER, Reading, Tokens, along_sample, is_number, weighted, written
from persona_lens.judges.rubrics import coherence_message, role_message, trait_message
from persona_lens.traits import Role, Trait

Mode = Literal["logprobs", "digits", "text"]
MODES: Final[tuple[Mode, ...]] = ("logprobs", "digits", "text")
TOP: Final = 20  # first tokens whose probabilities are asked for, as in the paper
FIRST_TOKENS: Final = 3  # the first is read; the others show whether it was the whole number
DIGIT_TOKENS: Final = 4  # a space, and the digits of 100
TEXT_TOKENS: Final = 512
NOT_JUDGED: Final = "coherence was not judged"


@dataclass(frozen=True)
class EndpointJudge:
    """A judge behind a server.

    Attributes:
        first_seed: what the seeds of its requests begin at; `repeated` moves it.
        spent: what its calls cost so far, one entry each.
    """

    endpoint: Endpoint
    mode: Mode
    coherence: bool
    cache: Path | None
    repeats: int
    first_seed: int = 0
    spent: list[Usage] = field(default_factory=list[Usage], compare=False, repr=False)

    @property
    def name(self) -> str:
        """The model and how it is read."""
        parts = [f"openai:{self.endpoint.model}@{self.endpoint.url}", self.mode]
        parts += [] if self.repeats == 1 else [f"repeats={self.repeats}"]
        parts += [] if self.coherence else ["without coherence"]
        return ", ".join(parts)

    @property
    def usage(self) -> Usage:
        """What its calls cost so far; replies from the cache cost nothing again."""
        return sum(self.spent, Usage())

    def repeated(self, number: int) -> "EndpointJudge":
        """The same judge with other seeds: 0 is itself."""
        return replace(self, first_seed=self.first_seed + number * self.repeats)

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
        if not answers:
            key_of(self.endpoint)  # so that a missing key is told before anything is sampled
        messages = [trait_message(trait, a) for a in answers]
        if not self.coherence:
            return [score(t, Reading(None, NOT_JUDGED)) for t in self._readings(messages)]
        found = self._readings([*messages, *(coherence_message(a) for a in answers)])
        return [score(t, c) for t, c in zip(found[: len(answers)], found[len(answers) :], strict=True)]

    def _readings(self, messages: Sequence[str]) -> list[Reading]:
        """One reading per message: the mean over the repeats."""
        seeds = range(self.first_seed, self.first_seed + self.repeats)
        requests = [_request(message, self.mode, seed, self.repeats > 1) for message in messages for seed in seeds]
        reader = _READERS[self.mode]
        found = ask(self.endpoint, requests, reader, cache=self.cache, spent=self.spent.append)
        readings = [Reading(None, f"unreadable reply: {r.reason}") if isinstance(r, Failed) else r for r in found]
        return [_mean(readings[i : i + self.repeats]) for i in range(0, len(readings), self.repeats)]


def endpoint_judge(
    endpoint: Endpoint, *, mode: Mode = "logprobs", coherence: bool = True, cache: Path | None = None, repeats: int = 1
) -> EndpointJudge:
    """A judge behind an OpenAI-compatible server.

    Args:
        mode: how replies are read. "logprobs": expected number over the first token (Chen et al. 2025), for models whose tokens are
            whole numbers; a reply in which another digit follows that token ends the call. "digits": the same over the digits of
            the reply, for models that write numbers digit by digit; what was not sampled is approximated (`reply.along_sample`).
            "text": the number that is written.
        coherence: whether coherence is judged as well, by a second request; without it every score's coherence is a gap.
        cache: a JSONL file of replies, so that an interrupted run goes on where it stopped.
        repeats: how often each answer is judged, with different seeds; the mean counts. In mode "text" several are sampled at
            temperature 1, a single one at 0.

    Raises:
        PersonaLensError: no such mode, or fewer than one repeat. Calling it raises `EndpointError` as `endpoints.ask`
            does, where the server gives no probabilities, and in mode "logprobs" where the model writes digit by digit.

    Example:
        >>> from persona_lens.endpoints import Endpoint
        >>> server = Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-7B-Instruct")
        >>> judge = pl.judges.endpoint_judge(server, mode="digits", cache=Path("replies.jsonl"))
        >>> judge.name
        'openai:Qwen/Qwen2.5-7B-Instruct@http://localhost:8000/v1, digits'
    """
    if mode not in MODES:
        raise PersonaLensError(f"mode={mode!r} is unknown: use one of {', '.join(MODES)}")
    if repeats < 1:
        raise PersonaLensError(f"repeats must be at least 1, not {repeats}")
    return EndpointJudge(endpoint, mode, coherence, cache, repeats)


@dataclass(frozen=True)
class _EndpointRoleJudge:
    endpoint: Endpoint
    cache: Path | None

    @property
    def name(self) -> str:
        return f"openai:{self.endpoint.model}@{self.endpoint.url}, text"

    def __call__(self, role: Role, rubric: str, answers: Sequence[Judged], /) -> list[Adherence]:
        requests = [_request(role_message(role, rubric, a), "text", 0, False) for a in answers]
        found = ask(self.endpoint, requests, lambda reply: written(_text(reply), highest=3), cache=self.cache)
        return [Adherence(None, f"unreadable reply: {r.reason}") if isinstance(r, Failed) else adherence(r) for r in found]


def endpoint_role_judge(endpoint: Endpoint, *, cache: Path | None = None) -> _EndpointRoleJudge:
    """A judge of roles behind an OpenAI-compatible server: it writes 0, 1, 2 or 3.

    Args:
        cache: a JSONL file of replies, so that an interrupted run goes on where it stopped.
    """
    return _EndpointRoleJudge(endpoint, cache)


def score(trait: Reading, coherence: Reading) -> Score:
    """A score of two readings; the reasons of what is missing are joined."""
    named = (("trait", trait), ("coherence", coherence))
    reasons = [r.reason if r.reason == NOT_JUDGED else f"{what}: {r.reason}" for what, r in named if r.value is None]
    return Score(trait.value, coherence.value, "; ".join(str(r) for r in reasons) or None)


def adherence(reading: Reading) -> Adherence:
    """The whole number that a reading is."""
    if reading.value is None or reading.value != int(reading.value):
        return Adherence(None, reading.reason or f"no whole number: {reading.value}")
    return Adherence(int(reading.value))


def _mean(readings: Sequence[Reading]) -> Reading:
    """Mean over repeats, of which more than half must be readable."""
    values = [r.value for r in readings if r.value is not None]
    if 2 * len(values) > len(readings):
        return Reading(sum(values) / len(values))
    reason = next(r.reason for r in readings if r.value is None)
    return Reading(None, reason if len(readings) == 1 else f"{len(readings) - len(values)} of {len(readings)} repeats: {reason}")


def _request(message: str, mode: Mode, seed: int, sampled: bool) -> Request:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": message}], "seed": seed}
    if mode == "text":
        return Request("chat/completions", body | {"max_tokens": TEXT_TOKENS, "temperature": 1 if sampled else 0})
    tokens = FIRST_TOKENS if mode == "logprobs" else DIGIT_TOKENS
    return Request("chat/completions", body | {"max_tokens": tokens, "temperature": 0, "logprobs": True, "top_logprobs": TOP})


def _choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnreadableReply("the reply has no choices")
    return choices[0]


def _text(reply: Mapping[str, Any]) -> str:
    """What the model said; a refusal that the server tells apart counts as said."""
    message = _choice(reply).get("message")
    if not isinstance(message, dict):
        raise UnreadableReply("the reply has no message")
    said = message.get("content") or message.get("refusal") or ""
    if not isinstance(said, str):
        raise UnreadableReply("the reply's message is no text")
    return said


def _from_first_token(reply: Mapping[str, Any]) -> Reading:
    positions, sampled = _positions(reply)
    if not positions:
        return Reading(None, "an empty reply")
    first, whole = sampled[0].strip(), _digits("".join(sampled).lstrip())
    if not first and whole:
        return Reading(None, "the number comes after a blank token: judge with mode='digits'")
    if len(first) == 1 and len(whole) > 1 and is_number(whole):
        raise EndpointError(
            f"the model writes numbers digit by digit ({whole} in several tokens), and only the first token is read: judge with "
            "mode='digits', or name the judge openai:MODEL@URL,digits"
        )
    if NUMBER.fullmatch(first) and len(whole) > len(first):
        return Reading(None, f"a number outside 0-100: {whole}")
    return weighted(positions[0])


def _digits(text: str) -> str:
    """The digits that a text begins with."""
    return text[: len(text) - len(text.lstrip(digits))]


def _from_digits(reply: Mapping[str, Any]) -> Reading:
    positions, sampled = _positions(reply)
    return along_sample(positions, sampled) if positions else Reading(None, "an empty reply")


def _from_text(reply: Mapping[str, Any]) -> Reading:
    return written(_text(reply))


_READERS: Final[Mapping[Mode, Callable[[Mapping[str, Any]], Reading]]] = {
    "logprobs": _from_first_token,
    "digits": _from_digits,
    "text": _from_text,
}


def _positions(reply: Mapping[str, Any]) -> tuple[list[Tokens], list[str]]:
    """Probabilities of the most likely tokens at each position of the reply, and the tokens it is made of.

    Raises:
        UnreadableReply: they are there, and damaged.
        EndpointError: the server gives none.
    """
    choice = _choice(reply)
    given = choice.get("logprobs")
    if choice.get("finish_reason") == "content_filter":
        return [], []
    if not isinstance(given, dict) or given.get("content") is None:
        raise EndpointError(
            "the server's replies hold no logprobs: judge with mode='text', or name the judge openai:MODEL@URL,text"
        )
    try:
        top = [{str(t["token"]): 0.0 for t in p["top_logprobs"]} for p in given["content"]]
        for tokens, position in zip(top, given["content"], strict=True):
            for t in position["top_logprobs"]:
                tokens[t["token"]] += _probability(t["logprob"])
        return list(top), [str(position["token"]) for position in given["content"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableReply(f"the reply's logprobs are damaged ({error!r})") from error


def _probability(logprob: Any) -> float:
    if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not logprob <= 1e-6:
        raise ValueError(f"a log probability of {logprob!r}")
    return math.exp(logprob)
