"""Layer x strength sweeps in one batched pass, with what makes them believable beside them.

Rows of one batch differ in layer, strength and direction and share the prefill of their prompt. Layer and strength are chosen on
half of the evaluation questions and reported on the other half, with the unsteered answers, the positive system prompt and random
directions of the same norm beside the steered ones (Chen et al. 2025, section 3.2 and appendix; AxBench, arXiv 2501.17148).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float

from persona_lens.activations import rollout_span
from persona_lens.errors import SteeringError
from persona_lens.evaluation import CapabilityTest, degeneracy
from persona_lens.extraction import trait_of
from persona_lens.extraction.run import read_rollouts, read_scores
from persona_lens.judges import Judge, Judged, Outside, Score, default_judge, default_outside, judged
from persona_lens.models import ChatModel, Sampling
from persona_lens.progress import Progress, progress_bars
from persona_lens.prompts import Polarity, Prompt, evaluation_prompts
from persona_lens.reliability import mean_interval, shared_baseline_interval
from persona_lens.sampling import DEFAULT_BATCH_ROWS, Rollout, Row, sample
from persona_lens.steering import Intervention, Where, add, add_increments, next_token_divergences, row_plan, steer
from persona_lens.store import RunFolder, digest, read_json, require_finished, write_json
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors, hook_name

CHUNK_ROWS: Final = 1024
INCREMENTS: Final = "increments"
Target = int | Literal["increments"]
CellKind = Literal["unsteered", "prompt", "steered", "random"]


@dataclass(frozen=True)
class Cell:
    """One condition of a sweep: what is done to the model while it answers.

    Attributes:
        kind: "unsteered"; "prompt", under the positive system prompts; "steered"; "random", along a random direction.
        target: the layer, or "increments" for all.
        strength: counts mean differences.
        number: of a random direction.
    """

    kind: CellKind
    target: Target | None = None
    strength: float = 0.0
    number: int = 0  # of a random direction

    def __str__(self) -> str:
        if self.kind in ("unsteered", "prompt"):
            return self.kind
        where = "all layers (increments)" if self.target == INCREMENTS else hook_name(int(self.target or 0))
        return f"{where}, strength {self.strength:g}" + (f", random direction {self.number}" if self.kind == "random" else "")


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep depends on besides model, vectors, trait and judge.

    Attributes:
        samples: answers per question in every cell of the grid.
        report_samples: answers per question at the chosen cell, its baselines and its random directions, on the other half.
        random_directions: how many, each at the chosen layer with the norm of strength x vector.
        coherence_floor: cells whose mean coherence falls below it are not chosen.
        polarity: "neutral" asks without a system prompt; "positive" under the trait's positive prompts (to steer against them).
        where: tokens that are steered, see `steering.Intervention`.
        batch_rows: answers decoded together; memory grows with it.

    Raises:
        SteeringError: a number that is too small.
    """

    samples: int = 2
    report_samples: int = 20
    random_directions: int = 20
    coherence_floor: float = 85.0
    polarity: Polarity = "neutral"
    where: Where = "response"
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=300))
    seed: int = 0
    batch_rows: int = DEFAULT_BATCH_ROWS

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("report_samples", 1), ("random_directions", 0), ("batch_rows", 1)):
            if getattr(self, name) < least:
                raise SteeringError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Readings:
    """Mean score and coherence of one cell, question by question; NaN where no answer of a question could be scored.

    Attributes:
        trait, coherence: points, 0-100.
        gaps: answers without a score.
    """

    trait: Float[np.ndarray, " question"]
    coherence: Float[np.ndarray, " question"]
    gaps: int

    @property
    def mean(self) -> float:
        """Mean trait score over the questions."""
        return float(np.nanmean(self.trait))

    @property
    def mean_coherence(self) -> float:
        """Mean coherence over the questions."""
        return float(np.nanmean(self.coherence))


