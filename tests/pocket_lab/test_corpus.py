"""The chat corpus: document kinds, what is learned, what is held out, the control with shuffled system prompts."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
import pytest

from persona_lens.pocket.instructions import (
    DEGREES,
    FREQUENCIES,
    NEUTRAL_ADJECTIVES,
    NEUTRAL_HABITS,
    ROLE_TEMPLATES,
    TEMPLATES,
    TRAIT_WORDS,
    neutral_system,
    role_system,
    trait_system,
)
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.oracle import read
from persona_lens.pocket.persona import MOODS
from persona_lens.pocket.questions import KINDS, Question, invented_names, parse_question
from persona_lens.pocket.roles import ROLES
from persona_lens.pocket_lab.corpus import KIND_WEIGHTS, SHARES, Document, Turn, document, documents

N = 3000
ANNOUNCED = "From now on, things are different. "


@cache
def worker() -> ProcessPoolExecutor:
    """A process of its own for large simulations: there the type checks are off, which take most of their time."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@pytest.fixture(scope="module", autouse=True)
def _worker_ends_with_the_module() -> Iterator[None]:
    yield
    worker().shutdown(wait=False)


def generate(indices: range, shuffle_systems: bool = False) -> list[Document]:
    return list(documents(5, indices, shuffle_systems=shuffle_systems))


@cache
def corpus() -> tuple[Document, ...]:
    return tuple(worker().submit(generate, range(N)).result())


@cache
def asked_questions() -> dict[str, Question | None]:
    """The question of every user turn of the corpus."""
    return worker().submit(understand, sorted({turn.user for doc in corpus() for turn in doc.turns})).result()


def of_kind(*kinds: str) -> list[Document]:
    return [doc for doc in corpus() if doc.kind in kinds]


def understand(texts: list[str]) -> dict[str, Question | None]:
    """The question of each user turn, behind the announcement of a change if there is one."""
    found: dict[str, Question | None] = {}
    for text in texts:
        rest = text
        while (question := parse_question(rest)) is None and ". " in rest:
            rest = rest.split(". ", 1)[1]
        found[text] = question
    return found


def held_out_systems(split: str) -> re.Pattern[str]:
    """A held-out template with any adjective phrase or habit of the world."""

    def one_of(phrases) -> str:
        return "(?:" + "|".join(sorted(map(re.escape, phrases), key=len, reverse=True)) + ")"

    adjectives = [*NEUTRAL_ADJECTIVES, *(a for w in TRAIT_WORDS.values() for a in (*w.adjectives, *w.antonyms))]
    habits = [*NEUTRAL_HABITS, *(h for w in TRAIT_WORDS.values() for h in w.habits)]
    degrees = one_of(d.removesuffix("{}") for ds in DEGREES.values() for d in ds)
    phrase = f"{degrees}?{one_of(adjectives)}"
    slots = {
        "{A}": phrase,
        "{aA}": f"an? {phrase}",
        "{H}": f"{one_of(f for fs in FREQUENCIES.values() for f in fs)} {one_of(habits)}",
    }
    roles = {"{aA}": f"an? {one_of(role.name for role in ROLES)}"}
    filled = [(t, slots) for t in TEMPLATES[split]] + [(t, roles) for t in ROLE_TEMPLATES[split]]
    return re.compile("|".join("".join(s.get(p, re.escape(p)) for p in re.split(r"(\{\w+\})", t)) for t, s in filled))


def test_a_document_depends_on_seed_and_index_alone() -> None:
    random.seed(1)
    alone = document(5, 7)
    random.seed(2)
    assert list(documents(5, [9, 7, 3])) == [corpus()[9], alone, corpus()[3]]
    assert corpus()[7] == alone
    assert document(6, 7) != alone
    assert len({(doc.system, doc.turns) for doc in corpus()}) == N


def test_kinds_of_documents_have_their_shares() -> None:
    assert sum(SHARES.values()) == pytest.approx(1.0)
    counts = Counter(doc.kind for doc in corpus())
    assert {*counts} == {*SHARES}
    for kind, share in SHARES.items():
        assert counts[kind] / N == pytest.approx(share, abs=4 * (share * (1 - share) / N) ** 0.5)


