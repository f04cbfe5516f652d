"""The report of a sweep."""

from collections.abc import Mapping
from html import escape

from persona_lens.reports.page import image, page, provenance, table
from persona_lens.store import read_json
from persona_lens.sweeps import Sweep


def sweep_verdict(found: Sweep) -> str:
    """What the sweep shows, in three sentences: the chosen cell on the other half of the questions, and what stands beside it."""
    r = found.report
    low, high = r.interval
    floor = "" if r.coherent else " No cell stayed coherent: this is the least bad one."
    random = (
        "."
        if r.random_effect is None or r.random_interval is None
        else f"; random directions of that norm {r.random_effect:+.1f} [{r.random_interval[0]:+.1f}, {r.random_interval[1]:+.1f}]."
    )
    return (
        f"{r.cell}: {found.trait} score {r.score:.0f} at coherence {r.coherence:.0f}, from {r.unsteered:.0f} unsteered "
        f"(effect {r.effect:+.1f} [{low:+.1f}, {high:+.1f}], reversed on {100 * r.reversed_share:.0f} % of the questions). "
        f"The positive prompt alone gives {r.prompted:.0f} at coherence {r.prompted_coherence:.0f}{random}{floor}"
    )


def sweep_page(found: Sweep, images: Mapping[str, bytes]) -> str:
    r, manifest = found.report, read_json(found.path / "run.json")
    rows = [
        (target, *(f"{s:.0f} / {c:.0f}" for s, c in zip(score, coherence, strict=True)))
        for target, score, coherence in zip(found.targets, found.score, found.coherence, strict=True)
    ]
    damage = [
        (target, *(f"{d:.2f} / {x:.0%} / {c:.0%}" for d, x, c in zip(divergence, degenerate, cut, strict=True)))
        for target, divergence, degenerate, cut in zip(
            found.targets, found.divergence, found.degenerate, found.cut_off, strict=True
        )
    ]
    usable = ", ".join(f"{s:g}" for s in r.usable) or "none"
    parts = [
        f"<h1>Steering sweep: {escape(found.trait)}</h1><p><b>{escape(sweep_verdict(found))}</b></p>",
        f"<p>Usable strengths at that layer (coherent, at least 90 % of the chosen effect): {usable}. "
        "Layer and strength were chosen on half of the evaluation questions; the sentence above is about the other half.</p>",
        "<h2>Layers and strengths</h2>",
        image(images["heat_map"], "Mean trait score and coherence over all evaluation questions."),
        table(("layer", *(f"{s:g}" for s in found.strengths)), rows),
        "<p class='meta'>score / coherence; layers count blocks from 0 (blocks.{l}.hook_resid_post)</p>",
        image(
            images["profile"],
            "The layer that gets furthest while coherent (the paper's criterion; all questions), and where the vector is reliable.",
        ),
        "<h2>Damage</h2>",
        table(("layer", *(f"{s:g}" for s in found.strengths)), damage),
        "<p class='meta'>mean KL divergence from the unsteered next-token distribution in nats / answers that are empty, repeat "
        "themselves or are not of this world (where that is checked) / answers that reached the length limit; unsteered "
        f"{found.record['unsteered_degenerate']:.0%} / {found.record['unsteered_cut_off']:.0%}</p>",
        *_capability_table(r.capability),
        "<h2>Dose and response</h2>",
        image(images["dose_response"], "At the chosen layer, with what stands beside it."),
        f"<p>{found.record['gaps']} answers have no score.</p>",
        provenance(manifest),
    ]
    return page(f"Steering sweep: {found.trait}", parts)


def _capability_table(measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Each task's metrics unsteered and at the chosen cell."""
    if not measured:
        return []
    rows = [
        (task, metric, f"{value:.3f}", f"{measured['steered'][task][metric]:.3f}")
        for task, metrics in measured["unsteered"].items()
        for metric, value in metrics.items()
    ]
    return [table(("capability", "metric", "unsteered", "steered"), rows)]
