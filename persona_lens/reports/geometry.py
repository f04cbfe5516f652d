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
    given = np.isfinite(value)
    if not given.any():
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
        f"{int((q[given] < 0.05).sum())} of {int(given.sum())} pairs of vectors have a cosine other than zero (q < .05); that any "
        f"has: p = {table.p_largest:.2g} (max-T).{beyond} The largest, chosen for being so: {table.names[a]} and {table.names[b]}, "
        f"{value[top]:+.2f}."
    )


def _dimensions(who: str, found: PCA, rank: int) -> str:
    between = "" if np.isnan(found.share_low[0]) else f" [{found.share_low[0]:.0%}, {found.share_high[0]:.0%}]"
    first = f"the first component holds {found.share[0]:.0%}{between} of their variance beyond noise"
    if found.chance is None:
        beyond = "how much of that is chance cannot be said (no neutral residuals, or more than a fifth of it is noise)"
    else:
        n = found.chance.significant
        larger = f"{n} component{'s are' if n != 1 else ' is'} larger than chance"
        beyond = (
            f"with the noise {found.chance.observed[0]:.0%}, where chance gives {found.chance.share[0, 0]:.0%} (95th percentile "
            f"{found.chance.share[0, 1]:.0%}, p = {found.chance.p_value[0]:.2g}); {larger}"
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
    for what, test, effects in (
        ("steered", co.cosines_and_steered, co.steered),
        ("prompted", co.cosines_and_prompted, co.prompted),
    ):
        if test is None:
            said.append(
                f"Whether the cosines foretell {what} effects cannot be tested: {co.without[f'cosines and {what} effects']}."
            )
            continue
        verb = "do not show that they foretell" if test.p_value >= 0.05 else "foretell" if test.r > 0 else "run against"
        held = ", answer length held" if effects.length_matters else ""
        deed = (
            "steering along one vector does to the other traits"
            if what == "steered"
            else "prompting for one trait does to the others"
        )
        said.append(f"At layer {co.layer} the cosines {verb} what {deed} (off the diagonal{held}: {_mantel(test)}).")
    lowest = float(np.nanmin(co.coherence))
    said.append(
        f"Steering cost coherence: {co.unsteered_coherence:.0f} unsteered, {lowest:.0f} at the worst vector and strength; "
        "what low coherence does to the scores is part of the effects."
    )
    return said


def _mantel(test: Mantel) -> str:
    kind = "all" if test.exact else "random"
    return f"r = {test.r:+.2f}, p = {test.p_value:.2g}, {test.n_permutations} {kind} permutations"


def geometry_page(run: GeometryRun, images: Mapping[str, bytes]) -> str:
    study, manifest = run.study, read_json(run.path / "run.json")
    least, most = min(study.n_questions), max(study.n_questions)
    questions = f"{least} questions a vector" if least == most else f"{least} to {most} questions a vector"
    at = f"at blocks.{study.layer}.hook_resid_post, n = {questions}"
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
            f"Disattenuated cosines (no unit) {at}. Left as they are, right after subtracting the mean vector.",
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
        image(
            images["scree"], f"Share of the variance beyond noise (%) of {len(study.names)} vectors {at}; bars are 95 % intervals."
        ),
        _chance(study.pca),
        image(images["components"], f"Scores of {len(study.names)} vectors in residual-stream units, {at}."),
        _loadings(study.pca),
        *_rotated(study),
        "<h2>Layers</h2>",
        image(images["layers"], f"Disattenuated cosine of each vector with itself at other layers; n = {questions}."),
        _reliability_table(study),
    ]
    if study.roles:
        parts += _role_parts(study.roles, images, f"blocks.{study.layer}.hook_resid_post")
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
            _interval(found.value[i, j], found.low[i, j], found.high[i, j]),
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
    note = (
        "Loadings (cosine of the centred vector with the component) [95 %, where the component is separate]. "
        f"Participation ratio {found.participation:.2f}"
        f"{spread}."
    )
    return f"<p class='meta'>{escape(note)}</p>" + table(("vector", *(f"component {k + 1}" for k in range(n))), rows)


