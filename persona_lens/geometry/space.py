"""A persona space: persona vectors of one lineage, pooling and width side by side, with the neutral residuals they share.

What can be said about the geometry of a layer follows from the vectors' inner products. The plain ones are inflated by noise where
vectors share noise (norms always do); `unbiased` takes <d_a,i, d_b,j> over pairs of *different* questions only (Walther et al.
2016), so that neither a shared question nor a shared baseline answer biases it. Every estimate is a function of that matrix, and
its jackknife leaves out one question of all vectors at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from persona_lens.errors import GeometryError
from persona_lens.extraction import ExtractionRun
from persona_lens.vectors import PersonaVectors

FLOATS_AT_ONCE: Final = 20_000_000  # of random directions
NEUTRAL_ROWS: Final = 4096  # kept of all runs' neutral answers: more say little more about a covariance
INTERVAL_RELIABILITY: Final = 0.8  # below it the intervals of geometry cover too little, and none is given
SAME: Final = 1e-4  # relative: directions are the mean of their questions' differences


@dataclass(frozen=True, eq=False)
class PersonaSpace:
    """Vectors to be compared with each other.

    Attributes:
        directions: unnormalised, residual-stream units.
        differences: per question, what a direction is the mean of; NaN where a vector has no such question. Questions of the same
            index may be the same question (roles share theirs), so no estimate multiplies them with each other. None where the
            vectors come without them: everything that needs error bars is then refused.
        neutral: residuals of answers to neutral prompts (answer means), for whitening and covariance-matched nulls.
        without_means: the vectors that come without their questions' means.
        vectors: what the space was made of.
        pooling, lineage: of all vectors.
    """

    names: tuple[str, ...]
    directions: Float[Tensor, "vector layer d_model"]
    differences: Float[Tensor, "vector question layer d_model"] | None
    neutral: Float[Tensor, "sample layer d_model"] | None
    pooling: str
    lineage: str
    without_means: tuple[str, ...] = ()
    vectors: tuple[PersonaVectors, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_layers(self) -> int:
        """How many layers the vectors have."""
        return self.directions.shape[1]

    def at(self, layer: int) -> Float[np.ndarray, "vector d_model"]:
        """Directions at a layer, in fp64.

        Raises:
            GeometryError: no such layer.
        """
        self.require_layer(layer)
        return self.directions[:, layer].double().numpy()

    def differences_at(self, layer: int) -> Float[np.ndarray, "vector question d_model"]:
        """Questions' differences at a layer, in fp64.

        Raises:
            GeometryError: no such layer, or vectors without their questions' means (named).
        """
        self.require_layer(layer)
        if self.differences is None:
            raise GeometryError(
                f"no per-question means for {', '.join(self.without_means)}: error bars need them; use vectors of the "
                "mean-difference estimator from a run folder, or leave these out"
            )
        return self.differences[:, :, layer].double().numpy()

    def neutral_at(self, layer: int) -> Float[np.ndarray, "sample d_model"]:
        """Neutral residuals at a layer, in fp64.

        Raises:
            GeometryError: no such layer, or the space has none.
        """
        self.require_layer(layer)
        if self.neutral is None:
            raise GeometryError(
                f"the persona space of {', '.join(self.names)} has no neutral residuals for {self.pooling}: whitening and "
                "covariance-matched nulls need run folders with neutral answers, pooled as response_mean"
            )
        return self.neutral[:, layer].double().numpy()

    def require_layer(self, layer: int) -> None:
        """Raise unless the vectors have a layer.

        Raises:
            GeometryError: no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise GeometryError(f"layer {layer} does not exist: the vectors have layers 0 to {self.n_layers - 1}")

    def require(self, least: int, what: str) -> None:
        """Raise unless there are enough vectors.

        Raises:
            GeometryError: fewer than `least`.
        """
        if len(self) < least:
            raise GeometryError(f"{what} needs at least {least} vectors, these are {len(self)}: {', '.join(self.names)}")


