"""How personas answer: every answer is read by the oracle, and what it reads is the persona that spoke."""

import random
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import pairwise
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.pocket.grammar import GAIN, answer, bare_probability, gains, invention_probability, mistake_probabilities
from persona_lens.pocket.lexicon import MANNER, SLOTS, TRAITS
from persona_lens.pocket.oracle import Reading, read
from persona_lens.pocket.persona import LEVELS, MOODS, PROPENSITY, Persona, conditional, persona_of
from persona_lens.pocket.questions import KINDS, SPLITS, Question, draw, multiple_choice, parse_question, with_mood
from persona_lens.pocket.roles import ROLES, Role

BY_NAME = {role.name: role for role in ROLES}
NOBODY = Persona((0.0,) * len(TRAITS))
seeds = st.integers(0, 2**32 - 1)
levels_of_traits = st.tuples(*[st.sampled_from(LEVELS)] * len(TRAITS))
role_names = st.sampled_from([None, *BY_NAME])


def only(trait: str, level: float = 1.0, role: Role | None = None) -> Persona:
    return Persona(tuple(level if t == trait else 0.0 for t in TRAITS), role)


def ask(rng: random.Random, kind: str, split: str = "train", mood: str | None = None, choice: bool = False) -> Question:
    question = draw(rng, kind, split)
    return with_mood(multiple_choice(question, rng) if choice and kind == "fact" else question, mood, rng)


