"""System prompts: held-out templates in trained words, neutral prompts in the same templates, contrastive pairs."""

import random
import re
from functools import cache

import pytest

from persona_lens.pocket.instructions import (
    DEGREES,
    FREQUENCIES,
    NEUTRAL_ADJECTIVES,
    NEUTRAL_HABITS,
    ROLE_TEMPLATES,
    TEMPLATES,
    TRAIT_WORDS,
    contrast,
    neutral_system,
    role_system,
    trait_clause,
    trait_system,
    with_article,
)
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import LEVELS
from persona_lens.pocket.questions import SPLITS
from persona_lens.pocket.roles import ROLES

HELD_OUT = ("development", "test")


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text))


def one_of(phrases) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, phrases), key=len, reverse=True)) + ")"


def pattern(template: str, adjectives, habits) -> str:
    """A template as a pattern: any degree of these adjectives, any frequency of these habits."""
    degrees = one_of(["{}", *(d for ds in DEGREES.values() for d in ds)]).replace(r"\{\}", one_of(adjectives))
    frequency = one_of(f for fs in FREQUENCIES.values() for f in fs)
    slots = {"{A}": degrees, "{aA}": f"an? {degrees}", "{H}": f"{frequency} {one_of(habits)}"}
    return "".join(slots.get(piece, re.escape(piece)) for piece in re.split(r"(\{\w+\})", template))


TRAIT_ADJECTIVES = [a for w in TRAIT_WORDS.values() for a in (*w.adjectives, *w.antonyms)]
TRAIT_HABITS = [h for w in TRAIT_WORDS.values() for h in w.habits]
NEUTRAL_CLAUSE = "(?:" + "|".join(pattern(t, NEUTRAL_ADJECTIVES, NEUTRAL_HABITS) for t in TEMPLATES["train"]) + ")"


def held_out_pattern(split: str) -> re.Pattern[str]:
    traits = [pattern(t, (*TRAIT_ADJECTIVES, *NEUTRAL_ADJECTIVES), (*TRAIT_HABITS, *NEUTRAL_HABITS)) for t in TEMPLATES[split]]
    roles = [t.replace(".", r"\.").replace("{aA}", f"an? {one_of(r.name for r in ROLES)}") for t in ROLE_TEMPLATES[split]]
    return re.compile("|".join((*traits, *roles)))


def some_trait_prompt(rng: random.Random, split: str) -> str:
    named = rng.sample(TRAITS, rng.choice((1, 2, 3)))
    return trait_system(rng, [(trait, rng.choice(LEVELS)) for trait in named], split)


@cache
def trait_prompts(split: str) -> tuple[str, ...]:
    rng = random.Random(0)
    return tuple(some_trait_prompt(rng, split) for _ in range(3000))


@cache
def neutral_prompts(split: str) -> tuple[str, ...]:
    rng = random.Random(1)
    return tuple(neutral_system(rng, split) for _ in range(1500))


@cache
def trained_words() -> frozenset[str]:
    """Words of the trait prompts of the training split, in their case."""
    return frozenset().union(*map(words, trait_prompts("train")))


@pytest.mark.parametrize("split", HELD_OUT)
def test_every_word_of_a_held_out_template_occurs_in_a_training_template(split: str) -> None:
    def of(templates) -> set[str]:
        return set().union(*(words(re.sub(r"\{\w+\}", "", template)) for template in templates))

    assert of(TEMPLATES[split]) <= of(TEMPLATES["train"])
    assert of(ROLE_TEMPLATES[split]) <= of(ROLE_TEMPLATES["train"]) | of(TEMPLATES["train"])
    assert {word.lower() for word in of(ROLE_TEMPLATES[split])} <= {word.lower() for word in of(ROLE_TEMPLATES["train"])}


@pytest.mark.parametrize("split", HELD_OUT)
def test_every_word_of_a_contrast_occurs_with_traits_in_training(split: str) -> None:
    used = set().union(*(words(text) for trait in TRAITS for pair in contrast(trait, split) for text in pair))
    assert used <= trained_words()


@pytest.mark.parametrize("split", HELD_OUT)
def test_every_word_of_a_held_out_trait_prompt_occurs_with_traits_in_training(split: str) -> None:
    assert set().union(*map(words, trait_prompts(split))) <= trained_words()
    marker = {"modern", "calendar", "office"}  # words that only neutral prompts have would not pass
    assert not marker & trained_words()
    assert marker <= set().union(*map(words, neutral_prompts("train")))


def test_held_out_templates_are_no_training_templates() -> None:
    for templates in (TEMPLATES, ROLE_TEMPLATES):
        flat = [t for split in SPLITS for t in templates[split]]
        assert len(set(flat)) == len(flat)


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_prompts_never_appear_in_training(split: str) -> None:
    held_out = held_out_pattern(split)
    rng = random.Random(2)
    roles = [role_system(rng, role) for role in ROLES for _ in range(20)]
    assert not [text for text in (*trait_prompts("train"), *neutral_prompts("train"), *roles) if held_out.search(text)]
    shown = (*trait_prompts(split)[:200], *neutral_prompts(split)[:200], *(role_system(rng, role, split) for role in ROLES))
    assert all(held_out.search(text) for text in shown)
    assert all(held_out.search(text) for trait in TRAITS for pair in contrast(trait, split) for text in pair)


