"""What is asked of whom, and what becomes of it: plain values, checked when they are made."""

import hashlib
import ipaddress
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from persona_lens.errors import EndpointError

URL_VARIABLE: Final = "OPENAI_BASE_URL"
OPENAI: Final = "https://api.openai.com/v1"
Route = Literal["chat/completions", "completions"]


class UnreadableReply(Exception):
    """What `read` raises for a reply it cannot read: the request is made again, and ends as `Failed` where that never helps."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible server.

    Attributes:
        url: the API's root, such as "https://api.openai.com/v1"; http or https, without user, password or query.
        model: the name the server knows the model by.
        key_variable: the environment variable that holds the key. A server on this machine needs none.
        concurrency: requests at a time.
        timeout: seconds for one whole reply.
        attempts: how often a request is made at most.

    Raises:
        EndpointError: a URL that cannot be used, no model, or a number out of range.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 60.0
    attempts: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError("the URL of an endpoint begins with http:// or https:// and a host, like http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise EndpointError(
                f"the URL of an endpoint holds no user, password or query (host {parts.hostname}): "
                f"put the key into the environment variable {self.key_variable}"
            )
        if not self.model:
            raise EndpointError(f"{self.url}: the name of a model is needed, as the server lists it at {self.url}/models")
        for name, value in (("concurrency", self.concurrency), ("attempts", self.attempts)):
            if value < 1:
                raise EndpointError(f"{name} must be at least 1, not {value}")
        if not self.timeout > 0:
            raise EndpointError(f"timeout must be more than 0 seconds, not {self.timeout}")

    @property
    def on_this_machine(self) -> bool:
        """Whether the URL is a loopback address."""
        host = urlsplit(self.url).hostname or ""
        with suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"


def endpoint_named(text: str, **options: Any) -> Endpoint:
    """A model at a server from "MODEL@URL", or from "MODEL" at OPENAI_BASE_URL (OpenAI's own where that is not set).

    Args:
        options: fields of `Endpoint`.

    Raises:
        EndpointError: as `Endpoint`.
    """
    for scheme in ("@http://", "@https://"):  # a model's name may hold an @ of its own
        if scheme in text:
            model, _, rest = text.partition(scheme)
            return Endpoint(scheme[1:] + rest, model, **options)
    return Endpoint(os.environ.get(URL_VARIABLE) or OPENAI, text, **options)


@dataclass(frozen=True)
class Request:
    """What a model is asked: the route, and the JSON body without the model's name.

    Raises:
        ValueError: a body that names a model or asks for a stream.
    """

    route: Route
    body: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.route not in ("chat/completions", "completions"):
            raise ValueError(f'the route is "chat/completions" or "completions", not {self.route!r}')
        if "model" in self.body or self.body.get("stream"):
            raise ValueError("the body of a request names no model (the endpoint does) and asks for no stream")

    def digest(self, source: str) -> str:
        """The reply's name in a cache: a hash of its source (model, URL, weights), route and body, whatever its fields' order."""
        content = json.dumps({"source": source, "route": self.route, "body": dict(self.body)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Failed:
    """A request whose replies stayed unreadable, and why: a gap to be counted, never a value."""

    reason: str


@dataclass(frozen=True)
class Usage:
    """What replies cost: requests that were sent, how many of them were retries, and the tokens that the server counted.

    Attributes:
        prompt_tokens, completion_tokens: as the server counted them.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.requests + other.requests,
            self.retries + other.retries,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )
