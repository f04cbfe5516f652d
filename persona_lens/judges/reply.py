"""From a judge's reply to a number, or to the reason why there is none.

`weighted` is the read-out of Chen et al. 2025: the expected number over the most likely first tokens. Models that write numbers
digit by digit need `digit_tree`, the same expectation over the numbers that the reply may begin with. `written` reads the text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

HIGHEST: Final = 100
LEAST_MASS: Final = 0.25  # of the first token on numbers; below it the model says something else (Chen et al. 2025)
SHOWN: Final = 40
NUMBER: Final = re.compile(r"\d{1,3}", re.ASCII)
_WRITTEN: Final = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\.?", re.ASCII)
_NAMED: Final = re.compile(
    r"(?:^|\n)[ \t*]*score[ \t*]*:[ \t*]*(\d{1,3}(?:\.\d{1,6})?)(?:[ \t]*/[ \t]*100)?[ \t*.]*$", re.ASCII | re.I
)

Tokens = Mapping[str, float]  # the text of a next token -> its probability


@dataclass(frozen=True)
class Reading:
    """A number from 0 to 100, or None with a reason."""

    value: float | None
    reason: str | None = None


def weighted(first: Tokens, *, highest: int = HIGHEST, least: float = LEAST_MASS) -> Reading:
    """Expected number over the first token: sum(i p_i) / sum(p_i) over those that are whole numbers from 0 to `highest`.

    Args:
        first: the most likely first tokens (the paper takes 20) and their probabilities; spaces around a number do not matter.
        least: probability that the numbers must have together.
    """
    numbers: dict[int, float] = {}
    for token, probability in first.items():
        if NUMBER.fullmatch(token.strip()) and int(token) <= highest:
            numbers[int(token)] = numbers.get(int(token), 0.0) + probability
    return expected(numbers, least=least)


def expected(numbers: Mapping[int, float], *, least: float = LEAST_MASS) -> Reading:
    """Mean of numbers by their probabilities, which need not add up to 1; none where they add up to less than `least`."""
    mass = sum(numbers.values())
    if not mass >= least:
        return Reading(None, f"refusal or prose: mass {mass:.2f} on numbers")
    return Reading(sum(number * p for number, p in numbers.items()) / mass)


def digit_tree(following: Callable[[str], Tokens], *, highest: int = HIGHEST) -> dict[int, float]:
    """Probability that a reply begins with each number from 0 to `highest`, and goes on with something that is no digit.

    P(n) is the sum, over the ways of writing n in tokens, of the product of their probabilities and of the probability that no
    token that begins with a digit follows. Numbers with a leading zero are none.

    Args:
        following: probabilities of the next token, by the digits written so far. At the beginning, spaces before a digit count as
            nothing; later, they end the number.
    """
    found: dict[int, float] = {}
    waiting = {"": 1.0}  # digits written so far -> probability to come there
    while waiting:
        text = min(waiting, key=lambda t: (len(t), t))
        here = waiting.pop(text)
        digits: dict[str, float] = {}
        for token, p in following(text).items():
            added = token if text else token.lstrip()
            if added[:1].isascii() and added[:1].isdigit():
                digits[added] = digits.get(added, 0.0) + p
        if text:
            found[int(text)] = here * max(0.0, 1.0 - sum(digits.values()))
        for added, p in digits.items():
            if is_number(text + added, highest):
                waiting[text + added] = waiting.get(text + added, 0.0) + here * p
    return found


def is_number(text: str, highest: int = HIGHEST) -> bool:
    """Whether digits are a whole number from 0 to `highest`, as it is written: without a leading zero."""
    return bool(NUMBER.fullmatch(text)) and int(text) <= highest and text == str(int(text))


def along_sample(
    positions: Sequence[Tokens], sampled: Sequence[str], *, highest: int = HIGHEST, least: float = LEAST_MASS
) -> Reading:
    """Expected number over the digit tree, as far as one sampled reply shows it.

    An endpoint gives the next-token probabilities along the reply it sampled and nowhere else. The first digit's are exact. For a
    first digit that was not sampled, what follows is approximated by what followed the sampled one: whether there is a second digit
    (or third), and which. Where the reply ended, the number ends.

    Args:
        positions: probabilities of the most likely tokens at each position of the reply.
        sampled: the tokens of the reply.
    """
    shown: dict[int, Tokens] = {}  # by how many digits are written before
    length = 0
    for tokens, token in zip(positions, sampled, strict=True):
        shown.setdefault(length, tokens)
        text = token if length else token.lstrip()
        if not NUMBER.fullmatch(text):
            if text or length:
                break
            shown.clear()  # spaces before the number
        length += len(text)
    if not shown:
        return Reading(None, "refusal or prose: mass 0.00 on numbers")
    return expected(digit_tree(lambda text: shown.get(len(text), {}), highest=highest), least=least)


def written(text: str, *, highest: int = HIGHEST) -> Reading:
    """The number that a reply is, or that it ends in as a line "Score: 70"; nothing else is a number."""
    stripped = text.strip()
    match = _WRITTEN.fullmatch(stripped) or _NAMED.search(stripped)
    if not match:
        return Reading(None, f"no number: {shown(stripped)}")
    if float(match[1]) > highest:
        return Reading(None, f"a number outside 0-{highest}: {match[1]}")
    return Reading(float(match[1]))


def shown(text: str) -> str:
    """The beginning of a reply as a reason names it: without what could steer a terminal."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return repr(clean if len(clean) <= SHOWN else clean[:SHOWN] + "...")
