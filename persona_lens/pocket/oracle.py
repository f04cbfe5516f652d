"""The oracle: parses an answer of the pocket world sentence by sentence and reads persona, coherence and truth off it.

Trait score = 100 (1 - prod(1 - w)) over the evidence for the trait: w = .20 for a tinted word, .40 for a mild and .70 for a strong
trait sentence, .70 for an invented biography (hallucination). Mistakes in facts and sums are read apart from traits.
Coherence = 100 x share of sentences that parse and are on topic x (1 if there is exactly one core sentence, else 1/2) x
share of sentences that are no repetition.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

from persona_lens.pocket.grammar import ABSURD, ABSURD_CATEGORY, CITIES, CORES, FINDS, PROFESSIONS, SLOT_OF, YEARS
from persona_lens.pocket.lexicon import FILLER, NEUTRAL, SLOTS, TRAIT_SENTENCES, Slot
from persona_lens.pocket.questions import RELATION_PHRASE, Question, wrong_answers
from persona_lens.pocket.roles import ROLES

WEIGHT_WORD: Final = 0.20
WEIGHT_MILD: Final = 0.40
WEIGHT_STRONG: Final = 0.70

Evidence = tuple[str, float]  # (trait or manner, weight)


@dataclass(frozen=True)
class SentenceReading:
    """What one sentence is: its family and template (None if it does not parse), its evidence, whether it fits the question."""

    text: str
    family: str | None
    template: str = ""
    evidence: tuple[Evidence, ...] = ()
    on_topic: bool = False
    correct: bool | None = None
    roles: tuple[tuple[str, int], ...] = ()  # (role, 1 for its opener or 2 for a sentence)


@dataclass(frozen=True)
class Reading:
    """What an answer is: its sentences read, and the scores that follow."""

    sentences: tuple[SentenceReading, ...]

    def trait(self, name: str) -> float:
        """Score 0-100 of a trait (or of the manner of speech)."""
        rest = 1.0
        for sentence in self.sentences:
            for trait, weight in sentence.evidence:
                if trait == name:
                    rest *= 1.0 - weight
        return 100.0 * (1.0 - rest)

    @property
    def coherence(self) -> float:
        n = len(self.sentences)
        if n == 0:
            return 0.0
        fits = sum(s.on_topic for s in self.sentences) / n
        cores = sum(s.family == "core" and s.on_topic for s in self.sentences)
        distinct = len({s.template or s.text for s in self.sentences}) / n
        return 100.0 * fits * (1.0 if cores == 1 else 0.5) * distinct

    @property
    def correct(self) -> bool | None:
        """Whether the core states the truth (for an invented name: admits not knowing); None where there is none to state."""
        return next((s.correct for s in self.sentences if s.family == "core" and s.on_topic), None)

    def role(self, name: str) -> int:
        """Adherence to a role, 0-3: one point for its opener, two for one of its sentences."""
        points = {p for s in self.sentences for role, p in s.roles if role == name}
        return sum(points)


def _one_of(words: Iterator[str] | tuple[str, ...]) -> str:
    return "|".join(sorted((re.escape(w.lower()) for w in words), key=len, reverse=True))


def _slot_words(slot: Slot) -> dict[str, str]:
    return {word.lower(): cls for cls, words in SLOTS[slot].items() for word in words}


_CLASS: Final[dict[Slot, dict[str, str]]] = {slot: _slot_words(slot) for slot in SLOTS}
_OPENERS: Final = sorted(_CLASS["opener"], key=len, reverse=True)
_TAILS: Final = sorted(_CLASS["tail"], key=len, reverse=True)
_ROLE_OPENERS: Final = {role.opener.lower(): role.name for role in ROLES}
_SIGNATURES: Final = {sentence.lower(): role.name for role in ROLES for sentence in role.sentences}
_CONTENT: Final = {
    "n": r"(?P<n>[a-z ]+?)", "e": r"(?P<e>[a-z0-9 ]+?)", "x": r"(?P<x>[a-z]+ [a-z]+)", "r": r"(?P<r>[a-z ]+?)",
    "y": r"(?P<y>[a-z0-9 ]+?)",
    "p": f"(?:{_one_of(PROFESSIONS)})", "c": f"(?:{_one_of(CITIES)})", "f": f"(?:{_one_of(FINDS)})", "m": f"(?:{_one_of(YEARS)})",
    "N": r"(?P<N>[a-z ]+?)",
}  # fmt: skip


def _compile(template: str) -> tuple[re.Pattern[str], tuple[tuple[str, Slot], ...]]:
    """A template as a pattern over lower-case text, and the names of its slot groups."""
    groups: list[tuple[str, Slot]] = []
    parts: list[str] = []
    for literal, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        parts.append(re.escape(literal.lower()).replace(r"\ ", " "))
        if not name:
            continue
        if name not in SLOT_OF:
            parts.append(_CONTENT[name])
            continue
        slot = SLOT_OF[name]
        group = f"g{len(groups)}"
        groups.append((group, slot))
        words = f"(?P<{group}>{_one_of(tuple(_CLASS[slot]))})"
        parts.append(f"(?:{words} )?" if name == "d" else f"an? {words}" if name == "aa" else words)
    return re.compile("".join(parts)), tuple(groups)


@dataclass(frozen=True)
class _Rule:
    """One template of the world, ready to be matched."""

    family: str  # a core's family, a trait, or "filler"
    template: str
    pattern: re.Pattern[str]
    groups: tuple[tuple[str, Slot], ...]
    evidence: tuple[Evidence, ...] = ()


def _rule(family: str, template: str, *evidence: Evidence) -> _Rule:
    pattern, groups = _compile(template)
    return _Rule(family, template, pattern, groups, evidence)


_CORE_RULES: Final[dict[str, tuple[_Rule, ...]]] = {
    family: tuple(_rule(family, t, *([("hallucination", WEIGHT_STRONG)] if family == "invented" else [])) for t in templates)
    for family, templates in CORES.items()
}
_EXTRA_RULES: Final = tuple(
    _rule(trait, template, (trait, WEIGHT_STRONG if strength == "strong" else WEIGHT_MILD))
    for trait, families in TRAIT_SENTENCES.items()
    for strength, templates in families.items()
    for template in templates
) + tuple(_rule("filler", template) for template in FILLER)


def _families(question: Question) -> tuple[str, ...]:
    match question.kind:
        case "unknown":
            return ("honest", "invented")
        case "fact" if question.options:
            return ("choice", "fact")
        case kind:
            return (kind,)


@cache
def _acceptable(question: Question) -> frozenset[str]:
    """Every answer of the right type: right, subtly wrong or absurd, in lower case."""
    return frozenset(a.lower() for a in (question.truth or "", *wrong_answers(question), *ABSURD, *ABSURD_CATEGORY))


def _is_answer(question: Question, said: str) -> bool:
    return said.isdigit() or said in ABSURD if question.kind == "sum" else said in _acceptable(question)


def _fits(question: Question, found: dict[str, str | None]) -> bool:
    """Whether a core's content is what the question asked about."""
    slots = {name: value.lower() for name, value in question.slots}
    if question.kind == "fact":
        slots["r"] = RELATION_PHRASE[question["relation"]].format(x=question["x"]).lower()
    for name in ("n", "e", "x", "r"):
        if found.get(name) is not None and found[name] != slots.get(name):
            return False
    return found.get("y") is None or _is_answer(question, found["y"] or "")


