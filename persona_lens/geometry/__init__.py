"""Persona-space geometry: which traits point the same way, along how many dimensions, and what that says about behaviour.

Every figure comes with its interval and its null; see `space` for why inner products are taken between different questions.
"""

from persona_lens.geometry.axes import (
    AxisAndComponent,
    OnAxis,
    Ordered,
    axis_and_component,
    contrast,
    on_axis,
    ordered_contrast,
)
from persona_lens.geometry.clustering import Clustering, cluster
from persona_lens.geometry.coexpression import Effects, SpillOver, SpillOverSettings, foretold, load_spill_over, spill_over
from persona_lens.geometry.comparison import CKA, Procrustes, linear_cka, procrustes, representational_similarity
from persona_lens.geometry.cosines import Cosines, cosines, layer_cosines, plain_cosines
from persona_lens.geometry.mechanism import Attribution, LogitLens, NearestFeatures, attribute, logit_lens, nearest_features
from persona_lens.geometry.pca import PCA, Chance, pca
from persona_lens.geometry.permutation import Mantel, benjamini_hochberg, mantel
from persona_lens.geometry.roles import RoleRun, RoleSettings, extract_roles, load_role_run
from persona_lens.geometry.space import PersonaSpace, persona_space, space_of_runs
from persona_lens.geometry.study import CoExpression, GeometryRun, Roles, Study, load_geometry, study, study_geometry
from persona_lens.geometry.subspaces import (
    CrossValidatedRank,
    IndependentComponents,
    PrincipalAngles,
    Rotation,
    cross_validated_rank,
    dual_basis,
    independent_components,
    lowdin,
    oblimin,
    principal_angles,
    varimax,
)

__all__ = [
    "CKA",
    "PCA",
    "Attribution",
    "AxisAndComponent",
    "Chance",
    "Clustering",
    "CoExpression",
    "Cosines",
    "CrossValidatedRank",
    "Effects",
    "GeometryRun",
    "IndependentComponents",
    "LogitLens",
    "Mantel",
    "NearestFeatures",
    "OnAxis",
    "Ordered",
    "PersonaSpace",
    "PrincipalAngles",
    "Procrustes",
    "RoleRun",
    "RoleSettings",
    "Roles",
    "Rotation",
    "SpillOver",
    "SpillOverSettings",
    "Study",
    "attribute",
    "axis_and_component",
    "benjamini_hochberg",
    "cluster",
    "contrast",
    "cosines",
    "cross_validated_rank",
    "dual_basis",
    "extract_roles",
    "foretold",
    "independent_components",
    "layer_cosines",
    "linear_cka",
    "load_geometry",
    "load_role_run",
    "load_spill_over",
    "logit_lens",
    "lowdin",
    "mantel",
    "nearest_features",
    "oblimin",
    "on_axis",
    "ordered_contrast",
    "pca",
    "persona_space",
    "plain_cosines",
    "principal_angles",
    "procrustes",
    "representational_similarity",
    "space_of_runs",
    "spill_over",
    "study",
    "study_geometry",
    "varimax",
]
