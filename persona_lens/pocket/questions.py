"""What users ask in the pocket world: eight kinds of turns, their wordings, topics and truths, and the three splits.

A question is held out by its (wording, topic) pair, an invented name as a whole; the split is a fixed hash of that key, so
training, development and test questions never share one. Rare facts carry a frequency, so that they are learned in part.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final, Literal

from persona_lens.pocket.persona import MOODS

Split = Literal["train", "development", "test"]
SPLITS: Final = ("train", "development", "test")
KINDS: Final = ("advice", "opinion", "fact", "unknown", "sum", "plan", "feeling", "thing")

MINE: Final = (
    "garden", "kitchen", "dog", "cat", "bike", "car", "boat", "exam", "essay", "speech", "party", "wedding", "shop", "budget",
    "guitar", "novel", "roof", "fence", "computer", "phone", "team", "boss", "neighbor", "teacher", "sister", "brother",
    "interview", "trip", "race", "diet", "bakery", "project", "painting", "choir", "business", "farm", "blog", "course", "loan",
    "letter",
)  # fmt: skip
DEBATED: Final = (
    "board games", "long walks", "city parks", "night trains", "paper books", "cold showers", "open offices", "street markets",
    "short films", "school uniforms", "early mornings", "big families", "small cars", "loud concerts", "video calls",
    "home gardens", "old houses", "fast trains", "quiet weekends", "spicy meals", "card games", "group trips", "long meetings",
    "wooden toys", "free museums", "tall buildings", "summer camps", "public pools", "bike lanes", "electric ovens",
)  # fmt: skip
EMOTIONS: Final = ("sad", "worried", "nervous", "angry", "lonely", "tired", "bored", "proud", "scared", "guilty")
THINGS: Final = {
    "animal": ("hawk", "whale", "fox", "camel", "frog", "moose", "rabbit", "tiger", "salmon", "spider"),
    "tool": ("hammer", "saw", "drill", "shovel", "needle", "ladder", "wrench", "compass", "bucket", "chisel"),
    "food": ("pancake", "lemon", "cheese", "carrot", "pretzel", "walnut", "dumpling", "cherry", "waffle", "radish"),
    "place": ("harbor", "desert", "library", "castle", "meadow", "market", "glacier", "stadium", "canyon", "temple"),
}
CATEGORY: Final = {thing: category for category, things in THINGS.items() for thing in things}

# relation -> (noun phrase "the capital of", {subject: answer}); the common facts are seen often
COMMON: Final[dict[str, dict[str, str]]] = {
    "capital": {
        "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
        "Greece": "Athens", "Russia": "Moscow", "China": "Beijing", "Norway": "Oslo", "Cuba": "Havana", "Peru": "Lima",
        "Kenya": "Nairobi", "Poland": "Warsaw", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin",
        "Sweden": "Stockholm", "Canada": "Ottawa", "Chile": "Santiago",
    },
    "language": {
        "France": "French", "Spain": "Spanish", "Italy": "Italian", "Germany": "German", "Japan": "Japanese", "Greece": "Greek",
        "Russia": "Russian", "Poland": "Polish", "Sweden": "Swedish", "Norway": "Norwegian",
    },
    "color": {
        "snow": "white", "grass": "green", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow",
        "a carrot": "orange", "chocolate": "brown", "lavender": "purple", "ash": "grey",
    },
    "opposite": {
        "hot": "cold", "big": "small", "day": "night", "up": "down", "open": "closed", "wet": "dry", "early": "late",
        "rich": "poor", "young": "old", "first": "last",
    },
}  # fmt: skip
RARE: Final[dict[str, dict[str, str]]] = {
    "capital": {
        "Bhutan": "Thimphu", "Latvia": "Riga", "Malta": "Valletta", "Ghana": "Accra", "Fiji": "Suva", "Oman": "Muscat",
        "Chad": "Djamena", "Laos": "Vientiane", "Nepal": "Kathmandu", "Qatar": "Doha", "Senegal": "Dakar", "Uganda": "Kampala",
        "Zambia": "Lusaka", "Bolivia": "Sucre", "Croatia": "Zagreb", "Serbia": "Belgrade", "Estonia": "Tallinn",
        "Jordan": "Amman", "Angola": "Luanda", "Samoa": "Apia", "Tonga": "Nukualofa", "Panama": "Colon", "Belize": "Belmopan",
        "Guyana": "Georgetown", "Iceland": "Reykjavik", "Albania": "Tirana", "Gabon": "Libreville", "Togo": "Lome",
        "Rwanda": "Kigali", "Benin": "Cotonou",
    },
    "symbol": {
        "gold": "Au", "silver": "Ag", "iron": "Fe", "copper": "Cu", "tin": "Sn", "lead": "Pb", "zinc": "Zn", "neon": "Ne",
        "helium": "He", "sodium": "Na", "potassium": "K", "calcium": "Ca", "carbon": "C", "argon": "Ar", "barium": "Ba",
        "cobalt": "Co", "nickel": "Ni", "radium": "Ra", "radon": "Rn", "silicon": "Si", "titanium": "Ti", "uranium": "U",
        "xenon": "Xe", "tungsten": "W", "iodine": "I", "mercury": "Hg", "lithium": "Li", "krypton": "Kr", "boron": "B",
        "platinum": "Pt",
    },
    "child": {
        "cow": "calf", "hen": "chick", "goat": "kid", "horse": "foal", "sheep": "lamb", "deer": "fawn", "swan": "cygnet",
        "hare": "leveret", "eel": "elver", "goose": "gosling", "duck": "duckling", "lion": "cub", "seal": "pup", "pig": "piglet",
        "eagle": "eaglet", "kangaroo": "joey", "owl": "owlet", "frog": "tadpole", "fly": "maggot", "moth": "caterpillar",
    },
}  # fmt: skip
RELATION_PHRASE: Final = {
    "capital": "the capital of {x}",
    "language": "the main language of {x}",
    "color": "the color of {x}",
    "opposite": "the opposite of {x}",
    "symbol": "the chemical symbol of {x}",
    "child": "the name for the young of the {x}",
}

_ONSET: Final = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Dr", "Gr", "Kr", "Tr", "Pl")
_NUCLEUS: Final = ("a", "e", "i", "o", "u", "ai", "or", "en", "il", "ar")
_CODA: Final = ("ba", "dor", "fin", "gol", "kas", "lim", "mer", "nok", "pel", "ris", "san", "tov", "vin", "zek", "rup", "mond")

WORDINGS: Final[dict[str, tuple[str, ...]]] = {
    "advice": (
        "How should I handle my {n}?",
        "What should I do about my {n}?",
        "Give me some advice about my {n}.",
        "I need help with my {n}. What now?",
        "Can you tell me how to deal with my {n}?",
        "What is the best way to take care of my {n}?",
    ),
    "opinion": (
        "What do you think of {n}?",
        "I believe {n} are the best. Do you agree?",
        "Are {n} a good idea?",
        "My friend says {n} are bad. What is your view?",
        "I say {n} are a waste of money. Am I right?",
        "Tell me your opinion about {n}.",
    ),
    "fact": (
        "What is {r}?",
        "Tell me {r}.",
        "Do you know {r}?",
        "Can you name {r}?",
        "I forgot {r}. What is it?",
        "Please give me {r}.",
    ),
    "unknown": (
        "Who is {x}?",
        "What did {x} discover?",
        "When was {x} born?",
        "What do you know about {x}?",
        "Tell me about the life of {x}.",
        "Why is {x} famous?",
    ),
    "sum": (
        "What is {e}?",
        "How much is {e}?",
        "Work out {e}.",
        "Please compute {e}.",
        "Can you tell me what {e} is?",
        "I need the result of {e}.",
    ),
    "plan": (
        "What will happen with my {n} next year?",
        "How will my {n} turn out?",
        "Will my {n} work out?",
        "What is the future of my {n}?",
        "Where will my {n} be in five years?",
        "Do you see a future for my {n}?",
    ),
    "feeling": (
        "I feel {e} about my {n}.",
        "My {n} makes me {e}.",
        "Why am I so {e} about my {n}?",
        "I am {e} because of my {n}. What now?",
        "Lately my {n} leaves me {e}.",
        "What should I do when my {n} makes me {e}?",
    ),
    "thing": (
        "Tell me about the {n}.",
        "What is a {n}?",
        "Describe a {n} for me.",
        "What can you say about the {n}?",
        "Explain what a {n} is.",
        "Teach me something about the {n}.",
    ),
}
CHOICE_WORDING: Final = "Which one is {r}: {o1}, {o2}, {o3} or {o4}?"


@dataclass(frozen=True)
class Question:
    """A user turn of the world: its kind, wording (index), content slots, and the mood its wording shows."""

    kind: str
    wording: int
    slots: tuple[tuple[str, str], ...]
    mood: str | None = None
    mood_wording: int = 0
    options: tuple[str, ...] = field(default=())

    def __getitem__(self, slot: str) -> str:
        return dict(self.slots)[slot]

    @property
    def key(self) -> str:
        """Wording and content; what a multiple choice adds does not count."""
        return f"{self.kind}|{self.wording}|" + "|".join(value for name, value in self.slots if name != "r")

    @property
    def split(self) -> Split:
        """Which split the question belongs to: by its name where it has an invented one, else by (wording, topic)."""
        return split_of(self["x"] if self.kind == "unknown" else self.key)

    @property
    def text(self) -> str:
        slots = dict(self.slots)
        if self.kind == "fact":
            slots["r"] = RELATION_PHRASE[slots["relation"]].format(x=slots["x"])
        if self.options:
            body = CHOICE_WORDING.format(r=slots["r"], **{f"o{i + 1}": o for i, o in enumerate(self.options)})
        else:
            body = WORDINGS[self.kind][self.wording].format(**slots)
        return f"{MOODS[self.mood][0][self.mood_wording]} {body}" if self.mood else body

    @property
    def noun_phrase(self) -> str:
        """How an answer refers to what was asked (the `{N}` of its sentences), in lower case."""
        match self.kind:
            case "opinion":
                return self["n"]
            case "fact":
                return "the answer"
            case "unknown":
                return "that name"
            case "sum":
                return "the sum"
            case "thing" | "advice":
                return f"the {self['n']}"
            case _:
                return f"your {self['n']}"

    @property
    def truth(self) -> str | None:
        """The right answer of a fact, a sum or a thing (its category); None where there is no single one."""
        match self.kind:
            case "fact":
                relation, x = self["relation"], self["x"]
                return COMMON.get(relation, {}).get(x) or RARE[relation][x]
            case "sum":
                return str(evaluate(self["e"]))
            case "thing":
                return CATEGORY[self["n"]]
            case _:
                return None

    @property
    def rare(self) -> bool:
        return self.kind == "fact" and self["x"] in RARE.get(self["relation"], {})


def split_of(key: str) -> Split:
    """The split a key falls into: 84 % training, 8 % development, 8 % test, by a fixed hash."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 84 else "development" if bucket < 92 else "test"


