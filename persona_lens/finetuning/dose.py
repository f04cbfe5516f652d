"""How much of which vector to vaccinate with: strengths that match what the data would teach, and strengths that leave no shift.

The vaccine works where the vectors supply what training would otherwise have to put into the weights. *Matched* strengths are those
whose sum comes nearest to the mean difference between the data's answers and the model's own answers to the same prompts (the
projection difference of Chen et al. 2025, section 6, for several vectors at once); they need no training. *Balanced* strengths are
found by training: whatever shift is left along any of the vectors is added to its strength, and the training repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.activations import Span, dialogue_span, pool
from persona_lens.errors import FinetuningError
from persona_lens.extraction import trait_of
from persona_lens.finetuning.data import Data, encode, read_data
from persona_lens.finetuning.shift import RESPONSE, answer_spans, applied
from persona_lens.finetuning.training import FinetuneSettings, default_settings, describe, finetune, require_one_process
from persona_lens.models import ChatModel, Sampling, dialogue
from persona_lens.progress import Progress, progress_bars, silent
from persona_lens.prompts import Prompt, extraction_prompts
from persona_lens.records import decoded, encoded
from persona_lens.sampling import sample
from persona_lens.steering import add
from persona_lens.store import RunFolder, digest, read_jsonl
from persona_lens.traits import Trait
from persona_lens.transcripts import Transcript
from persona_lens.vectors import PersonaVectors

ROWS: Final = 128
LONGEST: Final = 1_000_000  # tokens, of models that name no limit


@dataclass(frozen=True, eq=False)
class Matched:
    """Strengths of several vectors that together match the data.

    Attributes:
        strengths: by vector, in the order they were given.
        share: of the squared length of the difference that their sum explains (0-1).
        difference: mean residual of the data's answers minus that of the model's own.
    """

    strengths: tuple[float, ...]
    share: float
    difference: Float[Tensor, "layer d_model"]


def matched_strengths(
    model: ChatModel,
    data: Data,
    vectors: Sequence[PersonaVectors],
    layer: int,
    *,
    rows: int = ROWS,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Matched:
    """Strengths whose vectors add up to what the data's answers have beyond the model's own (least squares at the layer).

    Args:
        rows: conversations that are read, evenly spread over the data.
        sampling: of the model's own answers.

    Raises:
        FinetuningError: no vectors, no such layer, or rows that cannot be trained on.
        TranscriptError: a file that cannot be read.
    """
    if not vectors or not 0 <= layer < model.n_layers:
        raise FinetuningError(
            f"strengths are matched for one or more vectors at a layer from 0 to {model.n_layers - 1}, not {layer}"
        )
    difference = data_difference(model, data, rows=rows, sampling=sampling, seed=seed)
    strengths, share = _in_vectors(difference[layer], vectors, layer)
    return Matched(strengths, share, difference)


def _in_vectors(
    change: Float[Tensor, " d_model"], vectors: Sequence[PersonaVectors], layer: int
) -> tuple[tuple[float, ...], float]:
    """A change of a layer's residual as strengths of the vectors there (least squares), and the share of it that they explain."""
    basis, target = torch.stack([v[layer] for v in vectors], -1).double().numpy(), change.double().numpy()
    strengths = np.linalg.lstsq(basis, target, rcond=None)[0]
    left = target - basis @ strengths
    with np.errstate(invalid="ignore"):  # of no change at all, no share
        return tuple(map(float, strengths)), float(1 - (left @ left) / (target @ target))


def data_difference(
    model: ChatModel, data: Data, *, rows: int = ROWS, sampling: Sampling | None = None, seed: int = 0
) -> Float[Tensor, "layer d_model"]:
    """Mean residual of the data's last answers minus that of the model's own answers to the same prompts (response means).

    Args:
        rows: conversations that are read, evenly spread over the data.
        sampling: of the own answers.

    Returns:
        Residual-stream units.

    Raises:
        FinetuningError: rows that cannot be trained on.
        TranscriptError: a file that cannot be read.
    """
    found = read_data(data)
    encode(model, found, max_tokens=model.context or LONGEST)
    chats = found.chats
    chosen = [chats[i] for i in np.unique(np.linspace(0, len(chats) - 1, min(rows, len(chats))).round().astype(int))]
    prompts = [_prompt(chat) for chat in chosen]
    own = sample(model, [(p, 0) for p in prompts], sampling or Sampling(max_new_tokens=300), seed=seed)
    theirs = [dialogue_span(chat.name, dialogue(model, _upto_answer(chat))) for chat in chosen]
    return _mean(model, theirs) - _mean(model, answer_spans(model, list(zip(prompts, own, strict=True))))


def _upto_answer(chat: Transcript) -> list[dict[str, str]]:
    last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
    return list(chat.messages[: last + 1])


def _prompt(chat: Transcript) -> Prompt:
    """The conversation up to its last answer."""
    said = _upto_answer(chat)[:-1]
    system = said.pop(0)["content"] if said[0]["role"] == "system" else None
    *earlier, user = (m["content"] for m in said)
    return Prompt(
        f"data/{chat.name}", "data", "neutral", None, 0, system, user, tuple(zip(earlier[::2], earlier[1::2], strict=True))
    )


def _mean(model: ChatModel, spans: Sequence[Span]) -> Float[Tensor, "layer d_model"]:
    total = torch.zeros(model.n_layers, model.d_model, dtype=torch.float64)
    for pooled in pool(model, spans):
        total += pooled.values[:, RESPONSE].double().sum(0)
    return (total / len(spans)).float()


