"""A small pilot that recommends a preventative strength: train briefly on a part of the data at a few doses, and read two things.

The *shift*, read without steering on the base model's own answers, falls as the dose grows; at the dose where it crosses zero,
training no longer moves the persona. The *loss* on held-out rows, also without steering, tells what the dose costs in learning the
data. No judge and no sampling of the trained models is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from persona_lens.errors import FinetuningError
from persona_lens.evaluation import ScoreSettings, trait_answers
from persona_lens.extraction import trait_of
from persona_lens.finetuning.data import Data, encode, read_data
from persona_lens.finetuning.defences import Doses, Place, prevent
from persona_lens.finetuning.fit import answer_loss
from persona_lens.finetuning.shift import RESPONSE, answer_spans, applied, pooled_spans
from persona_lens.finetuning.training import FinetuneSettings, default_settings, describe, finetune, require_one_process
from persona_lens.models import ChatModel, Message
from persona_lens.progress import Progress, progress_bars, silent
from persona_lens.records import decoded, encoded
from persona_lens.reliability import mean_interval
from persona_lens.store import RunFolder, digest, read_json, require_finished, write_json
from persona_lens.traits import Trait

RESULT: Final = "pilot.json"


@dataclass(frozen=True)
class PilotSettings:
    """What a pilot depends on.

    Attributes:
        rows: conversations that are trained on, taken evenly from the data; as many others are held out.
        tolerance: a shift within this share of the shift without a vaccine counts as prevented.
        finetuning: of the trainings; default: `default_settings`.
        answers: how the answers are made that the shift is read over.

    Raises:
        FinetuningError: fewer than two rows, or a tolerance outside (0, 1).
    """

    rows: int = 160
    tolerance: float = 0.25
    finetuning: FinetuneSettings | None = None
    answers: ScoreSettings = field(default_factory=lambda: ScoreSettings(samples=1))

    def __post_init__(self) -> None:
        if self.rows < 2 or not 0 < self.tolerance < 1:
            raise FinetuningError(
                f"a pilot needs 2 or more rows and a tolerance between 0 and 1, not {self.rows} and {self.tolerance:g}"
            )


@dataclass(frozen=True, eq=False)
class Tried:
    """One dose: shift along the vector by question, in mean differences, and the loss on held-out rows in nats per token."""

    dose: float
    shift: Float[np.ndarray, " question"]
    loss: float

    @property
    def mean(self) -> float:
        """Mean shift over the questions."""
        return float(self.shift.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean shift (Student's t over questions)."""
        return mean_interval(self.shift)[1]


@dataclass(frozen=True, eq=False)
class Recommendation:
    """What the pilot says.

    Attributes:
        zero: the dose at which the shift crosses zero, between the doses tried; NaN where it does not.
        low, high: doses between which the shift stays within the tolerance; NaN where none does.
        kept: share of what ordinary training learned of the data (loss) that is still learned at `zero`.
        why: the same in words.
    """

    zero: float
    low: float
    high: float
    kept: float
    why: str


@dataclass(frozen=True)
class Pilot:
    """A pilot on disk.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that was measured, as plain values."""
        return read_json(self.path / RESULT)

    @property
    def trait(self) -> str:
        """Whose evaluation questions the shift was read on."""
        return str(self.record["trait"])

    @property
    def base_loss(self) -> float:
        """Of the untrained model on the held-out rows, in nats per token."""
        return float(self.record["base_loss"])

    @cached_property
    def tried(self) -> list[Tried]:
        """In order of dose; the first is 0."""
        return [decoded(Tried, t) for t in self.record["tried"]]

    @cached_property
    def recommendation(self) -> Recommendation:
        """The dose that is recommended, and why."""
        return recommend(self.tried, self.base_loss, float(self.record["tolerance"]))


def load_pilot(path: str | Path) -> Pilot:
    """Reopen a pilot.

    Raises:
        RunFolderError: the folder holds none, or it is not finished.
    """
    require_finished(Path(path), "pilot", RESULT)
    return Pilot(Path(path))