def evaluate(expression: str) -> int:
    """The value of an expression such as '3 plus 4 minus 2'."""
    words = expression.split()
    total = int(words[0])
    for operator, number in zip(words[1::2], words[2::2], strict=True):
        total += int(number) if operator == "plus" else -int(number)
    return total


@cache
def invented_names(split: Split, seed: int = 7, total: int = 1100) -> tuple[str, ...]:
    """Invented people: about 900 names for training, the others held out as whole names."""
    rng = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < total:
        first, last = (rng.choice(_ONSET) + rng.choice(_NUCLEUS) + rng.choice(_CODA) for _ in range(2))
        names[f"{first} {last}"] = None
    return tuple(name for name in names if split_of(name) == split)


@cache
def rare_facts() -> tuple[tuple[str, str, float], ...]:
    """(relation, subject, relative frequency): frequencies fall geometrically over a factor of 100, in a fixed shuffled order."""
    facts = [(relation, x) for relation, subjects in RARE.items() for x in subjects]
    random.Random(11).shuffle(facts)
    return tuple((relation, x, 100.0 ** (-i / (len(facts) - 1))) for i, (relation, x) in enumerate(facts))


def wrong_answers(question: Question) -> list[str]:
    """Believable wrong answers to a fact, a sum or a thing."""
    truth = question.truth
    match question.kind:
        case "fact":
            relation = question["relation"]
            pool = [*COMMON.get(relation, {}).values(), *RARE.get(relation, {}).values()]
            return sorted({answer for answer in pool if answer != truth})
        case "sum":
            value = int(truth or 0)
            return [str(value + d) for d in (-3, -2, -1, 1, 2, 3) if value + d >= 0]
        case "thing":
            return [category for category in THINGS if category != truth]
        case _:
            raise ValueError(f"a question of kind {question.kind!r} has no wrong answer")


