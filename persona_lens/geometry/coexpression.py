"""Co-expression: steer or prompt one trait, judge all of them, and ask whether the cosines of the vectors foretold it.

A cosine is no behavioural fact (arXiv 2602.15847, 2605.21006): traits with nearly orthogonal vectors can move each other. So the
spill-over is measured, trait by trait, with intervals over questions, and compared with the cosines by a Mantel / QAP test off the
diagonal, with what answer length alone would have changed as a covariate.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from persona_lens.errors import GeometryError
from persona_lens.extraction import trait_of
from persona_lens.extraction.run import read_rollouts
from persona_lens.geometry.permutation import Mantel, mantel
from persona_lens.judges import Judge, Judged, default_judge, judged
from persona_lens.models import ChatModel, Sampling
from persona_lens.progress import Progress, progress_bars
from persona_lens.prompts import Prompt, system_prompt
from persona_lens.records import encoded
from persona_lens.reliability import mean_interval
from persona_lens.sampling import DEFAULT_BATCH_ROWS, Rollout, Row, sample
from persona_lens.steering import Intervention, Where, add, row_plan
from persona_lens.store import RunFolder, digest, read_json, read_jsonl, require_finished, write_json
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

CHUNK_ROWS: Final = 512
NOTHING: Final = (np.nan, (np.nan, np.nan))  # a trait that was never scored


@dataclass(frozen=True)
class SpillOverSettings:
    """What a spill-over matrix depends on besides vectors, layer, strengths, model and judge.

    Attributes:
        questions: evaluation questions taken from every trait (first ones; a question of several traits is asked once).
        samples: answers per question and strength; five times as many unsteered ones.
        prompted_samples: answers per question and instruction of a system prompt.
        where: tokens that are steered.

    Raises:
        GeometryError: a number below 1.
    """

    questions: int = 5
    samples: int = 4
    prompted_samples: int = 1
    where: Where = "response"
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=300))
    seed: int = 0
    batch_rows: int = DEFAULT_BATCH_ROWS

    def __post_init__(self) -> None:
        for name in ("questions", "samples", "prompted_samples", "batch_rows"):
            if getattr(self, name) < 1:
                raise GeometryError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Effects:
    """What acting on each trait does to all of them: score points, 95 % intervals over questions (Student's t).

    Rows are the traits acted upon, columns the traits judged.

    Attributes:
        mean: points of judge's score; `low`, `high`: their intervals.
        by_length: what the change of answer length alone would have done, in points.
    """

    names: tuple[str, ...]
    mean: Float[np.ndarray, "steered judged"]
    low: Float[np.ndarray, "steered judged"]
    high: Float[np.ndarray, "steered judged"]
    by_length: Float[np.ndarray, "steered judged"]  # what the change of answer length alone would have done

    @property
    def length_matters(self) -> bool:
        """Whether answer length changed and goes with any score, so that it can be held."""
        return bool(np.ptp(self.by_length) > 0)

    def ordered(self, names: Sequence[str]) -> "Effects":
        """The same for the traits in another order."""
        at = np.ix_(*[[self.names.index(n) for n in names]] * 2)
        return Effects(tuple(names), self.mean[at], self.low[at], self.high[at], self.by_length[at])


def foretold(similarity: Float[np.ndarray, "vector vector"], effects: Effects, *, seed: int = 0) -> Mantel:
    """Whether a similarity of the traits (cosines, planted correlations) foretold what acting on one does to the others (QAP).

    Answer length is a covariate, where it matters.

    Args:
        similarity: of the traits in the order of `effects.names`.

    Raises:
        GeometryError: fewer than four traits, or a similarity that is not finite or constant.
    """
    return mantel(similarity, effects.mean, covariates=[effects.by_length] if effects.length_matters else [], seed=seed)


@dataclass(frozen=True)
class SpillOver:
    """A spill-over matrix on disk.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that was measured, as plain values."""
        return read_json(self.path / "spill_over.json")

    @property
    def names(self) -> tuple[str, ...]:
        """The traits, in the order of rows and columns."""
        return tuple(self.record["traits"])

    @property
    def steered(self) -> Effects:
        """Change of every trait's score per unit of strength along each vector."""
        return self._effects("steered")

    @property
    def prompted(self) -> Effects:
        """Change of every trait's score from each trait's negative to its positive system prompts."""
        return self._effects("prompted")

    def _effects(self, kind: str) -> Effects:
        found = {k: np.array(v, dtype=np.float64) for k, v in self.record[kind].items()}
        return Effects(self.names, **found)


def spill_over(
    model: ChatModel,
    vectors: Sequence[PersonaVectors],
    *,
    layer: int,
    strengths: Sequence[float] = (1.0, 2.0),
    traits: Sequence[Trait] | None = None,
    judge: Judge | None = None,
    out: str | Path | None = None,
    settings: SpillOverSettings | None = None,
    progress: Progress | None = None,
) -> SpillOver:
    """Steer along each vector, prompt for each trait, and judge every trait in every answer.

    Args:
        strengths: coefficients on the raw vectors; the slope is fitted through the unsteered score.
        traits: of the vectors, in their order; default: the shipped traits of their names.
        judge: default: the oracle for the pocket model.
        out: run folder; default `runs/spill-{model}-seed{seed}`. An interrupted run in it goes on.

    Raises:
        GeometryError: fewer than two vectors, a name twice, or strengths that are zero or missing.
        SteeringError: no such layer.
        PersonaLensError: no judge, no such trait (`UnknownNameError`), or a folder of another run (`RunFolderError`).
    """
    settings = settings or SpillOverSettings()
    traits = list(traits) if traits is not None else [trait_of(v, model.trait_set) for v in vectors]
    judge = judge or default_judge(model.trait_set)
    names = [v.trait for v in vectors]
    if len(names) < 2 or len(set(names)) < len(names) or [t.name for t in traits] != names:
        raise GeometryError(
            f"a spill-over matrix needs two or more different vectors and their traits; "
            f"vectors {names}, traits {[t.name for t in traits]}"
        )
    if not strengths or any(s == 0 or not np.isfinite(s) for s in strengths) or len(set(strengths)) < len(strengths):
        raise GeometryError(f"strengths must be different numbers other than 0, not {list(strengths)}")
    for v, s in itertools.product(vectors, strengths):
        add(v, layer, s, where=settings.where)
    directions = digest(b"".join(v[layer].contiguous().numpy().tobytes() for v in vectors))
    content = digest("".join(t.model_dump_json(by_alias=True) for t in traits))
    arguments = {
        "traits": names,
        "traits_hash": content,
        "vectors": directions,
        "layer": layer,
        "strengths": [float(s) for s in strengths],
        "judge": judge.name,
        "sampling": vars(settings.sampling),
        **{k: v for k, v in vars(settings).items() if k not in ("batch_rows", "sampling")},
    }
    path = Path(out) if out else Path("runs") / f"spill-{Path(model.name).name}-seed{settings.seed}"
    folder = RunFolder.open(path, command="spill-over", arguments=arguments, model=model.identity)
    if not (path / "spill_over.json").exists():
        with progress_bars() as bars:
            _SpillOver(model, vectors, traits, judge, layer, list(strengths), settings, folder, progress or bars).run()
    return SpillOver(path)


def load_spill_over(path: str | Path) -> SpillOver:
    """Reopen a spill-over matrix.

    Raises:
        RunFolderError: the folder holds none, or it is not finished.
    """
    folder = Path(path)
    require_finished(folder, "spill-over", "spill_over.json")
    return SpillOver(folder)


@dataclass(frozen=True)
class _Row:
    """One answer to be made: to which question, and what is done for it (`steer`, `prompt` or nothing)."""

    row: Row
    question: int
    acted: int | None = None  # on which trait
    strength: float = 0.0
    polarity: int = 0  # of the system prompt: +1, -1, or none

    @property
    def cell(self) -> str:
        """What was done for the answer; with the rollout's key it names the answer."""
        return "unsteered" if self.acted is None else "prompted" if self.polarity else f"steered {self.acted} x {self.strength:g}"


@dataclass(frozen=True)
class _SpillOver:
    """The stages over one open folder."""

    model: ChatModel
    vectors: Sequence[PersonaVectors]
    traits: Sequence[Trait]
    judge: Judge
    layer: int
    strengths: Sequence[float]
    settings: SpillOverSettings
    folder: RunFolder
    progress: Progress

    def run(self) -> None:
        questions = list(dict.fromkeys(q for t in self.traits for q in t.evaluation_questions[: self.settings.questions]))
        rows = self._rows(questions)
        rollouts = self._sampled(rows)
        scores = self._judged(rows, rollouts)
        lengths = np.array([len(r.token_ids) for r in rollouts], dtype=np.float64)
        write_json(self.folder.path / "spill_over.json", encoded(self._record(questions, rows, scores, lengths)))

    def _rows(self, questions: Sequence[str]) -> list[_Row]:
        """Unsteered, then every trait at every strength, then every trait's positive and negative prompts; by question."""
        samples, rows = self.settings.samples, list[_Row]()
        for q, text in enumerate(questions):
            plain = Prompt(f"spill/neutral/q{q:02d}", "", "neutral", None, q, None, text)
            rows += [_Row((plain, i), q) for i in range(5 * samples)]
            for k, strength in itertools.product(range(len(self.vectors)), self.strengths):
                rows += [_Row((plain, i), q, k, strength) for i in range(samples)]
        for (k, trait), polarity in itertools.product(enumerate(self.traits), ("positive", "negative")):
            for q, text in enumerate(questions):
                for n in range(len(trait.instructions)):
                    asked = f"spill/{trait.name}/{polarity}/i{n}/q{q:02d}"
                    prompt = Prompt(asked, trait.name, polarity, n, q, system_prompt(trait, polarity, n), text)
                    rows += [
                        _Row((prompt, i), q, k, 0.0, 1 if polarity == "positive" else -1)
                        for i in range(self.settings.prompted_samples)
                    ]
        return rows

    def _sampled(self, rows: Sequence[_Row]) -> list[Rollout]:
        s = self.settings

        def interventions(r: _Row) -> list[Intervention]:
            steered = r.acted is not None and r.strength
            return [add(self.vectors[r.acted], self.layer, r.strength, where=s.where)] if steered else []  # pyright: ignore[reportArgumentType,reportCallIssue]

        def answered(chunk: range) -> list[dict[str, Any]]:
            some = [rows[i] for i in chunk]
            with row_plan(self.model, [interventions(r) for r in some]).active():
                made = sample(self.model, [r.row for r in some], s.sampling, seed=s.seed, batch_rows=s.batch_rows)
            return [{"cell": r.cell, **m.as_dict()} for r, m in zip(some, made, strict=True)]

        self.folder.fill(
            "rollouts.jsonl", len(rows), answered, chunk=CHUNK_ROWS, told=lambda n: self.progress("answers", n, len(rows))
        )
        return read_rollouts(self.folder.path / "rollouts.jsonl")

    def _judged(self, rows: Sequence[_Row], rollouts: Sequence[Rollout]) -> Float[np.ndarray, "answer value"]:
        """Every trait's score of every answer, and its coherence; NaN where the judge gave none."""

        def scored(chunk: range) -> list[dict[str, Any]]:
            asked = [Judged(rows[i].row[0].user, rollouts[i].text) for i in chunk]
            per_trait = [judged(self.judge, trait, asked) for trait in self.traits]
            return [
                {
                    "cell": rows[i].cell,
                    "key": rollouts[i].key,
                    "scores": [s[n].trait for s in per_trait],
                    "coherence": per_trait[0][n].coherence,
                }
                for n, i in enumerate(chunk)
            ]

        self.folder.fill("scores.jsonl", len(rows), scored, chunk=CHUNK_ROWS, told=lambda n: self.progress("scores", n, len(rows)))
        records = read_jsonl(self.folder.path / "scores.jsonl")
        return np.array([[*r["scores"], r["coherence"]] for r in records], dtype=np.float64)

    def _record(
        self, questions: Sequence[str], rows: Sequence[_Row], scores: np.ndarray, lengths: Float[np.ndarray, " answer"]
    ) -> dict[str, Any]:
        asked = np.array([r.question for r in rows])
        acted = np.array([-1 if r.acted is None else r.acted for r in rows])
        strength, polarity = np.array([r.strength for r in rows]), np.array([r.polarity for r in rows])
        scores, coherence = scores[:, :-1], scores[:, -1]
        values = np.column_stack([scores, lengths])

        def means(where: np.ndarray) -> Float[np.ndarray, "question value"]:
            with np.errstate(invalid="ignore"):
                return np.stack([_mean(values[where & (asked == q)]) for q in range(len(questions))])

        base = means(acted < 0)
        along = np.array(self.strengths)
        per_length = _within_slopes(values[acted < 0], asked[acted < 0])
        steered, prompted = list[np.ndarray](), list[np.ndarray]()
        for k in range(len(self.traits)):
            changes = np.stack([means((acted == k) & (strength == s)) - base for s in along])
            steered.append(np.einsum("s,sqv->qv", along, changes) / (along @ along))
            prompted.append(means((acted == k) & (polarity == 1)) - means((acted == k) & (polarity == -1)))
        return {
            "traits": [t.name for t in self.traits],
            "layer": self.layer,
            "strengths": list(self.strengths),
            "questions": list(questions),
            "answers": len(rows),
            "gaps": int(np.isnan(scores).any(1).sum()),
            "unsteered_coherence": float(np.nanmean(coherence[acted < 0])),
            "coherence": [
                [float(np.nanmean(coherence[(acted == k) & (strength == s)])) for s in along] for k in range(len(self.traits))
            ],
            "unsteered": np.nanmean(base[:, :-1], axis=0).tolist(),
            "steered": _effects(steered, per_length),
            "prompted": _effects(prompted, per_length),
        }


def _mean(values: Float[np.ndarray, "answer value"]) -> Float[np.ndarray, " value"]:
    """Column means without gaps; NaN for a column of nothing else."""
    counts = np.isfinite(values).sum(0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def _within_slopes(values: Float[np.ndarray, "answer value"], asked: np.ndarray) -> Float[np.ndarray, " judged"]:
    """Score points per token of answer length among unsteered answers to the same question (the last column is the length)."""
    centred = np.concatenate([values[asked == q] - _mean(values[asked == q]) for q in np.unique(asked)])
    centred = centred[np.isfinite(centred).all(1)]
    length = centred[:, -1]
    spread = float(length @ length)
    return length @ centred[:, :-1] / spread if spread > 0 else np.zeros(values.shape[1] - 1)


def _effects(changes: Sequence[Float[np.ndarray, "question value"]], per_length: Float[np.ndarray, " judged"]) -> Mapping[str, Any]:
    """Means with intervals over questions, and what the mean change of length would have done alone."""
    found: dict[str, list[list[float]]] = {"mean": [], "low": [], "high": [], "by_length": []}
    for one in changes:
        columns = [mean_interval(c[np.isfinite(c)]) if np.isfinite(c).any() else NOTHING for c in one[:, :-1].T]
        found["mean"].append([m for m, _ in columns])
        found["low"].append([i[0] for _, i in columns])
        found["high"].append([i[1] for _, i in columns])
        found["by_length"].append((float(np.nanmean(one[:, -1])) * per_length).tolist())
    return found
