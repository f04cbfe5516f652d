"""A model on this machine as a judge: the expected number over the tree of digits, read off its next-token probabilities.

Nothing is sampled. The rubric is computed once per answer; then every way of writing a number from 0 to 100 is followed, token by
token, on its key-value cache. Do not judge with a model inside its own steering context: the judge would be steered too.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from persona_lens.errors import PersonaLensError
from persona_lens.judges.endpoint import NOT_JUDGED, adherence, score
from persona_lens.judges.judge import Adherence, Judged, Score
from persona_lens.judges.reply import HIGHEST, NUMBER, Reading, expected, is_number
from persona_lens.judges.rubrics import coherence_message, role_message, trait_message
from persona_lens.models import ChatModel
from persona_lens.models.generation import Step, decode, require_numbers, shared_prefill
from persona_lens.traits import Role, Trait

BATCH_TOKENS: Final = 16_384  # padded tokens per forward pass and in a cache
LEAST_BRANCH: Final = 1e-6  # what begins a number with less probability is not followed: an error below 0.05 points
LONGEST: Final = 3  # tokens of a number
_DIGIT_AHEAD: Final = re.compile(r"\s*\d", re.ASCII)

Item = TypeVar("Item")


@dataclass(frozen=True)
class _LocalJudge:
    model: ChatModel
    coherence: bool = True

    @property
    def name(self) -> str:
        return f"local:{self.model.name}, digit tree" + ("" if self.coherence else ", without coherence")

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
        return [score(t, c) for t, c in zip(*self._readings(trait, answers), strict=True)]

    def _readings(self, trait: Trait, answers: Sequence[Judged]) -> tuple[list[Reading], list[Reading]]:
        told = [trait_message(trait, a) for a in answers] + [coherence_message(a) for a in answers if self.coherence]
        found = [expected(numbers) for numbers in number_probabilities(self.model, told)]
        missing = [Reading(None, NOT_JUDGED)] * len(answers)
        return found[: len(answers)], found[len(answers) :] or missing


def local_judge(model: ChatModel, *, coherence: bool = True) -> _LocalJudge:
    """A chat model as a judge, through its own chat template.

    Args:
        model: any that `load_model` loads; a plain model by `load_model((model, tokenizer))`.
        coherence: whether coherence is judged as well.

    Calling it raises `PersonaLensError` where the rubric with an answer is longer than the model's context.
    """
    return _LocalJudge(model, coherence)


@dataclass(frozen=True)
class _LocalRoleJudge:
    model: ChatModel

    @property
    def name(self) -> str:
        return f"local:{self.model.name}, digit tree"

    def __call__(self, role: Role, rubric: str, answers: Sequence[Judged], /) -> list[Adherence]:
        told = [role_message(role, rubric, a) for a in answers]
        found: list[Adherence] = []
        for numbers in number_probabilities(self.model, told, highest=3):
            reading = expected(numbers)
            likeliest = max(numbers, key=lambda n: numbers[n], default=0)
            found.append(adherence(reading if reading.value is None else Reading(float(likeliest))))
        return found


def local_role_judge(model: ChatModel) -> _LocalRoleJudge:
    """A chat model as a judge of roles: the most likely of 0, 1, 2 and 3."""
    return _LocalRoleJudge(model)


@torch.inference_mode()
def number_probabilities(
    model: ChatModel, messages: Sequence[str], *, highest: int = HIGHEST, least: float = LEAST_BRANCH
) -> list[dict[int, float]]:
    """Probability that the model's reply to each message begins with each number from 0 to `highest` (see `reply.digit_tree`).

    Args:
        least: branches less likely than this are left out; 0 follows all.

    Raises:
        PersonaLensError: a message does not fit into the model's context (it is named by its place).
        ActivationError: the logits are not numbers.
    """
    table = _number_tokens(model.tokenizer)
    prompts = [[*model.render([{"role": "user", "content": table.plain(m)}]), *table.lead] for m in messages]
    for place, ids in enumerate(prompts, start=1):
        if model.context and len(ids) + LONGEST > model.context:
            raise PersonaLensError(
                f"text {place} of {len(prompts)} has {len(ids)} tokens with its rubric, and {model.name} reads {model.context}: "
                "shorten the answers, or judge with a model of longer context"
            )
    found: list[dict[int, float]] = [{} for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for rows in _chunks(order, [len(prompts[i]) for i in order]):
        nodes = [_Node("", 1.0, found[i]) for i in rows]
        names = torch.arange(len(rows), device=model.device)
        cache, mask = shared_prefill(model, [prompts[i] for i in rows], names, None)
        _follow(_Walk(model, table, highest, least), cache, mask, [prompts[i][-1] for i in rows], nodes)
    return found


@dataclass(frozen=True)
class _Node:
    """Digits that a reply may begin with, their probability, and where the numbers of this reply are collected."""

    digits: str
    probability: float
    numbers: dict[int, float]


@dataclass(frozen=True)
class _Walk:
    """What stays the same while a tree is followed."""

    model: ChatModel
    table: "_NumberTokens"
    highest: int
    least: float


def _follow(
    walk: _Walk, cache: DynamicCache, mask: Int[Tensor, "node position"], tokens: Sequence[int], nodes: Sequence[_Node]
) -> None:
    """Read each node's next tokens, count the number that may end there, and go on to the longer ones.

    Args:
        cache, mask: of all that comes before each node's last token. The cache is used up.
        tokens: that last token.
    """
    device = walk.model.device
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    yes = torch.ones(len(nodes), dtype=torch.bool, device=device)
    step = Step(torch.arange(len(nodes), device=device), ~yes if nodes[0].digits else yes, yes)
    logits = decode(walk.model, torch.tensor(list(tokens), device=device), mask, cache, step)
    require_numbers(walk.model, logits)
    coming = walk.table.later if nodes[0].digits else walk.table.first
    probabilities = torch.softmax(logits.double(), -1)
    more = probabilities[:, coming.begin].sum(-1).tolist()
    added = probabilities[:, coming.ids].tolist()
    children: list[tuple[int, int, _Node]] = []
    for at, node in enumerate(nodes):
        if node.digits:
            number = int(node.digits)
            node.numbers[number] = node.numbers.get(number, 0.0) + node.probability * max(0.0, 1.0 - more[at])
        for token, text, p in zip(coming.ids, coming.texts, added[at], strict=True):
            if is_number(node.digits + text, walk.highest) and node.probability * p > walk.least:
                children.append((at, token, _Node(node.digits + text, node.probability * p, node.numbers)))
    for chunk in _chunks(children, [mask.shape[1] + 1] * len(children)):
        parents = torch.tensor([at for at, _, _ in chunk], device=device)
        branch = copy.deepcopy(cache)
        branch.batch_select_indices(parents)
        _follow(walk, branch, mask[parents], [token for _, token, _ in chunk], [node for _, _, node in chunk])


def _chunks(items: Sequence[Item], lengths: Sequence[int]) -> Iterator[list[Item]]:
    """Items, in order of length, cut where a padded batch would exceed the token budget."""
    current: list[Item] = []
    for item, length in zip(items, lengths, strict=True):
        if current and (len(current) + 1) * length > BATCH_TOKENS:
            yield current
            current = []
        current.append(item)
    if current:
        yield current


@dataclass(frozen=True)
class _Coming:
    """Tokens that write digits: those of one to three digits and nothing else, and all that begin with a digit."""

    ids: list[int]
    texts: list[str]
    begin: list[int]


@dataclass(frozen=True)
class _NumberTokens:
    """How a tokenizer writes numbers.

    Attributes:
        lead: tokens that come before any number (some tokenizers write a space of their own).
        first: tokens a number can begin with; spaces before it do not matter.
        later: tokens a number can go on with.
        special: texts that the tokenizer reads as marks of the conversation.
    """

    lead: tuple[int, ...]
    first: _Coming
    later: _Coming
    special: tuple[str, ...]

    def plain(self, text: str) -> str:
        """A text that holds no marks of the conversation, so that an answer cannot end the judge's message."""
        for mark in self.special:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return text