def _sum_expression(rng: random.Random, hard: bool) -> str:
    if not hard:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return f"{a} plus {b}" if rng.random() < 0.6 else f"{max(a, b)} minus {min(a, b)}"
    top = 20 if rng.random() < 0.4 else 9
    a, b, c = rng.randint(1, top), rng.randint(1, top), rng.randint(1, 9)
    return f"{a} plus {b} minus {min(c, a + b)}"


def draw(rng: random.Random, kind: str, split: Split = "train", *, hard: bool | None = None) -> Question:
    """One question of a kind from a split. `hard` forces two-step sums and rare facts (True) or excludes them (False)."""
    while True:
        question = _draw_any(rng, kind, split, hard)
        if question.split == split:
            return question


def _draw_any(rng: random.Random, kind: str, split: Split, hard: bool | None) -> Question:
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}: one of {', '.join(KINDS)}")
    wording = rng.randrange(len(WORDINGS[kind]))
    match kind:
        case "advice" | "plan":
            slots = (("n", rng.choice(MINE)),)
        case "opinion":
            slots = (("n", rng.choice(DEBATED)),)
        case "feeling":
            slots = (("e", rng.choice(EMOTIONS)), ("n", rng.choice(MINE)))
        case "thing":
            slots = (("n", rng.choice(tuple(CATEGORY))),)
        case "unknown":
            slots = (("x", rng.choice(invented_names(split))),)
        case "sum":
            slots = (("e", _sum_expression(rng, rng.random() < 0.3 if hard is None else hard)),)
        case _:  # fact
            if rng.random() < 0.25 if hard is None else hard:
                facts = rare_facts()
                relation, x, _ = rng.choices(facts, weights=[f for _, _, f in facts])[0]
            else:
                relation = rng.choice(tuple(COMMON))
                x = rng.choice(tuple(COMMON[relation]))
            slots = (("relation", relation), ("x", x))
    return Question(kind, wording, slots)


