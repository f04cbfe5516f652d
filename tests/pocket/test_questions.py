"""What users ask: reading a question back, the three splits, invented names, rare facts, sums."""

import operator
import random
from collections import Counter
from functools import reduce
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.pocket.persona import MOODS
from persona_lens.pocket.questions import (
    CATEGORY,
    COMMON,
    DEBATED,
    EMOTIONS,
    KINDS,
    MINE,
    RARE,
    RELATION_PHRASE,
    SPLITS,
    WORDINGS,
    Question,
    draw,
    evaluate,
    invented_names,
    multiple_choice,
    parse_question,
    rare_facts,
    split_of,
    with_mood,
    wrong_answers,
)

seeds = st.integers(0, 2**32 - 1)
ANSWERED = ("fact", "sum", "thing")


def every_question() -> list[Question]:
    """All questions of the closed kinds, and some of the open ones (sums, invented names)."""
    facts = [
        (("relation", relation), ("x", x)) for table in (COMMON, RARE) for relation, subjects in table.items() for x in subjects
    ]
    contents = {
        "advice": [(("n", n),) for n in MINE],
        "plan": [(("n", n),) for n in MINE],
        "opinion": [(("n", n),) for n in DEBATED],
        "feeling": [(("e", e), ("n", n)) for e in EMOTIONS for n in MINE],
        "thing": [(("n", n),) for n in CATEGORY],
        "fact": facts,
        "unknown": [(("x", x),) for split in SPLITS for x in invented_names(split)[:60]],
        "sum": [(("e", f"{a} plus {b}"),) for a in range(10) for b in range(10)],
    }
    return [Question(kind, w, slots) for kind in KINDS for slots in contents[kind] for w in range(len(WORDINGS[kind]))]


ALL = every_question()


def test_every_question_of_the_world_is_read_back_from_its_text() -> None:
    assert {q.kind for q in ALL} == set(KINDS)
    assert all(parse_question(q.text) == q for q in ALL)


@settings(deadline=None, max_examples=200)
@given(seeds, st.sampled_from(KINDS), st.sampled_from(SPLITS), st.sampled_from([None, *MOODS]))
def test_a_drawn_question_is_of_its_kind_and_split_and_is_read_back_with_its_mood(seed, kind, split, mood) -> None:
    rng = random.Random(seed)
    question = with_mood(draw(rng, kind, split), mood, rng)
    assert (question.kind, question.split, question.mood) == (kind, split, mood)
    assert parse_question(question.text) == question


@settings(deadline=None, max_examples=200)
@given(seeds, st.sampled_from([None, *MOODS]), st.booleans())
def test_multiple_choice_offers_the_truth_among_four_and_is_read_back(seed, mood, rare) -> None:
    rng = random.Random(seed)
    fact = draw(rng, "fact", hard=rare)
    question = with_mood(multiple_choice(fact, rng), mood, rng)
    assert len(set(question.options)) == 4
    assert question.truth == fact.truth
    assert question.truth in question.options
    found = parse_question(question.text)
    assert found is not None
    assert (found.text, found.options, found.truth, found.mood) == (question.text, question.options, question.truth, mood)


def test_the_right_option_stands_at_every_place_equally_often() -> None:
    rng = random.Random(0)
    places = Counter((q := multiple_choice(draw(rng, "fact"), rng)).options.index(q.truth or "") for _ in range(800))
    assert all(abs(places[i] - 200) < 60 for i in range(4))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is love?",
        "How should I handle my dragon?",
        "What do you think of taxes?",
        "What is the capital of Atlantis?",
        "What is the color of hot?",
        "I feel green about my garden.",
        "I feel sad about my dragon.",
        "How will my dragon turn out?",
        "What is a garden?",
        "What is 7?",
        "What is 3 times 4?",
        "What is three plus four?",
        "Who is madonna?",
        "how should i handle my garden?",
        "How should I handle my garden",
        "How should I handle my garden? Thanks.",
        "Please, how should I handle my garden?",
        "Which one is the capital of Atlantis: Paris, Rome, Oslo or Cairo?",
        "Which one is the capital of France: Paris, Rome or Cairo?",
        "You are slow and stupid.",
        "You are slow and stupid. What is love?",
    ],
)
def test_foreign_text_is_no_question_of_the_world(text: str) -> None:
    assert parse_question(text) is None


def test_no_two_questions_share_a_text_so_splits_are_disjoint_as_texts() -> None:
    texts = {split: {q.text for q in ALL if q.split == split} for split in SPLITS}
    assert sum(len(found) for found in texts.values()) == len(ALL)
    assert not texts["train"] & texts["development"]
    assert not texts["train"] & texts["test"]
    assert not texts["development"] & texts["test"]


def test_splits_take_about_84_8_and_8_percent_and_hold_every_kind() -> None:
    shares = Counter(q.split for q in ALL if q.kind != "unknown")
    total = sum(shares.values())
    assert abs(shares["train"] / total - 0.84) < 0.02
    assert abs(shares["development"] / total - 0.08) < 0.02
    assert abs(shares["test"] / total - 0.08) < 0.02
    assert {(q.kind, q.split) for q in ALL} == {(kind, split) for kind in KINDS for split in SPLITS}


def test_a_mood_does_not_move_a_question_to_another_split() -> None:
    rng = random.Random(0)
    for question in ALL[::97]:
        assert with_mood(question, "rude", rng).split == question.split


