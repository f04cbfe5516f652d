"""How well a persona is seen before the answer: prompts that ask for a trait more and less, their projections, judged answers.

Graded system prompts or a growing number of examples in the context (Chen et al. 2025, monitoring: 8 prompts; 0, 5, 10, 15, 20
examples), every evaluation question under each, ten answers to each. The layer is chosen on every other question, and all figures
are about the others; what every layer gives on all of them is told as a description.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from persona_lens.activations import POOLINGS, Span, pool
from persona_lens.errors import MonitoringError
from persona_lens.extraction import ExtractionRun, trait_of
from persona_lens.extraction.run import read_rollouts, read_scores, read_tensors
from persona_lens.judges import Judge, Judged, default_judge, judged
from persona_lens.models import ChatModel, Sampling
from persona_lens.monitoring.baselines import length_baseline, text_baseline
from persona_lens.monitoring.content import Embedding
from persona_lens.monitoring.prediction import (
    Comparison,
    Outcomes,
    Predictor,
    RandomFloor,
    choose_layer,
    compare,
    correlations,
    random_floor,
)
from persona_lens.progress import Progress, progress_bars
from persona_lens.prompts import Prompt, extraction_prompts, graded_system_prompts
from persona_lens.records import decoded, encoded
from persona_lens.reliability import MINIMUM_QUESTIONS
from persona_lens.sampling import DEFAULT_BATCH_ROWS, Row, sample
from persona_lens.store import RunFolder, digest, read_json, require_finished, write_atomically, write_json
from persona_lens.traits import Trait, read_trait
from persona_lens.vectors import PersonaVectors

CHUNK_ROWS: Final = 512
PROMPT_LAST: Final = POOLINGS.index("prompt_last")
SHOTS: Final = (0, 5, 10, 15, 20)


@dataclass(frozen=True)
class Condition:
    """What comes before a question: a system prompt, examples (question, answer), both or nothing."""

    name: str
    system: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()


def graded_conditions(trait: Trait, system_prompts: Sequence[str] | None = None) -> list[Condition]:
    """A condition per system prompt, from suppressing to promoting; default: the trait's own graded ones.

    Args:
        system_prompts: in that order.

    Raises:
        TraitFileError: the trait has none.
    """
    prompts = graded_system_prompts(trait) if system_prompts is None else system_prompts
    return [Condition(f"prompt {i}", system=text) for i, text in enumerate(prompts, start=1)]


def shot_conditions(run: ExtractionRun, counts: Sequence[int] = SHOTS, *, seed: int = 0) -> list[Condition]:
    """Growing numbers of examples of the trait, without system prompt: the model's own answers under the positive prompts of an
    extraction, scored at least 50 and coherent, one per extraction question in a random order. Fewer examples are the last of more.

    Args:
        counts: how many examples, a condition each.
        seed: of their order and choice.

    Raises:
        MonitoringError: the run has fewer such questions than the largest count.
    """
    asked = {p.id: p for p in extraction_prompts(read_trait(run.path / "trait.json"), "positive")}
    answers: dict[int, list[str]] = {}
    for rollout, score in zip(run.rollouts(), run.scores(), strict=True):
        showing = (score.trait or 0) >= 50 and (score.coherence or 0) >= 50
        if rollout.prompt_id in asked and showing:
            answers.setdefault(asked[rollout.prompt_id].question, []).append(rollout.text)
    if len(answers) < max(counts):
        raise MonitoringError(
            f"{run.path} has answers that show {run.trait} to {len(answers)} questions, {max(counts)} examples were asked for: "
            "ask for fewer"
        )
    rng = np.random.default_rng(seed)
    questions = {p.question: p.user for p in asked.values()}
    order = rng.permutation(sorted(answers)).tolist()
    shots = [(questions[q], answers[q][int(rng.integers(len(answers[q])))]) for q in order]
    return [Condition(f"{n} examples", earlier=tuple(shots[len(shots) - n :])) for n in counts]


@dataclass(frozen=True)
class PredictionSettings:
    """What a study of prediction depends on besides vectors, conditions, model and judge.

    Attributes:
        samples: answers per condition and question.

    Raises:
        MonitoringError: a number below 1.
    """

    samples: int = 10
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=300))
    seed: int = 0
    batch_rows: int = DEFAULT_BATCH_ROWS

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_rows < 1:
            raise MonitoringError(f"samples and batch_rows are at least 1, not {self.samples} and {self.batch_rows}")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a study of prediction found.

    Attributes:
        layer: where the vector is read (blocks from 0).
        chosen_on: the questions that the layer was chosen on, which nothing else here is about; none where it was given.
        left_out: conditions whose prompts do not fit into the model's context.
        gaps: answers without a score.
        projection: of the last prompt token, residual-stream units.
        by_layer: r over all cells of all questions at every layer, a description.
        comparison: the projection beside text, prompt length and other vectors.
        floors: what random directions reach at that layer, isotropic and with the covariance of these very prompts.
    """

    trait: str
    layer: int
    chosen_on: tuple[str, ...]
    left_out: tuple[str, ...]
    gaps: int
    outcomes: Outcomes
    projection: Float[np.ndarray, "condition question"]
    by_layer: Float[np.ndarray, " layer"]
    comparison: Comparison
    floors: tuple[RandomFloor, ...]