def pilot(
    model: ChatModel,
    data: Data,
    doses: Doses,
    place: Place,
    *,
    tried: Sequence[float] = (0.5, 1.0, 2.0, 3.0),
    trait: Trait | None = None,
    out: str | Path | None = None,
    settings: PilotSettings | None = None,
    progress: Progress | None = None,
) -> Pilot:
    """Train on a part of the data at a few doses, and recommend one.

    Args:
        doses: vectors with the strength of each at dose 1; the shift is read along the first.
        place: the layer they are added at, or "increments" for all.
        tried: doses; 0 is tried too.
        trait: whose evaluation questions the shift is read on; default: the shipped trait of the first vector's name.

    Raises:
        FinetuningError: no dose, one that is not positive or given twice, or fewer than four rows.
        TranscriptError: a file that cannot be read.
        SteeringError, LineageError: vectors that do not fit the model.
        RunFolderError: the folder holds another run.
    """
    require_one_process("pilot")
    settings = settings or PilotSettings()
    settings = replace(settings, finetuning=settings.finetuning or default_settings(model))
    assert settings.finetuning
    if not doses or not tried or len(set(tried)) < len(tried) or min(tried) <= 0:
        raise FinetuningError(f"a pilot needs vectors and different positive doses, not {list(tried)}")
    trait = trait or trait_of(doses[0][0], model.trait_set)
    found = read_data(data)
    examples = encode(model, found, max_tokens=settings.finetuning.max_tokens).examples
    order = np.random.default_rng(settings.finetuning.seed).permutation(len(examples)).tolist()
    half = min(settings.rows, len(examples) // 2)
    if half < 2:
        raise FinetuningError(
            f"{found.path}: a pilot needs at least 4 rows to train on one half and test on the other, not {len(examples)}"
        )
    chosen = [found.chats[i].messages for i in sorted(order[:half])]
    held_out = [examples[i] for i in sorted(order[half : 2 * half])]
    defences = [prevent(doses, place, dose) for dose in (0.0, *sorted(tried))]
    arguments = {
        "data": digest(repr([(e.ids, e.answers) for e in examples])),
        "defences": [describe(d.during) for d in defences],
        "trait": digest(trait.model_dump_json(by_alias=True)),
        "settings": encoded(settings),
    }
    path = Path(out) if out else Path("runs") / f"pilot-{found.path.stem}-{trait.name}"
    folder = RunFolder.open(path, command="pilot", arguments=arguments, model=model.identity)
    if not (path / RESULT).exists():
        reader = _Reader(model, trait, settings.answers, doses[0][0].directions)
        points: list[dict[str, Any]] = []
        with progress_bars(None if progress is None else False) as bars:
            for number, defence in enumerate(defences):
                (progress or bars)("doses", number, len(defences))
                points.append(_try(model, chosen, held_out, defence.dose, defence.during, settings.finetuning, folder, reader))
            (progress or bars)("doses", len(defences), len(defences))
        record = {"trait": trait.name, "tolerance": settings.tolerance, "base_loss": answer_loss(model, held_out), "tried": points}
        write_json(path / RESULT, record)
    return Pilot(path)


def _try(
    model: ChatModel,
    chats: Sequence[Sequence[Message]],
    held_out: Any,
    dose: float,
    during: Any,
    settings: FinetuneSettings,
    folder: RunFolder,
    reader: "_Reader",
) -> dict[str, Any]:
    found = finetune(model, chats, prevent=during, settings=settings, out=folder.path / f"dose-{dose:g}", progress=silent)
    with applied(model, found.adapter) as trained:
        return encoded(Tried(dose, reader.shift(trained), answer_loss(trained, held_out)))


class _Reader:
    """Reads a shift over the base model's own answers, at the last layer: what all layers have learned together."""

    def __init__(self, model: ChatModel, trait: Trait, settings: ScoreSettings, directions: Any) -> None:
        answers = trait_answers(model, [trait], settings)
        self.spans = answer_spans(model, answers)
        self.questions = np.array([p.question for p, _ in answers])
        self.direction = directions[-1].double()
        self.base = self._read(model)

    def shift(self, model: ChatModel) -> Float[np.ndarray, " question"]:
        return self._read(model) - self.base

    def _read(self, model: ChatModel) -> Float[np.ndarray, " question"]:
        residuals = pooled_spans(model, self.spans)[:, RESPONSE, -1].double()
        found = (residuals @ self.direction / self.direction.square().sum()).numpy()
        return np.array([found[self.questions == q].mean() for q in np.unique(self.questions)])


def recommend(tried: Sequence[Tried], base_loss: float, tolerance: float) -> Recommendation:
    """Read a recommendation off the doses tried (in order, the first without a vaccine); between them shifts are interpolated."""
    doses, shifts = np.array([t.dose for t in tried]), np.array([t.mean for t in tried])
    losses = np.array([t.loss for t in tried])
    low, high = tried[0].interval
    if low <= 0.0 <= high:
        nothing = (
            f"ordinary training does not move the persona in the pilot (shift {shifts[0]:.2f} mean differences, 95 % interval "
            f"{low:.2f} to {high:.2f}): no vaccine is needed as far as it can tell, or the pilot is too small; give it more rows"
        )
        return Recommendation(float("nan"), float("nan"), float("nan"), float("nan"), nothing)
    left = shifts / shifts[0]  # share of the shift that is left: 1 without a vaccine, 0 where it is prevented
    zero, entered = _crossing(doses, left, 0.0), _crossing(doses, left, tolerance)
    if np.isnan(entered):
        why = (
            f"ordinary training shifts the persona by {shifts[0]:.2f} mean differences, and at dose {doses[-1]:g}, the highest "
            f"tried, {left[-1]:.0%} of that is left: try higher doses, another layer, or all layers (increments)"
        )
        return Recommendation(float("nan"), float("nan"), float("nan"), float("nan"), why)
    upper = _leaves(doses, left, entered, tolerance)
    at = zero if not np.isnan(zero) else upper
    learned = base_loss - losses[0]
    kept = float((base_loss - np.interp(at, doses, losses)) / learned) if learned > 0 else float("nan")
    why = (
        f"ordinary training shifts the persona by {shifts[0]:.2f} mean differences (95 % interval {low:.2f} to {high:.2f}). "
        f"Between dose {entered:.2f} and {upper:.2f} no more than {tolerance:.0%} of that is left"
        + (f"; it crosses zero at {zero:.2f}" if not np.isnan(zero) else "; it does not cross zero up to there")
        + (f", where {kept:.0%} of what the loss gains without a vaccine is still learned" if not np.isnan(kept) else "")
        + (". Where the trait is what the data teaches, that part of the loss cannot be kept" if kept < 0.8 else "")
    )
    return Recommendation(zero, entered, upper, kept, why)


def _crossing(doses: Float[np.ndarray, " dose"], left: Float[np.ndarray, " dose"], level: float) -> float:
    """The first dose at which what is left falls to a level, by linear interpolation; NaN where it does not."""
    for i in range(1, len(doses)):
        if left[i] <= level < left[i - 1]:
            return float(doses[i - 1] + (left[i - 1] - level) / (left[i - 1] - left[i]) * (doses[i] - doses[i - 1]))
    return float("nan")


def _leaves(doses: Float[np.ndarray, " dose"], left: Float[np.ndarray, " dose"], entered: float, tolerance: float) -> float:
    """The first dose after `entered` at which what is left is outside the tolerance again, either way; else the highest tried."""
    for i in range(1, len(doses)):
        level = tolerance if left[i] > tolerance else -tolerance
        if doses[i] > entered and abs(left[i]) > tolerance:
            before = max(float(doses[i - 1]), entered)
            at = float(np.interp(before, doses, left))
            return before + (level - at) / (float(left[i]) - at) * (float(doses[i]) - before)
    return float(doses[-1])
