"""Defences compared at matched settings: the same data, seed, questions and judge; one cell per defence and dose.

Every cell is judged on all traits (side effects), on coherence, on what the model can do, and on whether it learned what it was
trained for. A training that several defences share is run once.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from persona_lens.errors import FinetuningError, UnknownNameError
from persona_lens.evaluation import CapabilityTest, ScoreSettings, TraitScore, trait_answers, trait_scores
from persona_lens.finetuning.data import Data, encode, read_data
from persona_lens.finetuning.defences import ORDINARY, Chats, Defence, Task
from persona_lens.finetuning.fit import answer_loss
from persona_lens.finetuning.penalties import check_penalties
from persona_lens.finetuning.shift import applied
from persona_lens.finetuning.training import FinetuneSettings, default_settings, describe, finetune, require_one_process
from persona_lens.judges import Judge, default_judge
from persona_lens.models import ChatModel
from persona_lens.progress import Progress, progress_bars, silent
from persona_lens.records import decoded, encoded
from persona_lens.steering import plan, steer
from persona_lens.store import RunFolder, digest, read_json, require_finished, write_json
from persona_lens.traits import Trait, list_traits, load_trait
from persona_lens.transcripts import Transcripts

RESULT: Final = "comparison.json"
BASE: Final = Defence("base model", 0.0)


@dataclass(frozen=True)
class ComparisonSettings:
    """What a comparison depends on besides model, data, defences, traits and judge.

    Attributes:
        finetuning: of every training; default: the model's (`default_settings`).
        scores: how the answers are made that are judged.
    """

    finetuning: FinetuneSettings | None = None
    scores: ScoreSettings = field(default_factory=ScoreSettings)


@dataclass(frozen=True, eq=False)
class Cell:
    """One defence at one dose.

    Attributes:
        name, dose: of the defence.
        scores: of every trait.
        capability: task -> metric -> value; empty if not asked.
        task: how well what was trained for is done, if that was asked.
        held_out_loss: of the answers of the held-out data, in nats per token; NaN without any.
    """

    name: str
    dose: float
    scores: tuple[TraitScore, ...]
    capability: Mapping[str, Mapping[str, float]]
    task: float | None
    held_out_loss: float

    @property
    def coherence(self) -> float:
        """Mean over all traits' questions."""
        return float(np.nanmean(np.concatenate([s.coherence for s in self.scores])))

    @property
    def capable(self) -> float:
        """Mean over all tasks' metrics; NaN if not asked."""
        values = [v for metrics in self.capability.values() for v in metrics.values()]
        return float(np.mean(values)) if values else float("nan")

    def of(self, trait: str) -> TraitScore:
        """One trait's scores.

        Raises:
            UnknownNameError: the trait was not judged.
        """
        found = {s.trait: s for s in self.scores}
        if trait not in found:
            raise UnknownNameError("trait of this comparison", trait, found)
        return found[trait]


@dataclass(frozen=True)
class Comparison:
    """A comparison on disk.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that was measured, as plain values."""
        return read_json(self.path / RESULT)

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits that were judged."""
        return tuple(self.record["traits"])

    @property
    def task(self) -> str | None:
        """What the task is called."""
        return self.record["task"]

    @cached_property
    def cells(self) -> list[Cell]:
        """The base model, ordinary finetuning, then the defences in their order."""
        return [decoded(Cell, c) for c in self.record["cells"]]

    @property
    def base(self) -> Cell:
        """The base model."""
        return self.cells[0]

    @property
    def ordinary(self) -> Cell:
        """Finetuned without any defence."""
        return self.cells[1]


def load_comparison(path: str | Path) -> Comparison:
    """Reopen a comparison.

    Raises:
        RunFolderError: the folder holds none, or it is not finished.
    """
    require_finished(Path(path), "defend", RESULT)
    return Comparison(Path(path))


def defend(
    model: ChatModel,
    data: Data,
    defences: Sequence[Defence],
    *,
    traits: Sequence[Trait] | None = None,
    judge: Judge | None = None,
    capability: CapabilityTest | None = None,
    task: Task | None = None,
    held_out: Data | None = None,
    out: str | Path | None = None,
    settings: ComparisonSettings | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Train with each defence, and judge what comes out; base model and ordinary finetuning come first by themselves.

    Args:
        traits: all that are judged; default: every shipped trait of the model's set.
        judge: default: the oracle for pocket models.
        capability: what the models can do, for instance `evaluation.capability_test(["mmlu"])`.
        task: whether what the data teaches was learned.
        held_out: more conversations like the data; their loss tells how well they were learned.
        out: run folder; default `runs/defend-{data}`. An interrupted comparison in it goes on.

    Raises:
        FinetuningError: no defences, or one given twice at one dose; rows that cannot be trained on.
        SteeringError, LineageError: interventions that do not fit the model - before anything is trained.
        TranscriptError: a file that cannot be read.
        PersonaLensError: no judge, or a folder of another run (`RunFolderError`).
    """
    settings = settings or ComparisonSettings()
    training = settings.finetuning or default_settings(model)
    settings = replace(settings, finetuning=training)
    traits = list(traits) if traits is not None else [load_trait(n, model.trait_set) for n in list_traits(model.trait_set)]
    judge = judge or default_judge(model.trait_set)
    require_one_process("defend")
    _check(model, defences, training)
    found = read_data(data)
    encode(model, found, max_tokens=training.max_tokens)
    chats = [chat.messages for chat in found.chats]
    extra = None if held_out is None else read_data(held_out)
    if extra:
        encode(model, extra, max_tokens=training.max_tokens)
    _check_rows(model, chats, defences, training.max_tokens)
    place = Path(out) if out else Path("runs") / f"defend-{found.path.stem}"
    everything = [BASE, ORDINARY, *defences]
    arguments = {
        "data": digest(repr(chats)),
        "held_out": digest(repr([c.messages for c in extra.chats])) if extra else None,
        "defences": [f"{d} [{_key(d)}]" for d in everything],
        "traits": [t.name for t in traits],
        "content": digest("".join(t.model_dump_json(by_alias=True) for t in traits)),
        "judge": judge.name,
        "capability": capability.name if capability else None,
        "task": task.name if task else None,
        "settings": encoded(settings),
    }
    folder = RunFolder.open(place, command="defend", arguments=arguments, model=model.identity)
    if not (place / RESULT).exists():
        study = _Comparison(model, chats, extra, traits, judge, capability, task, training, settings.scores, folder)
        with progress_bars(None if progress is None else False) as bars:
            cells = study.run(everything, progress or bars)
        write_json(place / RESULT, {"traits": [t.name for t in traits], "task": task.name if task else None, "cells": cells})
    return Comparison(place)


