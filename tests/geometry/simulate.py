"""Persona spaces with a planted truth: directions of known cosines, noise of known size, questions shared or not."""

from dataclasses import dataclass

import numpy as np
import torch

from persona_lens.geometry import PersonaSpace, persona_space
from persona_lens.vectors import PersonaVectors

WIDTH = 48


def vectors_of(
    name: str, differences: np.ndarray, questions: list[int] | None = None, pooling: str = "response_mean", lineage: str = "tiny"
) -> PersonaVectors:
    """Vectors from per-question differences [question, layer, d_model] or [question, d_model]."""
    x = torch.tensor(differences if differences.ndim == 3 else differences[:, None], dtype=torch.float32)
    layers = x.shape[1]
    return PersonaVectors(
        name,
        pooling,
        "mean_difference",
        x.double().mean(0).float(),
        x,
        reliability=torch.ones(layers),
        norm=x.mean(0).norm(dim=-1),
        p_value=torch.zeros(layers),
        provenance={"model": {"lineage": lineage, "name": "tiny"}, "questions": questions or list(range(len(x)))},
    )


@dataclass(frozen=True)
class World:
    """Where vectors come from: directions, the shape of the noise, and how reliable a vector of so many questions is."""

    means: np.ndarray  # [vector, d_model]
    spread: np.ndarray  # [d_model, d_model]: noise is white noise times this
    questions: int
    reliability: float
    shared: float = 0.0  # share of a question's noise variance that all vectors have in common

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Differences [vector, question, d_model]."""
        n, width = self.means.shape
        own, common = rng.normal(size=(n, self.questions, width)), rng.normal(size=(1, self.questions, width))
        noise = (np.sqrt(1 - self.shared) * own + np.sqrt(self.shared) * common) @ self.spread
        length = np.linalg.norm(self.means, axis=1)[:, None, None]
        return self.means[:, None] + np.sqrt(self.questions * (1 / self.reliability - 1)) * length * noise

    def space(self, rng: np.random.Generator, neutral: np.ndarray | None = None) -> PersonaSpace:
        drawn = self.draw(rng)
        rest = None if neutral is None else torch.tensor(neutral[:, None], dtype=torch.float32)
        return persona_space([vectors_of(f"v{i}", d) for i, d in enumerate(drawn)], rest)


def anisotropic(rng: np.random.Generator, power: float = 0.5) -> np.ndarray:
    """A spread whose standard deviations fall as a power of their rank, in random axes; total variance 1."""
    size = np.arange(1, WIDTH + 1) ** -power
    return (size / np.linalg.norm(size))[:, None] * np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]


def world(
    vectors: int, questions: int, reliability: float, *, rank: int = 4, shared: float = 0.0, seed: int = 0, noise: float = 0.5
) -> World:
    """Directions of a planted rank (plus a little of everything), lengths between .7 and 1.3."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(WIDTH, rank)))[0].T
    means = rng.normal(size=(vectors, rank)) * np.linspace(1.4, 0.7, rank) @ axes + 0.03 * rng.normal(size=(vectors, WIDTH))
    means *= rng.uniform(0.7, 1.3, size=(vectors, 1)) / np.linalg.norm(means, axis=1, keepdims=True)
    return World(means, anisotropic(rng, noise), questions, reliability, shared)
