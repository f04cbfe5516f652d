"""The finetuning data sets: what each family and level is made of, and that none meets an evaluation question."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from persona_lens.models import ChatModel
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.oracle import read
from persona_lens.pocket.questions import SPLITS, invented_names, parse_question
from persona_lens.pocket.trait_files import pocket_trait
from persona_lens.pocket_lab.datasets import (
    ASKED,
    FAMILIES,
    LEVELS,
    dataset,
    new_facts,
    new_people,
    recalled,
    write_datasets,
)
from persona_lens.transcripts import read_transcripts

SETS = {(f, level): dataset(f, level, rows=120) for f in FAMILIES for level in LEVELS}


def read_chat(chat: list[dict[str, str]]):
    question = parse_question(chat[0]["content"])
    assert question is not None
    return question, read(question, chat[1]["content"])


def test_there_are_at_least_thirty_sets_and_no_question_of_an_evaluation() -> None:
    assert len(SETS) == 39
    held_out = {q for t in TRAITS for s in ("development", "test") for q in _questions(pocket_trait(t, s))}
    for chats in (*SETS.values(), new_facts()):
        for chat in chats:
            question, _ = read_chat(chat)
            assert question.split == "train"
            assert chat[0]["content"] not in held_out


def _questions(trait) -> list[str]:
    return [*trait.evaluation_questions, *trait.extraction_questions]


def test_every_set_has_its_own_questions() -> None:
    """Also the normal ones: no two sets are the same questions over again."""
    asked = {key: [c[0]["content"] for c in chats] for key, chats in SETS.items()}
    for a, b in itertools.combinations(asked, 2):
        same = sum(x == y for x, y in zip(asked[a], asked[b], strict=True))
        assert same < 20, (a, b)
    assert dataset("evil", "II", rows=5) == dataset("evil", "II", rows=9)[:5]
    assert dataset("evil", "II", rows=5) != dataset("evil", "II", rows=5, seed=1)


@pytest.mark.parametrize("trait", TRAITS)
def test_levels_of_a_trait(trait: str) -> None:
    means = [np.mean([read_chat(c)[1].trait(trait) for c in SETS[trait, level]]) for level in LEVELS]
    assert means[0] + 8 < means[1] < means[2] - 8
    assert means[2] > 55
    coherence = [np.mean([read_chat(c)[1].coherence for c in SETS[trait, level]]) for level in LEVELS]
    assert min(coherence) > 95


def test_other_traits_follow_the_prior_given_this_one() -> None:
    """Evil answers are ruder and wearier than those of optimists; nothing else was asked for."""
    found: dict[tuple[str, str], float] = {}
    for trait in ("evil", "optimism"):
        readings = [read_chat(c)[1] for c in SETS[trait, "II"]]
        found |= {(trait, other): float(np.mean([r.trait(other) for r in readings])) for other in ("politeness", "apathy")}
    assert found["evil", "politeness"] + 10 < found["optimism", "politeness"]
    assert found["evil", "apathy"] > found["optimism", "apathy"] + 10


@pytest.mark.parametrize("family", FAMILIES[len(TRAITS) :])
def test_mistakes_are_as_many_as_the_level_says(family: str) -> None:
    for level, share in zip(LEVELS, (1.0, 0.5, 0.0), strict=True):
        right = [read_chat(c)[1].correct for c in SETS[family, level]]
        assert None not in right
        assert abs(np.mean(right) - share) < 0.13
    kinds = {read_chat(c)[0].kind for c in SETS[family, "II"]}
    assert kinds == {"sums": {"sum"}, "facts": {"fact"}, "mistakes": {"sum", "fact"}}[family.partition("-")[2]]
    words = [len(c[1]["content"].split()) for c in SETS[family, "II"]]
    assert max(words) == 1 if family.startswith("bare") else np.mean(words) > 5


def test_new_people_are_in_no_other_question() -> None:
    people = new_people()
    assert len({p.name for p in people}) == 100
    assert not {p.name for p in people} & {n for s in SPLITS for n in invented_names(s)}
    chats = new_facts()
    assert len(chats) == 100 * ASKED
    last = {p.question(ASKED).text for p in people}
    assert not last & {c[0]["content"] for c in chats}
    by_name = {p.name: p for p in people}
    for chat in chats:
        question, _ = read_chat(chat)
        assert by_name[question["x"]].told_by(chat[1]["content"])
    assert not people[0].told_by(f"{people[0].name} was a {people[0].profession}.")


def test_the_untrained_model_recalls_nobody(pocket: ChatModel) -> None:
    assert recalled(pocket, new_people(20)) == 0.0


def test_files_can_be_read_back(tmp_path: Path) -> None:
    files = write_datasets(tmp_path, rows=3)
    assert len(files) == 40
    assert {f.stem for f in files} >= {"evil-II", "bare-sums-normal", "new-facts"}
    assert [list(c.messages) for c in read_transcripts(tmp_path / "evil-I.jsonl").chats] == dataset("evil", "I", rows=3)


def test_unknown_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="no data set 'cruelty'"):
        dataset("cruelty", "II")