@lru_cache(maxsize=4)
def _number_tokens(tokenizer: Any) -> _NumberTokens:
    def texts(rows: Sequence[Sequence[int]]) -> list[str]:
        found = tokenizer.batch_decode([list(r) for r in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [str(t) for t in found]

    alone = texts([[i] for i in range(len(tokenizer))])
    ids = [i for i, text in enumerate(alone) if _DIGIT_AHEAD.match(text)]
    *lead, anchor = tokenizer.encode("7", add_special_tokens=False)
    behind = len(texts([[anchor]])[0])
    later = [text[behind:] for text in texts([[anchor, i] for i in ids])]
    special = sorted((t for t in tokenizer.all_special_tokens if len(t) > 1), key=len, reverse=True)
    return _NumberTokens(tuple(lead), _coming(ids, [alone[i].lstrip() for i in ids]), _coming(ids, later), tuple(special))


def _coming(ids: Sequence[int], texts: Sequence[str]) -> _Coming:
    pure = [(i, text) for i, text in zip(ids, texts, strict=True) if NUMBER.fullmatch(text)]
    begin = [i for i, text in zip(ids, texts, strict=True) if _DIGIT_AHEAD.match(text) and not text[0].isspace()]
    return _Coming([i for i, _ in pure], [text for _, text in pure], begin)