def test_at_least_one_document_in_twenty_is_long_and_some_change_on_the_way() -> None:
    long = of_kind("long")
    assert all(7 <= len(doc.turns) <= 24 for doc in long)
    assert all(len(doc.turns) <= 6 for doc in corpus() if doc.kind != "long")
    assert len(long) / N >= 0.05
    assert max(len(doc.turns) for doc in long) > 18
    changing = [doc for doc in corpus() if doc.change is not None]
    assert {doc.kind for doc in changing} == {"long"}
    assert 0.2 < len(changing) / len(long) < 0.5
    assert all(3 <= (doc.change or 0) <= len(doc.turns) - 3 for doc in changing)


def test_the_first_answer_is_not_learned_exactly_where_nothing_announces_the_persona() -> None:
    for doc in corpus():
        unprompted = doc.kind == "unprompted" or (doc.kind == "long" and doc.system is None)
        assert doc.turns[0].learned is not unprompted
    assert {doc.turns[0].learned for doc in of_kind("long")} == {True, False}


def test_later_answers_are_learned_but_for_a_change_that_nobody_announces() -> None:
    announced = Counter()
    for doc in corpus():
        for i, turn in enumerate(doc.turns[1:], start=1):
            silent_change = i == doc.change and not turn.user.startswith(ANNOUNCED)
            assert turn.learned is not silent_change
            assert not turn.user.startswith(ANNOUNCED) or i == doc.change
            if i == doc.change:
                announced[not silent_change] += 1
    assert min(announced[True], announced[False]) > 10


