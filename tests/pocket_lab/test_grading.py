"""Grading: the report card's parts do what they say."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from persona_lens.activations import Span
from persona_lens.models import ChatModel
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.oracle import read
from persona_lens.pocket.persona import realised_correlations
from persona_lens.pocket_lab.capability import EASY, HARD, _choice_accuracy, _mean_log_probability, capability, task_questions
from persona_lens.pocket_lab.grading import geometry, judge_answers, random_directions, steered_answers, verdicts
from persona_lens.steering import add
from persona_lens.vectors import PersonaVectors


def vectors_of(directions: torch.Tensor) -> PersonaVectors:
    layers = directions.shape[0]
    nothing = torch.zeros(layers)
    return PersonaVectors("x", "response_mean", "mean_difference", directions, directions[None], nothing, nothing, nothing)


def test_planted_geometry_is_recognised_and_noise_is_not() -> None:
    root = torch.linalg.cholesky(torch.from_numpy(realised_correlations())).float()
    basis = torch.linalg.qr(torch.randn(64, 7, generator=torch.Generator().manual_seed(0)))[0]
    planted = root @ basis.T
    noise = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    found = geometry({t: vectors_of(torch.stack([planted[i], noise[i]])) for i, t in enumerate(TRAITS)})
    assert found[0] > 0.95
    assert abs(found[1]) < 0.5


def test_tasks_have_distinct_held_out_questions() -> None:
    development, test = task_questions("development", 40), task_questions("test", 40)
    assert set(development) == {*EASY, *HARD}
    for name, questions in development.items():
        assert len({q.text for q in questions}) == len(questions)
        assert all(q.split == "development" for q in questions)
        assert not {q.text for q in questions} & {q.text for q in test[name]} or name == "multiple_choice"
    assert all(q.rare for q in development["rare_facts"])
    assert all(len(q.options) == 4 and q.truth in q.options for q in development["multiple_choice"])


def test_choices_by_log_probability_beat_chance_and_wrong_truths_do_not(pocket: ChatModel) -> None:
    from dataclasses import replace

    questions = task_questions("development", 40)["multiple_choice"]
    right = _choice_accuracy(pocket, questions)
    swapped = [replace(q, options=tuple("potato" if o == q.truth else o for o in q.options)) for q in questions]
    assert right > 35
    assert _choice_accuracy(pocket, swapped) == 0


def test_steering_towards_a_trait_raises_its_score(pocket: ChatModel, small_run: Any) -> None:
    v, layer = small_run.vectors, 5
    conditions = [[], [add(v, layer, 1.5)], [add(v, layer, -1.5)]]
    base, up, down = steered_answers(pocket, "optimism", "development", slice(10, 20), 3, 1, conditions)
    assert up.trait.mean() > base.trait.mean() + 5 > down.trait.mean()
    plain = judge_answers(pocket, "optimism", "development", "neutral", slice(10, 20), 3, 1)
    assert np.array_equal(plain.trait, base.trait)
    assert np.array_equal(plain.coherence, base.coherence)


def test_verdicts_name_what_is_met_and_what_is_missed() -> None:
    prescription = {t: {"auc": 0.95, "ceiling": 70.0, "negative": 2.0, "none": 5.0} for t in TRAITS}
    elicitation = {
        t: {
            "positive": 66.0,
            "negative": 4.0,
            "none": 6.0,
            "coherence_positive": 97.0,
            "coherence_negative": 97.0,
            "coherence_none": 96.0,
        }
        for t in TRAITS
    }
    tasks = {"facts": 100.0, "sums": 98.0, "unknown": 99.0, "hard": 80.0}
    card: dict[str, Any] = {
        "prescription": prescription,
        "elicitation": elicitation,
        "capability": tasks,
        "geometry": {"best": 0.95},
        "model": {"n_layers": 8},
    }
    assert all(v["met"] for v in verdicts(card).values())
    elicitation["evil"]["negative"] = 9.0
    tasks["hard"] = 99.0
    missed = [name for name, v in verdicts(card).items() if not v["met"]]
    assert len(missed) == 2
    assert np.isclose(verdicts(card)["|negative - prescribed|, worst trait <= 6"]["value"], 7.0)


@pytest.mark.parametrize("quick_split", ["development"])
def test_the_test_split_is_not_the_shipped_one(quick_split: str) -> None:
    from persona_lens.pocket.trait_files import pocket_trait
    from persona_lens.traits import load_trait

    assert load_trait("humor", "pocket") == pocket_trait("humor", quick_split)  # pyright: ignore[reportArgumentType]
    assert load_trait("humor", "pocket") != pocket_trait("humor", "test")


def test_capability_is_greedy_and_averages_its_tasks(pocket: ChatModel) -> None:
    scores = capability(pocket, "development", n=10)
    assert scores["easy"] == pytest.approx(sum(scores[t] for t in EASY) / 3)
    assert scores["hard"] == pytest.approx(sum(scores[t] for t in HARD) / 3)
    assert scores["easy"] >= 80
    for name in ("facts", "two_step_sums", "rare_facts"):
        questions = task_questions("development", 10)[name]
        right = [read(q, pocket.chat(q.text, temperature=0.0, max_new_tokens=120)).correct is True for q in questions]
        assert scores[name] == 100 * sum(right) / len(right)


def test_answers_are_judged_under_the_polarity_and_on_the_questions_asked_for(pocket: ChatModel) -> None:
    up, down = (judge_answers(pocket, "optimism", "development", side, slice(0, 4), 1, 1) for side in ("positive", "negative"))
    assert len(up.trait) == len(down.trait) == 20
    assert up.trait.mean() > down.trait.mean() + 20


def test_random_directions_of_no_length_change_nothing(pocket: ChatModel, small_run: Any) -> None:
    vectors = dict.fromkeys(TRAITS, small_run.vectors)
    still = random_directions(pocket, vectors, "development", 4, 0.0, directions=2, answers=100)
    assert still["mean_change"] == still["largest_trait_change"] == 0.0
    assert still["interval"] == [0.0, 0.0]


def test_steering_verdicts_take_the_farther_end_and_refuse_the_last_layer() -> None:
    row = {"auc": 1.0, "ceiling": 70.0, "negative": 2.0, "none": 5.0}
    elicited = {"positive": 70.0, "negative": 2.0, "none": 5.0}
    coherence = {f"coherence_{side}": 100.0 for side in elicited}
    card: dict[str, Any] = {
        "prescription": dict.fromkeys(TRAITS, row),
        "elicitation": {trait: {**elicited, **coherence} for trait in TRAITS},
        "capability": {"facts": 100.0, "sums": 100.0, "unknown": 100.0, "hard": 80.0},
        "geometry": {"best": 0.95},
        "model": {"n_layers": 8},
        "steering": {"share_of_ceiling": 0.7, "coherence": 90.0, "layer": 6},
        "random_directions": {"interval": [-5.0, 1.0]},
    }
    assert all(v["met"] for v in verdicts(card).values())
    card["random_directions"] = {"interval": [-7.0, 1.0]}
    card["steering"] = {"share_of_ceiling": 0.5, "coherence": 80.0, "layer": 7}
    missed = [name for name, v in verdicts(card).items() if not v["met"]]
    assert len(missed) == 4


def test_options_are_compared_by_their_mean_log_probability(pocket: ChatModel, plain_pocket: PreTrainedModel) -> None:
    prompt = tuple(pocket.render([{"role": "user", "content": "What is 3 plus 4?"}]))
    answers = [tuple(pocket.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ("Seven.", "An owl sleeps in a tree.")]
    assert len(answers[0]) != len(answers[1])
    with torch.inference_mode():
        found = _mean_log_probability(pocket, [Span("x", prompt, a) for a in answers])
        for answer, value in zip(answers, found, strict=True):
            logits = plain_pocket(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = sum(float(logits[k, token]) for k, token in enumerate(answer)) / len(answer)
            assert value == pytest.approx(expected, abs=1e-4)
