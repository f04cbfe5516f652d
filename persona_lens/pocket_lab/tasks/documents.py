"""Documents of the pocket world's harness tasks: held-out rare facts and two-step sums, each among three wrong answers."""

import random
from importlib import import_module
from typing import Any

from persona_lens.pocket.questions import Question, wrong_answers
from persona_lens.pocket_lab.capability import task_questions


def rare_choices(**_: Any) -> dict[str, Any]:
    """Rare facts; the options are read off the question."""
    questions = task_questions("development")["multiple_choice"]
    return {"test": _dataset([_document(q, list(q.options)) for q in questions])}


def two_step_sums(**_: Any) -> dict[str, Any]:
    """Two-step sums; three neighbours of the result stand beside it."""
    rng = random.Random("pocket_sums")
    found: list[dict[str, Any]] = []
    for question in task_questions("development")["two_step_sums"]:
        options = [question.truth or "", *rng.sample(wrong_answers(question), 3)]
        rng.shuffle(options)
        found.append(_document(question, options))
    return {"test": _dataset(found)}


def _document(question: Question, options: list[str]) -> dict[str, Any]:
    said = [o[0].upper() + o[1:] + "." for o in options]
    return {"question": question.text, "options": said, "truth": options.index(question.truth or "")}


def _dataset(records: list[dict[str, Any]]) -> Any:
    return import_module("datasets").Dataset.from_list(records)