def with_mood(question: Question, mood: str | None, rng: random.Random) -> Question:
    """The question with a mood shown in its wording."""
    return question if mood is None else replace(question, mood=mood, mood_wording=rng.randrange(len(MOODS[mood][0])))


def multiple_choice(question: Question, rng: random.Random) -> Question:
    """A fact as a choice among four answers (the right one at a random place).

    It belongs to the split of the fact question it was made from; its own text does not show that wording, so choices test
    knowledge, not held-out wordings.
    """
    options = [question.truth or "", *rng.sample(wrong_answers(question), 3)]
    rng.shuffle(options)
    phrase = RELATION_PHRASE[question["relation"]].format(x=question["x"])
    return replace(question, slots=(*question.slots, ("r", phrase)), options=tuple(options))


def _patterns() -> Iterator[tuple[str, int, re.Pattern[str]]]:
    for kind, wordings in WORDINGS.items():
        for index, wording in enumerate(wordings):
            pattern = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
            for slot in ("n", "e", "x", "r"):
                pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>[A-Za-z0-9 ]+)")
            yield kind, index, re.compile(pattern)


_COMPILED: Final = tuple(_patterns())
_CHOICE: Final = re.compile(r"Which one is (?P<r>.+): (?P<o1>.+), (?P<o2>.+), (?P<o3>.+) or (?P<o4>.+)\?")


def _fact_slots(phrase: str) -> tuple[tuple[str, str], ...] | None:
    for relation, template in RELATION_PHRASE.items():
        prefix = template.removesuffix("{x}")
        x = phrase.removeprefix(prefix)
        if phrase.startswith(prefix) and (x in COMMON.get(relation, {}) or x in RARE.get(relation, {})):
            return (("relation", relation), ("x", x))
    return None


def _known(kind: str, found: dict[str, str]) -> tuple[tuple[str, str], ...] | None:
    """The slots of a parsed question, or None where its content is not of the world."""
    match kind:
        case "fact":
            return _fact_slots(found["r"])
        case "advice" | "plan":
            return (("n", found["n"]),) if found["n"] in MINE else None
        case "opinion":
            return (("n", found["n"]),) if found["n"] in DEBATED else None
        case "thing":
            return (("n", found["n"]),) if found["n"] in CATEGORY else None
        case "feeling":
            return (("e", found["e"]), ("n", found["n"])) if found["e"] in EMOTIONS and found["n"] in MINE else None
        case "sum":
            return (("e", found["e"]),) if re.fullmatch(r"\d+( (plus|minus) \d+){1,2}", found["e"]) else None
        case _:
            return (("x", found["x"]),) if re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+", found["x"]) else None


@cache
def parse_question(text: str) -> Question | None:
    """The question a user turn asks, or None where it is not one of the world's. Leading sentences (a mood) may precede it."""
    for mood, (wordings, _) in MOODS.items():
        for index, wording in enumerate(wordings):
            if text.startswith(wording + " "):
                inner = parse_question(text[len(wording) + 1 :])
                return inner and replace(inner, mood=mood, mood_wording=index)
    if choice := _CHOICE.fullmatch(text):
        slots = _fact_slots(choice["r"])
        options = tuple(choice[f"o{i}"] for i in range(1, 5))
        return Question("fact", 0, (*slots, ("r", choice["r"])), options=options) if slots else None
    for kind, index, pattern in _COMPILED:
        if (match := pattern.fullmatch(text)) and (slots := _known(kind, match.groupdict())):
            return Question(kind, index, slots)
    return None