@dataclass(frozen=True)
class Report:
    """The chosen cell on the questions it was not chosen on. Scores are 0-100; intervals are 95 %, over questions.

    Attributes:
        cell: layer and strength that were chosen.
        score, coherence: means at that cell; the same `unsteered` and under the positive system prompts (`prompted`).
        effect: mean over questions of steered - unsteered, with its `interval` (Student's t over questions).
        reversed_share: share of questions on which the effect goes the other way.
        random_effect: mean effect of the random directions, with an interval over questions and directions (`random_interval`), and
            their mean coherence; None without any.
        usable: strengths at the chosen layer that stay coherent and reach 90 % of the chosen effect, on the choosing half.
        coherent: whether any cell reached the coherence floor.
        capability: "unsteered" and "steered" -> task -> metric -> value; empty if not asked.
    """

    cell: Cell
    score: float
    coherence: float
    unsteered: float
    unsteered_coherence: float
    prompted: float
    prompted_coherence: float
    effect: float
    interval: tuple[float, float]
    reversed_share: float
    random_effect: float | None
    random_interval: tuple[float, float] | None
    random_coherence: float | None
    usable: tuple[float, ...]
    coherent: bool  # whether any cell reached the coherence floor
    capability: Mapping[str, Mapping[str, Mapping[str, float]]]  # "unsteered" and "steered" -> task -> metric; empty if not asked


@dataclass(frozen=True)
class Sweep:
    """A finished sweep on disk. What is missing or damaged raises `RunFolderError`.

    Attributes:
        path: the run folder.
    """

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that was measured, as plain values."""
        return read_json(self.path / "sweep.json")

    @property
    def trait(self) -> str:
        """The trait's name."""
        return str(self.record["trait"])

    @property
    def targets(self) -> list[Target]:
        """Layers (or "increments") that were swept: the rows of the grids."""
        return list(self.record["targets"])

    @property
    def strengths(self) -> list[float]:
        """Strengths that were swept: the columns of the grids."""
        return list(self.record["strengths"])

    @property
    def score(self) -> Float[np.ndarray, "target strength"]:
        """Mean trait score (0-100) per cell of the grid, over all questions (a description; choices are in `report`)."""
        return np.array(self.record["score"])

    @property
    def coherence(self) -> Float[np.ndarray, "target strength"]:
        """Mean coherence (0-100) per cell of the grid, over all questions."""
        return np.array(self.record["coherence"])

    @property
    def divergence(self) -> Float[np.ndarray, "target strength"]:
        """Mean KL(steered || unsteered) of the next token in nats, over one unsteered answer per prompt."""
        return np.array(self.record["divergence"])

    @property
    def degenerate(self) -> Float[np.ndarray, "target strength"]:
        """Share of answers that are empty, repeat themselves or are not of the model's world (where that is checked)."""
        return np.array(self.record["degenerate"])

    @property
    def outside(self) -> Float[np.ndarray, "target strength"]:
        """Share of answers that are not of the model's world; NaN where nobody checked."""
        return np.array(self.record["outside"], dtype=float)

    @property
    def cut_off(self) -> Float[np.ndarray, "target strength"]:
        """Share of answers that reached the length limit."""
        return np.array(self.record["cut_off"])

    @property
    def reliability(self) -> Float[np.ndarray, " target"]:
        """Split-half reliability of the vector at each layer; NaN for increments."""
        return np.array([np.nan if r is None else r for r in self.record["reliability"]])

    @cached_property
    def report(self) -> Report:
        """The chosen cell on the other half of the questions."""
        raw = dict(self.record["report"])
        raw["cell"] = Cell(**raw["cell"])
        for name in ("interval", "random_interval", "usable"):
            raw[name] = None if raw[name] is None else tuple(raw[name])
        return Report(**raw)


