"""Prompts: every instruction meets every question once, under stable ids, and extraction never sees an evaluation question."""

import re
from typing import Any

import pytest

from persona_lens.prompts import POLARITIES, Polarity, evaluation_prompts, extraction_prompts, system_prompt
from persona_lens.traits import TRAIT_SETS, Adjectives, Trait, list_traits, load_trait

ALL: tuple[Polarity, ...] = ("positive", "negative", "neutral")
SHIPPED = [load_trait(name, trait_set) for trait_set in TRAIT_SETS for name in list_traits(trait_set)]


def changed(**changes: Any) -> Trait:
    return load_trait("evil").model_copy(update=changes)


@pytest.mark.parametrize("trait", SHIPPED, ids=lambda t: t.name)
def test_every_instruction_meets_every_question_once(trait: Trait) -> None:
    for make, questions in ((extraction_prompts, trait.extraction_questions), (evaluation_prompts, trait.evaluation_questions)):
        for polarity in POLARITIES:
            prompts = make(trait, polarity)
            assert len(prompts) == 100
            expected = {(system_prompt(trait, polarity, i), q) for i in range(5) for q in questions}
            assert {(p.system, p.user) for p in prompts} == expected
        assert [p.user for p in make(trait, "neutral")] == list(questions)


@pytest.mark.parametrize("trait", SHIPPED, ids=lambda t: t.name)
def test_ids_are_unique_and_say_what_the_prompt_is(trait: Trait) -> None:
    prompts = [p for polarity in ALL for make in (extraction_prompts, evaluation_prompts) for p in make(trait, polarity)]
    assert len({p.id for p in prompts}) == len(prompts) == 2 * (100 + 100 + 20)
    for p in prompts:
        instruction = "-" if p.instruction is None else f"i{p.instruction}"
        assert re.fullmatch(rf"{trait.name}/{p.polarity}/{instruction}/[xe]{p.question:02d}", p.id)


def test_ids_are_the_same_for_ever() -> None:
    trait = load_trait("evil")
    assert [extraction_prompts(trait, "positive")[i].id for i in (0, 1, 20, 99)] == [
        "evil/positive/i0/x00",
        "evil/positive/i0/x01",
        "evil/positive/i1/x00",
        "evil/positive/i4/x19",
    ]
    assert extraction_prompts(trait, "neutral")[7].id == "evil/neutral/-/x07"
    assert evaluation_prompts(trait)[19].id == "evil/neutral/-/e19"
    assert evaluation_prompts(trait, "negative")[21].id == "evil/negative/i1/e01"


def test_ids_do_not_depend_on_the_wording() -> None:
    other = changed(rubric="{question} {answer}", adjectives=None)
    assert [p.id for p in extraction_prompts(other, "positive")] == [
        p.id for p in extraction_prompts(load_trait("evil"), "positive")
    ]


def test_positive_prompts_carry_the_positive_instruction() -> None:
    trait = load_trait("evil")
    for polarity in POLARITIES:
        for p in extraction_prompts(trait, polarity):
            assert p.instruction is not None
            pair = trait.instructions[p.instruction]
            mine, other = (pair.positive, pair.negative) if polarity == "positive" else (pair.negative, pair.positive)
            assert p.system is not None
            assert p.system.endswith(mine)
            assert other not in p.system
            assert p.user == trait.extraction_questions[p.question]


@pytest.mark.parametrize(
    ("adjective", "article"),
    [
        ("evil", "an"),
        ("apathetic", "an"),
        ("Optimistic", "an"),
        ("impolite", "an"),
        ("polite", "a"),
        ("Rude", "a"),
        ("helpful", "a"),
    ],
)
def test_the_article_agrees_with_the_adjective(adjective: str, article: str) -> None:
    trait = changed(adjectives=Adjectives(positive=adjective, negative="plain"))
    assert system_prompt(trait, "positive", 2) == f"You are {article} {adjective} assistant. {trait.instructions[2].positive}"
    assert system_prompt(trait, "negative", 0) == f"You are a plain assistant. {trait.instructions[0].negative}"


def test_without_adjectives_the_instruction_stands_alone() -> None:
    trait = changed(adjectives=None)
    assert system_prompt(trait, "negative", 1) == trait.instructions[1].negative


@pytest.mark.parametrize("trait", SHIPPED, ids=lambda t: t.name)
def test_extraction_and_evaluation_never_meet(trait: Trait) -> None:
    seen = {p.user for polarity in ALL for p in extraction_prompts(trait, polarity)}
    held_out = {p.user for polarity in ALL for p in evaluation_prompts(trait, polarity)}
    assert len(seen) == len(held_out) == 20
    assert not seen & held_out


def test_neutral_prompts_have_no_system_message_and_the_others_do() -> None:
    trait = load_trait("evil")
    for make in (extraction_prompts, evaluation_prompts):
        for p in make(trait, "neutral"):
            assert (p.system, p.instruction) == (None, None)
            assert p.messages == [{"role": "user", "content": p.user}]
        for p in make(trait, "positive"):
            assert p.messages == [{"role": "system", "content": p.system}, {"role": "user", "content": p.user}]


def test_evaluation_is_neutral_unless_it_is_told_otherwise() -> None:
    trait = load_trait("evil")
    assert evaluation_prompts(trait) == evaluation_prompts(trait, "neutral") != evaluation_prompts(trait, "positive")