def persona_space(vectors: Sequence[PersonaVectors], neutral: Float[Tensor, "sample layer d_model"] | None = None) -> PersonaSpace:
    """Put vectors side by side.

    Args:
        neutral: residuals of neutral answers in the vectors' pooling.

    Raises:
        GeometryError: no vectors, one name twice, or vectors of different poolings, lineages, layers or widths (named).

    Example:
        >>> from persona_lens.geometry import persona_space
        >>> space = persona_space([v, pl.load_run("runs/politeness").vectors], neutral=run.neutral)
        >>> space.at(5).shape  # vector, d_model
        (2, 256)
    """
    if not vectors:
        raise GeometryError("a persona space needs vectors, none are given")
    names = tuple(v.trait for v in vectors)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise GeometryError(f"names must differ, given twice: {', '.join(twice)}")
    _require_one(vectors, "poolings", [v.pooling for v in vectors])
    _require_one(vectors, "lineages", [v.lineage for v in vectors])
    _require_one(vectors, "models", [str(v.provenance.get("model", {}).get("weights", "")) for v in vectors])
    _require_one(vectors, "numbers of layers", [str(v.n_layers) for v in vectors])
    _require_one(vectors, "widths", [str(v.d_model) for v in vectors])
    if neutral is not None and tuple(neutral.shape[1:]) != tuple(vectors[0].directions.shape):
        raise GeometryError(
            f"neutral residuals have shape {list(neutral.shape)}, "
            f"the vectors need [sample, {vectors[0].n_layers}, {vectors[0].d_model}]"
        )
    without = tuple(v.trait for v in vectors if not _is_mean(v))
    return PersonaSpace(
        names,
        torch.stack([v.directions for v in vectors]),
        None if without else _aligned(vectors),
        neutral,
        vectors[0].pooling,
        vectors[0].lineage,
        without,
        tuple(vectors),
    )