def _check(model: ChatModel, defences: Sequence[Defence], settings: FinetuneSettings) -> None:
    names = [str(d) for d in (BASE, ORDINARY, *defences)]
    if not defences:
        raise FinetuningError("nothing to compare: give at least one defence")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise FinetuningError(f"{twice[0]!r} is given twice: name one of them apart")
    for defence in defences:
        plan(model, defence.during)
        plan(model, defence.after)
        check_penalties(model, defence.penalties, settings.method)


def _check_rows(model: ChatModel, chats: Chats, defences: Sequence[Defence], max_tokens: int) -> None:
    """Every defence's own data can be trained on, known before the first training."""
    for defence in {d.recipe: d for d in defences if d.rows}.values():
        assert defence.rows
        encode(model, read_data(list(defence.rows(chats))), max_tokens=max_tokens)


def _training_key(defence: Defence) -> str:
    """What tells trainings apart."""
    return digest(repr([describe(defence.during), [str(p) for p in defence.penalties], defence.recipe]))


def _key(defence: Defence) -> str:
    return digest(repr([_training_key(defence), describe(defence.after), defence.system]))


@dataclass(frozen=True)
class _Comparison:
    """Trains and judges cell by cell; each is kept as soon as it is there."""

    model: ChatModel
    chats: Sequence[Any]
    held_out: Transcripts | None
    traits: Sequence[Trait]
    judge: Judge
    capability: CapabilityTest | None
    task: Task | None
    training: FinetuneSettings
    scores: ScoreSettings
    folder: RunFolder

    def run(self, defences: Sequence[Defence], progress: Progress) -> list[dict[str, Any]]:
        cells: list[dict[str, Any]] = []
        for number, defence in enumerate(defences):
            progress("defences", number, len(defences))
            path = self.folder.path / "cells" / f"{number:03d}.json"
            if not path.exists():
                write_json(path, encoded(self._cell(defence)))
            cells.append(read_json(path))
        progress("defences", len(defences), len(defences))
        return cells

    def _cell(self, defence: Defence) -> Cell:
        with ExitStack() as stack:
            model = self.model if defence is BASE else stack.enter_context(applied(self.model, self._trained(defence)))
            model = replace(model, system=defence.system or self.model.system)
            stack.enter_context(steer(model, defence.after))
            answers = trait_answers(model, self.traits, self.scores)
            return Cell(
                defence.name,
                float(defence.dose),
                tuple(trait_scores(self.traits, answers, self.judge)),
                self.capability.measure(model) if self.capability else {},
                float(self.task.measure(model)) if self.task else None,
                self._held_out_loss(model),
            )

    def _held_out_loss(self, model: ChatModel) -> float:
        """Of the model as it is used: steered, and under its system prompt."""
        if self.held_out is None:
            return float("nan")
        return answer_loss(model, encode(model, self.held_out, max_tokens=self.training.max_tokens).examples)

    def _trained(self, defence: Defence) -> Path:
        """The adapter of a defence's training, which others may share."""
        chats = list(defence.rows(self.chats)) if defence.rows else self.chats
        out = self.folder.path / "trained" / _training_key(defence)
        found = finetune(
            self.model,
            chats,
            prevent=defence.during,
            penalties=defence.penalties,
            settings=self.training,
            out=out,
            progress=silent,
        )
        return found.adapter