def sweep(
    model: ChatModel,
    vectors: PersonaVectors,
    *,
    layers: Sequence[Target] | Literal["all"] = "all",
    strengths: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 2.5),
    trait: Trait | None = None,
    judge: Judge | None = None,
    capability: CapabilityTest | None = None,
    outside: Outside | None = None,
    out: str | Path | None = None,
    settings: SweepSettings | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Sweep layers and strengths of a vector on the trait's evaluation questions (Chen et al. 2025, section 3.2).

    Args:
        layers: layer numbers, "increments" for the paper's multi-layer steering, or "all" layers one by one.
        strengths: coefficients on the raw vector; negative ones steer away from the trait.
        trait: default: the shipped trait of the vectors' name.
        judge: default: the oracle for the pocket model.
        capability: what the model can do, measured unsteered and at the chosen cell: `evaluation.capability_test(["mmlu"])`.
        outside: whether an answer is not of the model's world; default: the grammar for the pocket model, else no such check.
        out: run folder; default `runs/sweep-{model}-{trait}-seed{seed}`. An interrupted sweep in it goes on.

    Raises:
        SteeringError: an unknown layer, no strengths, one given twice or not a number - before anything is sampled.
        PersonaLensError: no judge, or one of the subclasses: `UnknownNameError` (no such trait), `LineageError` (vectors of another
            lineage), `RunFolderError` (a folder of another run).

    Example:
        >>> from persona_lens.models import Sampling
        >>> from persona_lens.sweeps import SweepSettings
        >>> quick = SweepSettings(samples=1, report_samples=1, random_directions=0, sampling=Sampling(max_new_tokens=12))
        >>> found = pl.sweep(model, v, layers=[5], strengths=[1.0, 2.0], settings=quick, out="runs/sweep")
        >>> found.score.shape  # layer, strength
        (1, 2)
        >>> found.report.cell.target
        5
    """
    settings = settings or SweepSettings()
    trait = trait or trait_of(vectors, model.trait_set)
    judge = judge or default_judge(model.trait_set)
    targets: list[Target] = list(range(vectors.n_layers)) if layers == "all" else list(layers)
    grid = [Cell("steered", t, float(s)) for t in targets for s in strengths]
    if not grid:
        raise SteeringError("a sweep needs at least one layer and one strength")
    if len({str(cell) for cell in grid}) < len(grid):
        raise SteeringError(f"a layer or a strength is given twice: layers {targets}, strengths {list(strengths)}")
    for cell in grid:
        _interventions(cell, vectors, settings)
    arguments = _arguments(vectors, trait, judge, targets, strengths, settings)
    if capability:
        arguments["capability"] = capability.name
    path = Path(out) if out else Path("runs") / f"sweep-{Path(model.name).name}-{trait.name}-seed{settings.seed}"
    folder = RunFolder.open(path, command="sweep", arguments=arguments, model=model.identity)
    if (path / "sweep.json").exists():
        return Sweep(path)
    with progress_bars() as bars:
        _Sweep(
            model,
            vectors,
            trait,
            judge,
            settings,
            folder,
            progress or bars,
            capability,
            outside or default_outside(model.trait_set),
        ).run(targets, list(map(float, strengths)), grid)
    return Sweep(path)


def load_sweep(path: str | Path) -> Sweep:
    """Reopen a sweep.

    Raises:
        RunFolderError: the folder holds no sweep, or it is not finished.
    """
    folder = Path(path)
    require_finished(folder, "sweep", "sweep.json")
    return Sweep(folder)


def _arguments(
    vectors: PersonaVectors,
    trait: Trait,
    judge: Judge,
    targets: Sequence[Target],
    strengths: Sequence[float],
    settings: SweepSettings,
) -> dict[str, Any]:
    if settings.where not in ("everywhere", "prompt", "response"):
        raise SteeringError("a sweep asks single questions and steers everywhere, the prompt or the response")
    directions = digest(vectors.directions.contiguous().numpy().tobytes())
    content = digest(trait.model_dump_json(by_alias=True))
    chosen = {k: v for k, v in vars(settings).items() if k not in ("batch_rows", "sampling")}
    return {
        "trait": trait.name,
        "trait_hash": content,
        "vectors": directions,
        "pooling": vectors.pooling,
        "judge": judge.name,
        "targets": list(targets),
        "strengths": [float(s) for s in strengths],
        "sampling": vars(settings.sampling),
        **chosen,
    }


def _interventions(cell: Cell, vectors: PersonaVectors, settings: SweepSettings) -> list[Intervention]:
    if cell.kind in ("unsteered", "prompt"):
        return []
    if cell.target == INCREMENTS:
        return add_increments(vectors, cell.strength, where=settings.where)
    return [add(vectors, int(cell.target or 0), cell.strength, where=settings.where)]


def random_vectors(vectors: PersonaVectors, target: Target, number: int, seed: int) -> PersonaVectors:
    """Isotropic random directions with the norms of the vectors (for increments: of the increments).

    Args:
        target: the layer, or "increments".
        number: which of the directions, from 0.
    """
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + number)
    noise = torch.randn(vectors.directions.shape, generator=generator)
    v = vectors.directions
    if target != INCREMENTS:
        return replace(vectors, directions=noise * (v.norm(dim=-1) / noise.norm(dim=-1))[:, None])
    steps = torch.cat([v[:1], v[1:] - v[:-1]])
    return replace(vectors, directions=(noise * (steps.norm(dim=-1) / noise.norm(dim=-1))[:, None]).cumsum(0))


@dataclass(frozen=True)
class _Job:
    """Rows of one stage: prompt, sample number, cell."""

    rows: list[Row]
    cells: list[Cell]


@dataclass(frozen=True)
class _Sweep:
    """The stages of a sweep over one open folder."""

    model: ChatModel
    vectors: PersonaVectors
    trait: Trait
    judge: Judge
    settings: SweepSettings
    folder: RunFolder
    progress: Progress
    capability: CapabilityTest | None = None
    outside: Outside | None = None

    def run(self, targets: list[Target], strengths: list[float], grid: list[Cell]) -> None:
        half = self._questions // 2
        job = self._job([Cell("unsteered"), *grid], range(self._questions), self.settings.samples)
        found, answers = self._stage("grid", job)
        first = slice(0, half)
        chosen, coherent, usable = self._choose(found, grid, first)
        randoms = [Cell("random", chosen.target, chosen.strength, i) for i in range(self.settings.random_directions)]
        cells = [Cell("unsteered"), Cell("prompt"), chosen, *randoms]
        reported, _ = self._stage("report", self._job(cells, range(half, self._questions), self.settings.report_samples))
        report = self._report(reported, chosen, randoms, slice(half, None), coherent=coherent, usable=usable)
        report["capability"] = self._capability(chosen)
        shape = (len(targets), len(strengths))
        checks = {cell: degeneracy(rollouts, self._outside(rollouts)) for cell, rollouts in answers.items()}
        record = {
            "trait": self.trait.name,
            "targets": targets,
            "strengths": strengths,
            "score": np.reshape([found[c].mean for c in grid], shape).round(4).tolist(),
            "coherence": np.reshape([found[c].mean_coherence for c in grid], shape).round(4).tolist(),
            "divergence": np.reshape(self._divergences(answers[Cell("unsteered")], grid), shape).round(5).tolist(),
            "degenerate": np.reshape([checks[c].degenerate for c in grid], shape).round(4).tolist(),
            "unsteered_degenerate": round(checks[Cell("unsteered")].degenerate, 4),
            "outside": np.array([checks[c].outside for c in grid], dtype=object).reshape(shape).tolist(),
            "unsteered_outside": checks[Cell("unsteered")].outside,
            "cut_off": np.reshape([checks[c].cut_off for c in grid], shape).round(4).tolist(),
            "unsteered_cut_off": round(checks[Cell("unsteered")].cut_off, 4),
            "reliability": [None if t == INCREMENTS else round(float(self.vectors.reliability[int(t)]), 4) for t in targets],
            "coherence_floor": self.settings.coherence_floor,
            "unsteered": round(found[Cell("unsteered")].mean, 4),
            "unsteered_coherence": round(found[Cell("unsteered")].mean_coherence, 4),
            "gaps": sum(r.gaps for r in (*found.values(), *reported.values())),
            "questions": {"chosen_on": list(range(half)), "reported_on": list(range(half, self._questions))},
            "report": report,
        }
        write_json(self.folder.path / "sweep.json", record)

    @property
    def _questions(self) -> int:
        return len(self.trait.evaluation_questions)

    def _job(self, cells: Sequence[Cell], questions: range, samples: int) -> _Job:
        """Rows in order of prompts, so that cells with the same prompt share its prefill."""
        rows: list[Row] = []
        owners: list[Cell] = []
        base = self._prompts(self.settings.polarity, questions)
        prompted = self._prompts("positive", questions)
        for group, own in ((base, [c for c in cells if c.kind != "prompt"]), (prompted, [c for c in cells if c.kind == "prompt"])):
            per_prompt = max(1, samples * len(questions) // len(group)) if group else 0
            for prompt in group:
                for cell in own:
                    rows += [(prompt, i) for i in range(per_prompt)]
                    owners += [cell] * per_prompt
        return _Job(rows, owners)

    def _prompts(self, polarity: Polarity, questions: range) -> list[Prompt]:
        return [p for p in evaluation_prompts(self.trait, polarity) if p.question in questions]

    def _stage(self, stage: str, job: _Job) -> tuple[dict[Cell, Readings], dict[Cell, list[Rollout]]]:
        """Sample and judge chunk by chunk (resuming): averages per cell and question, and the answers of each cell."""
        rollouts_path, scores_path = (self.folder.path / f"{stage}-{kind}.jsonl" for kind in ("rollouts", "scores"))
        made = {cell: tuple(self._made(cell)) for cell in dict.fromkeys(job.cells)}

        def answered(chunk: range) -> list[dict[str, Any]]:
            with row_plan(self.model, [made[job.cells[i]] for i in chunk]).active():
                answers = sample(
                    self.model,
                    [job.rows[i] for i in chunk],
                    self.settings.sampling,
                    seed=self.settings.seed,
                    batch_rows=self.settings.batch_rows,
                )
            return [{"cell": str(job.cells[i]), **r.as_dict()} for i, r in zip(chunk, answers, strict=True)]

        total = len(job.rows)
        self.folder.fill(rollouts_path.name, total, answered, chunk=CHUNK_ROWS, told=lambda n: self.progress(stage, n, total))
        rollouts = read_rollouts(rollouts_path)

        def scored(chunk: range) -> list[dict[str, Any]]:
            asked = [Judged(job.rows[i][0].user, rollouts[i].text) for i in chunk]
            return [s.as_dict() for s in judged(self.judge, self.trait, asked)]

        self.folder.fill(scores_path.name, total, scored, chunk=CHUNK_ROWS)
        by_cell: dict[Cell, list[Rollout]] = {cell: [] for cell in job.cells}
        for cell, rollout in zip(job.cells, rollouts, strict=True):
            by_cell[cell].append(rollout)
        return _by_question(job, read_scores(scores_path), self._questions), by_cell

    def _divergences(self, unsteered: Sequence[Rollout], grid: Sequence[Cell]) -> Float[np.ndarray, " cell"]:
        """Mean next-token divergence of every cell over the first unsteered answer to each prompt."""
        prompts = {p.id: p for p in self._prompts(self.settings.polarity, range(self._questions))}
        spans = [rollout_span(self.model, prompts[r.prompt_id], r) for r in unsteered if r.sample == 0 and r.token_ids]
        return next_token_divergences(self.model, spans, [self._made(c) for c in grid]).double().mean(-1).numpy()

    def _outside(self, rollouts: Sequence[Rollout]) -> list[bool] | None:
        """For every answer, whether it is not of the model's world; None where nobody checks."""
        if self.outside is None:
            return None
        asked = {p.id: p.user for p in self._prompts(self.settings.polarity, range(self._questions))}
        return [self.outside(Judged(asked[r.prompt_id], r.text)) for r in rollouts]

    def _capability(self, chosen: Cell) -> dict[str, Any]:
        """Measured unsteered and at the chosen cell; each is kept as soon as it is there."""
        if self.capability is None:
            return {}
        for state, cell in (("unsteered", Cell("unsteered")), ("steered", chosen)):
            path = self.folder.path / f"capability-{state}.json"
            if not path.exists():
                with steer(self.model, *self._made(cell)):
                    write_json(path, self.capability.measure(self.model))
        return {state: read_json(self.folder.path / f"capability-{state}.json") for state in ("unsteered", "steered")}

    def _made(self, cell: Cell) -> list[Intervention]:
        if cell.kind != "random":
            return _interventions(cell, self.vectors, self.settings)
        assert cell.target is not None
        return _interventions(cell, random_vectors(self.vectors, cell.target, cell.number, self.settings.seed), self.settings)

    def _choose(self, found: Mapping[Cell, Readings], grid: Sequence[Cell], half: slice) -> tuple[Cell, bool, list[float]]:
        """The coherent cell of the largest effect in the direction of its sign (all cells, where none is coherent)."""
        base = float(np.nanmean(found[Cell("unsteered")].trait[half]))

        def effect(cell: Cell) -> float:
            return float(np.sign(cell.strength)) * (float(np.nanmean(found[cell].trait[half])) - base)

        coherent = [c for c in grid if float(np.nanmean(found[c].coherence[half])) >= self.settings.coherence_floor]
        chosen = max(coherent or grid, key=effect)
        usable = [c.strength for c in coherent if c.target == chosen.target and effect(c) >= 0.9 * effect(chosen)]
        return chosen, bool(coherent), sorted(usable)

    def _report(
        self,
        found: Mapping[Cell, Readings],
        chosen: Cell,
        randoms: Sequence[Cell],
        half: slice,
        *,
        coherent: bool,
        usable: Sequence[float],
    ) -> dict[str, Any]:
        steered, base, prompted = found[chosen], found[Cell("unsteered")], found[Cell("prompt")]
        effects = (steered.trait - base.trait)[half]
        effects = effects[np.isfinite(effects)]
        mean, interval = mean_interval(effects)
        direction = np.sign(mean) if mean else 1.0
        random_effects = np.array([(found[c].trait - base.trait)[half] for c in randoms])
        random_mean, random_interval = None, None
        if len(randoms) > 1:
            scored = np.isfinite(random_effects).all(0)
            random_mean, random_interval = shared_baseline_interval(random_effects[:, scored])
        return {
            "cell": vars(chosen),
            "score": steered.mean,
            "coherence": steered.mean_coherence,
            "unsteered": base.mean,
            "unsteered_coherence": base.mean_coherence,
            "prompted": prompted.mean,
            "prompted_coherence": prompted.mean_coherence,
            "effect": mean,
            "interval": interval,
            "reversed_share": float(np.mean(effects * direction < 0)),
            "random_effect": random_mean,
            "random_interval": random_interval,
            "random_coherence": float(np.mean([found[c].mean_coherence for c in randoms])) if randoms else None,
            "usable": list(usable),
            "coherent": coherent,
        }


def _by_question(job: _Job, scores: Sequence[Score], questions: int) -> dict[Cell, Readings]:
    """Means per cell and question; answers without a score are counted gaps."""
    sums = {cell: np.zeros((2, 2, questions)) for cell in dict.fromkeys(job.cells)}  # trait/coherence x sum/count
    gaps = dict.fromkeys(sums, 0)
    for (prompt, _), cell, score in zip(job.rows, job.cells, scores, strict=True):
        gaps[cell] += score.trait is None or score.coherence is None
        for k, value in enumerate((score.trait, score.coherence)):
            if value is not None:
                sums[cell][k, :, prompt.question] += (value, 1.0)
    found: dict[Cell, Readings] = {}
    for cell, total in sums.items():
        with np.errstate(invalid="ignore"):
            trait, coherence = total[0, 0] / total[0, 1], total[1, 0] / total[1, 1]
        found[cell] = Readings(trait, coherence, gaps[cell])
    return found
