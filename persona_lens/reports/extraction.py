"""The report of an extraction."""

from collections.abc import Mapping
from html import escape
from typing import Any, Final

from persona_lens.extraction import ExtractionRun
from persona_lens.extraction.filtering import told_reasons
from persona_lens.prompts import POLARITIES, extraction_prompts
from persona_lens.reports.page import image, page, provenance, table
from persona_lens.traits import Trait, read_trait
from persona_lens.vectors import hook_name

EXAMPLES: Final = 3
COLUMNS: Final = {
    "polarity": "prompts",
    "total": "answers",
    "kept": "kept",
    "off_trait": "off trait",
    "incoherent": "incoherent",
    "empty": "empty",
    "unfinished": "still thinking",
    "unscored": "without score",
    "cut_off": "cut off",
}


def verdict(run: ExtractionRun) -> str:
    """One sentence on whether the vector can be used."""
    v, best, p = run.vectors, run.vectors.best_layer, run.vectors.p_any
    reliability = float(v.reliability[best])
    article = "An" if run.trait[0] in "aeiou" else "A"
    exists = (
        f"{article} {run.trait} direction exists (p = {p:.2g}" if p < 0.05 else f"No {run.trait} direction was found (p = {p:.2g}"
    )
    trust = "reliable" if reliability >= 0.9 else "usable with care" if reliability >= 0.5 else "not reliable"
    return (
        f"{exists}, sign-flip test over {len(v.differences)} questions and all layers); "
        f"it is {trust} (split-half reliability {reliability:.3f} at layer {best}, the highest of {v.n_layers})."
    )


def extraction_page(run: ExtractionRun, images: Mapping[str, bytes]) -> str:
    trait = read_trait(run.path / "trait.json")
    v = run.vectors
    counts = run.summary["counts"]
    layers = [
        (
            layer,
            hook_name(layer),
            f"{v.reliability[layer]:.3f}",
            f"{v.norm[layer]:.3f}",
            f"{v.directions[layer].norm():.3f}",
            f"{v.p_value[layer]:.4f}",
        )
        for layer in range(v.n_layers)
    ]
    parts = [
        f"<h1>Persona vector: {escape(run.trait)}</h1>",
        f"<p>{escape(trait.description)}</p><p><b>{escape(verdict(run))}</b></p>",
        f'<p class="meta">{escape(_origin(run))}</p>',
        "<h2>Layers</h2>",
        image(images["layers"], "Left: agreement of the vectors of two halves of the questions (Spearman-Brown). Right: length."),
        table(("layer", "hook", "reliability", "norm (cross-validated)", "norm (plain)", "p"), layers),
        "<h2>Answers on the vector</h2>",
        image(images["projections"], "Mean projection per question, each on the vector of the other questions."),
        "<h2>Rollouts</h2>",
        image(images["scores"], "Trait scores of the answers."),
        table(tuple(COLUMNS.values()), [[c.get(k, 0) for k in COLUMNS] for c in counts]),
        f"<p>{run.summary['questions_kept']} of {run.summary['questions']} questions survive the filter on both sides.</p>",
        *(f"<p>{escape(_unscored(c))}</p>" for c in counts if c.get("reasons")),
        "<h2>Examples</h2>",
        *_examples(run, trait),
        provenance(run.manifest),
    ]
    return page(f"Persona vector: {run.trait}", parts)


def _unscored(counts: Mapping[str, Any]) -> str:
    """Why one side's answers have no score."""
    return f"Without score ({counts['polarity']}): {told_reasons(counts['reasons'])}."


def _origin(run: ExtractionRun) -> str:
    model, arguments = run.manifest["model"], run.manifest["arguments"]
    return (
        f"Model {model['name']} ({model['dtype']}, {model['n_layers']} layers, weights {model['weights']}), "
        f"judge {arguments['judge']}, seed {arguments['seed']}."
    )


def _examples(run: ExtractionRun, trait: Trait) -> list[str]:
    """The first answers of each side that are scored, one per question."""
    shown: list[str] = []
    pairs = list(zip(run.rollouts(), run.scores(), strict=True))
    for polarity in POLARITIES:
        prompts = {p.id: p for p in extraction_prompts(trait, polarity)}
        taken: set[int] = set()
        for rollout, score in pairs:
            prompt = prompts.get(rollout.prompt_id)
            if (
                prompt is None
                or prompt.question in taken
                or score.trait is None
                or score.coherence is None
                or len(taken) == EXAMPLES
            ):
                continue
            taken.add(prompt.question)
            shown.append(
                f'<div class="answer {polarity}"><div class="meta">{escape(prompt.system or "")}</div>'
                f"<b>{escape(prompt.user)}</b><br>"
                f'{escape(rollout.text)}<div class="meta">trait {score.trait:.0f}, coherence {score.coherence:.0f}</div></div>'
            )
    return shown
