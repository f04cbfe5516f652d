"""Asking an endpoint: whatever goes wrong on the way, every reply is there once, and what cannot be mended says what to do."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from servers import FAULTS, Server, by_content, hashed, prompt_of, said, serving

from persona_lens.endpoints import Endpoint, Failed, Request, UnreadableReply, Usage, ask, asking, usage, wire
from persona_lens.endpoints.cache import Reply, opened
from persona_lens.errors import EndpointError, RunFolderError

KEY = "sk-a-secret-key-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and no key but the test's own."""
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 0.01)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def questions(n: int, **more: Any) -> list[Request]:
    return [Request("chat/completions", {"messages": [{"role": "user", "content": f"question {i}"}], **more}) for i in range(n)]


def text(reply: Mapping[str, Any]) -> str:
    try:
        return reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError) as error:
        raise UnreadableReply("no text in the reply") from error


def expected(requests: list[Request]) -> list[str]:
    return [str(hashed(prompt_of(r.body)) % 100) for r in requests]


def endpoint(server: Server, **more: Any) -> Endpoint:
    return Endpoint(server.url, "m", **{"timeout": 5.0, "attempts": 12, **more})


def lines(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cache.read_text().splitlines()]


def test_replies_come_in_order_and_equal_requests_are_made_once(tmp_path: Path) -> None:
    with serving(Server()) as server:
        wanted = [*questions(5), *questions(3)]
        told: list[tuple[int, int]] = []
        assert ask(endpoint(server), wanted, text, told=lambda *n: told.append(n)) == expected(wanted)
        assert sum(server.asked.values()) == 5
        assert told[0] == (0, 5)
        assert told[-1] == (5, 5)
        assert server.paths == {"/v1/chat/completions"}
        assert all(json.loads(c)["model"] == "m" for c in server.asked)
        assert not list(tmp_path.iterdir())
        assert ask(endpoint(server), [], text) == []


def test_the_other_route_gets_its_body_and_nothing_else() -> None:
    with serving(Server()) as server:
        body = {"prompt": "go on", "max_tokens": 3, "temperature": 0.5}
        ask(endpoint(server), [Request("completions", body)], text)
        assert server.paths == {"/v1/completions"}
        assert json.loads(next(iter(server.asked))) == {**body, "model": "m"}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_overcome(fault: str, tmp_path: Path) -> None:
    with serving(Server(rate=0.4, faults=[fault])) as server:
        wanted = questions(12)
        seen: list[Usage] = []
        there = endpoint(server, timeout=0.5 if fault == "hang" else 5.0)
        found = ask(there, wanted, text, cache=tmp_path / "c.jsonl", spent=seen.append)
        wrong = server.went_wrong[fault]
        assert wrong > 2
        assert found == expected(wanted)
        assert seen == [Usage(12 + wrong, wrong, 120, 24)]
        assert usage(tmp_path / "c.jsonl") == seen[0]


@pytest.mark.parametrize("n", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_faults_lose_nothing_and_double_nothing(n: int, tmp_path: Path) -> None:
    wanted, cache = questions(n), tmp_path / "c.jsonl"
    with serving(Server(rate=0.3)) as server:
        found = ask(endpoint(server, attempts=20, timeout=0.5), wanted, text, cache=cache)
        assert found == expected(wanted)
        assert set(server.went_wrong) == set(FAULTS)
        names = [r["key"] for r in lines(cache)]
        assert len(names) == len(set(names)) == n
        before, content = server.asked.copy(), cache.read_bytes()
        seen: list[Usage] = []
        assert ask(endpoint(server), wanted, text, cache=cache, spent=seen.append) == found
        assert (server.asked, cache.read_bytes(), seen) == (before, content, [Usage()])


def test_a_cache_answers_without_server_key_or_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Server()) as server:
        found = ask(endpoint(server), questions(3), text, cache=tmp_path / "c.jsonl")
    monkeypatch.setitem(sys.modules, "openai", None)
    assert ask(endpoint(server), questions(3), text, cache=tmp_path / "c.jsonl") == found
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(EndpointError, match=r"pip install 'persona-lens\[judge\]'"):
        ask(endpoint(server), questions(4), text, cache=tmp_path / "c.jsonl")