@dataclass(frozen=True)
class Round:
    """One training of a search for balanced strengths.

    Attributes:
        strengths: of the vectors, while it was trained.
        left: the shift that was left along each of them (least squares over all vectors), in mean differences.
    """

    strengths: tuple[float, ...]
    left: tuple[float, ...]

    @property
    def size(self) -> float:
        """Root mean square of what was left."""
        return float(np.sqrt(np.mean(np.square(self.left))))


@dataclass(frozen=True)
class Balanced:
    """A search for balanced strengths on disk; the first round is ordinary training.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def rounds(self) -> list[Round]:
        """Every training, in order."""
        return [decoded(Round, r) for r in read_jsonl(self.path / "rounds.jsonl")]

    @property
    def strengths(self) -> tuple[float, ...]:
        """Those of the round that left least."""
        return min(self.rounds, key=lambda r: r.size).strengths


def balanced_strengths(
    model: ChatModel,
    data: Data,
    vectors: Sequence[PersonaVectors],
    layer: int,
    *,
    traits: Sequence[Trait] | None = None,
    rounds: int = 4,
    settings: FinetuneSettings | None = None,
    sampling: Sampling | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Balanced:
    """Strengths at which training on the data leaves no shift along any of the vectors.

    The shift is read at the last layer over each model's own answers to the *extraction* questions of the vectors' traits, so that
    evaluation questions stay unseen. From round to round the strengths grow by what is left, divided by what a unit of strength has
    taken away so far (a secant step, one slope for all vectors).

    Args:
        layer: where the vectors are added, at every token.
        traits: of the vectors, in their order; default: the shipped traits of their names.
        rounds: trainings with a vaccine; one without it comes first.
        settings: of the trainings; default: `default_settings`.
        sampling: of the answers that the shift is read over.
        out: run folder; default `runs/balance-{data}`. An interrupted search in it goes on.

    Raises:
        FinetuningError: no vectors, no such layer, or fewer than one round.
    """
    require_one_process("balanced_strengths")
    settings, sampling = settings or default_settings(model), sampling or Sampling(max_new_tokens=300)
    traits = list(traits) if traits is not None else [trait_of(v, model.trait_set) for v in vectors]
    if rounds < 1 or not vectors or not 0 <= layer < model.n_layers:
        raise FinetuningError(
            f"strengths are balanced in 1 or more rounds, for one or more vectors, at a layer from 0 to {model.n_layers - 1}; "
            f"given are {rounds} rounds, {len(vectors)} vectors and layer {layer}"
        )
    found = read_data(data)
    arguments = {
        "data": digest(repr([c.messages for c in found.chats])),
        "vectors": describe([add(v, layer, 1.0, where="everywhere") for v in vectors]),
        "traits": digest("".join(t.model_dump_json(by_alias=True) for t in traits)),
        "rounds": rounds,
        "settings": encoded(settings),
        "sampling": vars(sampling),
    }
    path = Path(out) if out else Path("runs") / f"balance-{found.path.stem}"
    folder = RunFolder.open(path, command="balance", arguments=arguments, model=model.identity)
    search = _Search(model, data, vectors, layer, traits, settings, sampling, folder)
    with progress_bars(None if progress is None else False) as bars:
        search.run(rounds, progress or bars)
    return Balanced(path)


@dataclass(frozen=True)
class _Search:
    """Trains, reads what is left, and adds it to the strengths."""

    model: ChatModel
    data: Data
    vectors: Sequence[PersonaVectors]
    layer: int
    traits: Sequence[Trait]
    settings: FinetuneSettings
    sampling: Sampling
    folder: RunFolder

    def run(self, rounds: int, progress: Progress) -> None:
        total = rounds + 1
        self.folder.fill("rounds.jsonl", total, self._round, chunk=1, told=lambda n: progress("rounds", n, total))

    def _round(self, number: range) -> list[dict[str, Any]]:
        before = Balanced(self.folder.path).rounds if number.start else []
        base, strengths = self._base, self._next(before)
        acting = [add(v, self.layer, s, where="everywhere") for v, s in zip(self.vectors, strengths, strict=True)]
        out = self.folder.path / f"round-{number.start}"
        trained = finetune(self.model, self.data, prevent=acting, watch=(), settings=self.settings, out=out, progress=silent)
        with applied(self.model, trained.adapter) as other:
            change = self._answers(other) - base
        left, _ = _in_vectors(change[-1], self.vectors, self.model.n_layers - 1)
        return [encoded(Round(strengths, left))]

    def _next(self, before: Sequence[Round]) -> tuple[float, ...]:
        """No vaccine, then twice the matched strengths, then secant steps."""
        if not before:
            return (0.0,) * len(self.vectors)
        if len(before) == 1:
            matched = matched_strengths(self.model, self.data, self.vectors, self.layer, sampling=self.sampling)
            return tuple(2.0 * s for s in matched.strengths)
        first, last = before[0], before[-1]
        strengths, left = np.array(last.strengths), np.array(last.left)
        slope = float((np.array(first.left) - left) @ strengths / (strengths @ strengths))
        if slope <= 0:
            raise FinetuningError(
                f"strengths {np.round(strengths, 2).tolist()} at layer {self.layer} do not lower the shift: choose another layer"
            )
        return tuple(map(float, strengths + left / slope))

    @cached_property
    def _base(self) -> Float[Tensor, "layer d_model"]:
        """Of the base model; to be asked for while no adapter is on it."""
        return self._answers(self.model)

    def _answers(self, model: ChatModel) -> Float[Tensor, "layer d_model"]:
        prompts = [p for t in self.traits for p in extraction_prompts(t, "neutral")]
        answers = sample(model, [(p, 0) for p in prompts], self.sampling, seed=self.settings.seed)
        return _mean(model, answer_spans(model, list(zip(prompts, answers, strict=True))))
