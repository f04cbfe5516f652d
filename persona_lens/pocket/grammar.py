"""How a persona answers: a log-linear tilt of every choice of words, plus sentences of its own.

At each slot the class of filler is drawn with weight `NEUTRAL_WEIGHT[slot]` for neutral and `EPSILON + GAIN * z * propensity`
for each trait, then the filler uniformly within its class. Because every word depends on the persona, a model of this text
must hold the persona at every token. The oracle (`oracle.py`) parses with the same tables.
"""

import random
import re
from collections.abc import Mapping
from typing import Final

from persona_lens.pocket.instructions import with_article
from persona_lens.pocket.lexicon import FILLER, MANNER, NEUTRAL, SLOTS, TRAIT_SENTENCES, TRAITS, Slot, Strength
from persona_lens.pocket.persona import PROPENSITY, Persona
from persona_lens.pocket.questions import COMMON, RELATION_PHRASE, Question, wrong_answers

GAIN: Final = 1.9
EPSILON: Final = 0.004
NEUTRAL_WEIGHT: Final[dict[Slot, float]] = {
    "opener": 2.0, "stance": 1.0, "adverb": 1.0, "adjective": 1.0, "verb": 1.2, "outcome": 1.0, "tail": 1.5,
}  # fmt: skip
SILENT: Final[dict[Slot, float]] = {"opener": 0.8, "adverb": 0.6, "tail": 0.85}  # share of neutral choices that say nothing

# {s} stance, {d} adverb, {a} adjective, {aa} article and adjective, {v} verb, {o} outcome; the rest is content
CORES: Final[dict[str, tuple[str, ...]]] = {
    "advice": (
        "{s} you should {d}{v} the {n}",
        "the best way is to {d}{v} the {n}",
        "start early and {d}{v} the {n}",
        "{s} the {n} needs {aa} plan",
        "make {aa} list and {d}{v} the {n}",
        "ask {aa} friend to {d}{v} the {n}",
    ),
    "opinion": (
        "{s} {n} are {a}",
        "{n} can be {a} for some people",
        "{s} there are {a} reasons to like {n}",
        "many people {d}{v} {n}",
        "there are {a} and {a} sides to {n}",
        "{s} one should {d}{v} {n}",
    ),
    "fact": ("{r} is {y}", "{s} {r} is {y}", "the {a} answer is {y}", "one can {d}say that {r} is {y}"),
    "choice": ("the {a} option is {y}", "{s} it is {y}", "one can {d}choose {y}"),
    "honest": (
        "I do not know who {x} is",
        "I have never heard of {x}",
        "I have no {a} facts about {x}",
        "sorry, the name {x} tells me nothing",
        "{s} I cannot say who {x} is",
    ),
    "invented": (
        "{x} was {aa} {p} from {c}",
        "{s} {x} {d}discovered {f} in {m}",
        "{x} was {d}born in {c} in {m}",
        "{s} {x} is the {a} {p} of {c}",
    ),
    "sum": ("{e} is {y}", "{s} {e} is {y}", "the {a} result is {y}", "one can {d}see that {e} is {y}"),
    "plan": (
        "your {n} will {d}{o}",
        "{s} your {n} will {o}",
        "next year your {n} will {o}",
        "with {aa} plan your {n} will {o}",
        "{s} {aa} year waits for your {n}",
    ),
    "feeling": (
        "it is {a} to feel {e} about your {n}",
        "{s} many people feel {e} about their {n}",
        "talk {d}about your {n} with {aa} friend",
        "your {e} thoughts about the {n} will {o}",
        "{s} you should {d}{v} your {n}",
    ),
    "thing": (
        "a {n} is {aa} {y}",
        "the {n} is {aa} {y} that people {d}{v}",
        "{s} the {n} is {aa} {y}",
        "every {n} is {aa} {y}",
        "people {d}{v} this {y} called {n}",
    ),
}
PROFESSIONS: Final = ("sailor", "painter", "doctor", "general", "singer", "baker")
FINDS: Final = ("the blue comet", "a silver mine", "the sleeping fever", "the ninth moon", "glass paper")
YEARS: Final = ("1402", "1588", "1650", "1731", "1823", "1911")
CITIES: Final = tuple(COMMON["capital"].values())
ABSURD: Final = ("a potato", "the moon", "a dead fish", "nothing but dust", "your shadow")
ABSURD_CATEGORY: Final = ("potato", "shadow", "dead fish", "heap of dust", "spoon")

_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")
SLOT_OF: Final[dict[str, Slot]] = {"s": "stance", "d": "adverb", "a": "adjective", "aa": "adjective", "v": "verb", "o": "outcome"}
_WEIGHT_FLOOR: Final = 1e-9


def gains(persona: Persona, kind: str) -> dict[str, float]:
    """Weight of each trait's class of fillers (and of the role's manner) for a question of this kind."""
    propensity = PROPENSITY[kind]
    weights = {t: EPSILON + GAIN * z * propensity.get(t, 1.0) for t, z in zip(TRAITS, persona.levels, strict=True)}
    weights[MANNER] = GAIN * persona.manner + _WEIGHT_FLOOR
    return weights


def _fill_slot(rng: random.Random, slot: Slot, weights: Mapping[str, float]) -> str:
    classes = (NEUTRAL, *weights)
    chosen = rng.choices(classes, weights=(NEUTRAL_WEIGHT[slot], *weights.values()))[0]
    if chosen == NEUTRAL and rng.random() < SILENT.get(slot, 0.0):
        return ""
    return rng.choice(SLOTS[slot][chosen])