def test_neutral_prompts_are_training_templates_with_neutral_words() -> None:
    whole = re.compile(f"{NEUTRAL_CLAUSE}(?: {NEUTRAL_CLAUSE})?")
    assert all(whole.fullmatch(text) for text in neutral_prompts("train"))
    assert not any(whole.fullmatch(text) for text in trait_prompts("train"))


def test_neutral_prompts_use_every_training_template() -> None:
    for template in TEMPLATES["train"]:
        used = re.compile(pattern(template, NEUTRAL_ADJECTIVES, NEUTRAL_HABITS))
        assert any(used.search(text) for text in neutral_prompts("train"))


def test_neutral_words_say_nothing_about_a_trait() -> None:
    assert not {*NEUTRAL_ADJECTIVES} & {*TRAIT_ADJECTIVES}
    assert not {*NEUTRAL_HABITS} & {*TRAIT_HABITS}
    assert set(TRAIT_WORDS) == set(TRAITS)


def test_no_adjective_or_habit_speaks_for_two_traits() -> None:
    for phrases in (TRAIT_ADJECTIVES, TRAIT_HABITS):
        assert len(set(phrases)) == len(phrases)


def test_every_degree_and_frequency_names_one_level() -> None:
    for table in (DEGREES, FREQUENCIES):
        assert set(table) == set(LEVELS)
        phrases = [phrase for level in LEVELS for phrase in table[level]]
        assert len(set(phrases)) == len(phrases)


@pytest.mark.parametrize("trait", TRAITS)
def test_a_clause_speaks_of_its_trait_at_its_level(trait: str) -> None:
    spoken = TRAIT_WORDS[trait]
    rng = random.Random(3)
    for level in LEVELS:
        adjectives = {d.format(a) for d in DEGREES[level] for a in spoken.adjectives}
        adjectives |= set(spoken.adjectives) if level == 1.0 else set(spoken.antonyms) if level == 0.0 else set()
        assert {trait_clause(rng, trait, level, "{A}") for _ in range(150)} <= adjectives
        habits = {f"{f} {h}" for f in FREQUENCIES[level] for h in spoken.habits}
        assert {trait_clause(rng, trait, level, "{H}") for _ in range(150)} == habits


@pytest.mark.parametrize("split", HELD_OUT)
@pytest.mark.parametrize("trait", TRAITS)
def test_contrast_gives_five_distinct_pairs_one_for_each_template(trait: str, split: str) -> None:
    pairs = contrast(trait, split)
    assert len(pairs) == 5
    assert len({text for pair in pairs for text in pair}) == 10
    for (positive, negative), template in zip(pairs, TEMPLATES[split], strict=True):
        spoken = TRAIT_WORDS[trait]
        for_it = [template.format(A=f"extremely {a}", aA=f"an extremely {a}", H="") for a in spoken.adjectives]
        for_it += [template.format(A="", aA="", H=f"always {h}") for h in spoken.habits]
        against = [template.format(A=a, aA=with_article(a), H="") for a in spoken.antonyms]
        against += [template.format(A=f"not at all {a}", aA="", H="") for a in spoken.adjectives]
        against += [template.format(A="", aA="", H=f"never {h}") for h in spoken.habits]
        assert positive in for_it
        assert negative in against
        assert negative not in for_it


def test_contrasts_of_two_traits_and_of_two_splits_share_no_instruction() -> None:
    texts = [text for split in HELD_OUT for trait in TRAITS for pair in contrast(trait, split) for text in pair]
    assert len(set(texts)) == len(texts) == 2 * 7 * 10


def test_a_trait_prompt_has_one_clause_per_trait_from_distinct_templates() -> None:
    rng = random.Random(4)
    for n in (1, 2, 3):
        text = trait_system(rng, [(trait, 1.0) for trait in TRAITS[:n]])
        assert text.count(".") == n
        for trait in TRAITS[:n]:
            assert any(phrase in text for phrase in (*TRAIT_WORDS[trait].adjectives, *TRAIT_WORDS[trait].habits))


def test_a_role_prompt_names_the_role() -> None:
    rng = random.Random(5)
    for split in SPLITS:
        for role in ROLES:
            article = "an" if role.name in ("explorer",) else "a"
            assert f"{article} {role.name}" in role_system(rng, role, split)


@pytest.mark.parametrize(("phrase", "with_it"), [("evil", "an evil"), ("pirate", "a pirate"), ("optimistic", "an optimistic")])
def test_the_article_goes_with_the_first_letter(phrase: str, with_it: str) -> None:
    assert with_article(phrase) == with_it


@pytest.mark.parametrize(("phrase", "with_it"), [("a little evil", "a little evil"), ("useful", "a useful")])
def test_the_article_is_good_english(phrase: str, with_it: str) -> None:
    assert with_article(phrase) == with_it
