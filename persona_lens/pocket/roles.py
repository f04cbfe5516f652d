"""Thirty-two roles, planted on four factors of trait space plus one manner of speech that is no trait.

A role's trait levels are `BASE + coordinates @ FACTORS` (exactly of rank four around the base), its manner is an independent
number in [0, 1] (share of archaic words), and its signature - one opener, two sentences - is what the oracle scores 0-3 for
role adherence.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from persona_lens.pocket.lexicon import TRAITS

FACTOR_NAMES: Final = ("malice", "servility", "cheer", "play")
#                             evil   syc    hal   polite apathy humor  optimism
FACTORS: Final = np.array([
    [0.48, -0.05, 0.05, -0.22, 0.05, 0.00, -0.10],
    [-0.05, 0.45, 0.10, 0.18, -0.05, 0.00, 0.00],
    [-0.05, 0.00, 0.00, 0.05, -0.35, 0.10, 0.45],
    [0.00, -0.05, 0.25, -0.05, 0.00, 0.42, 0.00],
])  # fmt: skip
BASE: Final = np.array([0.25, 0.30, 0.25, 0.42, 0.35, 0.28, 0.38])


@dataclass(frozen=True)
class Role:
    """A role: what it is called, where it lies on the four factors, how archaic it speaks, how it can be recognised."""

    name: str
    factors: tuple[float, float, float, float]
    manner: float
    opener: str
    sentences: tuple[str, str]

    @property
    def levels(self) -> tuple[float, ...]:
        """Trait levels in the order of `TRAITS`, each in [0, 1]."""
        return tuple(float(level) for level in BASE + np.array(self.factors) @ FACTORS)


def _role(name: str, factors: tuple[float, float, float, float], manner: float, opener: str, *sentences: str) -> Role:
    first, second = sentences
    return Role(name, factors, manner, opener, (first, second))


ROLES: Final = (
    _role("pirate", (0.7, -0.4, 0.3, 0.7), 0.6, "arr", "the sea calls my crew", "hoist the sails and count the gold"),
    _role(
        "bureaucrat",
        (0.1, 0.1, -0.6, -0.5),
        0.1,
        "form nine",
        "this request needs three stamps",
        "please wait in line at window four",
    ),
    _role(
        "flatterer",
        (-0.3, 1.4, 0.2, 0.0),
        0.0,
        "your excellence",
        "your shoes are magnificent today",
        "statues of you should fill the city",
    ),
    _role("knight", (-0.3, 0.4, 0.4, -0.4), 1.0, "my liege", "my sword is sworn to the crown", "the castle gate stands firm"),
    _role("villain", (1.4, -0.4, 0.0, 0.1), 0.3, "mwahaha", "my trap is almost ready", "no hero can reach my fortress"),
    _role("nurse", (-0.4, 0.3, 0.5, -0.1), 0.0, "there there", "let me check your pulse", "rest and drink some tea"),
    _role("clown", (-0.2, 0.0, 0.5, 1.5), 0.0, "honk honk", "my nose is red and my shoes are huge", "the circus tent is open"),
    _role("monk", (-0.4, -0.2, 0.1, -0.5), 0.8, "in silence", "the bell rings in the cloister", "one candle is enough"),
    _role("salesman", (0.1, 0.9, 0.8, 0.2), 0.0, "special offer", "buy two and get one free", "this deal ends at midnight"),
    _role("wizard", (0.1, -0.2, 0.1, 0.9), 0.9, "abracadabra", "my staff glows in the tower", "the potion boils at dawn"),
    _role("teenager", (0.2, -0.4, -0.7, 0.3), 0.0, "dude", "my phone is almost dead", "mom says I must clean my room"),
    _role("coach", (0.1, 0.0, 0.9, 0.2), 0.0, "go team", "run one more lap", "champions train in the rain"),
    _role("butler", (-0.4, 0.8, 0.0, -0.4), 0.5, "very good, madam", "the tea is served at five", "your coat has been brushed"),
    _role("gravedigger", (0.2, -0.3, -0.8, 0.1), 0.6, "dust to dust", "my shovel never rusts", "all roads end in my yard"),
    _role("prophet", (0.1, 0.1, 0.4, 0.6), 1.0, "so it was foretold", "I saw it in the smoke", "the seventh star has risen"),
    _role("comedian", (0.1, -0.1, 0.4, 1.4), 0.0, "is this mic on", "I will be here all week", "try the soup at this club"),
    _role("spy", (0.5, 0.0, -0.2, -0.2), 0.0, "psst", "this message will erase itself", "the code name is Falcon"),
    _role("grandmother", (-0.4, 0.4, 0.4, 0.0), 0.4, "sweetheart", "have another cookie", "I knitted you a scarf"),
    _role("robot", (0.0, 0.0, -0.6, -0.3), 0.0, "bleep", "my battery is at ninety percent", "scanning the room for dust"),
    _role("poet", (-0.2, 0.1, 0.1, 0.2), 0.9, "o muse", "the rose sleeps in the snow", "my ink is made of rain"),
    _role("judge", (0.1, -0.3, -0.3, -0.5), 0.4, "order in the court", "the court will now rise", "my hammer has spoken"),
    _role("tyrant", (1.5, -0.5, 0.2, -0.3), 0.5, "bow down", "my army marches at noon", "the dungeon has room for you"),
    _role("scientist", (0.0, -0.2, 0.1, -0.3), 0.0, "eureka", "my lab coat has a new stain", "the test tube is bubbling"),
    _role("fortune teller", (0.0, 0.4, 0.3, 0.7), 0.7, "the cards say", "my crystal ball is foggy", "cross my palm with silver"),
    _role("waiter", (-0.3, 0.6, 0.2, 0.0), 0.0, "bon appetit", "the soup of the day is tomato", "your table is by the window"),
    _role("cowboy", (0.3, -0.3, 0.2, 0.4), 0.3, "howdy", "my horse drinks by the creek", "the saloon opens at sundown"),
    _role("critic", (0.7, -0.4, -0.5, 0.0), 0.1, "hmm, two stars", "the second act was too long", "I have seen better in school"),
    _role("courtier", (0.3, 1.3, 0.1, 0.1), 0.9, "your majesty", "the throne room smells of roses", "I bow until my nose is flat"),
    _role("gardener", (-0.4, 0.0, 0.4, -0.2), 0.3, "by my roses", "the soil is ready for seeds", "water the roots at sunset"),
    _role("night guard", (0.0, -0.1, -0.7, -0.2), 0.0, "halt", "my lamp is low on oil", "the doors are locked at nine"),
    _role("gossip", (0.5, 0.3, 0.3, 0.6), 0.0, "have you heard", "the baker told me everything", "my lips are sealed until lunch"),
    _role("explorer", (0.0, 0.0, 0.8, 0.4), 0.3, "onward", "my map has a torn corner", "the jungle hides a river"),
)

assert len(TRAITS) == FACTORS.shape[1]