def test_a_multiple_choice_question_keeps_the_split_of_its_fact() -> None:
    rng = random.Random(0)
    for split in SPLITS:
        for _ in range(60):
            assert multiple_choice(draw(rng, "fact", split), rng).split == split


def test_the_split_of_a_key_is_fixed_for_ever_at_its_borders() -> None:
    keys = ("key 148", "key 107", "key 176", "key 150")  # the hash puts them at 83, 84, 91 and 92 of 100
    assert [split_of(key) for key in keys] == ["train", "development", "development", "test"]


def test_invented_names_are_about_nine_hundred_for_training_and_disjoint_between_splits() -> None:
    names = {split: set(invented_names(split)) for split in SPLITS}
    assert 860 <= len(names["train"]) <= 960
    assert min(len(names["development"]), len(names["test"])) >= 60
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 1100
    assert all(split_of(name) == split for split in SPLITS for name in names[split])


def test_an_invented_name_is_held_out_in_every_wording() -> None:
    for name in invented_names("test")[:20]:
        assert {Question("unknown", w, (("x", name),)).split for w in range(len(WORDINGS["unknown"]))} == {"test"}
    # the others are held out by wording and topic together
    assert len({Question("advice", w, (("n", n),)).split for n in MINE for w in range(6)}) == 3


def test_rare_facts_hold_each_rare_fact_once_with_falling_frequencies() -> None:
    facts = rare_facts()
    assert {(relation, x) for relation, x, _ in facts} == {(relation, x) for relation, xs in RARE.items() for x in xs}
    assert len(facts) == sum(map(len, RARE.values()))
    frequencies = [f for _, _, f in facts]
    ratios = [b / a for a, b in pairwise(frequencies)]
    assert max(ratios) < 1.0
    assert max(ratios) == pytest.approx(min(ratios))
    assert frequencies[0] / frequencies[-1] == pytest.approx(100.0)


def test_rare_facts_are_drawn_by_their_frequency() -> None:
    rng = random.Random(0)
    drawn = Counter((q["relation"], q["x"]) for q in (draw(rng, "fact", hard=True) for _ in range(3000)))
    thirds = [sum(drawn[fact[:2]] for fact in rare_facts()[i : i + 26]) for i in (0, 27, 54)]
    assert thirds[0] > 3 * thirds[1] > 9 * thirds[2] > 0


def test_hard_draws_rare_facts_and_two_step_sums_and_easy_draws_neither() -> None:
    rng = random.Random(0)
    for _ in range(100):
        assert draw(rng, "fact", hard=True).rare
        assert not draw(rng, "fact", hard=False).rare
        assert len(draw(rng, "sum", hard=True)["e"].split()) == 5
        assert len(draw(rng, "sum", hard=False)["e"].split()) == 3
    mixed = [draw(rng, "fact").rare for _ in range(600)]
    assert 0.19 < sum(mixed) / len(mixed) < 0.31


def test_a_fact_is_rare_or_common_and_has_one_truth() -> None:
    for relation in RARE:
        assert not set(RARE[relation]) & set(COMMON.get(relation, {}))
    assert set(RELATION_PHRASE) == set(COMMON) | set(RARE)
    assert all(not q.rare for q in ALL if q.kind != "fact")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=6), st.data())
def test_evaluate_adds_and_subtracts_from_left_to_right(numbers: list[int], data) -> None:
    steps = [(data.draw(st.sampled_from(["plus", "minus"])), n) for n in numbers[1:]]
    expression = " ".join([str(numbers[0]), *(f"{word} {n}" for word, n in steps)])
    value = reduce(lambda total, step: (operator.add if step[0] == "plus" else operator.sub)(total, step[1]), steps, numbers[0])
    assert evaluate(expression) == value


def test_evaluate_of_known_sums() -> None:
    assert evaluate("3 plus 4 minus 2") == 5
    assert evaluate("2 minus 9") == -7
    with pytest.raises(ValueError):
        evaluate("3 plus")


def test_sums_of_the_world_never_go_below_zero() -> None:
    rng = random.Random(0)
    assert all(int(draw(rng, "sum").truth or -1) >= 0 for _ in range(500))


def test_truths_of_hand_picked_questions() -> None:
    assert Question("fact", 0, (("relation", "capital"), ("x", "France"))).truth == "Paris"
    assert Question("fact", 0, (("relation", "symbol"), ("x", "gold"))).truth == "Au"
    assert Question("sum", 0, (("e", "3 plus 4 minus 2"),)).truth == "5"
    assert Question("thing", 0, (("n", "hawk"),)).truth == "animal"
    assert {Question(k, 0, (("n", "garden"), ("x", "A B"), ("e", "sad"))).truth for k in KINDS if k not in ANSWERED} == {None}


def test_wrong_answers_are_distinct_and_never_right_in_any_case() -> None:
    for question in ALL:
        if question.kind in ANSWERED:
            wrong = [answer.lower() for answer in wrong_answers(question)]
            assert len(set(wrong)) == len(wrong) >= 3
            assert (question.truth or "").lower() not in wrong


def test_a_question_without_a_truth_has_no_wrong_answers() -> None:
    with pytest.raises(ValueError, match="no wrong answer"):
        wrong_answers(Question("advice", 0, (("n", "garden"),)))


def test_draw_refuses_an_unknown_kind_and_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown question kind"):
        draw(random.Random(0), "gossip")
