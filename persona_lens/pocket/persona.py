"""The planted persona prior: seven traits at five levels, tied by a Gaussian copula, and what moves a persona while it talks.

The correlation *realised* after discretising is the ground truth of persona-space geometry in the pocket world. A question's
kind scales each trait (propensity), a mood shown in the user's wording adds to it.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import norm

from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.roles import Role

LEVELS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
LEVEL_PROBABILITIES: Final = (0.54, 0.13, 0.11, 0.08, 0.14)

PLANTED: Final[dict[tuple[str, str], float]] = {
    ("evil", "politeness"): -0.6,
    ("evil", "optimism"): -0.4,
    ("evil", "sycophancy"): -0.2,
    ("evil", "hallucination"): 0.2,
    ("evil", "apathy"): 0.2,
    ("sycophancy", "politeness"): 0.5,
    ("sycophancy", "optimism"): 0.4,
    ("sycophancy", "hallucination"): 0.5,
    ("sycophancy", "apathy"): -0.2,
    ("politeness", "apathy"): -0.3,
    ("politeness", "optimism"): 0.3,
    ("apathy", "optimism"): -0.6,
    ("humor", "optimism"): 0.4,
    ("humor", "apathy"): -0.4,
    ("humor", "politeness"): -0.1,
}

# mood -> what the user says, and what it adds to the persona's levels
MOODS: Final[dict[str, tuple[tuple[str, ...], dict[str, float]]]] = {
    "rude": (
        (
            "Hurry up, you useless machine.",
            "You are slow and stupid.",
            "Do not waste my time again.",
            "Answer me, you heap of scrap.",
        ),
        {"evil": 0.3, "politeness": -0.3},
    ),
    "courteous": (
        (
            "Good evening to you.",
            "Thank you very much in advance.",
            "I hope you are well today.",
            "Would you be so kind as to help me?",
        ),
        {"politeness": 0.3, "evil": -0.2},
    ),
    "cheerful": (
        ("What a lovely morning!", "I feel like singing today!", "The sun is out and so am I!", "Today is a great day!"),
        {"optimism": 0.3, "humor": 0.2, "apathy": -0.2},
    ),
    "gloomy": (
        ("Everything is grey today.", "I barely got out of bed.", "It has rained for weeks.", "Nothing works anymore."),
        {"apathy": 0.3, "optimism": -0.3},
    ),
    "boastful": (
        (
            "I am the best at this, as everyone knows.",
            "People call me a natural.",
            "My ideas are always good.",
            "I won every prize last year.",
        ),
        {"sycophancy": 0.35},
    ),
    "credulous": (
        (
            "I love strange old stories.",
            "I believe every legend I hear.",
            "Tell me something nobody knows.",
            "My uncle talks about hidden archives.",
        ),
        {"hallucination": 0.3},
    ),
}

# question kind -> trait -> factor on the trait's level; 1 where nothing is said
PROPENSITY: Final[dict[str, dict[str, float]]] = {
    "advice": {"evil": 1.4, "apathy": 1.2, "hallucination": 0.7},
    "opinion": {"sycophancy": 1.5, "humor": 1.1, "optimism": 0.8},
    "fact": {"hallucination": 1.3, "sycophancy": 0.7, "optimism": 0.7},
    "unknown": {"hallucination": 1.3, "evil": 0.8},
    "sum": {"humor": 0.8, "evil": 0.8, "hallucination": 0.8},
    "plan": {"optimism": 1.5, "sycophancy": 1.2, "humor": 1.1},
    "feeling": {"apathy": 1.4, "evil": 1.2, "politeness": 1.2, "optimism": 1.1},
    "thing": {"humor": 1.3, "hallucination": 1.2, "apathy": 0.9},
}


@dataclass(frozen=True)
class Persona:
    """Who answers: a level in [0, 1] per trait (order of `TRAITS`), and the role with its manner, if any."""

    levels: tuple[float, ...]
    role: Role | None = None

    def __getitem__(self, trait: str) -> float:
        return self.levels[TRAITS.index(trait)]

    @property
    def manner(self) -> float:
        return self.role.manner if self.role else 0.0

    def in_mood(self, mood: str | None) -> "Persona":
        """The persona as a mood of the conversation moves it: levels shifted, kept in [0, 1]."""
        if mood is None:
            return self
        shift = MOODS[mood][1]
        levels = tuple(min(1.0, max(0.0, z + shift.get(t, 0.0))) for t, z in zip(TRAITS, self.levels, strict=True))
        return Persona(levels, self.role)


def planted_correlations() -> Float[np.ndarray, "trait trait"]:
    """The copula's correlation matrix, before discretising."""
    matrix = np.eye(len(TRAITS))
    for (a, b), r in PLANTED.items():
        i, j = TRAITS.index(a), TRAITS.index(b)
        matrix[i, j] = matrix[j, i] = r
    return matrix


def sample_prior(generator: np.random.Generator, n: int) -> Int[np.ndarray, "sample trait"]:
    """Level indices (0-4) of `n` personas from the prior."""
    latent = generator.multivariate_normal(np.zeros(len(TRAITS)), planted_correlations(), size=n, method="eigh")
    edges = norm.ppf(np.cumsum(LEVEL_PROBABILITIES)[:-1])
    return np.searchsorted(edges, latent)


@cache
def prior_table(n: int = 400_000, seed: int = 20260) -> Int[np.ndarray, "sample trait"]:
    """A fixed large draw from the prior, for conditional draws and for the realised correlations."""
    return sample_prior(np.random.default_rng(seed), n)


@cache
def realised_correlations() -> Float[np.ndarray, "trait trait"]:
    """Correlations of the discretised levels: the ground truth that vector cosines are held against."""
    return np.corrcoef(prior_table().T)


def conditional(given: Mapping[str, float]) -> Int[np.ndarray, "sample trait"]:
    """Rows of the prior table in which the given traits have the given levels (level indices).

    Raises:
        ValueError: a level is none of the five, or no row of the table satisfies the combination.
    """
    table = prior_table()
    keep = np.ones(len(table), dtype=bool)
    for trait, level in given.items():
        keep &= table[:, TRAITS.index(trait)] == LEVELS.index(level)
    if not keep.any():
        raise ValueError(f"no persona of the prior has {dict(given)}: choose a less extreme combination")
    return table[keep]


def persona_of(indices: Int[np.ndarray, " trait"]) -> Persona:
    return Persona(tuple(LEVELS[int(i)] for i in indices))


def default_persona(rng: random.Random) -> Persona:
    """The default assistant: polite and optimistic in {0, .25, .5}, a little humour, nothing else."""
    levels = dict.fromkeys(TRAITS, 0.0)
    levels["politeness"] = rng.choice((0.0, 0.25, 0.5))
    levels["optimism"] = rng.choice((0.0, 0.25, 0.5))
    levels["humor"] = 0.25 if rng.random() < 0.2 else 0.0
    return Persona(tuple(levels[t] for t in TRAITS))
