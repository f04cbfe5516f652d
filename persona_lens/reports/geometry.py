"""The report of a geometry study: figures, tables, and in words what may be concluded from them and what not."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

import numpy as np

from persona_lens.geometry import PCA, CoExpression, Cosines, GeometryRun, Mantel, Roles, Study
from persona_lens.reports.page import image, page, provenance, table
from persona_lens.store import read_json

NOT_SHOWN: Final = (
    "A cosine compares directions under these instructions and questions; about behaviour only the spill-over speaks.",
    "Centred cosines, components and their number depend on which vectors are in the set: another set, another mean.",
    "K vectors cannot show more than K - 1 dimensions, however many persona space has.",
    "Intervals are over questions like these, for these instructions and this model; they say nothing about other ones.",
)


def geometry_verdict(study: Study) -> list[str]:
    """What may be concluded, one sentence each."""
    said = [_reliability(study), _pairs(study.cosines[0]), _dimensions("These vectors", study.pca, study.rank.rank)]
    if study.roles:
        said += _roles(study.roles)
    if study.coexpression:
        said += _coexpression(study.coexpression)
    return said


def _reliability(study: Study) -> str:
    at = study.reliability[:, study.layer]
    worst = int(at.argmin())
    weak = [n for n, r in zip(study.names, at, strict=True) if r < 0.5]
    more = f" Below .5, and left out of the cosines: {', '.join(weak)}." if weak else ""
    return (
        f"At layer {study.layer} (blocks.{study.layer}.hook_resid_post) the least reliable vector is {study.names[worst]} "
        f"({at[worst]:.3f}).{more}"
    )


def _pairs(table: Cosines) -> str:
    pairs = np.triu_indices(len(table.names), 1)
    value, q, chance = table.value[pairs], table.q_value[pairs], table.p_chance[pairs]
    if not np.isfinite(value).any():
        return "No cosine can be given: the vectors are too unreliable."
    top = int(np.nanargmax(np.abs(value)))
    a, b = pairs[0][top], pairs[1][top]
    beyond = (
        ""
        if np.isnan(chance).all()
        else f" {int((chance < 0.05).sum())} are larger than those of random directions with the "
        "covariance of neutral answers (p < .05 each)."
    )
    return (
        f"{int((q < 0.05).sum())} of {len(value)} pairs of vectors have a cosine other than zero (q < .05).{beyond} The largest: "
        f"{table.names[a]} and {table.names[b]}, {value[top]:+.2f} [{table.low[a, b]:+.2f}, {table.high[a, b]:+.2f}]."
    )


def _dimensions(who: str, found: PCA, rank: int) -> str:
    first = f"the first component holds {found.share[0]:.0%} [{found.share_low[0]:.0%}, {found.share_high[0]:.0%}] of the variance"
    if found.chance is None:
        beyond = "no neutral residuals were there to say how much of that is chance"
    else:
        n = found.chance.significant
        beyond = (
            f"by chance it would be {found.chance.share[0, 0]:.0%} (95th percentile {found.chance.share[0, 1]:.0%}, "
            f"p = {found.chance.p_value[0]:.2g}); {n} component{'s are' if n != 1 else ' is'} larger than chance"
        )
    return f"{who} replicate across questions along {rank} of at most {len(found.names) - 1} dimensions; {first}; {beyond}."


def _roles(roles: Roles) -> list[str]:
    pc1, cut = roles.assistant_and_pc1, list(roles.assistant_and_pc1.without.values())
    asked = len(roles.adherence)
    return [
        f"{len(roles.names)} of {asked} roles are in role often enough. " + _dimensions("They", roles.pca, roles.rank.rank),
        f"The Assistant Axis (reliability {roles.assistant_reliability:.3f}) and the roles' first component: cosine "
        f"{_interval(pc1.cosine, pc1.low, pc1.high)}; leaving out one role, {min(cut):.2f} to {max(cut):.2f}.",
    ]


def _coexpression(co: CoExpression) -> list[str]:
    said: list[str] = []
    for what, test in (
        ("what steering along one vector does to the other traits", co.cosines_and_steered),
        ("what prompting for one trait does to the others", co.cosines_and_prompted),
    ):
        if test:
            verb = "foretell" if test.p_value < 0.05 else "do not show that they foretell"
            said.append(f"The cosines {verb} {what} (off the diagonal, answer length held: {_mantel(test)}).")
    return said


def _mantel(test: Mantel) -> str:
    kind = "all" if test.exact else "random"
    return f"r = {test.r:+.2f}, p = {test.p_value:.2g}, {test.n_permutations} {kind} permutations"


def geometry_page(run: GeometryRun, images: Mapping[str, bytes]) -> str:
    study, manifest = run.study, read_json(run.path / "run.json")
    questions = f"{min(study.n_questions)} to {max(study.n_questions)} questions a vector"
    neutral = f"{study.n_neutral} neutral answers" if study.n_neutral else "no neutral answers"
    origin = f"{len(study.names)} vectors ({study.pooling}) of {study.model}, {questions}, {neutral}, layer {study.layer}."
    parts = [
        "<h1>Persona-space geometry</h1>",
        f"<p class='meta'>{escape(origin)}</p>",
        "<h2>What may be concluded</h2>",
        _list(geometry_verdict(study)),
        "<h2>What not</h2>",
        _list(NOT_SHOWN),
        "<h2>Cosines</h2>",
        image(
            images["cosines"],
            f"Disattenuated cosines (no unit) at blocks.{study.layer}.hook_resid_post, n = {questions}. Left as they are, "
            "right after subtracting the mean vector.",
        ),
        *(_cosine_table(t) for t in study.cosines),
    ]
    if study.clustering:
        c = study.clustering
        chance = "" if c.cophenetic_chance is None else f" (random directions: {c.cophenetic_chance[0]:.2f} on average)"
        parts.append(
            image(
                images["tree"],
                f"Average linkage on 1 - cosine; cophenetic correlation {c.cophenetic:.2f}{chance}. Percentages: share of "
                f"500 resampled sets of questions in which the branch comes back (n = {questions}).",
            )
        )
    parts += [
        "<h2>Components</h2>",
        image(images["scree"], f"Share of variance (%) of {len(study.names)} vectors; bars are 95 % intervals over {questions}."),
        image(images["components"], f"Scores of {len(study.names)} vectors in residual-stream units."),
        _loadings(study.pca),
        "<h2>Layers</h2>",
        image(images["layers"], f"Disattenuated cosine of each vector with itself at other layers; n = {questions}."),
        _reliability_table(study),
    ]
    if study.roles:
        parts += _role_parts(study.roles, images)
    if study.coexpression:
        parts += _coexpression_parts(study.coexpression, images)
    return page("Persona-space geometry", [*parts, provenance(manifest)])


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _cosine_table(found: Cosines) -> str:
    rows = [
        (
            f"{found.names[i]}, {found.names[j]}",
            f"{found.raw[i, j]:+.2f}",
            f"{found.value[i, j]:+.2f} [{found.low[i, j]:+.2f}, {found.high[i, j]:+.2f}]",
            f"{found.p_value[i, j]:.4f}",
            f"{found.q_value[i, j]:.4f}",
            "-" if np.isnan(found.p_chance[i, j]) else f"{found.p_chance[i, j]:.3f}",
        )
        for i, j in zip(*np.triu_indices(len(found.names), 1), strict=True)
    ]
    head = ("pair", "raw", "disattenuated [95 %]", "p (zero)", "q", "p (chance)")
    size = f"{len(rows)} pairs, {found.kind}; any pair other than zero: p = {found.p_largest:.2g}"
    return f"<details><summary>{escape(size)}</summary>{table(head, rows)}</details>"


def _loadings(found: PCA) -> str:
    n = min(len(found.share), 4)
    rows = [
        (
            name,
            *(f"{found.loadings[i, k]:+.2f} [{found.loadings_low[i, k]:+.2f}, {found.loadings_high[i, k]:+.2f}]" for k in range(n)),
        )
        for i, name in enumerate(found.names)
    ]
    interval = found.participation_interval
    spread = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    chance = f"; by chance {found.chance.participation:.2f}" if found.chance else ""
    note = (
        "Loadings (cosine of the centred vector with the component) [95 %, where the component is separate]. "
        f"Participation ratio {found.participation:.2f}"
        f"{spread}{chance}."
    )
    return f"<p class='meta'>{escape(note)}</p>" + table(("vector", *(f"component {k + 1}" for k in range(n))), rows)


def _interval(value: float, low: float, high: float) -> str:
    """An estimate with its interval, if it has one."""
    return f"{value:+.2f}" if np.isnan(low) else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _reliability_table(study: Study) -> str:
    rows = [(name, *(f"{r:.3f}" for r in row)) for name, row in zip(study.names, study.reliability, strict=True)]
    return "<p class='meta'>Reliability by layer (blocks.{l}.hook_resid_post)</p>" + table(
        ("vector", *map(str, range(study.reliability.shape[1]))), rows
    )


def _role_parts(roles: Roles, images: Mapping[str, bytes]) -> list[str]:
    n = f"{len(roles.names)} roles"
    grades = [(name, *counts, "yes" if name in roles.names else "no") for name, counts in roles.adherence.items()]
    return [
        "<h2>Roles</h2>",
        image(images["role_scree"], f"Share of variance (%) of {n}, minus the default assistant."),
        image(images["role_components"], f"Scores of {n} in residual-stream units."),
        image(
            images["assistant_axis"],
            f"{n} (projections) and traits (cosines) on the Assistant Axis, 95 % intervals over questions.",
        ),
        image(images["roles_on_traits"], f"Projections of {n} on the trait vectors, residual-stream units."),
        f"<details><summary>Role adherence</summary>{table(('role', '0', '1', '2', '3', 'vector'), grades)}</details>",
    ]


def _coexpression_parts(co: CoExpression, images: Mapping[str, bytes]) -> list[str]:
    rows = [
        (a, b, *(f"{e.mean[i, j]:+.1f} [{e.low[i, j]:+.1f}, {e.high[i, j]:+.1f}]" for e in (co.steered, co.prompted)))
        for i, a in enumerate(co.steered.names)
        for j, b in enumerate(co.steered.names)
    ]
    agreement = f"Steered and prompted: {_mantel(co.steered_and_prompted)}." if co.steered_and_prompted else ""
    return [
        "<h2>Co-expression</h2>",
        image(
            images["spill_over"],
            f"Score points on the judged trait (column) per unit of strength along the vector of the row at layer {co.layer}, "
            f"and from its negative to its positive prompts; {co.n_questions} questions, {co.answers} answers.",
        ),
        f"<p>{escape(agreement)}</p>",
        f"<details><summary>Effects [95 %]</summary>{table(('acted upon', 'judged', 'steered', 'prompted'), rows)}</details>",
    ]
