"""Grading: the report card's parts do what they say."""

from typing import Any

import numpy as np
import pytest
import torch

from persona_lens.models import ChatModel
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import realised_correlations
from persona_lens.pocket_lab.capability import EASY, HARD, _choice_accuracy, task_questions
from persona_lens.pocket_lab.grading import adding, geometry, judge_answers, verdicts
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


def test_adding_acts_on_the_last_prompt_token_and_decoded_tokens_only(pocket: ChatModel) -> None:
    ids = torch.tensor([pocket.render([{"role": "user", "content": "What is 3 plus 4?"}])])
    seen: list[torch.Tensor] = []

    def keep(residual: torch.Tensor, hook: Any) -> None:
        seen.append(residual.clone())

    delta = torch.ones(pocket.d_model)
    for context in (None, adding(pocket, 2, delta)):
        with torch.inference_mode(), pocket.hooks([]):
            if context:
                with context, pocket.hooks([(pocket.hook_name(2), keep)]):
                    pocket.hf(ids, use_cache=False)
            else:
                with pocket.hooks([(pocket.hook_name(2), keep)]):
                    pocket.hf(ids, use_cache=False)
    change = seen[1] - seen[0]
    assert torch.allclose(change[0, -1], delta, atol=1e-4)
    assert not change[0, :-1].any()


def test_steering_towards_a_trait_raises_its_score(pocket: ChatModel, small_run: Any) -> None:
    vectors, layer = small_run.vectors, 5
    base = judge_answers(pocket, "optimism", "development", "neutral", slice(10, 20), 3, 1)
    up = judge_answers(
        pocket, "optimism", "development", "neutral", slice(10, 20), 3, 1, within=adding(pocket, layer, 1.5 * vectors[layer])
    )
    down = judge_answers(
        pocket, "optimism", "development", "neutral", slice(10, 20), 3, 1, within=adding(pocket, layer, -1.5 * vectors[layer])
    )
    assert up.trait.mean() > base.trait.mean() + 5 > down.trait.mean()


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