def test_one_server_does_not_answer_for_another(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with serving(Server(reply=lambda _, name=name: said(name))) as server:
            assert ask(endpoint(server), questions(2), text, cache=tmp_path / "c.jsonl") == [name, name]


def test_model_route_and_body_make_the_name_of_a_reply_and_their_order_does_not() -> None:
    request = Request("chat/completions", {"messages": [], "seed": 1})
    assert request.digest("m") == Request("chat/completions", {"seed": 1, "messages": []}).digest("m")
    others = [
        request.digest("n"),
        Request("completions", request.body).digest("m"),
        Request("chat/completions", {"messages": [], "seed": 2}).digest("m"),
    ]
    assert len({request.digest("m"), *others}) == 4
    for body in ({"model": "m"}, {"stream": True}):
        with pytest.raises(ValueError, match="names no model"):
            Request("completions", body)


def test_a_reply_that_stays_unreadable_is_a_gap_with_its_reason_and_is_asked_for_again(tmp_path: Path) -> None:
    def half(body: Mapping[str, Any]) -> Any:
        return b'{"choices": [' if prompt_of(body) == "question 1" else {} if prompt_of(body) == "question 2" else by_content(body)

    with serving(Server(reply=half)) as server:
        seen: list[Usage] = []
        wanted = questions(4)
        found = ask(endpoint(server, attempts=3), wanted, text, cache=tmp_path / "c.jsonl", spent=seen.append)
        assert [found[0], found[3]] == [expected(wanted)[0], expected(wanted)[3]]
        assert found[1] == Failed('the reply is no JSON: {"choices": [ (3 attempts)')
        assert found[2] == Failed("no text in the reply (3 attempts)")
        assert len(lines(tmp_path / "c.jsonl")) == 2
        assert sum(server.asked.values()) == 2 + 3 + 3
        assert seen[0].requests == 8
        server.reply = by_content
        assert ask(endpoint(server), wanted, text, cache=tmp_path / "c.jsonl") == expected(wanted)
        assert sum(server.asked.values()) == 8 + 2


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "cannot do what the request asks for"),
        (401, "environment variable MY_KEY"),
        (403, "the key in MY_KEY may not use this model"),
        (404, "check the URL .* and the model's name .*/v1/models"),
        (422, "is not repeated"),
        (302, "redirects are not followed"),
    ],
)
def test_a_refusal_is_not_repeated_and_says_what_to_do(status: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(Server()) as other, serving(Server(status=status, headers={"Location": other.url})) as server:
        with pytest.raises(EndpointError, match=words) as caught:
            ask(endpoint(server, key_variable="MY_KEY", concurrency=1), questions(5), text)
        assert sum(server.asked.values()) == 1
        assert not other.asked
    message = str(caught.value)
    assert f"m at {server.url} refused the request ({status})" in message
    assert "0 of 5 replies are there" in message
    assert "as it was told" in message
    assert KEY not in message


def test_without_a_key_nothing_is_sent_but_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(asking, "reply_of", lambda *a: sent.append(a) or said("1"))
    with pytest.raises(EndpointError, match="set the environment variable OPENAI_API_KEY"):
        ask(Endpoint("https://api.openai.com/v1", "m"), questions(1), text)
    assert not sent
    for url in ("http://localhost:1/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1"):
        assert ask(Endpoint(url, "m"), questions(1), text) == ["1"]
    for url in ("http://127.0.0.1.example.org/v1", "http://localhost.example.org/v1", "http://192.168.0.1/v1"):
        with pytest.raises(EndpointError, match="needs a key"):
            ask(Endpoint(url, "m"), questions(1), text)
    monkeypatch.setenv("OPENAI_API_KEY", "with a\x7fdelete")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY holds characters"):
        ask(Endpoint("https://api.openai.com/v1", "m"), questions(1), text)


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "host/v1", "file:///etc/passwd", "http://", "https://u:p@host/v1", "https://h/v1?key=s", "http://h/#k"]
)
def test_a_url_that_is_no_plain_http_is_refused(url: str) -> None:
    with pytest.raises(EndpointError, match="URL of an endpoint") as caught:
        Endpoint(url, "m")
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize("field", [{"concurrency": 0}, {"attempts": 0}, {"timeout": 0.0}, {"timeout": float("nan")}, {"model": ""}])
def test_an_endpoint_is_checked_when_it_is_made(field: dict[str, Any]) -> None:
    with pytest.raises(EndpointError):
        Endpoint(**{"url": "http://localhost/v1", "model": "m", **field})


