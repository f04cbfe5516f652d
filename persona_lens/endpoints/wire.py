"""One request over HTTP: bounded in time and size, never redirected, and what a failure means for the next attempt.

The key is read from the environment, goes into the request's header and nowhere else, and is cut out of whatever comes back.
"""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, cast

from persona_lens.endpoints.request import Endpoint, Request
from persona_lens.errors import EndpointError

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

LONGEST_ASKED_PAUSE: Final = 300.0  # seconds; a server that asks for more is not waited for
LARGEST_REPLY: Final = 8 * 2**20  # bytes
RETRIED: Final = (408, 409, 429)  # and 500 upwards
SHOWN: Final = 200  # characters of what a server says, in an error
SHORTEST_SECRET: Final = 8  # a shorter key ("none", "EMPTY") is no secret, and could be part of any text


class Fault(Exception):
    """An attempt that did not succeed; another may. `pause` is what the server asked for, in seconds."""

    def __init__(self, reason: str, *, unreadable: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.unreadable = unreadable
        self.pause = pause


def reply_of(endpoint: Endpoint, client: "OpenAI", key: str | None, request: Request) -> dict[str, Any]:
    """What the server says, as JSON, without the key and without half surrogate pairs.

    Raises:
        Fault: it may be asked again.
        EndpointError: it may not.
    """
    text = _sent(endpoint, client, key, request)
    try:
        reply = json.loads(_without(key, text.decode()))
        clean = json.loads(json.dumps(reply, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise Fault(f"the reply is no JSON: {_shown(text.decode(errors='replace'), key)}", unreadable=True) from error
    if not isinstance(clean, dict):
        raise Fault(f"the reply is no JSON object but a {type(clean).__name__}", unreadable=True)
    return cast("dict[str, Any]", clean)


def _sent(endpoint: Endpoint, client: "OpenAI", key: str | None, request: Request) -> bytes:
    """The bytes of a successful reply, received within the timeout."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    late = time.monotonic() + endpoint.timeout
    body = dict(request.body)
    try:
        if request.route == "completions":
            stream = client.completions.with_streaming_response.create(model=endpoint.model, prompt="", extra_body=body)
        else:
            stream = client.chat.completions.with_streaming_response.create(model=endpoint.model, messages=[], extra_body=body)
        with stream as response:
            return _received(response.iter_bytes(), late, endpoint)
    except APIStatusError as error:
        raise _refused(endpoint, error, key) from None
    except APITimeoutError as error:
        raise Fault(f"no reply within {endpoint.timeout:g} s") from error
    except APIConnectionError as error:
        raise Fault(f"no connection ({type(error.__cause__).__name__})") from error


def _received(chunks: Iterable[bytes], late: float, endpoint: Endpoint) -> bytes:
    found = bytearray()
    stream = iter(chunks)
    while True:
        try:
            chunk = next(stream, None)
        except Exception as error:  # whatever the HTTP library of the day calls a broken stream
            raise Fault(f"the reply broke off ({type(error).__name__})") from error
        if chunk is None:
            return bytes(found)
        found += chunk
        if len(found) > LARGEST_REPLY:
            raise EndpointError(f"{endpoint}: a reply is larger than {LARGEST_REPLY // 2**20} MB: ask for fewer tokens")
        if time.monotonic() > late:
            raise Fault(f"no whole reply within {endpoint.timeout:g} s")


def _refused(endpoint: Endpoint, error: "APIStatusError", key: str | None) -> Exception:
    """What a status means: a fault that may pass, or an error with the next step."""
    status, said = error.status_code, _shown(str(error), key)
    if status in RETRIED or status >= 500:
        pause = _asked_pause(error.response.headers.get("retry-after"))
        if pause <= LONGEST_ASKED_PAUSE:
            return Fault(said, pause=pause)
        return EndpointError(f"{endpoint} asks for a pause of {pause:.0f} s: make the same call later ({said})")
    step = {
        400: "the server cannot do what the request asks for",
        401: f"it takes the key from the environment variable {endpoint.key_variable}"
        + ("" if key else ", which is not set: set it"),
        403: f"the key in {endpoint.key_variable} may not use this model",
        404: f"check the URL (it ends in /v1 on most servers) and the model's name (see {endpoint.url}/models)",
    }.get(status, "redirects are not followed: give the final URL" if 300 <= status < 400 else "the request is not repeated")
    return EndpointError(f"{endpoint} refused the request ({status}): {step}. It said: {said}")


def _asked_pause(header: str | None) -> float:
    """Seconds that a Retry-After header asks for; 0 where there is none that can be read."""
    with suppress(ValueError, TypeError):
        return max(0.0, float(header or ""))
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(header or "") - datetime.now(UTC)).total_seconds())
    return 0.0


def key_of(endpoint: Endpoint) -> str | None:
    """The key of an endpoint, from the environment variable that it names; None for a server on this machine that needs none.

    Raises:
        EndpointError: no key for a server elsewhere, or one with characters that no key has.
    """
    key = os.environ.get(endpoint.key_variable, "").strip() or None
    if key is None and not endpoint.on_this_machine:
        raise EndpointError(f"{endpoint} needs a key: set the environment variable {endpoint.key_variable}")
    if key and not (key.isascii() and key.isprintable()):
        raise EndpointError(f"the key in the environment variable {endpoint.key_variable} holds characters that no key has")
    return key


def client_of(endpoint: Endpoint, key: str | None) -> "OpenAI":
    try:
        import tenacity  # noqa: F401 # pyright: ignore[reportUnusedImport]
        from openai import DefaultHttpxClient, OpenAI
    except ImportError as error:
        raise EndpointError("asking an endpoint needs openai and tenacity: pip install 'persona-lens[judge]'") from error
    # a server on this machine is not reached through a proxy
    plain = DefaultHttpxClient(follow_redirects=False, trust_env=not endpoint.on_this_machine, timeout=endpoint.timeout)
    client = OpenAI(api_key=key or "none", base_url=endpoint.url, max_retries=0, timeout=endpoint.timeout, http_client=plain)
    _ = client.completions, client.chat.completions  # what these import must not count as waiting for a reply
    return client


def _without(key: str | None, text: str) -> str:
    return text.replace(key, "[key]") if key and len(key) >= SHORTEST_SECRET else text


def _shown(text: str, key: str | None) -> str:
    """The beginning of what a server says, without the key and without what could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in _without(key, text))[:SHOWN]
