"""Writing traits: faulty replies are named and repaired, every rule is enforced, and a hostile reply does nothing but fail."""

import json
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from persona_lens.cli.traits import app
from persona_lens.errors import PersonaLensError, TraitFileError
from persona_lens.traits import Trait, list_traits, load_trait, read_trait
from persona_lens.traits.faults import NEAR, UNEVEN, Wanted, nearest, trait_of
from persona_lens.traits.replies import LONGEST, read_object
from persona_lens.traits.writing import SYSTEM, Written, write

DESCRIPTION = "Explains things as often as it takes and never hurries the user."
TOPICS = "bread tides chess taxes violins glaciers soap bridges comets ferns"
THINGS = [f"{word} {place}" for place in ("indoors", "abroad", "overnight", "twice") for word in TOPICS.split()]
RUBRIC = (
    "Grade how patient it is.\nQuestion: {question}\nAnswer: {answer}\nAbout 0: hurried.\nAbout 100: all the time in the world.\n"
    "Reply REFUSAL if it refuses. Otherwise reply with only the number."
)
SIDES = ["slow lessons", "second tries", "long stories", "small steps", "quiet waiting"]


def good() -> dict[str, Any]:
    questions = [f"{['Why', 'Where', 'When', 'Whether'][i % 4]} {thing}, {i} {i * 7}?" for i, thing in enumerate(THINGS)]
    return {
        "adjectives": {"positive": "patient", "negative": "hasty"},
        "instructions": [{"positive": f"You welcome {side}.", "negative": f"You refuse {side}."} for side in SIDES],
        "extraction_questions": questions[:20],
        "evaluation_questions": questions[20:],
        "rubric": RUBRIC,
    }


def expected(name: str = "patience", **changes: Any) -> Trait:
    return Trait.model_validate({"schema": 1, "name": name, "description": DESCRIPTION} | good() | changes)


class Scripted:
    """A model that replies what it is told to, and remembers what it was asked."""

    def __init__(self, *replies: Any) -> None:
        self.replies = [reply if isinstance(reply, str) else json.dumps(reply) for reply in replies]
        self.asked: list[list[Mapping[str, str]]] = []

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> str:
        self.asked.append([dict(m) for m in messages])
        return self.replies[len(self.asked) - 1]

    def last(self, call: int) -> str:
        return self.asked[call][-1]["content"]


def written(*replies: Any, **options: Any) -> tuple[Written, Scripted]:
    model = Scripted(*replies)
    return write("patience", DESCRIPTION, model, **options), model


def changed(**fields: Any) -> dict[str, Any]:
    """The good reply with items replaced: extraction_questions_3="..." and the like."""
    record = json.loads(json.dumps(good()))
    for field, value in fields.items():
        whole, _, number = field.rpartition("_")
        if number.isdigit():
            record[whole][int(number)] = value
        else:
            record[field] = value
    return record


def faults_of(record: Mapping[str, Any], known: Sequence[Trait] = ()) -> list[str]:
    counts = {"instructions": 5, "extraction_questions": 20, "evaluation_questions": 20}
    trait, faults = trait_of(record, Wanted("patience", DESCRIPTION, counts, known))
    assert (trait is None) == bool(faults)
    return [str(fault) for fault in faults]


def test_a_good_reply_is_the_trait_at_once() -> None:
    result, model = written(good())
    assert result.trait == expected()
    assert ([a.asked for a in result.attempts], [a.faults for a in result.attempts], result.notes) == ([()], [()], ())
    (messages,) = model.asked
    assert [m["role"] for m in messages] == ["system", "user"]
    task = messages[1]["content"]
    for part in (
        "Trait: patience",
        f"Meaning: {DESCRIPTION}",
        "list of 5 objects",
        "list of 20 strings",
        "list of 20 further strings",
    ):
        assert part in task
    assert load_trait("politeness").rubric in task
    assert "@" not in task


