"""Clusters of persona vectors: average linkage on 1 - cosine, with how faithful the tree is and how often each branch comes back.

Average linkage, because Ward's criterion assumes Euclidean distances. Support is the share of resampled sets of questions
(without a question's product with itself) in which the same branch appears (Felsenstein 1985).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import cophenet, leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from persona_lens.errors import GeometryError
from persona_lens.geometry.cosines import LEAST_RELIABILITY, disattenuated, normalised
from persona_lens.geometry.space import PersonaSpace, centre, matched_grams, null_norms, products, resampled_products

N_RESAMPLES = 500


@dataclass(frozen=True, eq=False)
class Clustering:
    """A tree of vectors at one layer.

    Attributes:
        linkage: scipy's linkage matrix, leaves in optimal order.
        order: the vectors as the tree lists them.
        cophenetic: correlation of the tree's distances with the cosines' distances.
        cophenetic_chance: its mean and 95th percentile for random directions of the neutral covariance; None without these.
        support: share of resampled question sets with the same branch, for each of the K - 1 joins (the last is always 1).
    """

    names: tuple[str, ...]
    layer: int
    linkage: Float[np.ndarray, "join 4"]
    order: tuple[int, ...]
    cophenetic: float
    cophenetic_chance: tuple[float, float] | None
    support: Float[np.ndarray, " join"]

    def members(self, join: int) -> frozenset[str]:
        """The vectors under a join.

        Args:
            join: its row in `linkage`.
        """
        return frozenset(self.names[i] for i in _branches(self.linkage)[join])


def cluster(space: PersonaSpace, layer: int, *, centred: bool = False, seed: int = 0) -> Clustering:
    """Cluster the vectors by their disattenuated cosines.

    Args:
        centred: subtract the mean of these vectors first.
        seed: of the resampled question sets.

    Raises:
        GeometryError: fewer than three vectors, or one whose reliability is below .5 (named).
    """
    space.require(3, "clustering")
    differences = space.differences_at(layer)
    found = products(differences)
    found = found.centred() if centred else found
    weak = [n for n, r in zip(space.names, found.reliability, strict=True) if not r >= LEAST_RELIABILITY]
    if weak:
        raise GeometryError(f"clustering at layer {layer} needs reliable vectors; below {LEAST_RELIABILITY}: {', '.join(weak)}")
    rng = np.random.default_rng(seed)
    tree, cophenetic = _tree(disattenuated(found), ordered=True)
    branches = _branches(tree)
    counts = np.zeros(len(tree))
    for unbiased in resampled_products(differences, N_RESAMPLES, rng, centred=centred):
        again = set(_branches(_tree(unbiased)[0]))
        counts += [b in again for b in branches]
    chance = None
    if space.neutral is not None:
        norms = null_norms(np.diag(found.unbiased), centred=centred)
        change = {"change": centre} if centred else {}
        grams = matched_grams(space.neutral_at(layer), norms, N_RESAMPLES, rng, **change)
        null = [_tree(normalised(g))[1] for g in grams]
        chance = (float(np.mean(null)), float(np.percentile(null, 95)))
    return Clustering(
        space.names,
        layer,
        tree,
        tuple(int(i) for i in leaves_list(tree)),
        cophenetic,
        chance,
        counts / N_RESAMPLES,
    )


def _tree(cosine: Float[np.ndarray, "vector vector"], *, ordered: bool = False) -> tuple[Float[np.ndarray, "join 4"], float]:
    """Linkage and cophenetic correlation; vectors that vanish in a resample are at distance 1 of everything."""
    distance = 1.0 - np.nan_to_num(np.clip(cosine, -1.0, 1.0))
    np.fill_diagonal(distance, 0.0)
    condensed = squareform((distance + distance.T) / 2, checks=False)
    tree = linkage(condensed, "average")
    if ordered:
        tree = optimal_leaf_ordering(tree, condensed)
    with np.errstate(invalid="ignore"):
        correlation = float(np.corrcoef(condensed, cophenet(tree))[0, 1])
    return tree, correlation


def _branches(tree: Float[np.ndarray, "join 4"]) -> list[frozenset[int]]:
    """The leaves under every join."""
    n = len(tree) + 1
    found: list[frozenset[int]] = [frozenset({i}) for i in range(n)]
    for a, b, *_ in tree:
        found.append(found[int(a)] | found[int(b)])
    return found[n:]