def test_the_key_is_sent_and_stays_out_of_files_errors_and_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cache = tmp_path / "c.jsonl"

    def tattling(body: Mapping[str, Any]) -> Any:
        return said(f"you sent {KEY}") if prompt_of(body) != "question 1" else f"<html>{KEY}</html>".encode()

    with caplog.at_level(logging.DEBUG), serving(Server(reply=tattling)) as server:
        found = ask(endpoint(server, attempts=2), questions(2), text, cache=cache)
        assert server.keys == {f"Bearer {KEY}"}
        assert found[0] == "you sent [key]"
        server.status, server.message = 401, f"{KEY} is wrong"
        with pytest.raises(EndpointError) as caught:
            ask(endpoint(server), questions(3), text, cache=cache)
    for where in (cache.read_text(), str(found), str(caught.value), repr(caught.value.__cause__), caplog.text):
        assert KEY not in where
        assert "Bearer" not in where
    assert "[key]" in cache.read_text()
    assert "[key] is wrong" in str(caught.value)


def test_no_key_is_sent_where_there_is_none() -> None:
    with serving(Server()) as server:
        ask(endpoint(server), questions(1), text)
        assert server.keys == {"Bearer none"}


def test_a_server_that_dies_ends_the_call_and_what_it_said_is_kept(tmp_path: Path) -> None:
    cache = tmp_path / "c.jsonl"
    with serving(Server(rate=0.0)) as server:
        ask(endpoint(server), questions(7), text, cache=cache)
    with pytest.raises(EndpointError) as caught:
        ask(endpoint(server, attempts=3), questions(10), text, cache=cache)
    message = str(caught.value)
    assert "no answer after 3 attempts, the last one: no connection" in message
    assert f"7 of 10 replies are there, kept in {cache}: the same call goes on from there" in message
    with pytest.raises(EndpointError, match="0 of 1 replies are there, not kept"):
        ask(endpoint(server, attempts=1), questions(1), text)


@pytest.mark.parametrize(("fault", "words"), [("429", "slowly"), ("500", "503"), ("hang", "no reply within 0.2 s")])
def test_faults_that_do_not_pass_end_the_call(fault: str, words: str, tmp_path: Path) -> None:
    with serving(Server(rate=1.0, faults=[fault])) as server:
        with pytest.raises(EndpointError, match=f"no answer after 3 attempts.*{words}"):
            ask(endpoint(server, attempts=3, timeout=0.2, concurrency=1), questions(4), text)
        assert list(server.asked.values()) == [3]


def test_replies_on_their_way_are_kept_when_another_request_ends_the_call(tmp_path: Path) -> None:
    def slow_but_one(body: Mapping[str, Any]) -> Any:
        if prompt_of(body) == "question 0":
            return b"[" * 3_000_000  # too large
        time.sleep(0.8)
        return by_content(body)

    cache = tmp_path / "c.jsonl"
    with serving(Server(reply=slow_but_one)) as server:
        wire_limit = wire.LARGEST_REPLY
        wire.LARGEST_REPLY = 2**20  # pyright: ignore
        try:
            with pytest.raises(EndpointError, match="a reply is larger than 1 MB.*3 of 9 replies"):
                ask(endpoint(server, concurrency=4, timeout=5.0), questions(9), text, cache=cache)
        finally:
            wire.LARGEST_REPLY = wire_limit  # pyright: ignore
        assert len(lines(cache)) == 3


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_a_status_that_passes_is_waited_out(status: int) -> None:
    class Once(Server):
        def fault(self, content: str, attempt: int) -> str | None:
            self.status = status if attempt == 1 else None
            return None

    with serving(Once()) as server:
        assert ask(endpoint(server), questions(1), text) == expected(questions(1))
        assert list(server.asked.values()) == [2]