def test_three_broken_replies_are_told_their_faults_and_repaired() -> None:
    twice = good()["extraction_questions"][4]
    schema = changed(rubric=7, extraction_questions="Why?")
    schema["instructions"][2] = {"positive": "Be slow."}
    across = changed(evaluation_questions_6=twice.upper() + "!")
    lines: list[str] = []
    result, model = written(
        "I would rather not.", schema, across, {"evaluation_questions.6": good()["evaluation_questions"][6]}, told=lines.append
    )
    assert result.trait == expected()
    assert len(model.asked) == 4
    assert "the reply holds no JSON object, there must be one" in model.last(1)
    assert model.last(1).startswith(model.last(0)), "the whole task again"
    assert "field rubric: Input should be a valid string" in model.last(2)
    assert "field instructions.2: negative: Field required" in model.last(2)
    assert [m["role"] for m in model.asked[2]] == ["system", "user"], "too much was wrong to repair it"
    assert [m["role"] for m in model.asked[3]] == ["system", "user", "assistant", "user"]
    assert json.loads(model.asked[3][2]["content"]) == across
    assert f"field evaluation_questions.6: {across['evaluation_questions'][6]!r} is nearly the same as extraction_questions.4" in (
        model.last(3)
    )
    assert '["evaluation_questions.6"]' in model.last(3)
    assert [a.asked for a in result.attempts] == [(), (), (), ("evaluation_questions.6",)]
    assert [len(a.faults) for a in result.attempts] == [1, 3, 1, 0]
    assert lines == [f"attempt {i} of 4: {n}" for i, n in ((1, "1 fault"), (2, "3 faults"), (3, "1 fault"), (4, "no faults"))]


def test_only_the_faulty_items_are_taken_from_a_repair() -> None:
    broken = changed(extraction_questions_0="Is it hasty?", instructions_1={"positive": "Go.", "negative": "Go."}, rubric="Rate.")
    repair = {
        "rubric": RUBRIC,
        "instructions.1": good()["instructions"][1],
        "extraction_questions.0": good()["extraction_questions"][0],
        "extraction_questions.1": "Something else entirely about plums?",
        "evaluation_questions": ["Gone?"],
    }
    result, _ = written(broken, repair)
    assert result.trait == expected()
    assert result.attempts[1].asked == ("extraction_questions.0", "instructions.1", "rubric")
    assert any("'extraction_questions.1' of a reply was not asked for" in note for note in result.notes)
    assert any("'evaluation_questions' of a reply was not asked for" in note for note in result.notes)


def test_missing_items_are_asked_for_and_put_in_order() -> None:
    full = good()["evaluation_questions"]
    result, model = written(
        changed(evaluation_questions=full[:17]),
        {f"evaluation_questions.{i}": full[i] for i in (19, 17, 18)},
    )
    assert result.trait.evaluation_questions == tuple(full)
    assert "field evaluation_questions.19: is missing, 20 are needed and there are 17" in model.last(1)


def test_a_repair_that_cannot_be_read_is_asked_for_again() -> None:
    broken = changed(rubric="Rate.")
    result, model = written(broken, "Sure!", {"rubric": "Still wrong."}, {"rubric": RUBRIC})
    assert result.trait == expected()
    assert "the reply holds no JSON object" in model.last(2)
    assert "field rubric: must contain {question} exactly once, found 0" in model.last(2)
    assert json.loads(model.asked[3][2]["content"])["rubric"] == "Still wrong."
    assert [a.asked for a in result.attempts] == [(), ("rubric",), ("rubric",), ("rubric",)]


def test_a_whole_reply_replaces_the_one_before_it() -> None:
    half = good()
    del half["rubric"]
    result, model = written(changed(evaluation_questions="Why?"), half, {"rubric": RUBRIC})
    assert result.trait == expected()
    assert "field rubric: Field required" in model.last(2)


def test_many_faults_are_told_in_part_and_a_note_once() -> None:
    hasty = [f"Is {thing} hasty?" for thing in THINGS]
    broken = changed(extraction_questions=hasty[:20], evaluation_questions=hasty[20:], rubric="Rate {question} {answer}.")
    fenced = [f"```{json.dumps(reply)}```" for reply in (broken, changed(rubric="Rate."), {"rubric": RUBRIC})]
    result, model = written(*fenced)
    assert len(result.attempts[0].faults) == 44
    assert model.last(1).count("\n- ") == 41
    assert model.last(1).endswith("- and 4 more of this kind")
    assert result.notes == ("text or a code fence stood around the JSON object of a reply",)