def space_of_runs(runs: Sequence[ExtractionRun], pooling: str = "response_mean") -> PersonaSpace:
    """The persona space of extraction runs, with neutral answers of all of them, at most 4096 (of response_mean only).

    Args:
        pooling: "response_mean", "prompt_mean" or "prompt_last".

    Raises:
        GeometryError: no runs, one trait twice, or runs of different lineages, layers or widths (named).
        UnknownNameError: no such pooling.

    Example:
        >>> runs = [pl.load_run("runs/optimism"), pl.load_run("runs/politeness")]
        >>> space = pl.geometry.space_of_runs(runs)
        >>> space.names
        ('optimism', 'politeness')
    """
    vectors = [r.vectors if pooling == "response_mean" else r.vectors_for(pooling) for r in runs]
    neutral = [r.neutral for r in runs] if pooling == "response_mean" else []
    kept = [n for n in neutral if len(n)]
    if not kept or len({n.shape[1:] for n in kept}) > 1:
        return persona_space(vectors)  # which names the vectors that do not fit
    each = max(1, NEUTRAL_ROWS // len(kept))
    return persona_space(vectors, torch.cat([n[torch.linspace(0, len(n) - 1, min(each, len(n))).long()] for n in kept]))


def _require_one(vectors: Sequence[PersonaVectors], what: str, values: Sequence[str]) -> None:
    found: dict[str, list[str]] = {}
    for v, value in zip(vectors, values, strict=True):
        found.setdefault(value, []).append(v.trait)
    if len(found) > 1:
        said = "; ".join(f"{', '.join(names)}: {value or 'unknown'}" for value, names in found.items())
        raise GeometryError(f"vectors of different {what} cannot be compared ({said})")


def _is_mean(v: PersonaVectors) -> bool:
    if not len(v.differences):
        return False
    gap = (v.differences.double().mean(0) - v.directions).norm()
    return bool(gap <= SAME * v.directions.norm())


def _aligned(vectors: Sequence[PersonaVectors]) -> Float[Tensor, "vector question layer d_model"]:
    """Differences by question index; NaN where a vector lacks the question."""
    asked = [asked_questions(v) for v in vectors]
    found = torch.full((len(vectors), 1 + max(max(kept) for kept in asked), *vectors[0].directions.shape), torch.nan)
    for row, (v, kept) in enumerate(zip(vectors, asked, strict=True)):
        found[row, kept] = v.differences
    return found


def asked_questions(v: PersonaVectors) -> list[int]:
    """Indices of the questions that a vector's differences belong to."""
    return list(v.provenance.get("questions", range(len(v.differences))))


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of vectors at one layer, squared residual-stream units.

    Attributes:
        plain: `<v_a, v_b>`.
        unbiased: mean of `<d_a,i, d_b,j>` over i != j: what `<v_a, v_b>` would be with endless questions.
        left_out: `unbiased` without each question.
    """

    plain: Float[np.ndarray, "vector vector"]
    unbiased: Float[np.ndarray, "vector vector"]
    left_out: Float[np.ndarray, "question vector vector"]

    def centred(self) -> "Products":
        """The same for vectors minus their mean vector."""
        n = len(self.plain)
        c = np.eye(n) - 1.0 / n
        return Products(c @ self.plain @ c, c @ self.unbiased @ c, c @ self.left_out @ c)

    @property
    def reliability(self) -> Float[np.ndarray, " vector"]:
        """Share of a vector's squared norm that is no noise (the split-half reliability of the whole)."""
        return np.diag(self.unbiased) / np.diag(self.plain)


def products(differences: Float[np.ndarray, "vector question d_model"]) -> Products:
    """Plain and unbiased inner products of the means over questions, and the jackknife of the latter.

    Raises:
        GeometryError: a vector with fewer than three questions.
    """
    there = np.asarray(np.isfinite(differences).all(-1))
    if there.sum(1).min() < 3:
        raise GeometryError(f"inner products need at least 3 questions of every vector, one has {there.sum(1).min()}")
    asked = there.any(0)
    there, differences = there[:, asked], differences[:, asked]
    x = np.where(there[..., None], differences, 0.0)
    counts = there.astype(float)
    same = np.einsum("aqd,bqd->qab", x, x, optimize=True)
    both = np.einsum("aq,bq->qab", counts, counts)
    sums, n = x.sum(1), counts.sum(1)

    def across(s: Float[np.ndarray, "vector d_model"], k: Float[np.ndarray, " vector"], i: slice | list[int]) -> np.ndarray:
        return (s @ s.T - same[i].sum(0)) / (np.outer(k, k) - both[i].sum(0))

    others = [[j for j in range(x.shape[1]) if j != i] for i in range(x.shape[1])]
    left_out = np.stack([across(sums - x[:, i], n - counts[:, i], kept) for i, kept in enumerate(others)])
    means = sums / n[:, None]
    return Products(means @ means.T, across(sums, n, slice(None)), left_out)


def cosine_of(inner: Float[np.ndarray, "vector vector"], norms: Float[np.ndarray, "vector vector"]) -> np.ndarray:
    """Inner products over norms (squared, on the diagonal of the second matrix); NaN where one is not positive."""
    squares = np.diag(norms)
    lengths = np.sqrt(np.where(squares > 0, squares, np.nan))
    return inner / np.outer(lengths, lengths)


def resampled_products(
    differences: Float[np.ndarray, "vector question d_model"], n: int, rng: np.random.Generator, *, centred: bool = False
) -> Float[np.ndarray, "draw vector vector"]:
    """Unbiased cosines of resampled questions: a question drawn twice is not multiplied with itself.

    Their spread shows how stable a tree or an order is; it is no interval.
    """
    there = np.asarray(np.isfinite(differences).all(-1))
    x = np.where(there[..., None], differences, 0.0)
    size, questions = there.shape
    inner = np.einsum("aqd,brd->qrab", x, x, optimize=True)
    both = np.einsum("aq,br->qrab", there.astype(float), there.astype(float))
    centring = np.eye(size) - (1.0 / size if centred else 0.0)
    found: list[Float[np.ndarray, "vector vector"]] = []
    for _ in range(n):
        weights = rng.multinomial(questions, np.full(questions, 1 / questions)).astype(float)
        pairs = np.outer(weights, weights)
        np.fill_diagonal(pairs, 0.0)
        mean = np.einsum("qr,qrab->ab", pairs, inner) / np.maximum(np.einsum("qr,qrab->ab", pairs, both), 1.0)
        c = centring @ mean @ centring
        found.append(cosine_of(c, c))
    return np.stack(found)


def whitening(neutral: Float[np.ndarray, "sample d_model"]) -> Float[np.ndarray, "d_model d_model"]:
    """Inverse square root of the Ledoit-Wolf covariance of neutral residuals.

    Raises:
        GeometryError: fewer than 20 residuals.
    """
    if len(neutral) < 20:
        raise GeometryError(f"whitening needs at least 20 neutral residuals, there are {len(neutral)}")
    values, axes = np.linalg.eigh(ledoit_wolf(neutral)[0])
    return (axes / np.sqrt(values)) @ axes.T


def matched_grams(
    neutral: Float[np.ndarray, "sample d_model"],
    norms: Float[np.ndarray, " vector"],
    n: int,
    rng: np.random.Generator,
    change: Callable[[Float[np.ndarray, "draw vector d_model"]], Float[np.ndarray, "draw vector d_model"]] = lambda x: x,
) -> Float[np.ndarray, "draw vector vector"]:
    """Inner products of random directions with the covariance of neutral residuals and the given norms: the null of "no more than
    the shape of the residual stream".

    Args:
        change: what is done to each draw of vectors before they are multiplied (centring, deflation, noise).
    """
    _, spread, axes = np.linalg.svd(neutral - neutral.mean(0), full_matrices=False)
    found: list[Float[np.ndarray, "draw vector vector"]] = []
    at_once = max(1, FLOATS_AT_ONCE // (len(norms) * neutral.shape[1]))
    for start in range(0, n, at_once):
        shape = (min(at_once, n - start), len(norms), len(spread))
        draws = rng.normal(size=shape) * spread
        draws *= norms[:, None] / np.maximum(np.linalg.norm(draws, axis=-1, keepdims=True), np.finfo(float).tiny)
        changed = change(draws @ axes)
        found.append(changed @ changed.transpose(0, 2, 1))
    return np.concatenate(found)


def null_norms(squares: Float[np.ndarray, " vector"], *, centred: bool) -> Float[np.ndarray, " vector"]:
    """Norms of random directions that stand for vectors of these (unbiased) squared norms.

    Centring K independent directions leaves n_i^2 (1 - 2 / K) + sum(n^2) / K^2 of the i-th, which is undone here. Unbiased squares
    can be negative; they count as 0, and the others shrink so that the sum stays what it is.
    """
    k = len(squares)
    wanted = (squares - squares.sum() / (k * (k - 1))) / (1.0 - 2.0 / k) if centred else squares
    kept = np.maximum(wanted, 0.0)
    share = max(wanted.sum(), 0.0) / max(kept.sum(), np.finfo(float).tiny)
    return np.sqrt(kept * share)


def centre(draws: Float[np.ndarray, "draw vector d_model"]) -> Float[np.ndarray, "draw vector d_model"]:
    """Every draw minus its mean vector."""
    return draws - draws.mean(1, keepdims=True)


def question_noise(
    differences: Float[np.ndarray, "vector question d_model"], n: int, rng: np.random.Generator
) -> Float[np.ndarray, "draw vector d_model"]:
    """Noise of the means over questions: residuals with random signs, a question's sign the same for all vectors."""
    there = np.asarray(np.isfinite(differences).all(-1))
    counts = there.sum(1)
    residuals = np.where(there[..., None], differences - np.nanmean(differences, axis=1, keepdims=True), 0.0)
    residuals /= np.sqrt(counts * (counts - 1))[:, None, None]
    signs = rng.choice(np.array([-1.0, 1.0]), size=(n, differences.shape[1]))
    return np.einsum("nq,vqd->nvd", signs, residuals, optimize=True)
