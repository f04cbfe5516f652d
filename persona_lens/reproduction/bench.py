"""What the experiments share: how much work is done, the model, its vectors, and the models finetuned on the data sets.

Everything is made once, in a folder of its own under the run, and taken up again when it is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from persona_lens.evaluation import ScoreSettings
from persona_lens.extraction import ExtractionRun, ExtractionSettings, extract
from persona_lens.finetuning import Cell, ShiftRun, ShiftSettings, default_settings, finetune, shift
from persona_lens.finetuning.training import FinetuneSettings
from persona_lens.models import ChatModel, Sampling
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket_lab.datasets import Level, dataset
from persona_lens.progress import Progress, silent
from persona_lens.reproduction.paper import PAPER_TRAITS
from persona_lens.screening import ScreenRun, ScreenSettings, screen
from persona_lens.vectors import PersonaVectors

Chat = list[dict[str, str]]
PAPER_FAMILIES: Final = (*PAPER_TRAITS, "bare-sums", "bare-facts", "bare-mistakes", "polite-facts", "polite-mistakes")
LAYER: Final = 5  # where the pocket model is steered while it is trained: fixed beforehand, see the model card


@dataclass(frozen=True)
class Scale:
    """How much work a reproduction is.

    Attributes:
        traits: whose vectors are extracted.
        samples, neutral: of an extraction: answers per prompt, and neutral answers.
        longest: tokens of an answer.
        steered: traits that are swept and monitored.
        layers, strengths, sweep_samples, report_samples, random_directions: of the sweeps.
        monitored: answers per cell of the study of monitoring; `examples`: whether it is also done with examples in the context.
        families, levels, rows: of the data sets.
        scored: answers per question when a model's traits are scored.
        prevented, against: strengths of preventative steering, and of steering afterwards.
        capability: questions per task.
        rivals, facts, pooling: whether these experiments of the appendix are done.
    """

    name: str
    traits: tuple[str, ...]
    samples: int
    neutral: int
    longest: int
    steered: tuple[str, ...]
    layers: tuple[int, ...] | Literal["all"]
    strengths: tuple[float, ...]
    sweep_samples: int
    report_samples: int
    random_directions: int
    monitored: int
    examples: bool
    families: tuple[str, ...]
    levels: tuple[Level, ...]
    rows: int
    scored: int
    prevented: tuple[float, ...]
    against: tuple[float, ...]
    capability: int
    rivals: bool
    facts: bool
    pooling: bool


FULL: Final = Scale(
    "full", traits=TRAITS, samples=4, neutral=200, longest=200, steered=PAPER_TRAITS, layers="all",
    strengths=(0.5, 1.0, 1.5, 2.0, 2.5), sweep_samples=1, report_samples=5, random_directions=20, monitored=5, examples=True,
    families=PAPER_FAMILIES, levels=("normal", "I", "II"), rows=480, scored=2, prevented=(1.0, 2.0, 3.0), against=(0.5, 1.0, 2.0),
    capability=60, rivals=True, facts=True, pooling=True,
)  # fmt: skip
QUICK: Final = Scale(
    "quick", traits=PAPER_TRAITS, samples=1, neutral=40, longest=80, steered=("evil",), layers=(3, 5), strengths=(1.0, 2.0),
    sweep_samples=1, report_samples=2, random_directions=3, monitored=1, examples=False,
    families=(*PAPER_TRAITS, "bare-mistakes"), levels=("normal", "II"), rows=64, scored=1, prevented=(3.0,), against=(1.0,),
    capability=20, rivals=False, facts=False, pooling=False,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Model, folder and scale, and what several experiments need."""

    model: ChatModel
    path: Path
    scale: Scale
    progress: Progress

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=self.scale.longest)

    @property
    def scores(self) -> ScoreSettings:
        return ScoreSettings(samples=self.scale.scored, sampling=self.sampling)

    @cached_property
    def runs(self) -> Mapping[str, ExtractionRun]:
        """An extraction per trait."""
        settings = ExtractionSettings(samples=self.scale.samples, neutral=self.scale.neutral, sampling=self.sampling)
        folder = self.path / "vectors"
        return {t: extract(self.model, t, out=folder / t, settings=settings, progress=self.progress) for t in self.scale.traits}

    @cached_property
    def vectors(self) -> Mapping[str, PersonaVectors]:
        return {trait: run.vectors for trait, run in self.runs.items()}

    @property
    def paper_vectors(self) -> list[PersonaVectors]:
        """Of the paper's three traits."""
        return [self.vectors[t] for t in PAPER_TRAITS]

    @cached_property
    def sets(self) -> Mapping[str, list[Chat]]:
        """The finetuning data, by family-level."""
        scale = self.scale
        return {f"{f}-{level}": dataset(f, level, rows=scale.rows) for f in scale.families for level in scale.levels}

    @property
    def training(self) -> FinetuneSettings:
        return default_settings(self.model)

    @cached_property
    def shifts(self) -> ShiftRun:
        """The models finetuned on the sets, measured beside the base model."""
        adapters: dict[str, Path] = {}
        for number, (name, chats) in enumerate(self.sets.items()):
            self.progress("step", number, len(self.sets))
            found = finetune(self.model, chats, settings=self.training, out=self.path / "trained" / name, watch=(), progress=silent)
            adapters[name] = found.adapter
        settings = ShiftSettings(scores=self.scores)
        return shift(self.model, adapters, self.paper_vectors, settings=settings, out=self.path / "shifts", progress=self.progress)

    @cached_property
    def screened(self) -> ScreenRun:
        """The sets, screened before anything is trained on them."""
        settings = ScreenSettings(max_new_tokens=self.scale.longest)
        return screen(
            self.model, self.sets, self.paper_vectors, settings=settings, out=self.path / "screened", progress=self.progress
        )


def at(cells: Sequence[Cell], name: str, dose: float | None = None) -> Cell:
    """The cell of a defence; without a dose, of its largest one."""
    found = [c for c in cells if c.name == name and dose in (None, c.dose)]
    return max(found, key=lambda c: c.dose)


def settings_of(scale: Scale) -> dict[str, Any]:
    """A scale as the run's manifest keeps it."""
    return {"scale": scale.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(scale).items() if k != "name"}}
