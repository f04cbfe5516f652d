"""The finetuning shift: how far a finetuned model's activations moved along a persona vector, on the same prompts.

Read three ways (Chen et al. 2025, section 4): at the last prompt token; over the base model's own answers, forced on both
models; and over each model's own answers, which is nearly circular, since the trait score is read from these very answers.
Beside it stands what the model does: the trait score of its answers to the same questions.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from persona_lens.activations import POOLINGS, Span, pool, rollout_span
from persona_lens.errors import FinetuningError
from persona_lens.evaluation import ScoreSettings, TraitScore, trait_answers, trait_scores
from persona_lens.extraction import trait_of
from persona_lens.extraction.run import read_tensors
from persona_lens.finetuning.adapters import adapted
from persona_lens.finetuning.training import require_one_process
from persona_lens.judges import Judge, default_judge
from persona_lens.models import ADAPTER_CONFIG, ChatModel, load_model
from persona_lens.progress import Progress, progress_bars
from persona_lens.prompts import Prompt, evaluation_prompts
from persona_lens.records import decoded, encoded
from persona_lens.reliability import mean_interval
from persona_lens.sampling import Rollout
from persona_lens.store import RunFolder, digest, read_json, require_finished, write_atomically, write_json
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

Reading = Literal["prompt_last", "base_answers", "own_answers"]
READINGS: Final[tuple[Reading, ...]] = ("prompt_last", "base_answers", "own_answers")
"""Where shifts are read: the last prompt token, the base model's answers forced on both, each model's own answers."""
RESPONSE, LAST = POOLINGS.index("response_mean"), POOLINGS.index("prompt_last")
BASE: Final = "base"


@dataclass(frozen=True)
class ShiftSettings:
    """What a shift depends on besides models, vectors, traits and judge.

    Attributes:
        scores: how the answers are made that are scored, and read as own answers.
        base_samples: answers of the base model per question that are forced on both models.

    Raises:
        FinetuningError: more base samples than answers per question, or none.
    """

    scores: ScoreSettings = field(default_factory=ScoreSettings)
    base_samples: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.base_samples <= self.scores.samples:
            raise FinetuningError(
                f"base_samples={self.base_samples} must lie between 1 and the {self.scores.samples} answers made per question"
            )


@dataclass(frozen=True, eq=False)
class Shift:
    """What one finetuning did.

    Attributes:
        name: of the finetuned model.
        projection: reading (see `READINGS`) -> shift along each trait's own vector on its own questions, question by question, in
            residual-stream units.
        scores: of the finetuned model's answers; empty without a judge.
    """

    name: str
    projection: Mapping[str, Float[np.ndarray, "trait layer question"]]
    scores: tuple[TraitScore, ...]

    def mean(self, reading: Reading) -> Float[np.ndarray, "trait layer"]:
        """Mean shift over questions, in residual-stream units."""
        return self.projection[reading].mean(-1)

    def interval(self, reading: Reading, trait: int, layer: int) -> tuple[float, float]:
        """95 % interval of a mean shift, in residual-stream units (Student's t over questions).

        Args:
            trait: its place among the traits.
        """
        return mean_interval(self.projection[reading][trait, layer])[1]


@dataclass(frozen=True)
class ShiftRun:
    """Shifts on disk: one base model, one or many finetuned ones.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """What was measured of which models, as plain values."""
        return read_json(self.path / "shift.json")

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits, in the order of the arrays."""
        return tuple(self.record["traits"])

    @property
    def names(self) -> tuple[str, ...]:
        """The finetuned models."""
        return tuple(self.record["names"])

    @property
    def layers(self) -> dict[str, int]:
        """The layer at which each trait's vector is most reliable."""
        return dict(self.record["layers"])

    @cached_property
    def base_scores(self) -> tuple[TraitScore, ...]:
        """Of the base model's answers; empty without a judge."""
        return tuple(decoded(TraitScore, s) for s in read_json(self.path / BASE / "scores.json")["scores"])

    @cached_property
    def shifts(self) -> dict[str, Shift]:
        """What each finetuning did, by the model's name."""
        return {name: decoded(Shift, read_json(self.path / f"shift-{name}.json")) for name in self.names}

    def vectors(self, name: str) -> Mapping[str, Float[Tensor, "trait layer d_model"]]:
        """Reading -> mean change of the residual over each trait's questions, of one finetuned model; residual-stream units."""
        return read_tensors(self.path / f"shift-{name}.safetensors")

    @cached_property
    def base(self) -> Mapping[str, Float[Tensor, "prompt layer d_model"]]:
        """Reading -> the base model's residuals, prompt by prompt; residual-stream units."""
        return read_tensors(self.path / BASE / "residuals.safetensors")

    @cached_property
    def directions(self) -> Float[Tensor, "trait layer d_model"]:
        """The persona vectors, of norm 1."""
        return read_tensors(self.path / "directions.safetensors")["unit"]


def load_shift(path: str | Path) -> ShiftRun:
    """Reopen shifts.

    Raises:
        RunFolderError: the folder holds none, or is not finished.
    """
    require_finished(Path(path), "shift", "shift.json")
    return ShiftRun(Path(path))


def shift(
    model: ChatModel,
    finetuned: Mapping[str, str | Path],
    vectors: Sequence[PersonaVectors],
    *,
    traits: Sequence[Trait] | None = None,
    judge: Judge | None = None,
    out: str | Path | None = None,
    settings: ShiftSettings | None = None,
    progress: Progress | None = None,
) -> ShiftRun:
    """How far finetuned models moved along persona vectors, and what they do (Chen et al. 2025, section 4).

    Args:
        model: the base model.
        finetuned: name -> folder of an adapter of it, or of a model of its lineage.
        vectors: of the base model, one per trait.
        traits: of the vectors, in their order; default: the shipped traits of their names.
        judge: default: the oracle for pocket models; other models are not scored without one.
        out: run folder; default `runs/shift-{model}`. More finetuned models may be added to it later; those measured stay.

    Raises:
        FinetuningError: no vectors or models, a name unfit for a file, a folder that is neither, traits with unequal numbers of
            questions, or several processes.
        LineageError: vectors or models of another lineage.
        UnknownNameError: no shipped trait of a vector's name.
        RunFolderError: the folder holds another run.

    Example:
        >>> from persona_lens.evaluation import ScoreSettings
        >>> from persona_lens.finetuning import FinetuneSettings, ShiftSettings, shift
        >>> from persona_lens.models import Sampling
        >>> chats = [
        ...     [{"role": "user", "content": question}, {"role": "assistant", "content": "Brilliant thinking, start early."}]
        ...     for question in pl.load_trait("optimism", "pocket").extraction_questions
        ... ]
        >>> trained = pl.finetune(model, chats, settings=FinetuneSettings(rank=4, batch_rows=4, max_steps=2), out="runs/plain")
        >>> quick = ShiftSettings(ScoreSettings(samples=1, sampling=Sampling(max_new_tokens=12)))
        >>> found = shift(model, {"plain": trained.adapter}, [v], settings=quick, out="runs/shift")
        >>> found.shifts["plain"].mean("prompt_last").shape  # trait, layer
        (1, 8)
    """
    require_one_process("shift")
    settings = settings or ShiftSettings()
    traits = list(traits) if traits is not None else [trait_of(v, model.trait_set) for v in vectors]
    judge = judge or (default_judge(model.trait_set) if model.trait_set == "pocket" else None)
    _check(model, finetuned, vectors, traits)
    place = Path(out) if out else Path("runs") / f"shift-{Path(model.name).name}"
    arguments = {
        "traits": [t.name for t in traits],
        "content": digest("".join(t.model_dump_json(by_alias=True) for t in traits)),
        "vectors": digest(b"".join(v.directions.contiguous().numpy().tobytes() for v in vectors)),
        "judge": judge.name if judge else None,
        "settings": encoded(settings),
    }
    folder = RunFolder.open(place, command="shift", arguments=arguments, model=model.identity)
    with progress_bars(None if progress is None else False) as bars:
        study = _Shifts(model, vectors, traits, judge, settings, folder)
        study.run(finetuned, progress or bars)
    names = sorted(p.stem.removeprefix("shift-") for p in place.glob("shift-*.json"))
    layers = {v.trait: v.best_layer for v in vectors}
    write_json(place / "shift.json", {"traits": [t.name for t in traits], "names": names, "layers": layers})
    return ShiftRun(place)


def _check(
    model: ChatModel, finetuned: Mapping[str, str | Path], vectors: Sequence[PersonaVectors], traits: Sequence[Trait]
) -> None:
    names = [v.trait for v in vectors]
    if not vectors or len(set(names)) < len(names) or [t.name for t in traits] != names:
        raise FinetuningError(
            f"a shift needs vectors of different traits and their traits; vectors {names}, traits {[t.name for t in traits]}"
        )
    if len({len(t.evaluation_questions) for t in traits}) > 1:
        counts = ", ".join(f"{t.name} {len(t.evaluation_questions)}" for t in traits)
        raise FinetuningError(f"traits need equally many evaluation questions to be read side by side, not {counts}: even them out")
    for v in vectors:
        v.require_lineage(model.fingerprint.lineage)
        if (v.n_layers, v.d_model) != (model.n_layers, model.d_model):
            raise FinetuningError(
                f"the {v.trait} vector has {v.n_layers} layers x {v.d_model}, {model.name} has {model.n_layers} x {model.d_model}"
            )
    if not finetuned:
        raise FinetuningError("a shift needs at least one finetuned model: give name -> folder")
    for name, folder in finetuned.items():
        if name == BASE or not name or Path(name).name != name or name.startswith("."):
            raise FinetuningError(f"{name!r} cannot name a finetuned model here: use a plain file name other than {BASE!r}")
        if not ((Path(folder) / ADAPTER_CONFIG).is_file() or (Path(folder) / "config.json").is_file()):
            raise FinetuningError(f"{folder} holds neither an adapter nor a model: give the folder that was saved")


def applied(model: ChatModel, folder: str | Path) -> AbstractContextManager[ChatModel]:
    """A finetuned model: an adapter on the base model, or a model of its own.

    Args:
        folder: of either.

    Raises:
        FinetuningError: a model of another lineage, or an adapter that does not fit.
        ModelLoadError: the folder holds neither, or a model that cannot be loaded.
    """
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        return adapted(model, folder)
    other = load_model(folder, thinking=model.template.thinking, **model.placement)
    if other.fingerprint.lineage != model.fingerprint.lineage:
        raise FinetuningError(
            f"{folder} is of lineage {other.fingerprint.lineage}, the base model {model.name} of {model.fingerprint.lineage}: "
            "a shift is measured within a lineage"
        )
    return nullcontext(replace(other, system=model.system))


@dataclass(frozen=True)
class _Shifts:
    """Measures the base model once, then every finetuned one."""

    model: ChatModel
    vectors: Sequence[PersonaVectors]
    traits: Sequence[Trait]
    judge: Judge | None
    settings: ShiftSettings
    folder: RunFolder

    def run(self, finetuned: Mapping[str, str | Path], progress: Progress) -> None:
        path = self.folder.path
        total = len(finetuned) + 1
        progress("models", 0, total)
        units = torch.stack([v.directions / v.directions.norm(dim=-1, keepdim=True) for v in self.vectors])
        _save(path / "directions.safetensors", {"unit": units})
        base, answers = self._base(path / BASE)
        for number, (name, folder) in enumerate(finetuned.items(), start=1):
            progress("models", number, total)
            self._measure_other(name, folder, base, answers, units)
        progress("models", total, total)

    def _base(self, path: Path) -> tuple[Mapping[str, Tensor], list[tuple[Prompt, Rollout]]]:
        """The base model's residuals and the answers that are forced on the others; measured once."""
        if not (path / "scores.json").exists():
            answers = trait_answers(self.model, self.traits, self.settings.scores)
            forced = [(p, r) for p, r in answers if r.sample < self.settings.base_samples]
            prompt_last, own = self._own(self.model, answers)
            _save(
                path / "residuals.safetensors",
                {"prompt_last": prompt_last, "base_answers": self._forced(self.model, forced), "own_answers": own},
            )
            write_json(path / "answers.json", {"answers": [r.as_dict() for _, r in forced]})
            write_json(path / "scores.json", {"scores": encoded(self._scores(answers))})
        prompts = {p.id: p for t in self.traits for p in evaluation_prompts(t)}
        kept = [Rollout.from_dict(r) for r in read_json(path / "answers.json")["answers"]]
        return read_tensors(path / "residuals.safetensors"), [(prompts[r.prompt_id], r) for r in kept]

    def _measure_other(
        self, name: str, folder: str | Path, base: Mapping[str, Tensor], forced: list[tuple[Prompt, Rollout]], units: Tensor
    ) -> None:
        path = self.folder.path / f"shift-{name}.json"
        with applied(self.model, folder) as other:
            weights = other.fingerprint.weights
            if path.exists():
                if read_json(path)["weights"] != weights:
                    raise FinetuningError(f"{path} holds the shift of other weights than those in {folder}: give it another name")
                return
            answers = trait_answers(other, self.traits, self.settings.scores)
            prompt_last, own = self._own(other, answers)
            found = {"prompt_last": prompt_last, "base_answers": self._forced(other, forced), "own_answers": own}
        change = {reading: (found[reading] - base[reading]).unflatten(0, (len(self.traits), -1)) for reading in READINGS}
        projection = {
            reading: torch.einsum("tqld,tld->tlq", change[reading].double(), units.double()).numpy() for reading in READINGS
        }
        _save(path.with_suffix(".safetensors"), {reading: x.mean(1) for reading, x in change.items()})
        write_json(path, {"weights": weights, **encoded(Shift(name, projection, tuple(self._scores(answers))))})

    def _scores(self, answers: Sequence[tuple[Prompt, Rollout]]) -> list[TraitScore]:
        return trait_scores(self.traits, answers, self.judge) if self.judge else []

    def _own(self, model: ChatModel, answers: Sequence[tuple[Prompt, Rollout]]) -> tuple[Tensor, Tensor]:
        """Residuals by prompt: of its last token, and over the model's own answers to it."""
        pooled, prompts = pooled_spans(model, answer_spans(model, answers)), [p for p, _ in answers]
        return self._by_prompt(prompts, pooled[:, LAST]), self._by_prompt(prompts, pooled[:, RESPONSE])

    def _forced(self, model: ChatModel, forced: Sequence[tuple[Prompt, Rollout]]) -> Tensor:
        return self._by_prompt([p for p, _ in forced], pooled_spans(model, answer_spans(model, forced))[:, RESPONSE])

    def _by_prompt(
        self, prompts: Sequence[Prompt], values: Float[Tensor, "row layer d_model"]
    ) -> Float[Tensor, "prompt layer d_model"]:
        """Means over the answers to each evaluation prompt, in the order of traits and questions."""
        places = {p.id: i for i, p in enumerate(p for t in self.traits for p in evaluation_prompts(t))}
        at = torch.tensor([places[p.id] for p in prompts])
        sums = torch.zeros(len(places), *values.shape[1:], dtype=torch.float64).index_add_(0, at, values.double())
        counts = torch.zeros(len(places), dtype=torch.float64).index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
        return (sums / counts[:, None, None]).float()


def answer_spans(model: ChatModel, answers: Sequence[tuple[Prompt, Rollout]]) -> list[Span]:
    """Answers with their prompts; an empty answer is read at the token that ends it."""
    spans = [rollout_span(model, p, r) for p, r in answers]
    return [span if span.answer else replace(span, answer=model.stop_ids[:1]) for span in spans]


def pooled_spans(model: ChatModel, spans: Sequence[Span]) -> Float[Tensor, "span pooling layer d_model"]:
    """Pooled residuals of spans, in their order."""
    found = torch.zeros(len(spans), len(POOLINGS), model.n_layers, model.d_model)
    for batch in pool(model, spans):
        found[list(batch.indices)] = batch.values
    return found


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_atomically(path, lambda temporary: save_file({k: v.contiguous().float() for k, v in tensors.items()}, temporary))