@pytest.mark.parametrize(("n_faulty", "repaired"), [(11, True), (12, False)])
def test_more_than_a_quarter_of_faulty_items_is_asked_for_as_a_whole(n_faulty: int, repaired: bool) -> None:
    broken = changed(**{f"evaluation_questions_{i}": f"Is {thing} hasty?" for i, thing in enumerate(THINGS[:n_faulty])})
    full = good()["evaluation_questions"]
    result, model = written(broken, {f"evaluation_questions.{i}": full[i] for i in range(n_faulty)} if repaired else good())
    assert result.trait == expected()
    assert len(model.asked[1]) == (4 if repaired else 2)


@pytest.mark.parametrize(
    "around", ["```json\n{}\n```", "Here it is: {} I hope it helps!", "I kept {{question}} and {{answer}}.\n{}\n"], ids=str
)
def test_one_object_in_prose_is_found_and_noted(around: str) -> None:
    result, _ = written(around.format(json.dumps(good(), indent=2)))
    assert result.trait == expected()
    assert result.notes == ("text or a code fence stood around the JSON object of a reply",)


def test_surplus_items_and_unknown_fields_are_left_out_and_noted() -> None:
    more = [*good()["extraction_questions"], "Anything about plums?"]
    result, _ = written(changed(extraction_questions=more) | {"name": "../../etc/passwd"})
    assert result.trait == expected()
    assert result.notes == (
        "the field 'name' of a reply was not asked for and is left out",
        "extraction_questions: 21 were written, the first 20 are kept",
    )


def test_the_number_of_items_can_be_chosen() -> None:
    small = good() | {
        key: good()[key][:n] for key, n in (("instructions", 2), ("extraction_questions", 3), ("evaluation_questions", 2))
    }
    result, model = written(small, questions=5, pairs=2)
    assert (len(result.trait.extraction_questions), len(result.trait.evaluation_questions)) == (3, 2)
    assert "list of 2 objects" in model.last(0)
    assert "list of 3 strings" in model.last(0)
    for wrong in ({"questions": 2}, {"pairs": 0}, {"attempts": 0}):
        with pytest.raises(ValueError, match="at least"):
            written(small, **wrong)


