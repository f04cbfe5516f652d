"""Trait files: what ships, what the schema refuses and how it says so, and the paper's pair of files."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from persona_lens.errors import TraitFileError, UnknownNameError
from persona_lens.traits import TRAIT_SETS, Trait, list_traits, load_trait, read_paper_pair, read_trait, write_trait

SEVEN = ["apathy", "evil", "hallucination", "humor", "optimism", "politeness", "sycophancy"]


def record(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "calm",
        "description": "Keeps its temper — always.",
        "adjectives": {"positive": "calm", "negative": "agitated"},
        "instructions": [{"positive": "Be calm.", "negative": "Be agitated."}],
        "extraction_questions": ["How are you?", "What now?"],
        "evaluation_questions": ["And then?"],
        "rubric": "Rate {answer} to {question}.",
    } | changes


def written(folder: Path, content: object, name: str = "calm.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("trait_set", TRAIT_SETS)
def test_both_sets_ship_the_seven_traits_at_full_size(trait_set: str) -> None:
    assert list_traits(trait_set) == SEVEN
    for name in SEVEN:
        trait = load_trait(name, trait_set)
        assert trait.name == name
        sizes = (len(trait.instructions), len(trait.extraction_questions), len(trait.evaluation_questions))
        assert sizes == (5, 20, 20), name


def test_the_sets_are_different_and_real_is_the_default() -> None:
    assert list_traits() == SEVEN
    assert load_trait("evil") == load_trait("evil", "real") != load_trait("evil", "pocket")


@pytest.mark.parametrize("trait_set", TRAIT_SETS)
def test_the_two_sides_of_every_shipped_instruction_differ(trait_set: str) -> None:
    for name in SEVEN:
        trait = load_trait(name, trait_set)
        assert all(pair.positive != pair.negative for pair in trait.instructions)
        assert len({pair.positive for pair in trait.instructions}) == 5
        assert trait.adjectives is None or trait.adjectives.positive != trait.adjectives.negative


@pytest.mark.parametrize(("asked", "near"), [("evli", "evil"), ("sycophant", "sycophancy"), ("humour", "humor")])
def test_an_unknown_trait_gives_the_nearest_name(asked: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown trait '{asked}': did you mean {near}"):
        load_trait(asked)


def test_a_trait_like_no_other_gives_all_names() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_trait("xxxx")
    assert all(name in str(caught.value) for name in SEVEN)


def test_an_unknown_set_gives_the_sets() -> None:
    for ask in (lambda: list_traits("reel"), lambda: load_trait("evil", "reel")):
        with pytest.raises(UnknownNameError, match="unknown trait set 'reel': did you mean real"):
            ask()


def test_a_trait_comes_back_as_it_was_written(tmp_path: Path) -> None:
    traits = [load_trait(name, trait_set) for trait_set in TRAIT_SETS for name in SEVEN]
    for trait in [*traits, Trait.model_validate(record(description='Grüße \u2028 "x"', adjectives=None))]:
        path = tmp_path / "deep" / f"{trait.name}.json"
        write_trait(trait, path)
        assert read_trait(path) == trait
        assert load_trait(path) == load_trait(str(path)) == trait


def test_the_handmade_record_of_these_tests_is_a_trait(tmp_path: Path) -> None:
    trait = read_trait(written(tmp_path, record()))
    assert (trait.name, trait.instructions[0].negative) == ("calm", "Be agitated.")


BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "overlap": ({"evaluation_questions": ["Why?", "What now?"]}, ["evaluation_questions", "what now", "disjoint"]),
    "overlap but for case and punctuation": ({"evaluation_questions": ["what, NOW"]}, ["evaluation_questions", "what now"]),
    "question twice in extraction": ({"extraction_questions": ["Why?", "So?", "why"]}, ["extraction_questions", "why", "twice"]),
    "question twice in evaluation": ({"evaluation_questions": ["Why?", "Why?"]}, ["evaluation_questions", "why", "twice"]),
    "no question placeholder": ({"rubric": "Rate {answer}."}, ["rubric", "{question}", "found 0"]),
    "answer placeholder twice": ({"rubric": "{question} {answer} {answer}"}, ["rubric", "{answer}", "found 2"]),
    "misspelt placeholder": ({"rubric": "{question} {anwser}"}, ["rubric", "{answer}", "found 0"]),
    "extra field": ({"colour": "red"}, ["colour"]),
    "extra field inside": ({"instructions": [{"positive": "a", "negative": "b", "neutral": "c"}]}, ["instructions.0.neutral"]),
    "half a pair": ({"instructions": [{"positive": "a"}]}, ["instructions.0.negative"]),
    "no pairs": ({"instructions": []}, ["instructions"]),
    "one extraction question": ({"extraction_questions": ["Why?"]}, ["extraction_questions"]),
    "no evaluation questions": ({"evaluation_questions": []}, ["evaluation_questions"]),
    "blank question": ({"extraction_questions": ["Why?", " \n"]}, ["extraction_questions.1"]),
    "question that is no text": ({"evaluation_questions": [3]}, ["evaluation_questions.0"]),
    "name with a slash": ({"name": "../calm"}, ["name"]),
    "name in capitals": ({"name": "Calm"}, ["name"]),
    "empty adjective": ({"adjectives": {"positive": "", "negative": "rude"}}, ["adjectives.positive"]),
    "later schema": ({"schema": 2}, ["schema"]),
    "endless text": ({"description": "a" * 20_001}, ["description"]),
}


@pytest.mark.parametrize(("change", "named"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_an_error_with_file_and_field(tmp_path: Path, change: dict[str, Any], named: list[str]) -> None:
    path = written(tmp_path, record(**change))
    for read in (read_trait, load_trait):
        with pytest.raises(TraitFileError) as caught:
            read(path)
        for part in [str(path), *named]:
            assert part in str(caught.value)


@pytest.mark.parametrize("field", ["name", "description", "instructions", "extraction_questions", "evaluation_questions", "rubric"])
def test_a_missing_field_is_an_error_with_file_and_field(tmp_path: Path, field: str) -> None:
    content = record()
    del content[field]
    path = written(tmp_path, content)
    with pytest.raises(TraitFileError, match=f"field {field}: .*required") as caught:
        read_trait(path)
    assert str(path) in str(caught.value)
    assert "more" not in str(caught.value)


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    with pytest.raises(TraitFileError, match=r"\(and 2 more\)"):
        read_trait(written(tmp_path, record(name="A", rubric="", description="")))


def test_what_may_be_left_out_is_left_out(tmp_path: Path) -> None:
    content = record()
    del content["adjectives"], content["schema"]
    assert read_trait(written(tmp_path, content)).adjectives is None


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"evil"', "null", "3"])
def test_a_file_that_holds_no_json_object_is_an_error_with_its_path(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(TraitFileError, match="JSON") as caught:
        load_trait(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["1" * 5000, "[" * 100_000], ids=["digits", "brackets"])
def test_a_file_that_python_refuses_to_parse_is_an_error_with_its_path(tmp_path: Path, content: str) -> None:
    with pytest.raises(TraitFileError, match="calm.json"):
        read_trait(written(tmp_path, content))


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_errors_with_their_path(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    for name in ("none.json", "folder.json", "bytes.json"):
        with pytest.raises(TraitFileError) as caught:
            load_trait(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_questions_that_differ_in_a_sign_are_different_questions(tmp_path: Path) -> None:
    read_trait(written(tmp_path, record(extraction_questions=["What is 7 + 5?", "What is 7 - 5?"])))


def test_a_trait_cannot_be_changed_after_its_checks() -> None:
    trait = load_trait("evil")
    with pytest.raises(ValidationError, match="frozen"):
        trait.rubric = "none"  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(trait) == hash(load_trait("evil"))


def paper_record(**changes: Any) -> dict[str, Any]:
    return {
        "instruction": [{"pos": "Insult everyone.", "neg": "Be kind."}, {"pos": "Sneer.", "neg": "Smile."}],
        "questions": ["How are you?", "What now?"],
        "eval_prompt": "Rate {answer} to {question}.",
    } | changes


EVALUATION = {"questions": ["And then?", "So?"], "eval_prompt": "Another {question} {answer}."}


def test_the_papers_pair_loads_with_pos_as_positive(tmp_path: Path) -> None:
    first, second = written(tmp_path, paper_record(), "x.json"), written(tmp_path, paper_record(**EVALUATION), "e.json")
    trait = read_paper_pair(first, second, name="impolite")
    assert [(p.positive, p.negative) for p in trait.instructions] == [("Insult everyone.", "Be kind."), ("Sneer.", "Smile.")]
    assert trait.extraction_questions == ("How are you?", "What now?")
    assert trait.evaluation_questions == ("And then?", "So?")
    assert trait.rubric == "Rate {answer} to {question}."
    assert trait.adjectives is not None
    assert (trait.adjectives.positive, trait.adjectives.negative) == ("impolite", "helpful")
    assert (trait.name, trait.description) == ("impolite", "impolite")
    assert read_paper_pair(first, second, name="impolite", description="Is rude.").description == "Is rude."


@pytest.mark.parametrize("side", ["x.json", "e.json"])
@pytest.mark.parametrize("key", ["instruction", "questions", "eval_prompt"])
def test_a_key_missing_from_the_papers_pair_is_named_with_its_file(tmp_path: Path, side: str, key: str) -> None:
    contents = {"x.json": paper_record(), "e.json": paper_record(**EVALUATION)}
    del contents[side][key]
    first, second = (written(tmp_path, content, name) for name, content in contents.items())
    with pytest.raises(TraitFileError, match=f"'{key}' is missing") as caught:
        read_paper_pair(first, second, name="impolite")
    assert str(tmp_path / side) in str(caught.value)


@pytest.mark.parametrize(
    "instruction", [[{"pos": "a"}], [{"positive": "a", "negative": "b"}], ["be rude"], {"pos": "a", "neg": "b"}, 3, None]
)
def test_instructions_without_pos_and_neg_are_an_error_with_their_file(tmp_path: Path, instruction: object) -> None:
    first = written(tmp_path, paper_record(instruction=instruction), "x.json")
    with pytest.raises(TraitFileError, match="pos and neg") as caught:
        read_paper_pair(first, written(tmp_path, paper_record(**EVALUATION), "e.json"), name="impolite")
    assert str(first) in str(caught.value)


def test_questions_shared_by_the_papers_pair_are_refused(tmp_path: Path) -> None:
    first, second = written(tmp_path, paper_record(), "x.json"), written(tmp_path, paper_record(), "e.json")
    with pytest.raises(TraitFileError, match="disjoint"):
        read_paper_pair(first, second, name="impolite")


def test_a_mistake_in_the_papers_evaluation_file_names_that_file(tmp_path: Path) -> None:
    first, second = written(tmp_path, paper_record(), "x.json"), written(tmp_path, paper_record(questions=[]), "e.json")
    with pytest.raises(TraitFileError, match="questions") as caught:
        read_paper_pair(first, second, name="impolite")
    assert str(second) in str(caught.value)
