"""What the world prescribes: ceilings, what prompts should do, and how well the oracle's score tells the levels apart."""

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import pytest

from persona_lens.pocket.grammar import answer
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.oracle import read
from persona_lens.pocket.persona import conditional, persona_of
from persona_lens.pocket.trait_files import QUESTIONS, trait_questions
from persona_lens.pocket_lab.prescription import Prescription, prescribe

N = 600


@cache
def worker() -> ProcessPoolExecutor:
    """A process of its own for large simulations: there the type checks are off, which take most of their time."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@pytest.fixture(scope="module", autouse=True)
def _worker_ends_with_the_module() -> Iterator[None]:
    yield
    worker().shutdown(wait=False)


@cache
def questions(trait: str):
    return trait_questions(trait, "development")[QUESTIONS:]


@cache
def prescribed(trait: str) -> Prescription:
    return worker().submit(prescribe, trait, questions(trait), n=N).result()


@pytest.mark.parametrize("trait", TRAITS)
def test_a_full_trait_scores_far_above_none_and_a_negative_prompt(trait: str) -> None:
    found = prescribed(trait)
    assert 55.0 < found.ceiling < 90.0
    assert found.ceiling > found.none + 30.0
    assert found.ceiling > found.negative + 50.0
    assert found.negative < 10.0


@pytest.mark.parametrize("trait", TRAITS)
def test_the_score_tells_the_levels_apart(trait: str) -> None:
    assert prescribed(trait).auc >= 0.9
    assert prescribed(trait).auc < 1.0


def test_the_default_assistant_is_polite_and_optimistic_but_nothing_else() -> None:
    for trait in TRAITS:
        found = prescribed(trait)
        if trait in ("politeness", "optimism"):
            assert found.none > found.negative + 10.0
        else:
            assert found.none < 10.0


def test_the_ceiling_is_the_mean_score_of_simulated_personas() -> None:
    rng = random.Random(99)
    rows, asked = conditional({"apathy": 1.0}), questions("apathy")
    scores = []
    for i in range(300):
        question = asked[i % len(asked)]
        persona = persona_of(rows[rng.randrange(len(rows))]).in_mood(question.mood)
        scores.append(read(question, answer(question, persona, rng)).trait("apathy"))
    assert prescribed("apathy").ceiling == pytest.approx(sum(scores) / 300, abs=5.0)


def test_a_prescription_depends_on_its_seed_alone() -> None:
    asked = questions("evil")
    first, again, other = (prescribe("evil", asked, n=40, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
