"""A loopback server with OpenAI's routes that goes wrong on purpose, and counts what it is asked.

Whether an attempt goes wrong is drawn from the seed, the content of the request and the number of the attempt, so that the order in
which threads ask does not matter.
"""

import hashlib
import json
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "hang", "garbage", "cut", "broken", "dropped", "no choices")
Reply = Callable[[Mapping[str, Any]], Any]


def hashed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()[:8], "big")


def prompt_of(body: Mapping[str, Any]) -> str:
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def said(text: str, **choice: Any) -> dict[str, Any]:
    """A chat completion of one text."""
    message = {"role": "assistant", "content": text, "refusal": choice.pop("refusal", None)}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2},
    }


def with_logprobs(tokens: Sequence[str], tops: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """A chat completion of tokens, with the probabilities at each of their positions."""
    content = [
        {
            "token": token,
            "logprob": math.log(top.get(token, 1e-9)),
            "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top.items()],
        }
        for token, top in zip(tokens, tops, strict=True)
    ]
    return said("".join(tokens), logprobs={"content": content})


def by_content(body: Mapping[str, Any]) -> dict[str, Any]:
    """A number that depends on the whole prompt, with a neighbour that is less likely; as text where no logprobs are asked for."""
    number = hashed(prompt_of(body)) % 100
    if not body.get("logprobs"):
        return said(str(number))
    return with_logprobs([str(number)], [{str(number): 0.7, str(number + 1): 0.2, "I": 0.1}])


@dataclass
class Server:
    """What the server does, and what it saw."""

    reply: Reply = by_content
    faults: Sequence[str] = FAULTS
    rate: float = 0.0
    seed: int = 0
    hang: float = 1.0  # seconds
    delay: float = 0.0  # seconds before a good reply
    status: int | None = None  # of every reply, instead of good ones
    message: str = "as it was told"  # with that status
    headers: Mapping[str, str] = field(default_factory=dict)  # sent with every status that is not 200
    asked: Counter[str] = field(default_factory=Counter)  # by content
    answered: Counter[str] = field(default_factory=Counter)
    went_wrong: Counter[str] = field(default_factory=Counter)  # by fault
    keys: set[str | None] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def fault(self, content: str, attempt: int) -> str | None:
        rng = random.Random(hashed(self.seed, content, attempt))
        return rng.choice(self.faults) if rng.random() < self.rate else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Listening"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = json.dumps(body, sort_keys=True)
        with server.lock:
            server.asked[content] += 1
            attempt = server.asked[content]
            server.keys.add(self.headers["Authorization"])
            server.paths.add(self.path)
        fault = server.fault(content, attempt)
        try:
            if fault:
                with server.lock:
                    server.went_wrong[fault] += 1
                self.go_wrong(fault, server)
            elif server.status is not None:
                self.send(server.status, json.dumps({"error": {"message": server.message}}).encode(), server.headers)
            else:
                server.over.wait(server.delay)
                reply = server.reply(body)
                self.send(200, reply if isinstance(reply, bytes) else json.dumps(reply).encode())
                with server.lock:
                    server.answered[content] += 1
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def go_wrong(self, fault: str, server: Server) -> None:
        good = json.dumps(by_content({"prompt": "?"})).encode()
        if fault == "429":
            self.send(429, b'{"error": {"message": "slowly"}}', {"Retry-After": "0"})
        elif fault == "500":
            self.send(503, b"<html>overloaded</html>")
        elif fault == "garbage":
            self.send(200, b"<html>\xff not a reply</html>")
        elif fault == "cut":  # whole by HTTP, half by JSON
            self.send(200, good[: len(good) // 2])
        elif fault == "broken":  # less than was announced
            self.send(200, good[: len(good) // 2], length=len(good))
            self.close_connection = True
        elif fault == "no choices":
            self.send(200, b'{"choices": []}')
        else:
            if fault == "hang":
                server.over.wait(server.hang)
            self.close_connection = True

    def send(self, status: int, content: bytes, headers: Mapping[str, str] = {}, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Listening(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, state: Server) -> None:
        self.state = state
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_: Any) -> None:
        pass


@contextmanager
def serving(state: Server) -> Generator[Server]:
    """Listen on a free port of this machine; `state.url` says where."""
    listening = Listening(state)
    state.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        listening.shutdown()
        listening.server_close()
