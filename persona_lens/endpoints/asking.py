"""`ask`: many requests at a time in threads, each made again until its reply can be read, replies kept as they arrive.

Threads and not coroutines, because notebooks run an event loop of their own. The calling thread alone writes the cache.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from persona_lens.endpoints.cache import Kept, Reply, opened, usage_of
from persona_lens.endpoints.request import Endpoint, Failed, Request, UnreadableReply, Usage
from persona_lens.endpoints.wire import Fault, client_of, key_of, reply_of
from persona_lens.errors import EndpointError

if TYPE_CHECKING:
    from openai import OpenAI

FIRST_PAUSE: Final = 0.5  # seconds that a first retry waits at most; each further one twice as long, drawn at random
LONGEST_PAUSE: Final = 30.0

T = TypeVar("T")


def nobody(done: int, total: int) -> None:
    """Progress that nobody is told."""


def unheard(usage: Usage) -> None:
    """Costs that nobody is told."""


def ask(
    endpoint: Endpoint,
    requests: Sequence[Request],
    read: Callable[[Mapping[str, Any]], T],
    *,
    cache: Path | None = None,
    weights: str = "",
    told: Callable[[int, int], object] = nobody,
    spent: Callable[[Usage], object] = unheard,
) -> list[T | Failed]:
    """Ask a model, many requests at a time.

    Equal requests are made once: for several samples let the body differ (by its seed). Retried are timeouts, broken connections,
    the statuses 408, 409, 429 and 500 upwards, and replies that are no JSON or that `read` refuses, after a random pause that
    doubles, or the one the server asks for. Redirects are not followed.

    Args:
        read: makes a value of a reply, or raises `UnreadableReply`. Runs in several threads.
        cache: a JSONL file of replies, one per line, that is filled as they arrive; runs may share it. None: nothing is kept.
        weights: a name for the weights that the server has, where it is known: replies of others are not taken from the cache.
        told: called with how many different requests are answered, and how many there are.
        spent: called once at the end, also before an error, with what the new replies cost (those of the cache cost nothing again).

    Returns:
        what `read` made of each reply, in order; `Failed` where every attempt failed and the last reply could not be read.

    Raises:
        EndpointError: no key, a refusal (400, 401, 403, 404 and the like), a server that stays out of reach, a file that is no
            cache, or a missing package. Replies that were received are in the cache: the same call goes on from there.
    """
    source = f"{endpoint} {weights}".rstrip()
    wanted = {r.digest(source): r for r in requests}
    found = _ask_missing(endpoint, wanted, read, opened(cache), told, spent)
    return [found[r.digest(source)] for r in requests]


@dataclass(frozen=True)
class _Answer(Generic[T]):
    """What became of one request: its value, the reply if it is to be kept, and what it cost."""

    name: str
    value: T | Failed
    reply: Reply | None
    usage: Usage


def _ask_missing(
    endpoint: Endpoint,
    wanted: Mapping[str, Request],
    read: Callable[[Mapping[str, Any]], T],
    kept: Kept,
    told: Callable[[int, int], object],
    spent: Callable[[Usage], object],
) -> dict[str, T | Failed]:
    """Values by name, of kept replies and of new ones. New ones are kept by this thread alone."""
    found: dict[str, T | Failed] = {}
    for name in wanted.keys() & kept.replies.keys():
        with suppress(UnreadableReply):  # it is asked for anew
            found[name] = read(kept.replies[name])
    told(len(found), len(wanted))
    total = Usage()
    try:
        for answers in _answers(endpoint, {n: r for n, r in wanted.items() if n not in found}, read):
            kept.add([a.reply for a in answers if a.reply])
            for answer in answers:
                found[answer.name] = answer.value
                total += answer.usage
            told(len(found), len(wanted))
    except EndpointError as error:
        where = f"kept in {kept.path}: the same call goes on from there" if kept.path else "not kept (no cache was given)"
        raise EndpointError(f"{error} [{len(found)} of {len(wanted)} replies are there, {where}]") from error
    finally:
        spent(total)
    return found


@dataclass
class _Work(Generic[T]):
    """What the threads of a call share."""

    todo: deque[tuple[str, Request]]
    done: "SimpleQueue[_Answer[T] | BaseException]" = field(default_factory=SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)


def _answers(
    endpoint: Endpoint, missing: Mapping[str, Request], read: Callable[[Mapping[str, Any]], T]
) -> Generator[list[_Answer[T]]]:
    """Answers as they arrive. After a fault that ends the call, those that are still on their way come first, then the error."""
    if not missing:
        return
    key = key_of(endpoint)
    client = client_of(endpoint, key)
    work: _Work[T] = _Work(deque(missing.items()))

    def run() -> None:
        while not work.stop.is_set():
            try:
                name, request = work.todo.popleft()
            except IndexError:
                return
            try:
                work.done.put(_answer(endpoint, client, key, name, request, read, work.stop))
            except BaseException as error:  # it is raised in the calling thread
                work.stop.set()
                work.done.put(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(endpoint.concurrency, len(missing)))]
    for thread in threads:
        thread.start()
    left = len(missing)
    try:
        while left:
            arrived = [work.done.get(), *_waiting(work.done)]
            errors = [a for a in arrived if isinstance(a, BaseException)]
            if errors:
                _join(threads, endpoint.timeout)
                arrived += _waiting(work.done)
            left -= len(arrived)
            yield [a for a in arrived if isinstance(a, _Answer)]
            if errors:
                raise next((e for e in errors if not isinstance(e, Fault)), _gave_up(endpoint, errors[0]))
    finally:
        work.stop.set()
        client.close()


def _waiting(done: "SimpleQueue[Any]") -> Iterable[Any]:
    with suppress(Empty):
        while True:
            yield done.get_nowait()


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _gave_up(endpoint: Endpoint, fault: BaseException) -> EndpointError:
    return EndpointError(f"{endpoint}: no answer after {endpoint.attempts} attempts, the last one: {fault}")


def _answer(
    endpoint: Endpoint,
    client: "OpenAI",
    key: str | None,
    name: str,
    request: Request,
    read: Callable[[Mapping[str, Any]], T],
    stop: threading.Event,
) -> _Answer[T]:
    """One request, made until its reply can be read."""
    from tenacity import (
        Retrying,
        retry_if_exception,
        stop_after_attempt,
        stop_when_event_set,
        wait_exception,
        wait_random_exponential,
    )

    def pause(error: BaseException) -> float:
        return error.pause if isinstance(error, Fault) else 0.0

    retrying = Retrying(
        retry=retry_if_exception(lambda e: isinstance(e, Fault)),
        stop=stop_after_attempt(endpoint.attempts) | stop_when_event_set(stop),
        wait=wait_random_exponential(FIRST_PAUSE, LONGEST_PAUSE) + wait_exception(pause),
        sleep=lambda seconds: cast(None, stop.wait(seconds)),
        reraise=True,
    )

    def attempt() -> _Answer[T]:
        reply = reply_of(endpoint, client, key, request)
        try:
            value = read(reply)
        except UnreadableReply as error:
            raise Fault(str(error), unreadable=True) from error
        retries = int(retrying.statistics["attempt_number"]) - 1
        return _Answer(name, value, Reply(name, reply, retries), usage_of(reply, retries))

    try:
        return retrying(attempt)
    except Fault as fault:
        if fault.unreadable and not stop.is_set():
            return _Answer(
                name, Failed(f"{fault} ({endpoint.attempts} attempts)"), None, Usage(endpoint.attempts, endpoint.attempts - 1)
            )
        raise