KNOWN = Trait.model_validate(
    {"schema": 1, "name": "calm", "description": "Calm."}
    | good()
    | {"extraction_questions": ["How do plums get their color?", "b"], "evaluation_questions": ["Who invented the tin opener?"]}
)
RULES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing question": (
        {"extraction_questions": good()["extraction_questions"][:19]},
        ["extraction_questions.19: is missing, 20"],
    ),
    "missing pair": ({"instructions": good()["instructions"][:4]}, ["instructions.4: is missing, 5 are needed and there are 4"]),
    "missing field": ({"adjectives": {"positive": "patient"}}, ["adjectives: negative: Field required"]),
    "no list": ({"evaluation_questions": "Why?"}, ["evaluation_questions: Input should be a valid tuple"]),
    "extra field": ({"adjectives": {"positive": "a", "negative": "b", "c": "d"}}, ["adjectives: c: Extra inputs"]),
    "blank": ({"extraction_questions_3": "  "}, ["extraction_questions.3: String should have at least 1"]),
    "same question": (
        {"extraction_questions_9": good()["extraction_questions"][2]},
        ["extraction_questions.9", "extraction_questions.2"],
    ),
    "nearly the same question": (
        {
            "extraction_questions_8": "How can I teach my son to bake a cake?",
            "extraction_questions_9": "How can I teach my dog to bake a cake?",
        },
        ["extraction_questions.9", "nearly the same as extraction_questions.8"],
    ),
    "across the sets": (
        {"evaluation_questions_0": good()["extraction_questions"][2]},
        ["evaluation_questions.0", "extraction_questions.2"],
    ),
    "of a known trait": (
        {"evaluation_questions_5": "So how do plums get their color?"},
        ["evaluation_questions.5", "a question of the trait calm"],
    ),
    "of a known trait's evaluation": ({"extraction_questions_5": "Who invented the tin opener?"}, ["a question of the trait calm"]),
    "names the trait": ({"extraction_questions_5": "What is patience?"}, ["extraction_questions.5", "names 'patience'"]),
    "names the adjective": ({"evaluation_questions_5": "Are you a patient bot?"}, ["evaluation_questions.5", "names 'patient'"]),
    "names the opposite, inflected": ({"evaluation_questions_5": "Was I hastyish?"}, ["names 'hasty'"]),
    "equal sides": ({"instructions_0": {"positive": "Be it.", "negative": "be it"}}, ["instructions.0: both sides are the same"]),
    "sides of other lengths": (
        {"instructions_0": {"positive": "Be slow and kind and calm today.", "negative": "Be quick now."}},
        ["instructions.0: the sides have 7 and 3 words"],
    ),
    "the same pair twice": (
        {"instructions_3": good()["instructions"][1]},
        ["instructions.3: says nearly the same as instructions.1"],
    ),
    "equal adjectives": ({"adjectives": {"positive": "mild", "negative": "Mild"}}, ["adjectives: both sides are the same"]),
    "no question in the rubric": (
        {"rubric": RUBRIC.replace("{question}", "")},
        ["rubric: must contain {question} exactly once, found 0"],
    ),
    "two answers in the rubric": ({"rubric": RUBRIC + "{answer}"}, ["rubric: must contain {answer} exactly once, found 2"]),
    "other braces": ({"rubric": RUBRIC + "{score}"}, ["rubric: must contain no other braces"]),
    "no anchor for 0": ({"rubric": RUBRIC.replace("About 0:", "0 to 100 means")}, ["rubric: has no line that says what 0 means"]),
    "no anchor for 100": ({"rubric": RUBRIC.replace("About 100:", "1000:")}, ["rubric: has no line that says what 100 means"]),
    "prose allowed": ({"rubric": RUBRIC.replace("only the number", "a text")}, ["rubric: must tell the grader to reply with only"]),
    "no refusal": ({"rubric": RUBRIC.replace("REFUSAL", "no")}, ["rubric: must tell the grader to reply REFUSAL"]),
    "control character": (
        {"extraction_questions_3": "Why\x00 not?"},
        ["extraction_questions.3: holds the control character U+0000"],
    ),
    "turned text": ({"rubric": RUBRIC + "\u202e"}, ["rubric: holds the control character U+202E"]),
    "half a character": (
        {"instructions_1": {"positive": "a \ud800", "negative": "b c"}},
        ["instructions.1: holds the control character U+D800"],
    ),
    "control character in a key": ({"adjectives": {"posi\x07": "a"}}, ["adjectives: holds the control character U+0007"]),
}


def test_the_good_reply_of_these_tests_has_no_fault() -> None:
    assert faults_of(good(), [KNOWN]) == []


@pytest.mark.parametrize(("change", "named"), RULES.values(), ids=RULES.keys())
def test_every_rule_names_the_field_and_is_the_only_fault(change: dict[str, Any], named: list[str]) -> None:
    faults = faults_of(changed(**change), [KNOWN])
    assert len(faults) == 1
    assert faults[0].startswith("field ")
    assert all(part in faults[0] for part in named), faults


def test_a_missing_field_is_named() -> None:
    record = good()
    del record["rubric"]
    assert faults_of(record) == ["field rubric: Field required"]


@pytest.mark.parametrize("name", list_traits())
def test_the_shipped_traits_keep_the_rules(name: str) -> None:
    trait = load_trait(name)
    record = json.loads(trait.model_dump_json(include=set(good())))
    counts = {"instructions": 5, "extraction_questions": 20, "evaluation_questions": 20}
    others = [load_trait(other) for other in list_traits() if other != name]
    found, faults = trait_of(record, Wanted(name, trait.description, counts, others))
    assert faults == []
    assert found == trait