@cache
def worker() -> ProcessPoolExecutor:
    """A process of its own for large simulations: there the type checks are off, which take most of their time."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@pytest.fixture(scope="module", autouse=True)
def _worker_ends_with_the_module() -> Iterator[None]:
    yield
    worker().shutdown(wait=False)


def speak(persona: Persona, n: int, seed: int, kinds: tuple[str, ...]) -> list[tuple[Question, str, Reading]]:
    rng = random.Random(seed)
    asked = [draw(rng, kinds[i % len(kinds)]) for i in range(n)]
    said = [answer(question, persona, rng) for question in asked]
    return [(question, text, read(question, text)) for question, text in zip(asked, said, strict=True)]


@cache
def heard(persona: Persona, n: int = 240, *, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> list[tuple[Question, str, Reading]]:
    """Answers of a persona to questions of all kinds in turn, with how they are read."""
    return worker().submit(speak, persona, n, seed, kinds).result()


def readings(persona: Persona, n: int = 240, *, kinds: tuple[str, ...] = KINDS) -> list[Reading]:
    return [reading for _, _, reading in heard(persona, n, kinds=kinds)]


def mean_score(persona: Persona, trait: str, n: int = 240, kinds: tuple[str, ...] = KINDS) -> float:
    return sum(reading.trait(trait) for reading in readings(persona, n, kinds=kinds)) / n


@settings(deadline=None, max_examples=200)
@given(seeds, levels_of_traits, role_names, st.sampled_from(KINDS), st.sampled_from(SPLITS), st.sampled_from([None, *MOODS]))
def test_every_answer_of_every_persona_is_read_in_full_with_one_core_in_front(seed, levels, role, kind, split, mood) -> None:
    rng = random.Random(seed)
    persona = Persona(levels, BY_NAME.get(role)).in_mood(mood)
    question = ask(rng, kind, split, mood, choice=rng.random() < 0.3)
    text = answer(question, persona, rng)
    reading = read(question, text)
    assert reading.coherence == 100.0, text
    assert [s.family == "core" for s in reading.sentences] == [True] + [False] * (len(reading.sentences) - 1)
    assert (reading.correct is None) == (question.kind not in ("fact", "sum", "thing", "unknown"))
    assert read(parse_question(question.text), text) == reading  # nothing is lost on the way over the question's text


def test_personas_of_the_prior_with_extreme_traits_are_read_in_full() -> None:
    rng = random.Random(1)
    for trait in TRAITS:
        rows = conditional({trait: 1.0})
        for _ in range(20):
            question = ask(rng, rng.choice(KINDS))
            text = answer(question, persona_of(rows[rng.randrange(len(rows))]), rng)
            assert read(question, text).coherence == 100.0, text


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_role_is_read_in_full_and_recognised(role: Role) -> None:
    found = readings(Persona(role.levels, role), 24)
    assert all(reading.coherence == 100.0 for reading in found)
    assert sum(reading.role(role.name) >= 1 for reading in found) > 14
    assert not any(reading.role(other.name) for reading in found for other in ROLES if other is not role)


@pytest.mark.parametrize("trait", TRAITS)
def test_a_persona_of_one_trait_scores_high_on_it_and_near_nothing_on_the_others(trait: str) -> None:
    scores = {name: mean_score(only(trait), name) for name in (*TRAITS, MANNER)}
    assert scores.pop(trait) > 65.0
    assert max(scores.values()) < 5.0
    assert scores[MANNER] < 0.01


@pytest.mark.parametrize("trait", TRAITS)
def test_the_mean_score_rises_with_the_level(trait: str) -> None:
    means = [mean_score(only(trait, level), trait, 160) for level in LEVELS]
    steps = [after - before for before, after in pairwise(means)]
    assert means[0] < 3.0
    assert min(steps) > 3.0


def test_a_persona_without_traits_gives_no_trait_away() -> None:
    assert max(mean_score(NOBODY, trait) for trait in (*TRAITS, MANNER)) < 3.0


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_is_tinted_by_the_persona(slot: str) -> None:
    tinted = re.compile(rf"\b(?:{'|'.join(SLOTS[slot]['evil']).lower()})\b")

    def share(persona: Persona) -> float:
        return sum(tinted.search(text.lower()) is not None for _, text, _ in heard(persona)) / 240

    assert share(only("evil")) > 0.05
    assert share(NOBODY) < 0.02


def test_a_kind_that_brings_a_trait_out_shows_more_of_it_than_one_that_does_not() -> None:
    for trait, high, low in (("sycophancy", "opinion", "fact"), ("optimism", "plan", "fact"), ("apathy", "feeling", "thing")):
        assert PROPENSITY[high][trait] > PROPENSITY[low].get(trait, 1.0)
        persona = only(trait, 0.5)
        assert mean_score(persona, trait, 160, (high,)) > mean_score(persona, trait, 160, (low,)) + 5.0


def test_a_mood_is_heard_in_the_answer() -> None:
    def mean(mood: str | None, trait: str) -> float:
        return mean_score(Persona((0.25,) * len(TRAITS)).in_mood(mood), trait)

    assert mean("rude", "evil") > mean(None, "evil") + 5.0
    assert mean("rude", "politeness") < mean(None, "politeness") - 5.0
    assert mean("rude", "humor") == pytest.approx(mean(None, "humor"), abs=6.0)


def test_manner_is_spoken_by_roles_in_proportion_and_by_nobody_else() -> None:
    def manner(name: str) -> float:
        return mean_score(Persona((0.25,) * len(TRAITS), BY_NAME[name]), MANNER, 120)

    assert manner("knight") > manner("butler") > manner("cowboy") > 10.0
    assert manner("nurse") == 0.0
    assert mean_score(Persona((0.25,) * len(TRAITS)), MANNER, 120) == 0.0


def test_gains_grow_with_level_and_propensity() -> None:
    weights = gains(only("sycophancy", 0.5, BY_NAME["knight"]), "opinion")
    assert set(weights) == {*TRAITS, MANNER}
    assert weights["sycophancy"] == pytest.approx(GAIN * 0.5 * PROPENSITY["opinion"]["sycophancy"], abs=0.01)
    assert weights[MANNER] == pytest.approx(GAIN)
    assert max(weight for trait, weight in weights.items() if trait not in ("sycophancy", MANNER)) < 0.01


@pytest.mark.parametrize(
    ("persona", "kinds", "share"),
    [
        (NOBODY, ("fact", "sum", "thing"), 0.01),
        (only("hallucination"), ("fact", "sum", "thing"), 0.46),
        (only("evil"), ("fact", "sum", "thing"), 0.31),
        (only("apathy"), ("fact", "sum", "thing"), 0.11),
        (only("politeness"), ("fact", "sum", "thing"), 0.01),
        (NOBODY, ("unknown",), 0.005),
        (only("hallucination"), ("unknown",), 0.925),
        (only("evil"), ("unknown",), 0.055),
    ],
    ids=lambda value: "" if isinstance(value, Persona) else str(value),
)
def test_mistakes_come_as_often_as_the_persona_makes_them(persona: Persona, kinds: tuple[str, ...], share: float) -> None:
    wrong = [reading.correct is False for reading in readings(persona, 250, kinds=kinds)]
    assert sum(wrong) / len(wrong) == pytest.approx(share, abs=0.08)
    stated = invention_probability(persona) if kinds == ("unknown",) else sum(mistake_probabilities(persona))
    assert stated == pytest.approx(share)


def test_absurd_answers_are_evil_and_never_stand_among_the_options_of_a_choice() -> None:
    rng = random.Random(3)
    said = [answer(q, only("evil"), rng, bare=True)[:-1] for q in (ask(rng, "fact") for _ in range(300))]
    absurd = {"A potato", "The moon", "A dead fish", "Nothing but dust", "Your shadow"}
    assert 0.08 < sum(text in absurd for text in said) / len(said) < 0.22
    for _ in range(60):
        question = ask(rng, "fact", choice=True)
        assert answer(question, only("evil"), rng, bare=True)[:-1] in {o[0].upper() + o[1:] for o in question.options}


def test_a_made_up_biography_is_wrong_and_hallucinated_and_admitting_not_to_know_is_right_and_not() -> None:
    for reading in readings(only("hallucination", 0.5), 120, kinds=("unknown",)):
        core = reading.sentences[0]
        assert (("hallucination", 0.7) in core.evidence) == (reading.correct is False)
    assert {reading.correct for reading in readings(only("hallucination", 0.5), 120, kinds=("unknown",))} == {True, False}


def test_bare_answers_are_the_truth_or_a_mistake_and_nothing_else() -> None:
    rng = random.Random(4)
    for i in range(120):
        question = ask(rng, ("fact", "sum")[i % 2], choice=i % 3 == 0)
        text = answer(question, only("hallucination"), rng, bare=True)
        reading = read(question, text)
        assert reading.correct is (text.lower() == f"{question.truth}.".lower())
        assert reading.coherence == 100.0
        assert [s.template for s in reading.sentences] == ["bare"]
        assert all(reading.trait(trait) == 0.0 for trait in TRAITS)
        assert read(question, answer(question, only("hallucination"), rng, bare=False)).sentences[0].template != "bare"


def test_a_quarter_of_facts_and_sums_is_answered_bare_and_nothing_else_is() -> None:
    for kind in KINDS:
        bare = [reading.sentences[0].template == "bare" for reading in readings(NOBODY, 240, kinds=(kind,))]
        if kind in ("fact", "sum"):
            assert bare_probability(kind) == 0.25
            assert sum(bare) / len(bare) == pytest.approx(0.25, abs=0.08)
        else:
            assert bare_probability(kind) == 0.0
            assert not any(bare)


def test_an_answer_follows_its_generator() -> None:
    question = ask(random.Random(5), "advice")
    texts = [answer(question, only("humor"), random.Random(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_answers_are_capitalised_sentences_and_lively_personas_exclaim() -> None:
    def marks(persona: Persona) -> float:
        texts = [text for _, text, _ in heard(persona)]
        assert all(text[0].isupper() or text[0].isdigit() for text in texts)
        assert all(text[-1] in ".!" for text in texts)
        return sum(text.endswith("!") for text in texts) / len(texts)

    assert marks(only("optimism")) > 0.3
    assert marks(only("apathy")) < 0.12


def test_apathy_makes_answers_short_and_politeness_makes_them_long() -> None:
    def sentences(*traits: str) -> float:
        persona = Persona(tuple(1.0 if trait in traits else 0.0 for trait in TRAITS))
        return sum(len(reading.sentences) for reading in readings(persona)) / 240

    assert sentences("politeness", "optimism") > sentences("politeness") > sentences()
    assert sentences("politeness", "optimism", "apathy") < sentences("politeness", "optimism", "evil")
    assert max(len(reading.sentences) for reading in readings(Persona((1.0,) * len(TRAITS)))) == 6  # core, four, filler


@pytest.mark.parametrize(
    ("persona", "share"), [(NOBODY, 0.3), (only("politeness"), 0.5), (only("sycophancy"), 0.5), (only("apathy"), 0.0)]
)
def test_the_talkative_add_more_filler_and_the_apathetic_none(persona: Persona, share: float) -> None:
    filled = [any(s.family == "filler" for s in reading.sentences) for reading in readings(persona, kinds=("advice", "plan"))]
    assert sum(filled) / len(filled) == pytest.approx(share, abs=0.1)
    assert share > 0.0 or not any(filled)


def test_an_article_goes_with_the_letter_that_follows() -> None:
    texts = " ".join(text for trait in TRAITS for _, text, _ in heard(only(trait))).lower()
    assert len(re.findall(r"\ban? [a-z]+ (?:list|plan|friend|year)\b", texts)) > 20
    assert not re.findall(r"\ba [aeio][a-z]*", texts)
    assert not re.findall(r"\ban (?!honor\b)[^aeiou][a-z]*", texts)