def _chance(found: PCA) -> str:
    """The tests of components against random directions, on shares with noise."""
    if found.chance is None:
        return ""
    c = found.chance
    rows = [
        (k + 1, f"{c.observed[k]:.0%}", f"{c.share[k, 0]:.0%}", f"{c.share[k, 1]:.0%}", f"{p:.3f}")
        for k, p in enumerate(c.p_value)
        if np.isfinite(p)
    ]
    note = (
        "Each component's share of what earlier ones leave, noise included, beside that of random directions with the covariance "
        f"of neutral answers and the same noise. Participation ratio likewise: {c.participation[0]:.2f}, by chance "
        f"{c.participation[1]:.2f} (p = {c.p_participation:.2g})."
    )
    return f"<p class='meta'>{escape(note)}</p>" + table(("component", "share", "chance, mean", "95th percentile", "p"), rows)


def _rotated(study: Study) -> list[str]:
    """Varimax of the components that are larger than chance, where there are two or more."""
    if study.rotated is None:
        return []
    rows = [(n, *(f"{x:+.0f}" for x in row)) for n, row in zip(study.names, study.rotated, strict=True)]
    head = ("vector", *(f"rotated {k + 1}" for k in range(study.rotated.shape[1])))
    return ["<p class='meta'>Varimax rotation of the components larger than chance, residual-stream units</p>", table(head, rows)]


def _coherence(co: CoExpression) -> str:
    rows = [(n, *(f"{x:.0f}" for x in row)) for n, row in zip(co.steered.names, co.coherence, strict=True)]
    note = f"Coherence of the steered answers by strength; unsteered {co.unsteered_coherence:.0f}"
    return f"<p class='meta'>{escape(note)}</p>" + table(("steered", *(f"{s:g}" for s in co.strengths)), rows)


def _interval(value: float, low: float, high: float) -> str:
    """An estimate with its interval, if it has one; a dash where it was refused."""
    if np.isnan(value):
        return "-"
    return f"{value:+.2f}" if np.isnan(low) else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _reliability_table(study: Study) -> str:
    rows = [(name, *(f"{r:.3f}" for r in row)) for name, row in zip(study.names, study.reliability, strict=True)]
    return "<p class='meta'>Reliability by layer (blocks.{l}.hook_resid_post)</p>" + table(
        ("vector", *map(str, range(study.reliability.shape[1]))), rows
    )


def _role_parts(roles: Roles, images: Mapping[str, bytes], where: str) -> list[str]:
    n = f"{len(roles.names)} roles on {roles.n_questions} questions"
    grades = [(name, *counts, "yes" if name in roles.names else "no") for name, counts in roles.adherence.items()]
    return [
        "<h2>Roles</h2>",
        image(images["role_scree"], f"Share of the variance beyond noise (%) of {n} minus the default assistant, at {where}."),
        _chance(roles.pca),
        image(images["role_components"], f"Scores of {n} in residual-stream units, at {where}."),
        image(
            images["assistant_axis"],
            f"{n} (projections, residual-stream units) and the traits (cosines) on the Assistant Axis at {where}; 95 % intervals "
            "over questions.",
        ),
        image(images["roles_on_traits"], f"Projections of {n} on the trait vectors at {where}, residual-stream units."),
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
            f"Cosines at layer {co.layer}; score points on the judged trait (column) per unit of strength along the vector of the "
            f"row at that layer; and from its negative to its positive prompts. {co.n_questions} questions, {co.answers} answers.",
        ),
        f"<p>{escape(agreement)}</p>",
        _coherence(co),
        f"<details><summary>Effects [95 %]</summary>{table(('acted upon', 'judged', 'steered', 'prompted'), rows)}</details>",
    ]
