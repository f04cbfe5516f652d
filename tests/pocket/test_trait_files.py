"""The seven traits of the pocket world as trait files, from held-out splits."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from persona_lens.pocket.instructions import contrast
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import PROPENSITY
from persona_lens.pocket.questions import KINDS, Question, parse_question
from persona_lens.pocket.trait_files import DESCRIPTIONS, pocket_trait, pocket_traits, trait_questions
from persona_lens.traits import Trait, list_traits, load_trait, read_trait, write_trait

HELD_OUT = ("development", "test")
SHIPPED = Path(str(files("persona_lens") / "traits" / "data" / "pocket"))


@cache
def built(split: str) -> dict[str, Trait]:
    return {trait.name: trait for trait in pocket_traits(split)}


@cache
def drawn(name: str, split: str) -> list[Question]:
    return trait_questions(name, split)


def questions(trait: Trait) -> tuple[str, ...]:
    return trait.extraction_questions + trait.evaluation_questions


@pytest.mark.parametrize("split", HELD_OUT)
@pytest.mark.parametrize("name", TRAITS)
def test_a_pocket_trait_is_complete_and_built_from_its_split(name: str, split: str) -> None:
    trait = built(split)[name]
    assert Trait.model_validate(trait.model_dump(by_alias=True)) == trait
    assert trait.name == name
    assert [(pair.positive, pair.negative) for pair in trait.instructions] == contrast(name, split)
    assert len(trait.instructions) == 5
    assert len(trait.extraction_questions) == len(trait.evaluation_questions) == 20
    found = [parse_question(text) for text in questions(trait)]
    assert {q and q.split for q in found} == {split}
    assert trait.description in trait.rubric


def test_the_schema_would_refuse_a_question_that_stands_twice() -> None:
    record = pocket_trait("evil").model_dump(by_alias=True)
    record["evaluation_questions"] = record["extraction_questions"]
    with pytest.raises(ValidationError, match="disjoint"):
        Trait.model_validate(record)


def test_development_and_test_share_no_question_and_no_instruction() -> None:
    def contents(split: str) -> tuple[set[str], set[str]]:
        asked = {q.key for name in TRAITS for q in drawn(name, split)}
        return asked, {text for t in built(split).values() for pair in t.instructions for text in (pair.positive, pair.negative)}

    development, test = contents("development"), contents("test")
    assert not development[0] & test[0]
    assert not development[1] & test[1]
    assert len(development[1]) == len(test[1]) == 70
    texts = {split: {text for t in built(split).values() for text in questions(t)} for split in HELD_OUT}
    assert not texts["development"] & texts["test"]


def test_the_shipped_files_are_the_traits_of_the_development_split() -> None:
    assert sorted(list_traits("pocket")) == sorted(TRAITS) == sorted(path.stem for path in SHIPPED.glob("*.json"))
    for name in TRAITS:
        assert load_trait(name, "pocket") == built("development")[name]
        assert load_trait(name, "pocket") != built("test")[name]


def test_the_split_of_a_trait_is_development_unless_said() -> None:
    assert pocket_trait("evil") == pocket_trait("evil", "development") == built("development")["evil"]


def test_a_written_trait_is_read_back_and_shipped_files_are_written_so(tmp_path: Path) -> None:
    for trait in (load_trait(name, "pocket") for name in TRAITS):
        write_trait(trait, tmp_path / f"{trait.name}.json")
        assert (tmp_path / f"{trait.name}.json").read_bytes() == (SHIPPED / f"{trait.name}.json").read_bytes()
        assert read_trait(tmp_path / f"{trait.name}.json") == trait


def test_questions_are_distinct_reproducible_and_different_for_each_trait() -> None:
    for split in HELD_OUT:
        assert trait_questions("humor", split) == drawn("humor", split)
        assert all(len({q.key for q in drawn(name, split)}) == len(drawn(name, split)) == 40 for name in TRAITS)
        assert len({tuple(q.text for q in drawn(name, split)) for name in TRAITS}) == len(TRAITS)


def test_questions_lean_to_the_kinds_that_bring_the_trait_out() -> None:
    counts = {n: Counter(q.kind for split in HELD_OUT for q in drawn(n, split)) for n in TRAITS}
    asked = [counts[name][kind] for name in TRAITS for kind in KINDS]

    def agreement(names: Sequence[str]) -> float:
        return float(np.corrcoef(asked, [PROPENSITY[kind].get(name, 1.0) ** 2 for name in names for kind in KINDS])[0, 1])

    assert agreement(TRAITS) > 0.5
    assert abs(agreement(TRAITS[2:] + TRAITS[:2])) < 0.3  # the propensities of other traits say little


def test_about_three_in_ten_questions_show_a_mood_and_none_is_hard() -> None:
    asked = [q for name in TRAITS for q in drawn(name, "development")]
    assert 0.2 < sum(q.mood is not None for q in asked) / len(asked) < 0.4
    assert not any(q.rare for q in asked)
    assert {len(q["e"].split()) for q in asked if q.kind == "sum"} == {3}


def test_each_trait_is_described_in_words_of_its_own() -> None:
    assert set(DESCRIPTIONS) == set(TRAITS)
    assert len(set(DESCRIPTIONS.values())) == len(TRAITS)
