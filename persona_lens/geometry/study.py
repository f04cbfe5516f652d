"""The geometry of stored runs in one call: everything that needs no model, as one record that a folder keeps and a report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from persona_lens.errors import GeometryError
from persona_lens.extraction import ExtractionRun
from persona_lens.geometry.axes import AxisAndComponent, OnAxis, axis_and_component, on_axis
from persona_lens.geometry.clustering import Clustering, cluster
from persona_lens.geometry.coexpression import Effects, SpillOver, foretold
from persona_lens.geometry.cosines import LEAST_RELIABILITY, Cosines, cosines, layer_cosines, trusted_cosines
from persona_lens.geometry.pca import PCA, pca
from persona_lens.geometry.permutation import Mantel
from persona_lens.geometry.roles import RoleRun
from persona_lens.geometry.space import PersonaSpace, products, space_of_runs
from persona_lens.geometry.subspaces import CrossValidatedRank, cross_validated_rank, varimax
from persona_lens.records import decoded, encoded
from persona_lens.reliability import MINIMUM_QUESTIONS
from persona_lens.store import RunFolder, digest, read_json, read_manifest, require_finished, write_json


@dataclass(frozen=True, eq=False)
class Roles:
    """Roles beside the traits at the studied layer.

    Attributes:
        adherence: for every role that was asked for, answers judged 0, 1, 2 and 3.
        assistant_reliability: split-half reliability of the Assistant Axis.
        on_traits: the roles on every trait vector.
    """

    names: tuple[str, ...]
    n_questions: int
    adherence: Mapping[str, tuple[int, ...]]
    pca: PCA
    rank: CrossValidatedRank
    assistant_reliability: float
    assistant_and_pc1: AxisAndComponent
    roles_on_assistant: OnAxis
    traits_on_assistant: OnAxis
    on_traits: tuple[OnAxis, ...]


@dataclass(frozen=True, eq=False)
class CoExpression:
    """Spill-over beside the cosines at the layer that was steered: did these foretell it, off the diagonal?

    Attributes:
        strengths: coefficients on the raw vectors.
        answers: how many were judged.
        cosines: disattenuated, at the layer.
        coherence: of the answers steered along each vector, at each strength; `unsteered_coherence` of the unsteered ones.
        steered, prompted: what steering along a vector, and prompting for a trait, does to every trait.
        cosines_and_steered, cosines_and_prompted, steered_and_prompted: tests that two of these agree.
        without: why a test is missing, by its name.
    """

    layer: int
    strengths: tuple[float, ...]
    n_questions: int
    answers: int
    cosines: Float[np.ndarray, "vector vector"]
    coherence: Float[np.ndarray, "vector strength"]
    unsteered_coherence: float
    steered: Effects
    prompted: Effects
    cosines_and_steered: Mantel | None
    cosines_and_prompted: Mantel | None
    steered_and_prompted: Mantel | None
    without: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Study:
    """Everything about the geometry of some vectors that their stored questions show.

    Attributes:
        n_questions: of every vector; `n_neutral`: neutral answers.
        layer: where the details are taken; default: where the least reliable vector is most reliable.
        reliability: of every vector at every layer (share of the squared norm that is no noise).
        cosines: as they are, centred, whitened, both (whitened only with neutral residuals).
        by_layer: disattenuated cosines, as they are, at every layer.
        across_layers: disattenuated cosines of every vector with itself at other layers.
        clustering: None where a vector's reliability is below .5.
        rank: dimensions that replicate across questions.
        pca: principal components at the layer.
        rotated: varimax of the scores on the components larger than chance, where these are at least two.
        roles, coexpression: where role vectors and a spill-over matrix were given.
    """

    names: tuple[str, ...]
    model: str
    pooling: str
    layer: int
    n_questions: tuple[int, ...]
    n_neutral: int
    reliability: Float[np.ndarray, "vector layer"]
    cosines: tuple[Cosines, ...]
    by_layer: Float[np.ndarray, "layer vector vector"]
    across_layers: Float[np.ndarray, "vector layer layer"]
    clustering: Clustering | None
    pca: PCA
    rank: CrossValidatedRank
    rotated: Float[np.ndarray, "vector component"] | None
    roles: Roles | None
    coexpression: CoExpression | None


@dataclass(frozen=True)
class GeometryRun:
    """A study on disk.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @property
    def study(self) -> Study:
        """The study that was kept."""
        return decoded(Study, read_json(self.path / "geometry.json"))