@dataclass(frozen=True)
class PredictionRun:
    """A study of prediction on disk.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def prediction(self) -> Prediction:
        """What was found."""
        return decoded(Prediction, read_json(self.path / "prediction.json"))

    @cached_property
    def residuals(self) -> Float[Tensor, "condition question layer d_model"]:
        """Of the last prompt token, in residual-stream units."""
        return read_tensors(self.path / "prompts.safetensors")["prompt_last"]


def load_prediction(path: str | Path) -> PredictionRun:
    """Reopen a study of prediction.

    Raises:
        RunFolderError: the folder holds none, or it is not finished.
    """
    require_finished(Path(path), "predict", "prediction.json")
    return PredictionRun(Path(path))


def predict(
    model: ChatModel,
    vectors: PersonaVectors,
    conditions: Sequence[Condition] | None = None,
    *,
    trait: Trait | None = None,
    layer: int | None = None,
    judge: Judge | None = None,
    others: Sequence[PersonaVectors] = (),
    embed: Embedding | None = None,
    out: str | Path | None = None,
    settings: PredictionSettings | None = None,
    progress: Progress | None = None,
) -> PredictionRun:
    """Does the projection of the last prompt token foretell how far the answers will show the trait?

    Args:
        conditions: default: the trait's graded system prompts. See also `shot_conditions`.
        trait: default: the shipped trait that the vectors are named after.
        layer: default: the one of the highest r on every other question.
        others: vectors of other traits, as a control (at the same layer); those of the same trait are left out.
        embed: text -> features, for a second text baseline.

    Raises:
        MonitoringError: fewer than three conditions fit, two have one name, or there are fewer than twelve questions to choose a
            layer on one half and report on the other.
        LineageError: vectors of another lineage.
        PersonaLensError: no judge, no such trait (`UnknownNameError`), or a folder of another run (`RunFolderError`).
    """
    others = [v for v in others if v.trait != vectors.trait]
    for v in (vectors, *others):
        v.require_lineage(model.fingerprint.lineage)
        if (v.n_layers, v.d_model) != (model.n_layers, model.d_model):
            raise MonitoringError(
                f"the {v.trait} vector has {v.n_layers} layers x {v.d_model}, {model.name} has {model.n_layers} x {model.d_model}"
            )
    if twice := [v.trait for i, v in enumerate(others) if v.trait in [o.trait for o in others[:i]]]:
        raise MonitoringError(f"two of the other vectors are of {twice[0]!r}: give one")
    trait = trait or trait_of(vectors, model.trait_set)
    conditions = graded_conditions(trait) if conditions is None else list(conditions)
    settings, judge = settings or PredictionSettings(), judge or default_judge(model.trait_set)
    if layer is not None:
        model.hook_name(layer)
    elif len(trait.evaluation_questions) < 2 * MINIMUM_QUESTIONS:
        raise MonitoringError(
            f"{trait.name} has {len(trait.evaluation_questions)} evaluation questions, {2 * MINIMUM_QUESTIONS} are needed to "
            "choose a layer on one half and report on the other: pass layer=, or add questions"
        )
    place = Path(out) if out else Path("runs") / f"predict-{trait.name}-seed{settings.seed}"
    told = {"trait": trait.model_dump_json(by_alias=True), "conditions": [asdict(c) for c in conditions]}
    arguments = {
        "trait": trait.name,
        "content": digest(str(told)),
        "judge": judge.name,
        "settings": asdict(settings),
    }
    folder = RunFolder.open(place, command="predict", arguments=arguments, model=model.identity)
    with progress_bars(None if progress is None else False) as bars:
        study = _Study(model, trait, judge, folder, settings, progress or bars)
        found = study.run(conditions, vectors, layer, others, embed)
    write_json(folder.path / "prediction.json", encoded(found))
    return PredictionRun(folder.path)


@dataclass(frozen=True)
class _Study:
    """A study while it runs."""

    model: ChatModel
    trait: Trait
    judge: Judge
    folder: RunFolder
    settings: PredictionSettings
    progress: Progress

    def run(
        self,
        conditions: Sequence[Condition],
        vectors: PersonaVectors,
        layer: int | None,
        others: Sequence[PersonaVectors],
        embed: Embedding | None,
    ) -> Prediction:
        prompts, left_out = self._fitting(conditions)
        rows: list[Row] = [(p, i) for grid in prompts for p in grid for i in range(self.settings.samples)]
        outcomes, gaps = self._outcomes(prompts, rows)
        ids = [[self.model.render(p.messages) for p in grid] for grid in prompts]
        residuals = self._residuals(ids)
        projections = torch.stack([vectors.project(residuals[:, :, at], at) for at in range(vectors.n_layers)]).double().numpy()
        every = range(len(outcomes.questions))
        choosing = every[::2] if layer is None else every[:0]
        layer = choose_layer(projections, outcomes, choosing) if layer is None else layer
        reported = [q for q in every if q not in choosing]
        texts = [["\n".join(m["content"] for m in p.messages) for p in grid] for grid in prompts]
        lengths = np.array([[float(len(x)) for x in grid] for grid in ids])
        baselines = [
            text_baseline(texts, outcomes, "questions"),
            text_baseline(texts, outcomes, "conditions"),
            *([text_baseline(texts, outcomes, "conditions", embed)] if embed else []),
            length_baseline(lengths, outcomes, "conditions"),
            *(_predictor(v, residuals, layer) for v in others),
        ]
        told, main = outcomes.of(reported), _predictor(vectors, residuals, layer).of(reported)
        at = residuals[:, reported, layer].double().numpy()
        return Prediction(
            trait=self.trait.name,
            layer=layer,
            chosen_on=tuple(outcomes.questions[q] for q in choosing),
            left_out=left_out,
            gaps=gaps,
            outcomes=told,
            projection=main.values,
            by_layer=np.array([correlations(values, outcomes).overall.value for values in projections]),
            comparison=compare(main, [b.of(reported) for b in baselines], told),
            floors=tuple(random_floor(at, told, matched=matched, seed=self.settings.seed) for matched in (False, True)),
        )

    def _fitting(self, conditions: Sequence[Condition]) -> tuple[list[list[Prompt]], tuple[str, ...]]:
        """The prompts of every condition that fits into the context, and the names of the others."""
        names = [c.name for c in conditions]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise MonitoringError(f"two conditions are called {twice[0]!r}: name them apart")
        room = (self.model.context or 10**9) - self.settings.sampling.max_new_tokens
        kept: list[list[Prompt]] = []
        left_out: list[str] = []
        for number, condition in enumerate(conditions):
            prompts = [self._prompt(condition, number, q, text) for q, text in enumerate(self.trait.evaluation_questions)]
            if max(len(self.model.render(p.messages)) for p in prompts) > room:
                left_out.append(condition.name)
            else:
                kept.append(prompts)
        if len(kept) < 3:
            raise MonitoringError(
                f"{len(kept)} of {len(conditions)} conditions fit into the context of {self.model.context} tokens beside "
                f"max_new_tokens={self.settings.sampling.max_new_tokens}, at least 3 are needed: shorten them or the answers"
            )
        return kept, tuple(left_out)

    def _prompt(self, condition: Condition, number: int, question: int, text: str) -> Prompt:
        name = f"predict/{self.trait.name}/{condition.name}/e{question:02d}"
        return Prompt(name, condition.name, "neutral", number, question, condition.system, text, condition.earlier)

    def _outcomes(self, prompts: Sequence[Sequence[Prompt]], rows: Sequence[Row]) -> tuple[Outcomes, int]:
        """Sampled and judged answers as a grid, and how many of them have no score."""
        s, path = self.settings, self.folder.path

        def answered(chunk: range) -> list[dict[str, Any]]:
            some = rows[chunk.start : chunk.stop]
            return [r.as_dict() for r in sample(self.model, some, s.sampling, seed=s.seed, batch_rows=s.batch_rows)]

        def fill(file: str, what: str, make: Any) -> None:
            self.folder.fill(file, len(rows), make, chunk=CHUNK_ROWS, told=lambda n: self.progress(what, n, len(rows)))

        fill("rollouts.jsonl", "answers", answered)
        rollouts = read_rollouts(path / "rollouts.jsonl")

        def scored(chunk: range) -> list[dict[str, Any]]:
            asked = [Judged(rows[i][0].user, rollouts[i].text) for i in chunk]
            scores = judged(self.judge, self.trait, asked)
            return [{"key": rollouts[i].key, **score.as_dict()} for i, score in zip(chunk, scores, strict=True)]

        fill("scores.jsonl", "scores", scored)
        values = np.array([np.nan if x.trait is None else x.trait for x in read_scores(path / "scores.jsonl")], dtype=np.float64)
        grid = values.reshape(len(prompts), len(prompts[0]), s.samples)
        known = np.isfinite(grid)
        n = known.sum(-1).astype(np.float64)
        mean = np.where(n > 0, np.where(known, grid, 0.0).sum(-1) / np.maximum(n, 1), np.nan)
        above = (np.where(known, grid, 0.0) > 50).sum(-1).astype(np.float64)
        names = tuple(grid_row[0].trait for grid_row in prompts)
        return Outcomes(names, tuple(self.trait.evaluation_questions), mean, above, n), int((~known).sum())

    def _residuals(self, ids: Sequence[Sequence[Sequence[int]]]) -> Float[Tensor, "condition question layer d_model"]:
        """Of the last prompt token, at every layer; kept in the folder."""
        file = self.folder.path / "prompts.safetensors"
        if not file.exists():
            answer = (self.model.stop_ids[0],)  # pooling needs one; what comes later changes nothing
            spans = [Span(f"prompt {c}/{q}", tuple(x), answer) for c, grid in enumerate(ids) for q, x in enumerate(grid)]
            found = torch.zeros(len(spans), self.model.n_layers, self.model.d_model)
            for pooled in pool(self.model, spans):
                found[list(pooled.indices)] = pooled.values[:, PROMPT_LAST]
            tensors = {"prompt_last": found.reshape(len(ids), len(ids[0]), *found.shape[1:]).contiguous()}
            write_atomically(file, lambda path: save_file(tensors, path))
        return read_tensors(file)["prompt_last"]


def _predictor(vectors: PersonaVectors, residuals: Float[Tensor, "condition question layer d_model"], layer: int) -> Predictor:
    values = vectors.project(residuals[:, :, layer], layer).double().numpy()
    return Predictor(f"{vectors.trait} vector", values)