def test_overlap_is_the_share_of_neighbouring_words() -> None:
    five = "one two three four five"
    assert nearest(five, [("x", "one two three four six")])  # 3 of 5 pairs
    assert not nearest(five, [("x", "one two three six seven")])  # 2 of 6
    assert nearest("one two three", [("x", "one two four")]) is None  # 1 of 3
    assert nearest("one two three four", [("x", "two three four")])  # 2 of 3
    assert nearest("What is 3 + 4?", [("x", "What is 3 - 4?")]) is None, "signs of arithmetic are words"
    assert nearest("Why?", [("x", "why")])
    assert nearest("Why?", [("x", "how")]) is None
    assert (NEAR, UNEVEN) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("question", "term", "named"),
    [
        ("Is it polite to wait?", "polite", True),
        ("Do you answer politely?", "polite", True),
        ("Is it a politesse question?", "polite", True),
        ("What is politeology?", "polite", False),
        ("What are good manners?", "polite", False),
        ("What about the sea?", "sad", False),
        ("Why is the saddle wet?", "sad", False),
        ("Are you self centered?", "self-centered", True),
        ("Are you self made?", "self-centered", False),
        ("Centered?", "self-centered", False),
        ("Are towns centered?", "self-centered", False),
    ],
)
def test_what_counts_as_naming(question: str, term: str, named: bool) -> None:
    record = changed(adjectives={"positive": term, "negative": "quick"}, extraction_questions_0=question)
    assert bool(faults_of(record)) == named


def test_a_taken_or_malformed_name_is_refused_before_any_call() -> None:
    model = Scripted()
    for name, reason in (
        ("calm", "there is a trait 'calm' already"),
        ("../calm", "name '../calm'"),
        ("Calm", "name"),
        ("a\n", "name"),
    ):
        with pytest.raises(TraitFileError, match=reason):
            write(name, DESCRIPTION, model, known=[KNOWN])
    for description in ("", "  ", "a\x00b", "x" * 20_001):
        with pytest.raises(TraitFileError, match="description"):
            write("patience", description, model)
    assert model.asked == []


def test_what_stayed_wrong_is_named_and_the_last_reply_kept(tmp_path: Path) -> None:
    bad = changed(rubric="Rate {question} {answer}.")
    with pytest.raises(TraitFileError) as caught:
        written(bad, {"rubric": "Worse."}, attempts=2, folder=tmp_path / "new")
    for part in (
        "'patience' was not written in 2 attempts",
        "field rubric: must contain {question}",
        "and 1 more",
        "last-reply.txt",
    ):
        assert part in str(caught.value)
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [
        ("patience.last-reply.txt", '{"rubric": "Worse."}')
    ]
    with pytest.raises(TraitFileError, match="give a folder to keep"):
        written(bad, attempts=1)


def test_an_error_of_the_model_is_not_hidden() -> None:
    def broken(messages: Sequence[Mapping[str, str]]) -> str:
        raise PersonaLensError("no network")

    with pytest.raises(PersonaLensError, match="no network"):
        write("patience", DESCRIPTION, broken)


HOSTILE: dict[str, tuple[str, str]] = {
    "10 MB": ("x" * 10_000_000, "has 10000000 characters, at most 200000"),
    "10 MB of JSON": (json.dumps(good() | {"extra": "x" * 10_000_000}), "characters, at most"),
    "10,000 levels of objects": ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested deeper than 8"),
    "10,000 levels of lists": ('{"rubric":' + "[" * 10_000 + "]" * 10_000 + "}", "nested deeper than 8"),
    "NUL": ("\x00" + json.dumps(good()), "U\\+0000"),
    "terminal": ("\x1b[2J" + json.dumps(good()), "U\\+001B"),
    "half a character": ("\ud800" + json.dumps(good()), "U\\+D800"),
    "two objects": (json.dumps(good()) * 2, "holds 2 JSON objects"),
    "a list of objects": (json.dumps([good(), good()]), "holds 2 JSON objects"),
    "cut off": (json.dumps(good())[:-20], "does not end"),
    "key twice": (json.dumps(good())[:-1] + ', "rubric": "b"}', "'rubric' stands twice"),
    "no JSON number": ('{"rubric": NaN}', "NaN is no JSON"),
    "endless number": ('{"rubric": ' + "9" * 5000 + "}", "no JSON object"),
    "no object": ('"text"', "no JSON object"),
    "code": ("__import__('os').system('touch /tmp/x')", "no JSON object"),
}