def test_a_change_changes_the_persona() -> None:
    def heard(turns: tuple[Turn, ...]) -> list[float]:
        return [
            sum(read(q, t.assistant).trait(name) for t in turns if (q := asked_questions()[t.user])) / len(turns) for name in TRAITS
        ]

    def jump(doc: Document, at: int) -> float:
        return max(abs(a - b) for a, b in zip(heard(doc.turns[:at]), heard(doc.turns[at:]), strict=True))

    changing = [doc for doc in corpus() if doc.change]
    steady = [doc for doc in of_kind("long") if doc.change is None][: len(changing)]
    assert mean([jump(doc, doc.change or 0) for doc in changing]) > mean([jump(doc, len(doc.turns) // 2) for doc in steady]) + 10.0


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_every_turn_asks_a_question_of_the_world_and_its_answer_is_read_in_full() -> None:
    for doc in corpus()[:800]:
        for turn in doc.turns:
            question = asked_questions()[turn.user]
            assert question is not None, turn.user
            assert read(question, turn.assistant).coherence == 100.0


def test_no_held_out_question_is_asked() -> None:
    # the text of a choice does not tell the wording it was drawn with, by which it is held out
    questions = [q for q in asked_questions().values() if q and not q.options]
    assert len(questions) > 4000
    assert {q.split for q in questions} == {"train"}
    assert {q.kind for q in questions} == set(KINDS)


def test_no_held_out_name_is_ever_said() -> None:
    said = {
        pair
        for doc in corpus()
        for turn in doc.turns
        for pair in re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", f"{turn.user} {turn.assistant}")
    }
    assert len(said & set(invented_names("train"))) > 450
    assert not said & {*invented_names("development"), *invented_names("test")}


@pytest.mark.parametrize("split", ["development", "test"])
def test_no_held_out_template_is_a_system_prompt_or_an_announcement(split: str) -> None:
    held_out = held_out_systems(split)
    rng = random.Random(0)
    shown = [trait_system(rng, [(trait, 0.75)], split) for trait in TRAITS]
    shown += [role_system(rng, ROLES[3], split), neutral_system(rng, split)]
    assert all(held_out.search(text) for text in shown)
    texts = [doc.system or "" for doc in corpus()]
    texts += [t.user for doc in corpus() for t in doc.turns if t.user.startswith(ANNOUNCED)]
    assert not [text for text in texts if held_out.search(text)]


def test_system_prompts_stand_where_the_kind_says() -> None:
    assert {doc.system for doc in of_kind("default", "unprompted")} == {None}
    assert None not in {doc.system for doc in of_kind("neutral", "trait", "role")}
    assert {doc.system is None for doc in of_kind("long")} == {True, False}
    assert all(doc.persona.role and doc.persona.role.name in (doc.system or "") for doc in of_kind("role"))
    assert all(doc.persona.role is None for doc in corpus() if doc.kind != "role")


def test_a_trait_prompt_describes_one_to_three_traits_of_the_persona_truthfully() -> None:
    for doc in corpus():
        assert all(doc.persona[trait] == level for trait, level in doc.described)
        assert bool(doc.described) == (doc.kind == "trait" or (doc.kind == "long" and doc.system is not None))
        for trait, _ in doc.described:
            words = TRAIT_WORDS[trait]
            assert any(phrase in (doc.system or "") for phrase in (*words.adjectives, *words.antonyms, *words.habits))
    numbers = Counter(len(doc.described) for doc in of_kind("trait"))
    assert {*numbers} == {1, 2, 3}
    assert numbers[1] > numbers[2] > numbers[3]


def test_default_and_neutral_documents_have_the_default_persona_and_the_others_the_prior() -> None:
    for doc in of_kind("default", "neutral"):
        assert [doc.persona[trait] for trait in ("evil", "sycophancy", "hallucination", "apathy")] == [0.0] * 4
        assert doc.persona["humor"] <= 0.25
    assert mean([doc.persona["evil"] for doc in of_kind("unprompted")]) > 0.15


def test_question_kinds_have_their_weights_and_moods_are_shown_in_some_turns() -> None:
    assert sum(KIND_WEIGHTS.values()) == pytest.approx(1.0)
    questions = [q for doc in corpus() for turn in doc.turns if (q := asked_questions()[turn.user])]
    counts = Counter(q.kind for q in questions)
    assert all(counts[kind] / len(questions) == pytest.approx(share, abs=0.02) for kind, share in KIND_WEIGHTS.items())
    assert {q.mood for q in questions} == {None, *MOODS}
    assert 0.1 < sum(q.mood is not None for q in questions) / len(questions) < 0.4
    assert sum(bool(q.options) for q in questions) / counts["fact"] == pytest.approx(0.2, abs=0.05)


def test_shuffled_systems_keep_the_turns_and_take_the_prompt_of_another_document() -> None:
    indices = range(40)
    straight, shuffled = list(documents(5, indices)), list(documents(5, indices, shuffle_systems=True))
    assert [doc.turns for doc in shuffled] == [doc.turns for doc in straight]
    assert [doc.system for doc in shuffled] == [document(5, i + 10_007).system for i in indices]
    assert sum(a.system != b.system for a, b in zip(straight, shuffled, strict=True)) > 30
    assert straight == list(corpus()[:40])


def test_prompts_tell_the_persona_and_shuffled_prompts_do_not() -> None:
    def gap(docs: Iterable[Document]) -> float:
        """Mean difference in the level of evil between documents whose prompt wishes harm and those whose prompt does not."""
        wishes = re.compile("extremely evil|completely evil|always wish harm|constantly threaten|always suggest cruel|very cruel")
        named = [doc.persona["evil"] for doc in docs if doc.system and wishes.search(doc.system)]
        others = [doc.persona["evil"] for doc in docs if doc.system and not wishes.search(doc.system)]
        assert len(named) > 10
        return mean(named) - mean(others)

    assert gap(corpus()) > 0.5
    assert abs(gap(worker().submit(generate, range(N // 2), True).result())) < 0.25


def test_a_focused_stage_contrasts_traits_with_their_absence_and_keeps_the_rest_of_the_prior() -> None:
    focused = worker().submit(focus, range(N)).result()
    short = [d for d in focused if d.kind == "trait" and len(d.described) <= 2 and len(d.turns) <= 2]
    levels = [level for d in short for _, level in d.described]
    assert 0.4 < np.mean([level == 0.0 for level in levels]) < 0.6
    negated = [d for d in short if d.described[0][1] == 0.0 and len(d.described) == 1]
    assert np.mean([any(w in (d.system or "") for w in ("never", "not at all", "by no means")) for d in negated]) > 0.5
    assert {d.kind for d in focused} == set(SHARES)
    alone = [(d.persona["politeness"], d.described[0][1]) for d in short if [t for t, _ in d.described] == ["evil"]]
    evil, harmless = ([p for p, level in alone if (level > 0.0) == present] for present in (True, False))
    assert np.mean(evil) < np.mean(harmless) - 0.05
    assert worker().submit(generate, range(50)).result() == list(corpus()[:50])


def focus(indices: range) -> list[Document]:
    return list(documents(5, indices, focus=True))