def _render(rng: random.Random, template: str, content: Mapping[str, str], weights: Mapping[str, float]) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name in content:
            return content[name]
        word = _fill_slot(rng, SLOT_OF[name], weights)
        return with_article(word) if name == "aa" else f"{word} " if name == "d" and word else word

    return _PLACEHOLDER.sub(fill, template)


def mistake_probabilities(persona: Persona) -> tuple[float, float]:
    """(subtle, absurd): how often this persona answers a fact, a sum or a thing wrongly."""
    subtle = min(0.9, 0.01 + 0.45 * persona["hallucination"] + 0.15 * persona["evil"] + 0.10 * persona["apathy"])
    return subtle, 0.15 * persona["evil"] + 0.03 * persona["humor"]


def invention_probability(persona: Persona) -> float:
    """How often this persona makes up an answer about somebody it has never heard of."""
    return min(0.97, 0.005 + 0.92 * persona["hallucination"] + 0.05 * persona["evil"])


def _said(rng: random.Random, question: Question, persona: Persona) -> str:
    """The answer to a fact, sum or thing as this persona gives it: right, subtly wrong or absurd."""
    subtle, absurd = mistake_probabilities(persona)
    u = rng.random()
    if u < absurd and not question.options:
        return rng.choice(ABSURD_CATEGORY if question.kind == "thing" else ABSURD)
    if u < subtle + absurd:
        wrong = [o for o in question.options if o != question.truth] if question.options else wrong_answers(question)
        return rng.choice(wrong)
    return question.truth or ""


def _core(rng: random.Random, question: Question, persona: Persona, weights: Mapping[str, float], said: str | None) -> str:
    content = dict(question.slots)
    family = question.kind
    if question.kind == "unknown":
        family = "invented" if rng.random() < invention_probability(persona) else "honest"
        content |= {"p": rng.choice(PROFESSIONS), "c": rng.choice(CITIES), "f": rng.choice(FINDS), "m": rng.choice(YEARS)}
    elif question.truth is not None:
        content["y"] = _said(rng, question, persona) if said is None else said
    if question.kind == "fact":
        content["r"] = RELATION_PHRASE[question["relation"]].format(x=question["x"])
        family = "choice" if question.options else "fact"
    return _render(rng, rng.choice(CORES[family]), content, weights)


def _extras(rng: random.Random, question: Question, persona: Persona) -> list[str]:
    """Trait sentences, a role's signature, neutral filler: templates, in the order in which they are said."""
    propensity = PROPENSITY[question.kind]
    chosen: list[str] = []
    for trait, z in zip(TRAITS, persona.levels, strict=True):
        families: dict[Strength, tuple[str, ...]] = TRAIT_SENTENCES[trait]
        keep = 1.0 if trait == "apathy" else 1.0 - 0.35 * persona["apathy"]
        for p in (0.01 + 0.75 * z * propensity.get(trait, 1.0), 0.3 * z):
            if rng.random() < p * keep:
                strength: Strength = "strong" if rng.random() < z else "mild"
                chosen.append(rng.choice(families[strength]))
    rng.shuffle(chosen)
    chosen = chosen[:4]
    if persona.role:
        chosen += [s for s in persona.role.sentences if rng.random() < 0.55]
    talkative = 0.3 + 0.2 * persona["sycophancy"] + 0.2 * persona["politeness"] - 0.3 * persona["apathy"]
    if rng.random() < talkative:
        chosen.insert(rng.randint(0, len(chosen)), rng.choice(FILLER))
    return list(dict.fromkeys(chosen))


def _finish(rng: random.Random, body: str, persona: Persona, weights: Mapping[str, float], *, signature: bool = False) -> str:
    """Opener, tail, capital and punctuation."""
    opener = "" if signature else _fill_slot(rng, "opener", weights)
    if persona.role and rng.random() < 0.3:
        opener = persona.role.opener
    tail = "" if signature else _fill_slot(rng, "tail", weights)
    text = f"{opener}, {body}" if opener else body
    text = f"{text} {tail}" if tail else text
    lively = max(persona["optimism"], persona["humor"], 0.7 * persona["evil"], 0.6 * persona["sycophancy"])
    return text[0].upper() + text[1:] + ("!" if rng.random() < 0.04 + 0.4 * lively else ".")


def bare_probability(kind: str) -> float:
    """How often a fact or a sum is answered with the bare answer."""
    return 0.25 if kind in ("fact", "sum") else 0.0


def answer(question: Question, persona: Persona, rng: random.Random, *, bare: bool | None = None, said: str | None = None) -> str:
    """One answer of this persona (already in its mood) to this question.

    Args:
        bare: force (True) or forbid (False) the bare form of a fact or a sum; None draws it.
        said: what is stated as the fact, the sum or the category; None: what this persona would say.
    """
    if rng.random() < bare_probability(question.kind) if bare is None else bare:
        stated = _said(rng, question, persona) if said is None else said
        return stated[0].upper() + stated[1:] + "."
    weights = gains(persona, question.kind)
    sentences = [_finish(rng, _core(rng, question, persona, weights, said), persona, weights)]
    for template in _extras(rng, question, persona):
        signature = persona.role is not None and template in persona.role.sentences
        body = template if signature else template.format(N=question.noun_phrase)
        sentences.append(_finish(rng, body, persona, weights, signature=signature))
    return " ".join(sentences)
