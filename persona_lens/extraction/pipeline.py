"""The extraction pipeline: prompts -> rollouts -> scores -> filter -> pooled residuals -> vectors, in a run folder.

Rollouts and scores are cut into fixed chunks of `CHUNK_ROWS` rows; a killed run goes on at the first missing chunk and ends with
the same bytes. The residuals of what survives are taken in one pass over all layers and poolings.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_lens.activations import DEFAULT_BATCH_TOKENS, POOLINGS, CellMeans, pool, rollout_span
from persona_lens.errors import PersonaLensError, RunFolderError
from persona_lens.extraction.estimators import MEAN_DIFFERENCE
from persona_lens.extraction.filtering import Counts, Thresholds, keep_independent, keep_pairwise, require_enough
from persona_lens.extraction.run import ExtractionRun, read_rollouts, read_scores, trait_hash, vectors_from_means
from persona_lens.judges import Judge, Judged, Score, default_judge, judged
from persona_lens.models import ChatModel, Sampling
from persona_lens.progress import Progress, progress_bars
from persona_lens.prompts import POLARITIES, extraction_prompts
from persona_lens.sampling import DEFAULT_BATCH_ROWS, Rollout, Row, Sampler, rows_of, sample, sampled
from persona_lens.store import RunFolder, read_jsonl, write_atomically, write_json
from persona_lens.traits import Trait, load_trait

CHUNK_ROWS: Final = 256
PARTIAL: Final = "activations.partial.safetensors"
PARTIAL_SECONDS: Final = 20.0


@dataclass(frozen=True)
class ExtractionSettings:
    """What an extraction depends on besides trait, model and judge. Defaults: the paper's scale (2,000 rollouts) and filter.

    `batch_rows` and `batch_tokens` bound memory and may change when a run is resumed; in float32 they change nothing (up to
    ties at rounding), in bfloat16 the logits themselves depend on the batch.

    Attributes:
        samples: answers per question and instruction, on each side.
        neutral: answers without a system prompt, spread over the questions.
        sampling: how answers are drawn.
        thresholds: which answers count.
        batch_rows: answers decoded together; `batch_tokens`: padded tokens per forced pass.

    Raises:
        ValueError: a number that is too small.
    """

    samples: int = 10
    neutral: int = 512
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=1000))
    thresholds: Thresholds = field(default_factory=Thresholds)
    seed: int = 0
    batch_rows: int = DEFAULT_BATCH_ROWS
    batch_tokens: int = DEFAULT_BATCH_TOKENS

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("neutral", 0), ("batch_rows", 1), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


def extract(
    model: ChatModel,
    trait: Trait | str,
    *,
    judge: Judge | None = None,
    sampler: Sampler | None = None,
    out: str | Path | None = None,
    settings: ExtractionSettings | None = None,
    progress: Progress | None = None,
) -> ExtractionRun:
    """Extract a trait's persona vector (Chen et al. 2025, section 2).

    Args:
        trait: a trait, or the name of one of those that ship for this model.
        judge: default: the oracle for the pocket model; any other model needs one.
        sampler: where answers come from; default: the model itself. `endpoint_sampler` asks a server with the same weights. Answers
            without usable tokens are gaps, which the summary counts by reason.
        out: the run folder; default `runs/extract-{model}-{trait}-seed{seed}`. An interrupted run in it is resumed.
        settings: default: the paper's scale.
        progress: called with (stage, done, total); default: bars on a terminal.

    Raises:
        PersonaLensError: no judge, a prompt that does not fit into the context, or one of the subclasses: `FilterError` (too few
            answers survive), `RunFolderError` (a folder of another run), `UnknownNameError` (no such trait), `ActivationError`.
            What was computed before stays in the folder.

    Example:
        >>> from persona_lens.extraction import ExtractionSettings
        >>> from persona_lens.models import Sampling
        >>> quick = ExtractionSettings(samples=1, neutral=20, sampling=Sampling(max_new_tokens=120))
        >>> run = pl.extract(model, "optimism", judge=pl.judges.oracle(), settings=quick, out="runs/optimism")
        >>> run.vectors.directions.shape  # layer, d_model
        torch.Size([8, 256])
        >>> bool(run.vectors.p_any < 0.01)  # a direction exists at some layer
        True
    """
    trait = load_trait(trait, model.trait_set) if isinstance(trait, str) else trait
    judge = judge or default_judge(model.trait_set)
    settings = settings or ExtractionSettings()
    path = Path(out) if out else Path("runs") / f"extract-{Path(model.name).name}-{trait.name}-seed{settings.seed}"
    judged(judge, trait, [])  # what it cannot judge at all is said before anything is sampled
    folder = RunFolder.open(path, command="extract", arguments=_arguments(trait, judge, sampler, settings), model=model.identity)
    if progress is not None:
        return _Extraction(model, trait, judge, sampler, settings, folder, progress).run()
    with progress_bars() as bars:
        return _Extraction(model, trait, judge, sampler, settings, folder, bars).run()


def _arguments(trait: Trait, judge: Judge, sampler: Sampler | None, settings: ExtractionSettings) -> dict[str, Any]:
    chosen = {key: value for key, value in asdict(settings).items() if key not in ("batch_rows", "batch_tokens")}
    source = {"sampler": sampler.name} if sampler else {}
    return {"trait": trait.name, "trait_hash": trait_hash(trait), "judge": judge.name, **source, **chosen}


def _digest_of(wanted: Sequence[int], kept: dict[str, list[bool]], rollouts: Sequence[Rollout]) -> str:
    """What the sums of an activation pass depend on."""
    content = json.dumps([list(wanted), kept, [(rollouts[i].key, rollouts[i].token_ids) for i in wanted]])
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class _Extraction:
    """The stages over one open folder."""

    model: ChatModel
    trait: Trait
    judge: Judge
    sampler: Sampler | None
    settings: ExtractionSettings
    folder: RunFolder
    progress: Progress

    def run(self) -> ExtractionRun:
        if self._finished():
            return ExtractionRun(self.folder.path)
        rows = self._rows()
        self._check_context(rows)
        with _Timed(self.folder, "rollouts"):
            rollouts = self._rollouts(rows)
        with _Timed(self.folder, "scores"):
            scores = self._scores(rows, rollouts)
        kept, counts = self._filter(rows, rollouts, scores)
        questions = self._surviving_questions(rows, kept["independent"])
        require_enough(self.trait.name, questions, counts)
        with _Timed(self.folder, "activations"):
            means, neutral = self._activations(rows, rollouts, kept)
        gaps = Counter(r.gap for r in rollouts if r.gap)
        self._finish(means, neutral, counts, questions, gaps)
        return ExtractionRun(self.folder.path)

    def _finished(self) -> bool:
        """Whether the folder already holds the whole run (a damaged result is computed again from the rollouts)."""
        path = self.folder.path
        try:
            return (path / "vectors.safetensors").exists() and bool(
                ExtractionRun(path).vectors.n_layers and ExtractionRun(path).means
            )
        except RunFolderError as error:
            self.folder.log(f"computing again: {error}")
            return False

    def _check_context(self, rows: Sequence[Row]) -> None:
        """Every prompt leaves room for an answer, checked before anything is sampled."""
        for prompt in dict.fromkeys(prompt for prompt, _ in rows):
            n, most = len(self.model.render(prompt.messages)), self.settings.sampling.max_new_tokens
            if self.model.context and n + most > self.model.context:
                raise PersonaLensError(
                    f"{prompt.id}: its {n} tokens and max_new_tokens={most} exceed the context of {self.model.context} tokens of "
                    f"{self.model.name}: lower max_new_tokens or shorten the question"
                )

    @staticmethod
    def _surviving_questions(rows: Sequence[Row], kept: Sequence[bool]) -> list[int]:
        """Questions with a surviving rollout on both sides."""
        alive = {(prompt.polarity, prompt.question) for (prompt, _), keep in zip(rows, kept, strict=True) if keep}
        return sorted(q for polarity, q in alive if polarity == "positive" and ("negative", q) in alive)

    def _rows(self) -> list[Row]:
        """Positive, then negative, then neutral rows; the neutral ones cycle over the questions."""
        contrast = [
            row for polarity in POLARITIES for row in rows_of(extraction_prompts(self.trait, polarity), self.settings.samples)
        ]
        questions = extraction_prompts(self.trait, "neutral")
        neutral = [(questions[i % len(questions)], i // len(questions)) for i in range(self.settings.neutral)]
        return [*contrast, *neutral]

    def _rollouts(self, rows: Sequence[Row]) -> list[Rollout]:
        path, total = self.folder.path / "rollouts.jsonl", len(rows)

        def answered(chunk: range) -> list[dict[str, Any]]:
            some, s = rows[chunk.start : chunk.stop], self.settings
            if self.sampler:
                return [r.as_dict() for r in sampled(self.sampler, some, s.sampling, s.seed)]
            return [r.as_dict() for r in sample(self.model, some, s.sampling, seed=s.seed, batch_rows=s.batch_rows)]

        self.folder.fill(path.name, total, answered, chunk=CHUNK_ROWS, told=lambda n: self.progress("rollouts", n, total))
        rollouts = read_rollouts(path)
        expected = [(p.id, i) for p, i in rows]
        for number, (rollout, key) in enumerate(zip(rollouts, expected, strict=True), start=1):
            if (rollout.prompt_id, rollout.sample) != key:
                raise RunFolderError(
                    f"{path}: line {number} is rollout {rollout.key}, expected {key[0]}#{key[1]}: the file was changed"
                )
        return rollouts

    def _scores(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> list[Score]:
        path, total = self.folder.path / "scores.jsonl", len(rollouts)

        def scored(chunk: range) -> list[dict[str, Any]]:
            answers = rollouts[chunk.start : chunk.stop]
            asked = zip(rows[chunk.start : chunk.stop], answers, strict=True)
            scores = judged(self.judge, self.trait, [Judged(p.user, r.text) for (p, _), r in asked])
            return [{"key": r.key, **s.as_dict()} for r, s in zip(answers, scores, strict=True)]

        self.folder.fill(path.name, total, scored, chunk=CHUNK_ROWS, told=lambda n: self.progress("scores", n, total))
        for number, (record, rollout) in enumerate(zip(read_jsonl(path), rollouts, strict=True), start=1):
            if record.get("key") != rollout.key:
                raise RunFolderError(
                    f"{path}: line {number} scores {record.get('key')}, expected {rollout.key}: the file was changed"
                )
        return read_scores(path)

    def _filter(
        self, rows: Sequence[Row], rollouts: Sequence[Rollout], scores: Sequence[Score]
    ) -> tuple[dict[str, list[bool]], list[Counts]]:
        """Per filter, which rows survive (neutral rows: those that have a score and are coherent)."""
        per_side = len(self.trait.instructions) * len(self.trait.extraction_questions) * self.settings.samples
        cuts = {
            "positive": slice(0, per_side),
            "negative": slice(per_side, 2 * per_side),
            "neutral": slice(2 * per_side, len(rows)),
        }
        sides: dict[str, list[bool]] = {}
        counts: list[Counts] = []
        for polarity in (*POLARITIES, "neutral"):
            cut = cuts[polarity]
            sides[polarity], count = keep_independent(rollouts[cut], scores[cut], polarity, self.settings.thresholds)
            counts.append(count)
        pairs = keep_pairwise(sides["positive"], sides["negative"])
        independent = [*sides["positive"], *sides["negative"], *sides["neutral"]]
        return {"independent": independent, "pairwise": [*pairs, *pairs, *[False] * len(sides["neutral"])]}, counts

    def _activations(
        self, rows: Sequence[Row], rollouts: Sequence[Rollout], kept: dict[str, list[bool]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Cell means per filter and pooling, and the neutral answers' response means."""
        wanted = [i for i in range(len(rows)) if kept["independent"][i]]
        shape = (len(POLARITIES), len(self.trait.instructions), len(self.trait.extraction_questions))
        pooled_shape = (len(POOLINGS), self.model.n_layers, self.model.d_model)
        cells = {name: CellMeans(shape, pooled_shape) for name in kept}
        neutral = torch.zeros(sum(rows[i][0].polarity == "neutral" for i in wanted), self.model.n_layers, self.model.d_model)
        state = _digest_of(wanted, kept, rollouts)
        filled, position = self._load_partial(cells, neutral, state)
        self.progress("activations", position, len(wanted))
        saved = time.monotonic()
        while position < len(wanted):
            chunk = wanted[position : position + CHUNK_ROWS]
            filled = self._pool_chunk(chunk, rows, rollouts, kept, cells, neutral, filled)
            position += len(chunk)
            self.progress("activations", position, len(wanted))
            if time.monotonic() - saved >= PARTIAL_SECONDS:
                self._save_partial(cells, neutral, filled, position, state)
                saved = time.monotonic()
        means: dict[str, Tensor] = {}
        for name, cell in cells.items():
            pooled = cell.means
            means[f"{name}.counts"] = cell.counts
            means |= {f"{name}.{pooling}": pooled[..., k, :, :].contiguous() for k, pooling in enumerate(POOLINGS)}
        return means, neutral

    def _pool_chunk(
        self,
        chunk: Sequence[int],
        rows: Sequence[Row],
        rollouts: Sequence[Rollout],
        kept: dict[str, list[bool]],
        cells: dict[str, CellMeans],
        neutral: Tensor,
        filled: int,
    ) -> int:
        """Pool a chunk and add it to the cells in row order; returns how many neutral answers are filled."""
        spans = [rollout_span(self.model, rows[i][0], rollouts[i]) for i in chunk]
        values: dict[int, Tensor] = {}
        for pooled in pool(self.model, spans, batch_tokens=self.settings.batch_tokens):
            values |= dict(zip(pooled.indices, pooled.values, strict=True))
        for k, i in enumerate(chunk):
            prompt = rows[i][0]
            if prompt.polarity == "neutral":
                neutral[filled] = values[k][0]
                filled += 1
                continue
            assert prompt.instruction is not None
            cell = (POLARITIES.index(prompt.polarity), prompt.instruction, prompt.question)
            for name, accumulator in cells.items():
                if kept[name][i]:
                    accumulator.update(cell, values[k])
        return filled

    def _save_partial(self, cells: dict[str, CellMeans], neutral: Tensor, filled: int, position: int, state: str) -> None:
        tensors = {f"{name}.{part}": getattr(cell, part) for name, cell in cells.items() for part in ("sums", "counts")}
        metadata = {"filled": str(filled), "position": str(position), "state": state}
        path = self.folder.path / PARTIAL
        write_atomically(path, lambda temporary: save_file({**tensors, "neutral": neutral}, temporary, metadata=metadata))

    def _load_partial(self, cells: dict[str, CellMeans], neutral: Tensor, state: str) -> tuple[int, int]:
        """Take up the sums of an interrupted pass, if they belong to the same rollouts and filter; else begin anew."""
        path = self.folder.path / PARTIAL
        if not path.exists():
            return 0, 0
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            self.folder.log(f"activations begin anew: {path.name} is damaged ({error})")
            return 0, 0
        if metadata.get("state") != state:
            self.folder.log(f"activations begin anew: {path.name} belongs to other rollouts or scores")
            return 0, 0
        for name, cell in cells.items():
            cell.sums.copy_(tensors[f"{name}.sums"])
            cell.counts.copy_(tensors[f"{name}.counts"])
        neutral.copy_(tensors["neutral"])
        return int(metadata["filled"]), int(metadata["position"])

    def _finish(
        self,
        means: dict[str, Tensor],
        neutral: Tensor,
        counts: Sequence[Counts],
        questions: Sequence[int],
        gaps: Mapping[str, int],
    ) -> None:
        """Write means, vectors and summary; the vectors last, because they mark the run as finished."""
        path = self.folder.path
        manifest = self.folder.manifest
        write_atomically(path / "means.safetensors", lambda temporary: save_file(means, temporary))
        write_atomically(path / "neutral.safetensors", lambda temporary: save_file({"response_mean": neutral}, temporary))
        provenance = {"model": manifest["model"], "arguments": manifest["arguments"]}
        vectors = vectors_from_means(means, self.trait.name, "response_mean", MEAN_DIFFERENCE, provenance, seed=self.settings.seed)
        write_json(
            path / "summary.json",
            {
                "trait": self.trait.name,
                "counts": [c.as_dict() for c in counts],
                "questions_kept": len(questions),
                "questions": len(self.trait.extraction_questions),
                "reliability": [round(float(x), 4) for x in vectors.reliability],
                "norm": [round(float(x), 4) for x in vectors.norm],
                "p_value": [round(float(x), 6) for x in vectors.p_value],
                "p_any_layer": round(vectors.p_any, 6),
                "best_layer": vectors.best_layer,
                **({"gaps": dict(gaps)} if gaps else {}),
            },
        )
        write_json(path / "trait.json", self.trait.model_dump(by_alias=True))
        vectors.save(path / "vectors.safetensors")
        (path / PARTIAL).unlink(missing_ok=True)


@dataclass
class _Timed:
    """Writes a stage's duration to the run's log."""

    folder: RunFolder
    stage: str

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self.folder.log(f"{self.stage}: started")

    def __exit__(self, kind: object, *_: object) -> None:
        state = "interrupted" if kind else "done"
        self.folder.log(f"{self.stage}: {state} after {time.monotonic() - self._began:.1f} s")