def study_geometry(
    runs: Sequence[ExtractionRun],
    *,
    roles: RoleRun | None = None,
    spill_over: SpillOver | None = None,
    layer: int | None = None,
    pooling: str = "response_mean",
    out: str | Path = "runs/geometry",
    seed: int = 0,
) -> GeometryRun:
    """Study the geometry of finished runs and keep the record.

    Args:
        roles: role vectors of the same model.
        spill_over: a spill-over matrix over the same traits.
        layer: where the details are taken; default: where the least reliable vector is most reliable.
        pooling: "response_mean", "prompt_mean" or "prompt_last".

    Raises:
        GeometryError: fewer than three runs, or runs that cannot be compared (named).
        RunFolderError: the folder holds another run.
    """
    space = space_of_runs(runs, pooling)
    _require(space, roles, spill_over, layer)
    arguments = {
        "vectors": {v.trait: digest(v.directions.numpy().tobytes()) for v in space.vectors},
        "pooling": pooling,
        "layer": layer,
        "roles": None if roles is None else read_manifest(roles.path)["arguments"],
        "spill_over": None if spill_over is None else read_manifest(spill_over.path)["arguments"],
        "seed": seed,
    }
    model, path = runs[0].manifest["model"], Path(out)
    if (path / "run.json").exists():
        RunFolder.open(path, command="geometry", arguments=arguments, model=model)
    found = study(space, model=str(model["name"]), roles=roles, spill_over=spill_over, layer=layer, seed=seed)
    folder = RunFolder.open(path, command="geometry", arguments=arguments, model=model)
    write_json(folder.path / "geometry.json", encoded(found))
    return GeometryRun(folder.path)


def load_geometry(path: str | Path) -> GeometryRun:
    """Reopen a study.

    Raises:
        RunFolderError: the folder holds none, or it is not finished.
    """
    folder = Path(path)
    require_finished(folder, "geometry", "geometry.json")
    return GeometryRun(folder)


def study(
    space: PersonaSpace,
    *,
    model: str = "",
    roles: RoleRun | None = None,
    spill_over: SpillOver | None = None,
    layer: int | None = None,
    seed: int = 0,
) -> Study:
    """The geometry of a persona space; see `study_geometry`.

    Args:
        model: its name, for the record.
        roles, spill_over, layer: as `study_geometry`.

    Raises:
        GeometryError: fewer than three vectors, vectors without their questions' means, or roles and spill-over of other ones.
    """
    _require(space, roles, spill_over, layer)
    by_layer = [products(space.differences_at(at)) for at in range(space.n_layers)]
    reliability = np.stack([p.reliability for p in by_layer], 1)
    layer = int(reliability.min(0).argmax()) if layer is None else layer
    kinds = [(c, w) for w in (False, True) for c in (False, True) if not w or space.neutral is not None]
    tables = tuple(cosines(space, layer, centred=c, whitened=w, seed=seed) for c, w in kinds)
    components = pca(space, layer, seed=seed)
    significant = components.chance.significant if components.chance else 0
    there = np.asarray(np.isfinite(space.differences_at(layer)).all(-1))
    return Study(
        space.names,
        model,
        space.pooling,
        layer,
        tuple(int(n) for n in there.sum(1)),
        0 if space.neutral is None else len(space.neutral),
        reliability,
        tables,
        by_layer=np.stack([trusted_cosines(p) for p in by_layer]),
        across_layers=np.stack([layer_cosines(space, name) for name in space.names]),
        clustering=cluster(space, layer, seed=seed) if reliability[:, layer].min() >= LEAST_RELIABILITY else None,
        pca=components,
        rank=_rank(space, layer, seed),
        rotated=varimax(components.scores[:, :significant], seed=seed).loadings if significant >= 2 else None,
        roles=None if roles is None else _roles(space, roles, layer, seed),
        coexpression=None if spill_over is None else _coexpression(space, spill_over, seed),
    )