@pytest.mark.parametrize("dated", [False, True])
def test_a_pause_that_the_server_asks_for_is_kept(dated: bool) -> None:
    class Slowly(Server):
        def fault(self, content: str, attempt: int) -> str | None:
            self.times.append(time.monotonic())
            self.status = 429 if attempt == 1 else None
            return None

    server = Slowly()
    server.times = []  # type: ignore[attr-defined]
    with serving(server):
        when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        server.headers = {"Retry-After": when if dated else "0.7"}
        assert ask(endpoint(server), questions(1), text) == expected(questions(1))
        first, second = server.times  # type: ignore[attr-defined]
        assert second - first >= (0.9 if dated else 0.7)
        assert second - first < 3


def test_a_pause_that_is_too_long_is_not_waited_for() -> None:
    with serving(Server(status=429, headers={"Retry-After": "3600"})) as server:
        began = time.monotonic()
        with pytest.raises(EndpointError, match="asks for a pause of 3600 s: make the same call later"):
            ask(endpoint(server), questions(1), text)
        assert time.monotonic() - began < 2
        assert sum(server.asked.values()) == 1


def test_a_reply_that_drips_is_late() -> None:
    """Every byte comes within the timeout, and the whole does not."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        import threading

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(40):
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        began = time.monotonic()
        with pytest.raises(EndpointError, match=r"no whole reply within 0.3 s"):
            ask(Endpoint(url, "m", timeout=0.3, attempts=1), questions(1), text)
        assert time.monotonic() - began < 1.5


def test_an_error_of_the_reader_itself_is_raised_and_not_counted() -> None:
    def wrong(reply: Mapping[str, Any]) -> str:
        raise ZeroDivisionError("mine")

    with serving(Server()) as server, pytest.raises(ZeroDivisionError, match="mine"):
        ask(endpoint(server, concurrency=1), questions(3), wrong)
    assert sum(server.asked.values()) == 1


def test_half_a_surrogate_pair_in_a_reply_can_be_kept(tmp_path: Path) -> None:
    with serving(Server(reply=lambda _: b'{"choices": [{"message": {"content": "\\ud83d 7"}}]}')) as server:
        fresh = ask(endpoint(server), questions(1), text, cache=tmp_path / "c.jsonl")
        assert fresh == ["? 7"] == ask(endpoint(server), questions(1), text, cache=tmp_path / "c.jsonl")


def test_a_torn_last_line_is_cut_off_and_its_reply_asked_for_again(tmp_path: Path) -> None:
    cache, wanted = tmp_path / "c.jsonl", questions(4)
    with serving(Server()) as server:
        ask(endpoint(server, concurrency=1), wanted, text, cache=cache)
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-9])
        assert ask(endpoint(server), wanted, text, cache=cache) == expected(wanted)
        assert cache.read_bytes() == whole
        assert sorted(server.asked.values()) == [1, 1, 1, 2]
        cache.write_bytes(b"xx" + whole)
        with pytest.raises(EndpointError, match="holds something other than replies"):
            ask(endpoint(server), wanted, text, cache=cache)
        cache.write_bytes(whole.replace(b'"reply": {', b'"reply": [', 1))
        with pytest.raises(RunFolderError, match="line 1 is damaged"):
            ask(endpoint(server), wanted, text, cache=cache)


def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("a line\nand one without an end")
    with pytest.raises(EndpointError, match="give another file for the cache"):
        ask(Endpoint("http://localhost:1/v1", "m"), questions(1), text, cache=other)
    assert other.read_text() == "a line\nand one without an end"


def test_a_cache_is_shared_by_calls_at_the_same_time(tmp_path: Path) -> None:
    """Also with lines that another call appends meanwhile."""
    cache = tmp_path / "c.jsonl"
    answers: list[Any] = []

    def nested(reply: Mapping[str, Any]) -> str:
        if not answers:
            answers.append(ask(endpoint(server), questions(3), text, cache=cache))
        return text(reply)

    with serving(Server()) as server:
        assert ask(endpoint(server, concurrency=1), questions(2), nested, cache=cache) == expected(questions(2))
        assert answers == [expected(questions(3))]
        asked = sum(server.asked.values())
        assert asked <= 5
        assert ask(endpoint(server), questions(3), text, cache=cache) == expected(questions(3))
        assert sum(server.asked.values()) == asked


def test_a_line_that_a_killed_run_left_does_not_spoil_the_next(tmp_path: Path) -> None:
    cache = tmp_path / "c.jsonl"

    def torn(reply: Mapping[str, Any]) -> str:
        with cache.open("ab") as file:
            file.write(b'{"key": "half a li')
        return text(reply)

    with serving(Server()) as server:
        ask(endpoint(server, concurrency=1), questions(3), torn, cache=cache)
        before = sum(server.asked.values())
        assert ask(endpoint(server), questions(3), text, cache=cache) == expected(questions(3))
        assert sum(server.asked.values()) == before
    assert len(lines(cache)) == 3


def test_a_cache_is_written_and_counted_by_one_at_a_time(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    cache = tmp_path / "c.jsonl"
    with serving(Server()) as server:
        ask(endpoint(server), questions(1), text, cache=cache)
        for call in (lambda: usage(cache), lambda: ask(endpoint(server), questions(2), text, cache=cache)):
            with cache.open("ab") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
                thread = threading.Thread(target=call, daemon=True)
                thread.start()
                thread.join(0.3)
                assert thread.is_alive(), "it waits for the other"
            thread.join(10)
            assert not thread.is_alive()
        kept = opened(cache)
        with cache.open("ab") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            thread = threading.Thread(target=kept.add, args=([Reply("k", {}, 0)],), daemon=True)
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        thread.join(10)
    assert len(lines(cache)) == 3


def test_two_processes_write_one_cache(tmp_path: Path) -> None:
    """Every line stays whole, nothing is lost."""
    cache = tmp_path / "c.jsonl"
    code = (
        "import sys; from pathlib import Path; from persona_lens.endpoints import Endpoint, Request, ask\n"
        "said = [[{'role': 'user', 'content': f'{sys.argv[2]} {i}'}] for i in range(60)]\n"
        "wanted = [Request('chat/completions', {'messages': m}) for m in said]\n"
        "found = ask(Endpoint(sys.argv[1], 'm'), wanted, lambda r: r['choices'][0], cache=Path(sys.argv[3]))\n"
        "assert len(found) == 60"
    )
    with serving(Server()) as server:
        running = [subprocess.Popen([sys.executable, "-c", code, server.url, name, str(cache)]) for name in ("a", "b")]
        assert [p.wait(timeout=60) for p in running] == [0, 0]
    records = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len({r["key"] for r in records}) == len(records) == 120


def test_no_proxy_stands_between_this_machine_and_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(Server()) as server:
        assert ask(endpoint(server, attempts=1), questions(1), text) == expected(questions(1))


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_endpoints import questions, text
from persona_lens.endpoints import Endpoint, ask
ask(Endpoint(sys.argv[2], "m", concurrency=4), questions(int(sys.argv[4])), text, cache=Path(sys.argv[3]))
"""


