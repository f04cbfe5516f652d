"""Run folder -> one self-contained HTML file: figures inline, every text escaped, nothing loaded from anywhere."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from persona_lens.extraction import ExtractionRun, load_run
from persona_lens.figures import dose_response, layer_profile, projections, score_histogram, sweep_heat_map, sweep_profile
from persona_lens.prompts import POLARITIES, extraction_prompts
from persona_lens.store import read_json, write_atomically
from persona_lens.sweeps import Sweep, load_sweep
from persona_lens.traits import Trait, read_trait
from persona_lens.vectors import hook_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES: Final = 3
_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
figure { margin: 1rem 0; }
.answer { border-left: 3px solid #bbb; padding: .2rem .8rem; margin: .6rem 0; }
.positive { border-color: #D55E00; }
.negative { border-color: #0072B2; }
.meta { color: #666; font-size: .85rem; }
"""


def report(run: ExtractionRun | Sweep | str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into the folder of an extraction or a sweep; returns the path of the report.

    Raises:
        RunFolderError: the folder holds neither, or is not finished.
    """
    if isinstance(run, str | Path):
        run = load_sweep(run) if read_json(Path(run) / "run.json").get("command") == "sweep" else load_run(run)
    if isinstance(run, Sweep):
        figures = {"heat_map": sweep_heat_map(run), "profile": sweep_profile(run), "dose_response": dose_response(run)}
    else:
        figures = {"layers": layer_profile(run.vectors), "projections": projections(run), "scores": score_histogram(run)}
    images = {name: _png(figure) for name, figure in figures.items()}
    for name, image in images.items():
        write_atomically(run.path / "figures" / f"{name}.png", lambda path, content=image: Path(path).write_bytes(content))
    page = _sweep_page(run, images) if isinstance(run, Sweep) else _page(run, images)
    target = run.path / "report.html"
    write_atomically(target, lambda path: Path(path).write_text(page, encoding="utf-8"))
    return target


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption class="meta">{text}</figcaption></figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + f"</tr>{cells}</table>"


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


def _sweep_page(found: Sweep, images: dict[str, bytes]) -> str:
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
        _image(images["heat_map"], "Mean trait score and coherence over all evaluation questions."),
        _table(("layer", *(f"{s:g}" for s in found.strengths)), rows),
        "<p class='meta'>score / coherence; layers count blocks from 0 (blocks.{l}.hook_resid_post)</p>",
        _image(
            images["profile"],
            "The layer that gets furthest while coherent (the paper's criterion; all questions), and where the vector is reliable.",
        ),
        "<h2>Damage</h2>",
        _table(("layer", *(f"{s:g}" for s in found.strengths)), damage),
        "<p class='meta'>mean KL divergence from the unsteered next-token distribution in nats / answers that are empty, repeat "
        "themselves or are not of this world (where that is checked) / answers that reached the length limit; unsteered "
        f"{found.record['unsteered_degenerate']:.0%} / {found.record['unsteered_cut_off']:.0%}</p>",
        *_capability_table(r.capability),
        "<h2>Dose and response</h2>",
        _image(images["dose_response"], "At the chosen layer, with what stands beside it."),
        f"<p>{found.record['gaps']} answers have no score.</p>",
        "<h2>Provenance</h2>",
        _table(
            ("what", "value"),
            [(k, val) for k, val in {**manifest["versions"], "git": manifest["git_revision"], **manifest["model"]}.items()],
        ),
    ]
    head = f"<meta charset='utf-8'><title>Steering sweep: {escape(found.trait)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _capability_table(measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Each task's metrics unsteered and at the chosen cell."""
    if not measured:
        return []
    rows = [
        (task, metric, f"{value:.3f}", f"{measured['steered'][task][metric]:.3f}")
        for task, metrics in measured["unsteered"].items()
        for metric, value in metrics.items()
    ]
    return [_table(("capability", "metric", "unsteered", "steered"), rows)]


def _page(run: ExtractionRun, images: dict[str, bytes]) -> str:
    trait = read_trait(run.path / "trait.json")
    v, model = run.vectors, run.manifest["model"]
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
        _image(images["layers"], "Left: agreement of the vectors of two halves of the questions (Spearman-Brown). Right: length."),
        _table(("layer", "hook", "reliability", "norm (cross-validated)", "norm (plain)", "p"), layers),
        "<h2>Answers on the vector</h2>",
        _image(images["projections"], "Mean projection per question, each on the vector of the other questions."),
        "<h2>Rollouts</h2>",
        _image(images["scores"], "Trait scores of the answers."),
        _table(
            ("prompts", "answers", "kept", "off trait", "incoherent", "empty", "without score", "cut off"),
            [
                [c[k] for k in ("polarity", "total", "kept", "off_trait", "incoherent", "empty", "unscored", "cut_off")]
                for c in counts
            ],
        ),
        f"<p>{run.summary['questions_kept']} of {run.summary['questions']} questions survive the filter on both sides.</p>",
        "<h2>Examples</h2>",
        *_examples(run, trait),
        "<h2>Provenance</h2>",
        _table(
            ("what", "value"),
            [(k, val) for k, val in {**run.manifest["versions"], "git": run.manifest["git_revision"], **model}.items()],
        ),
    ]
    head = f"<meta charset='utf-8'><title>Persona vector: {escape(run.trait)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


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