def _require(space: PersonaSpace, roles: RoleRun | None, spill_over: SpillOver | None, layer: int | None) -> None:
    """Everything that can be wrong, before any work."""
    space.require(3, "a geometry study")
    space.require_layer(0 if layer is None else layer)
    asked = np.asarray(np.isfinite(space.differences_at(0)).all(-1)).sum(1)
    few = [f"{n}: {k}" for n, k in zip(space.names, asked, strict=True) if k < MINIMUM_QUESTIONS]
    if few:
        raise GeometryError(f"a geometry study needs {MINIMUM_QUESTIONS} questions of every vector ({', '.join(few)})")
    weights = space.vectors[0].provenance.get("model", {}).get("weights")
    for what, path in (("roles", roles and roles.path), ("spill-over", spill_over and spill_over.path)):
        if path is None:
            continue
        model = read_manifest(path)["model"]
        if weights and (model["lineage"], model["weights"]) != (space.lineage, weights):
            raise GeometryError(
                f"the {what} in {path} are of {model['name']}, weights {model['weights']}; the vectors of {weights}"
            )
    if roles is not None and space.pooling != "response_mean":
        raise GeometryError(f"roles are pooled as response_mean, the vectors as {space.pooling}: leave out one of them")
    if spill_over is not None and set(spill_over.names) != set(space.names):
        raise GeometryError(
            f"the spill-over in {spill_over.path} is of {', '.join(spill_over.names)}; the vectors are {', '.join(space.names)}"
        )


def _rank(space: PersonaSpace, layer: int, seed: int) -> CrossValidatedRank:
    """Fewer splits and flips than the default: thirty roles take seconds, not minutes."""
    return cross_validated_rank(space.differences_at(layer), n_splits=8, n_flips=199, seed=seed)


def _roles(space: PersonaSpace, roles: RoleRun, layer: int, seed: int) -> Roles:
    theirs = roles.space()
    axis = roles.assistant_axis()
    return Roles(
        theirs.names,
        len(roles.summary["questions"]),
        {name: tuple(int(n) for n in counts) for name, counts in roles.adherence.items()},
        pca(theirs, layer, seed=seed),
        _rank(theirs, layer, seed),
        float(axis.reliability[layer]),
        axis_and_component(theirs, axis, layer),
        on_axis(theirs, axis, layer),
        on_axis(space, axis, layer),
        tuple(on_axis(theirs, v, layer) for v in space.vectors),
    )


def _coexpression(space: PersonaSpace, spill: SpillOver, seed: int) -> CoExpression:
    record = spill.record
    layer = int(record["layer"])
    value = trusted_cosines(products(space.differences_at(layer)))
    steered, prompted = spill.steered.ordered(space.names), spill.prompted.ordered(space.names)
    without: dict[str, str] = {}

    def tested(what: str, similarity: Float[np.ndarray, "vector vector"], effects: Effects) -> Mantel | None:
        try:
            return foretold(similarity, effects, seed=seed)
        except GeometryError as error:
            without[what] = str(error)
            return None

    order = [spill.names.index(n) for n in space.names]
    return CoExpression(
        layer,
        tuple(record["strengths"]),
        len(record["questions"]),
        int(record["answers"]),
        value,
        np.array(record["coherence"], dtype=np.float64)[order],
        float(record["unsteered_coherence"]),
        steered,
        prompted,
        tested("cosines and steered effects", value, steered),
        tested("cosines and prompted effects", value, prompted),
        tested("steered and prompted effects", steered.mean, prompted),
        without,
    )