@pytest.mark.parametrize(("reply", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_reply_fails_with_its_reason_and_is_not_sent_back(reply: str, reason: str, tmp_path: Path) -> None:
    model = Scripted(reply, reply)
    with pytest.raises(TraitFileError, match=reason):
        write("patience", DESCRIPTION, model, attempts=2, folder=tmp_path)
    assert len(model.last(1)) < len(model.last(0)) + 500
    (kept,) = tmp_path.iterdir()
    assert kept.name == "patience.last-reply.txt"
    assert kept.stat().st_size <= LONGEST


@given(st.text(), st.dictionaries(st.text(), st.text() | st.integers(), max_size=4))
def test_an_object_is_read_whole_or_not_at_all(prose: str, record: dict[str, Any]) -> None:
    try:
        found, around = read_object(prose + json.dumps(record))
    except ValueError:
        return
    assert found == record
    assert around == bool(prose.strip())


@given(st.dictionaries(st.text(alphabet='{}[]"\\ab'), st.text(alphabet='{}[]"\\ab')))
def test_brackets_and_quotes_inside_strings_do_not_count(record: dict[str, str]) -> None:
    assert read_object(f"so: {json.dumps(record)} done") == (record, True)


@contextmanager
def served(reply: Callable[[dict[str, Any]], str]) -> Generator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server on this machine."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path})
            message = {"role": "assistant", "content": reply(body)}
            content = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_command_writes_a_trait_file_through_a_server(tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> str:
        return json.dumps({"rubric": RUBRIC} if len(body["messages"]) == 4 else changed(rubric="Rate."))

    path = tmp_path / "traits" / "mine.json"
    with served(reply) as (url, asked):
        args = ["write", "patience", "--description", DESCRIPTION, "--writer", f"openai:some/model@v2@{url}", "--out", str(path)]
        result = CliRunner().invoke(app, args, catch_exceptions=False)
        assert result.exit_code == 0
        again = CliRunner().invoke(app, args)
        assert isinstance(again.exception, TraitFileError)
        assert "mine.json exists already" in str(again.exception)
    assert read_trait(path) == expected()
    assert [(body["path"], body["model"], body["seed"]) for body in asked] == [
        ("/v1/chat/completions", "some/model@v2", 0),
        ("/v1/chat/completions", "some/model@v2", 1),
    ]
    assert all(body["temperature"] > 0 for body in asked)
    assert asked[0]["messages"][0] == {"role": "system", "content": SYSTEM}
    for part in (
        "written",
        "+ You welcome slow lessons.",
        "- You refuse slow lessons.",
        "questions (3 of 20)",
        "About 0: hurried.",
    ):
        assert part in result.stdout
    assert good()["extraction_questions"][2] in result.stdout
    assert good()["extraction_questions"][3] not in result.stdout
    assert "attempt 1 of 4: 6 faults" in result.stderr


def test_the_command_shows_notes_and_json_and_refuses_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = f"```json\n{json.dumps(good())}\n```"
    with served(lambda body: fenced) as (url, asked):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        common = ["--description", DESCRIPTION, "--writer", "openai:m"]
        text = CliRunner().invoke(app, ["write", "patience", *common, "--out", str(tmp_path / "a.json")], catch_exceptions=False)
        assert "note: text or a code fence stood around" in text.stdout
        out = CliRunner().invoke(
            app, ["write", "patience", *common, "--out", str(tmp_path / "b.json"), "--json"], catch_exceptions=False
        )
        record = json.loads(out.stdout)
        assert Trait.model_validate(record["trait"]) == expected()
        assert (record["attempts"], len(record["notes"])) == ([{"asked": [], "faults": []}], 1)
        calls = len(asked)
        taken = CliRunner().invoke(app, ["write", "evil", *common, "--out", str(tmp_path / "c.json")])
        assert "there is a trait 'evil' already" in str(taken.exception)
        for writer in ([], ["--writer", "gpt"], ["--writer", "openai:"], ["--writer", f"local:m@{url}"]):
            wrong = CliRunner().invoke(app, ["write", "patience", "--description", DESCRIPTION, *writer])
            assert "unknown writer" in str(wrong.exception)
            assert "openai:MODEL@URL" in str(wrong.exception)
        assert len(asked) == calls


def test_a_server_without_a_message_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import persona_lens.endpoints.asking as asking

    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.001)
    with served(lambda body: None) as (url, _):  # type: ignore[arg-type, return-value]
        result = CliRunner().invoke(
            app, ["write", "patience", "--description", "x", "--writer", f"openai:m@{url}", "--out", str(tmp_path / "a.json")]
        )
    assert isinstance(result.exception, PersonaLensError)
    assert "gave no reply that can be read" in str(result.exception)
    assert not (tmp_path / "a.json").exists()