def killed(url: str, cache: Path, n: int, at: int) -> None:
    """Ask in a process of its own, which is killed when its cache holds `at` lines."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(Path(__file__).parent), url, str(cache), str(n)], env={**os.environ})
    until = time.monotonic() + 60
    while not cache.exists() or cache.read_bytes().count(b"\n") < at:
        assert child.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_killed_run_goes_on_and_asks_for_nothing_that_was_kept(tmp_path: Path) -> None:
    cache, wanted = tmp_path / "c.jsonl", questions(120)
    with serving(Server(delay=0.03)) as server:
        killed(server.url, cache, len(wanted), at=30)
        whole = cache.read_bytes()[: cache.read_bytes().rfind(b"\n") + 1]
        kept = {json.loads(line)["key"] for line in whole.splitlines()}
        assert 30 <= len(kept) < 100
        time.sleep(0.1)
        before = server.asked.copy()
        assert ask(endpoint(server), wanted, text, cache=cache) == expected(wanted)
        again = {c for c, n in server.asked.items() if n > before[c]}
    assert cache.read_bytes().startswith(whole)
    assert len(lines(cache)) == len({r["key"] for r in lines(cache)}) == len(wanted)
    assert len(again) == len(wanted) - len(kept)
    by_prompt = {prompt_of(r.body): r.digest(str(endpoint(server))) for r in wanted}
    assert kept <= set(by_prompt.values())
    assert not {by_prompt[prompt_of(json.loads(c))] for c in again} & kept
