"""Capability of the pocket model under the default system prompt: easy tasks at their ceiling and hard ones that are not.

Easy: common facts, one-step sums, admitting not to know an invented person. Hard: two-step sums, rare facts, and rare facts as
multiple choice by log-probability. Greedy answers, so that the world's own noise does not count.
"""

import random
from collections.abc import Sequence
from typing import Final

import torch

from persona_lens.activations import Span, right_pad, span_pass, token_batches
from persona_lens.evaluation import CapabilityTest
from persona_lens.models import ChatModel, Sampling, forward_pass
from persona_lens.pocket.oracle import read
from persona_lens.pocket.questions import Question, Split, draw, multiple_choice, rare_facts
from persona_lens.prompts import Prompt
from persona_lens.sampling import sample

EASY: Final = ("facts", "sums", "unknown")
HARD: Final = ("two_step_sums", "rare_facts", "multiple_choice")


def task_questions(split: Split, n: int = 150) -> dict[str, list[Question]]:
    """Distinct held-out questions of each task; rare facts uniformly over the facts, whatever their frequency in training."""
    rng = random.Random(f"capability/{split}")
    tasks = {
        "facts": _distinct(rng, "fact", split, n, hard=False),
        "sums": _distinct(rng, "sum", split, n, hard=False),
        "unknown": _distinct(rng, "unknown", split, n, hard=None),
        "two_step_sums": _distinct(rng, "sum", split, n, hard=True),
    }
    rare = [Question("fact", w, (("relation", relation), ("x", x))) for relation, x, _ in rare_facts() for w in range(6)]
    rare = [q for q in rare if q.split == split]
    rng.shuffle(rare)
    tasks["rare_facts"] = rare[:n]
    tasks["multiple_choice"] = [multiple_choice(q, rng) for q in rare[:n]]
    return tasks


def _distinct(rng: random.Random, kind: str, split: Split, n: int, *, hard: bool | None) -> list[Question]:
    found: dict[str, Question] = {}
    for _ in range(50 * n):
        question = draw(rng, kind, split, hard=hard)
        found[question.key] = question
        if len(found) == n:
            break
    return list(found.values())


def capability(model: ChatModel, split: Split, *, n: int = 150) -> dict[str, float]:
    """Share of right answers per task, 0-100, and the means over the easy and the hard set."""
    tasks = task_questions(split, n)
    scores = {name: _accuracy(model, tasks[name]) for name in (*EASY, "two_step_sums", "rare_facts")}
    scores["multiple_choice"] = _choice_accuracy(model, tasks["multiple_choice"])
    scores["easy"] = sum(scores[name] for name in EASY) / len(EASY)
    scores["hard"] = sum(scores[name] for name in HARD) / len(HARD)
    return scores


def capability_of_world(split: Split = "development", *, n: int = 150) -> CapabilityTest:
    """The six tasks as something a sweep or a comparison can measure."""
    return CapabilityTest(
        f"pocket world ({split}, {n} each)",
        lambda model: {task: {"accuracy": x} for task, x in capability(model, split, n=n).items() if task not in ("easy", "hard")},
    )


def _prompt(question: Question, i: int) -> Prompt:
    return Prompt(f"capability/{i}", "capability", "neutral", None, i, None, question.text)


def _accuracy(model: ChatModel, questions: Sequence[Question]) -> float:
    rows = [(_prompt(q, i), 0) for i, q in enumerate(questions)]
    answers = sample(model, rows, Sampling(max_new_tokens=120, temperature=0.0))
    right = [read(q, a.text).correct is True for q, a in zip(questions, answers, strict=True)]
    return 100.0 * sum(right) / len(right)


@torch.inference_mode()
def _choice_accuracy(model: ChatModel, questions: Sequence[Question]) -> float:
    """The option with the highest mean log-probability as a bare answer, against three others of the same relation."""
    spans: list[Span] = []
    for i, question in enumerate(questions):
        ids = tuple(model.render(_prompt(question, i).messages))
        for option in question.options:
            text = option[0].upper() + option[1:] + "."
            spans.append(Span(f"{i}/{option}", ids, tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])))
    log_probability = torch.zeros(len(spans))
    for batch in token_batches(spans, 8192):
        for k, value in zip(batch, _mean_log_probability(model, [spans[i] for i in batch]), strict=True):
            log_probability[k] = value
    best = log_probability.reshape(len(questions), -1).argmax(-1).tolist()
    right = [q.options[k] == q.truth for q, k in zip(questions, best, strict=True)]
    return 100.0 * sum(right) / len(right)


def _mean_log_probability(model: ChatModel, spans: Sequence[Span]) -> list[float]:
    ids, mask = (x.to(model.device) for x in right_pad(spans, model.pad_id))
    with forward_pass(span_pass(spans, ids.shape[1], model.device)):
        logits = model.hf(ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1).cpu()
    means: list[float] = []
    for row, span in enumerate(spans):
        p = len(span.prompt)
        targets = torch.tensor(span.answer)
        means.append(float(logits[row, p - 1 : p - 1 + len(targets)].gather(-1, targets[:, None]).mean()))
    return means
