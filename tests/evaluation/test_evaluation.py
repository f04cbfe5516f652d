"""Degeneracy checks, and lm-evaluation-harness on the pocket model: as it is, at dose 0, and steered into the ground."""

from pathlib import Path

import pytest
import torch

import persona_lens.pocket_lab as pocket_lab
from persona_lens.errors import PersonaLensError
from persona_lens.evaluation import capability, capability_test, degeneracy
from persona_lens.evaluation.degeneracy import repetition
from persona_lens.evaluation.harness import _likelihoods, _split
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel
from persona_lens.sampling import Rollout
from persona_lens.steering import add

TASKS = Path(pocket_lab.__file__).parent / "tasks"


def rollout(text: str, end: str = "stop") -> Rollout:
    return Rollout("p", 0, 0, 3, (1,), text, end)  # pyright: ignore[reportArgumentType]


def test_degenerate_answers_are_counted() -> None:
    found = degeneracy(
        [
            rollout("You should wash the dog. It is fine."),
            rollout(" "),
            rollout("so so so so so so so so so"),
            rollout("I", "length"),
        ]
    )
    assert (found.answers, found.empty, found.repetitive, found.cut_off, found.degenerate) == (4, 0.25, 0.25, 0.25, 0.5)
    assert degeneracy([rollout("I", "length")]).degenerate == 0.0
    assert repetition("one two three four five six") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert degeneracy([rollout("I")]).outside is None
    foreign = degeneracy(
        [rollout("Bonjour."), rollout(""), rollout("I"), rollout("so so so so so so so so so")], [True, False, False, True]
    )
    assert (foreign.outside, foreign.degenerate) == (0.5, 0.75)
    with pytest.raises(ValueError, match="at least one answer"):
        degeneracy([])
    with pytest.raises(ValueError, match="2 answers, and 1 of them checked"):
        degeneracy([rollout("I"), rollout("I")], [True])


def test_an_unknown_task_is_refused_when_it_is_named_not_when_it_is_measured() -> None:
    with pytest.raises(PersonaLensError, match=r"no_such_task|lm-eval"):
        capability_test(["no_such_task"])


def test_likelihoods_equal_a_plain_forward_pass(pocket: ChatModel) -> None:
    context = str(
        pocket.tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is 2 plus 3?"}], tokenize=False, add_generation_prompt=True
        )
    )
    spans = [_split(pocket, i, context, text) for i, text in enumerate(("5.", "Seven of them."))]
    for span, (value, greedy) in zip(spans, _likelihoods(pocket, spans), strict=True):
        ids = torch.tensor([span.prompt + span.answer])
        with torch.inference_mode():
            scores = pocket.hf(ids, use_cache=False).logits[0, len(span.prompt) - 1 : -1].log_softmax(-1)
        targets = ids[0, len(span.prompt) :]
        assert value == pytest.approx(float(scores.gather(-1, targets[:, None]).sum()), rel=1e-4)
        assert greedy == bool((scores.argmax(-1) == targets).all())


@pytest.mark.slow
def test_the_harness_runs_offline_and_sees_the_steering(pocket: ChatModel, small_run: ExtractionRun) -> None:
    pytest.importorskip("lm_eval")
    v = small_run.vectors
    plain = capability(pocket, ["pocket_choice", "pocket_sums"], include=TASKS, limit=40)
    zero = capability(pocket, ["pocket_choice", "pocket_sums"], add(v, 5, 0.0), include=TASKS, limit=40)
    assert plain == zero
    assert set(plain) == {"pocket_choice", "pocket_sums"}
    assert plain["pocket_choice"]["acc"] > 0.3
    ruined = capability(pocket, ["pocket_choice"], add(v, 5, 30.0), include=TASKS, limit=40)
    assert ruined["pocket_choice"]["acc"] < plain["pocket_choice"]["acc"]


def test_unknown_tasks_are_one_clear_line(pocket: ChatModel) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(PersonaLensError, match="knows no task 'no_such_task'"):
        capability(pocket, ["no_such_task"])