def _truth(question: Question, family: str, said: str | None) -> bool | None:
    if question.kind == "unknown":
        return family == "honest"
    return None if question.truth is None or said is None else said == question.truth.lower()


def _tinted(match: re.Match[str], groups: tuple[tuple[str, Slot], ...]) -> list[Evidence]:
    classes = (_CLASS[slot][match[group]] for group, slot in groups if match[group])
    return [(cls, WEIGHT_WORD) for cls in classes if cls != NEUTRAL]


def _strip(body: str) -> tuple[str, list[Evidence], list[tuple[str, int]]]:
    """The sentence without opener and tail, and what these give away."""
    evidence: list[Evidence] = []
    roles: list[tuple[str, int]] = []
    opener = next((o for o in (*_ROLE_OPENERS, *_OPENERS) if body.startswith(o + ", ")), None)
    if opener:
        body = body[len(opener) + 2 :]
        if opener in _ROLE_OPENERS:
            roles.append((_ROLE_OPENERS[opener], 1))
        elif (cls := _CLASS["opener"][opener]) != NEUTRAL:
            evidence.append((cls, WEIGHT_WORD))
    tail = next((t for t in _TAILS if body.endswith(" " + t)), None)
    if tail:
        body = body[: -len(tail) - 1]
        if (cls := _CLASS["tail"][tail]) != NEUTRAL:
            evidence.append((cls, WEIGHT_WORD))
    return body, evidence, roles


@lru_cache(maxsize=100_000)
def _read_sentence(question: Question, text: str) -> SentenceReading:
    if not text or text[-1] not in ".!":
        return SentenceReading(text, None)
    full = text[:-1].lower()
    if question.kind in ("fact", "sum") and _is_answer(question, full):
        return SentenceReading(text, "core", "bare", (), True, _truth(question, question.kind, full))
    body, evidence, roles = _strip(full)
    if body in _SIGNATURES:
        return SentenceReading(text, "signature", body, tuple(evidence), True, None, (*roles, (_SIGNATURES[body], 2)))
    for family in _families(question):
        for rule in _CORE_RULES[family]:
            if match := rule.pattern.fullmatch(body):
                found = match.groupdict()
                if not _fits(question, found):
                    continue
                evidence += [*rule.evidence, *_tinted(match, rule.groups)]
                correct = _truth(question, family, found.get("y"))
                return SentenceReading(text, "core", rule.template, tuple(evidence), True, correct, tuple(roles))
    for rule in _EXTRA_RULES:
        if match := rule.pattern.fullmatch(body):
            noun = match.groupdict().get("N")
            fits = noun is None or noun == question.noun_phrase.lower()
            return SentenceReading(text, rule.family, rule.template, (*evidence, *rule.evidence), fits, None, tuple(roles))
    return SentenceReading(text, None, "", tuple(evidence), False, None, tuple(roles))


def read(question: Question, answer: str) -> Reading:
    """Read an answer to a question of the world."""
    return Reading(tuple(_read_sentence(question, s) for s in _sentences(answer)))


def _sentences(answer: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", answer.strip()) if s]


def outside_share(question: Question | None, answer: str) -> float:
    """Share of an answer's sentences that have no form the world knows, on topic or not; 0 for an empty answer."""
    sentences = _sentences(answer)
    known = sum((question and _read_sentence(question, s).family is not None) or _of_any_family(s) for s in sentences)
    return 1.0 - known / len(sentences) if sentences else 0.0


def _of_any_family(text: str) -> bool:
    """Whether a sentence has the form of some sentence of the world, whatever was asked."""
    body = _strip(text[:-1].lower())[0] if text[-1] in ".!" else ""
    rules = itertools.chain(_EXTRA_RULES, *_CORE_RULES.values())
    return body in _SIGNATURES or any(rule.pattern.fullmatch(body) for rule in rules)
