"""Persona-space geometry of the pocket model, held against what was planted in its world.

Prints what a geometry study finds beside the truth: cosines against the realised trait correlations at every layer, dimensions of
the roles against the rank planted, roles on trait vectors against their planted levels, graded system prompts, the Assistant Axis,
spill-over against cosines and planted correlations, and attribution. Needs finished runs:

    persona-lens extract all --out runs/all
    persona-lens roles --out runs/roles
    persona-lens spill-over runs/all/* --layer 6 --out runs/spill
    python tests/benchmarks/study_geometry.py runs/all --roles runs/roles --spill-over runs/spill --json runs/geometry.json
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr

from persona_lens.activations import Span, pool
from persona_lens.extraction import load_run
from persona_lens.geometry import (
    attribute,
    foretold,
    linear_cka,
    load_role_run,
    load_spill_over,
    mantel,
    on_axis,
    ordered_contrast,
    pca,
    procrustes,
    representational_similarity,
    space_of_runs,
    study,
)
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.pocket.instructions import TEMPLATES, trait_clause
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import LEVELS, realised_correlations
from persona_lens.pocket.roles import ROLES
from persona_lens.prompts import Prompt
from persona_lens.sampling import sample
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors

SAMPLING = Sampling(max_new_tokens=200)


def graded(model: ChatModel, vectors: PersonaVectors, layer: int, samples: int) -> np.ndarray:
    """Mean projections [level, question] of answers under system prompts that put the trait at each of its five levels."""
    trait, rng = load_trait(vectors.trait, "pocket"), random.Random(0)
    found = np.zeros((len(LEVELS), len(trait.evaluation_questions)))
    for number, level in enumerate(LEVELS):
        rows = []
        for q, text in enumerate(trait.evaluation_questions):
            system = trait_clause(rng, trait.name, level, TEMPLATES["development"][q % 5])
            rows += [(Prompt(f"graded/{level}/q{q}", trait.name, "neutral", None, q, system, text), i) for i in range(samples)]
        answers = sample(model, rows, SAMPLING)
        kept = [(p, a) for (p, _), a in zip(rows, answers, strict=True) if a.token_ids]
        spans = [Span(a.key, tuple(model.render(p.messages)), a.token_ids) for p, a in kept]
        values = np.zeros(len(spans))
        for pooled in pool(model, spans):
            values[list(pooled.indices)] = vectors.project(pooled.values[:, 0, layer], layer).numpy()
        asked = np.array([p.question for p, _ in kept])
        found[number] = [values[asked == q].mean() for q in range(found.shape[1])]
    return found


def attribution(run: Any, model: ChatModel, layer: int, answers: int) -> dict[str, Any]:
    """How far the parts of an answer's projection are from its whole, and which parts are largest."""
    prompts = {r.prompt_id: r for r in run.rollouts()}
    from persona_lens.prompts import extraction_prompts

    asked = {p.id: p for p in extraction_prompts(load_trait(run.trait, "pocket"), "positive")}
    chosen = [r for r in prompts.values() if r.prompt_id in asked and r.token_ids][:answers]
    spans = [Span(r.key, tuple(model.render(asked[r.prompt_id].messages)), r.token_ids) for r in chosen]
    found = attribute(model, run.vectors, layer, spans)
    gap = np.abs(found.parts.sum(1) - found.projections).max() / np.abs(found.projections).max()
    mean = found.parts.mean(0)
    top = np.argsort(-np.abs(mean))[:4]
    return {
        "relative_gap": float(gap),
        "projection": float(found.projection),
        "top": {found.labels[i]: float(mean[i]) for i in top},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--roles", type=Path, required=True)
    parser.add_argument("--spill-over", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = [load_run(options.runs / t) for t in TRAITS]
    roles, spill = load_role_run(options.roles), load_spill_over(options.spill_over)
    space, truth, record = space_of_runs(runs), realised_correlations(), dict[str, Any]()

    began = time.monotonic()
    found = study(space, roles=roles, spill_over=spill)
    record["seconds"] = time.monotonic() - began
    assert found.roles is not None
    assert found.coexpression is not None
    print(f"study of {len(space)} vectors, {len(found.roles.names)} roles: {record['seconds']:.1f} s, layer {found.layer}")

    record["planted"] = []
    for layer, value in enumerate(found.by_layer):
        ranks, plain = mantel(value, truth, method="spearman"), mantel(value, truth)
        record["planted"].append({"layer": layer, "spearman": ranks.r, "p": ranks.p_value, "pearson": plain.r})
        print(f"layer {layer}: cosines and correlations: Spearman {ranks.r:.3f}, Mantel p {ranks.p_value:.4f}, r {plain.r:.3f}")
    for who, parts, rank in (("traits", found.pca, found.rank), ("roles", found.roles.pca, found.roles.rank)):
        assert parts.chance is not None
        record[who] = {"share": parts.share.tolist(), "significant": parts.chance.significant, "rank": rank.rank}
        print(
            f"{who}: shares {np.round(parts.share[:7], 3)}, chance p {np.round(parts.chance.p_value[:6], 3)}, larger than chance "
            f"{parts.chance.significant}, replicating {rank.rank}, participation {parts.participation:.2f} "
            f"(with noise {parts.chance.participation[0]:.2f}, chance {parts.chance.participation[1]:.2f})"
        )
    role_space = roles.space()
    record["roles_by_layer"] = []
    for layer in range(space.n_layers):
        chance = pca(role_space, layer).chance
        assert chance is not None
        record["roles_by_layer"].append(chance.significant)
    print(f"roles, components larger than chance by layer: {record['roles_by_layer']} (planted: 4 factors and a manner of speech)")

    levels = np.array([[r.levels for r in ROLES][[r.name for r in ROLES].index(n)] for n in role_space.names])
    record["levels"] = {}
    for trait, vectors in zip(TRAITS, space.vectors, strict=True):
        by_layer = [
            float(pearsonr(on_axis(role_space, vectors, at).projection, levels[:, TRAITS.index(trait)]).statistic)
            for at in range(8)
        ]
        placed = pearsonr(on_axis(role_space, vectors, found.layer).projection, levels[:, TRAITS.index(trait)])
        low, high = placed.confidence_interval()
        record["levels"][trait] = {"r": float(placed.statistic), "low": float(low), "high": float(high), "by_layer": by_layer}
        print(f"roles on {trait}: r with level {placed.statistic:.2f} [{low:.2f}, {high:.2f}]; by layer {np.round(by_layer, 2)}")

    both = found.roles.assistant_and_pc1
    record["assistant"] = {"cosine": both.cosine, "low": both.low, "high": both.high, "without": dict(both.without)}
    cut = both.without.values()
    print(
        f"Assistant Axis and PC1 of the roles: {both.cosine:.3f} [{both.low:.3f}, {both.high:.3f}], "
        f"without one role {min(cut):.3f} to {max(cut):.3f}"
    )

    co = found.coexpression
    for what, effects in (("steered", co.steered), ("prompted", co.prompted)):
        for name, matrix in (("cosines", co.cosines), ("planted", truth)):
            test = foretold(matrix, effects)
            record[f"{what} and {name}"] = {"r": test.r, "p": test.p_value}
            print(f"{what} effects and {name}: r {test.r:.3f}, QAP p {test.p_value:.4f}")
    off = np.triu_indices(len(TRAITS), 1)
    together = (co.prompted.mean + co.prompted.mean.T)[off] / 2
    order = np.argsort(-together)
    pairs = [(TRAITS[off[0][i]], TRAITS[off[1][i]], float(together[i]), float(co.cosines[off][i])) for i in order]
    record["together"] = pairs
    for a, b, points, cosine in [*pairs[:4], *pairs[-4:]]:
        print(f"{a} and {b}: {points:+.1f} points together, cosine {cosine:+.2f}")

    last, middle = space.at(7), space.at(found.layer)
    test = representational_similarity(middle, last, TRAITS, TRAITS)
    record["layers"] = {
        "rsa": test.r,
        "p": test.p_value,
        "cka": linear_cka(middle, last).value,
        "procrustes": procrustes(middle, last).mean,
    }
    print(f"layer {found.layer} and 7: {record['layers']}")

    model = load_model("pocket")
    record["graded"] = {}
    for vectors in space.vectors:
        steps = ordered_contrast(LEVELS, graded(model, vectors, found.layer, options.samples))
        record["graded"][vectors.trait] = {
            "slope": steps.slope,
            "interval": steps.interval,
            "p": steps.p_value,
            "spearman": steps.spearman,
        }
        print(
            f"graded {vectors.trait}: slope {steps.slope:.0f} [{steps.interval[0]:.0f}, {steps.interval[1]:.0f}], rank correlation "
            f"{steps.spearman:.2f}, Page p {steps.p_value:.2g}, rising at every step on {steps.monotone:.0%} of the questions"
        )
    full = load_model("pocket", hooks="full")
    record["attribution"] = {run.trait: attribution(run, full, found.layer, 20) for run in runs}
    worst = max(a["relative_gap"] for a in record["attribution"].values())
    print(f"attribution: parts and projection differ by {worst:.2g} of it; {record['attribution']['evil']['top']}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
