"""Rows of training data -> scores: projections on every direction, of the data's answers and of the model's own.

One forced pass over prompt and answer gives every trait, layer and pooling; another one over the model's own greedy answer to the
same prompt gives what the projection difference subtracts (Chen et al. 2025, section 6). A sample's answer is its last assistant
turn, all before it is its prompt. Nothing but projections and their layers' sums leaves the pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.activations import POOLINGS, Span, dialogue_span, pool
from persona_lens.errors import ScreeningError
from persona_lens.judges import Judged
from persona_lens.models import ChatModel, Message, last_answer
from persona_lens.sampling import DEFAULT_BATCH_ROWS
from persona_lens.screening.directions import Direction
from persona_lens.screening.own import Own, Tokens, own_answers, prompt_hash
from persona_lens.screening.rivals import Rival, rated
from persona_lens.screening.signals import losses
from persona_lens.transcripts import Skipped, Transcript

READINGS: Final = ("answer", "prompt_mean", "prompt_last")  # as activations.POOLINGS: response_mean, prompt_mean, prompt_last
LONGEST: Final = 1_000_000  # tokens, of models that name no limit
LONGEST_TOKEN: Final = 64  # characters; a text with more than so many per token that fits is not even tokenised


@dataclass(frozen=True)
class ScreenSettings:
    """What scores depend on besides model, data and directions.

    Attributes:
        own_share: share of the prompts (drawn by their hash and the seed) to which the model's own greedy answer is made: 1 for
            exact projection differences, 0 for none, between them for an estimate with an interval.
        max_new_tokens: longest own answer.
        max_tokens: longest conversation; longer ones are skipped. Default: the model's context.
        gradient: also the cosine of the sample's loss gradient (one backward pass).
        perplexity: also the mean loss of the data's answer and of the own answer.
        shard_rows: rows scored together: the unit of resume and of distribution.
        batch_rows: own answers decoded together; `batch_tokens`: padded tokens per forced pass.
        seed: of the prompts that are drawn.

    Raises:
        ScreeningError: a number out of range.
    """

    own_share: float = 1.0
    max_new_tokens: int = 300
    max_tokens: int | None = None
    gradient: bool = False
    perplexity: bool = False
    shard_rows: int = 512
    batch_rows: int = DEFAULT_BATCH_ROWS
    batch_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.own_share <= 1:
            raise ScreeningError(f"own_share is a share of the prompts from 0 to 1, not {self.own_share}")
        for name in ("max_new_tokens", "shard_rows", "batch_rows", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ScreeningError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ScreeningError(f"max_tokens must leave room for prompt and answer, not {self.max_tokens}")

    @property
    def decoding(self) -> dict[str, Any]:
        """What own answers depend on besides model and data."""
        return {k: v for k, v in asdict(self).items() if k in ("own_share", "max_new_tokens", "max_tokens", "shard_rows", "seed")}


@dataclass(frozen=True, eq=False)
class Scored:
    """A shard's scores.

    Attributes:
        columns: by name, one value per row; None (or NaN) where there is none.
        sums: of residuals over rows, at the layers in use [layer, d_model], and counts of rows; fp64.
    """

    columns: Mapping[str, Sequence[Any] | Float[np.ndarray, " row"]]
    sums: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is done with a shard of rows, wherever it is done.

    Attributes:
        strict: a row that cannot be screened is an error.
    """

    directions: tuple[Direction, ...]
    settings: ScreenSettings = field(default_factory=ScreenSettings)
    rivals: tuple[Rival, ...] = ()
    strict: bool = False

    def __call__(self, model: ChatModel, rows: Sequence[Transcript | Skipped], known: Mapping[int, Tokens] | None = None) -> Scored:
        """Scores of a shard.

        Args:
            known: own answers that are there already, by the prompt's hash.

        Raises:
            ScreeningError: a row that cannot be screened, where the recipe is strict.
        """
        samples = [sample_of(model, row, self.settings) for row in rows]
        if self.strict:
            _require_all(rows, samples)
        kept = [i for i, s in enumerate(samples) if isinstance(s, Span)]
        data = [s for s in samples if isinstance(s, Span)]
        layers = sorted({d.layer for d in self.directions})
        own = own_answers(
            model,
            [s if answers_itself(model, s, self.settings) else None for s in data],
            layers,
            max_new_tokens=self.settings.max_new_tokens,
            batch_rows=self.settings.batch_rows,
            batch_tokens=self.settings.batch_tokens,
            known=known or {},
        )
        columns: dict[str, Any] = {
            "prompt": [prompt_hash(s.prompt) for s in data],
            "tokens": [len(s.answer) for s in data],
            "own_tokens": [list(own.answers[n]) if n >= 0 else None for n in own.of],
        }
        sums = _Sums(layers)
        columns |= self._projections(model, data, own, sums)
        if self.settings.gradient or self.settings.perplexity:
            columns |= self._losses(model, data, own)
        columns |= self._rivals([_judged(rows[i]) for i in kept])
        places = {"place": [r.place for r in rows], "name": [r.name if isinstance(r, Transcript) else None for r in rows]}
        reasons = {"reason": [None if isinstance(s, Span) else s for s in samples]}
        return Scored(places | reasons | {k: _spread(v, kept, len(rows)) for k, v in columns.items()}, sums.tensors)

    def _projections(self, model: ChatModel, data: Sequence[Span], own: Own, sums: "_Sums") -> dict[str, Any]:
        paired = torch.from_numpy(own.of >= 0).float()
        read = np.full((len(data), len(POOLINGS), len(self.directions)), np.nan, dtype=np.float32)
        for batch in pool(model, data, layers=sums.layers, batch_tokens=self.settings.batch_tokens):
            at = list(batch.indices)
            read[at] = self._along(batch.values, sums.layers)
            sums.update("paired", batch.values[:, 0], paired[at])
            for number, reading in enumerate(READINGS):
                sums.update(reading, batch.values[:, number], torch.ones(len(at)))
        answered = self._along(own.means, sums.layers)
        sums.update("own", own.means, own.times)
        sums.count("rows", len(data))
        sums.count("pairs", int(paired.sum()))
        found: dict[str, Any] = {}
        for d, direction in enumerate(self.directions):
            found |= {f"{reading}/{direction.name}": read[:, r, d] for r, reading in enumerate(READINGS)}
            found[f"own/{direction.name}"] = own.spread(answered[:, d])
        return found

    def _along(
        self, residuals: Float[Tensor, "*batch layer d_model"], layers: Sequence[int]
    ) -> Float[np.ndarray, "*batch direction"]:
        """Projections on every direction."""
        return torch.stack([residuals[..., layers.index(d.layer), :] @ d.unit for d in self.directions], -1).numpy()

    def _losses(self, model: ChatModel, data: Sequence[Span], own: Own) -> dict[str, Any]:
        budget = self.settings.batch_tokens
        read = losses(model, data, self.directions, gradient=self.settings.gradient, batch_tokens=budget)
        found: dict[str, Any] = {"loss": read.loss.numpy()}
        if self.settings.gradient:
            found |= {f"gradient/{d.name}": read.gradient[:, i].numpy() for i, d in enumerate(self.directions)}
        if self.settings.perplexity:
            answered = losses(model, own.spans, self.directions, gradient=False, batch_tokens=budget)
            found["own_loss"] = own.spread(answered.loss.numpy())
        return found

    def _rivals(self, answers: Sequence[Judged]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for rival in self.rivals:
            values, reasons = rated(rival, answers)
            found |= {f"rival/{rival.name}": np.asarray(values, dtype=np.float32), f"gap/{rival.name}": reasons}
        return found


def answers_itself(model: ChatModel, span: Span, settings: ScreenSettings) -> bool:
    """Whether the model answers a prompt itself: drawn by its hash, so that neither order nor shards matter, if there is room."""
    key = blake2b(f"{settings.seed}/{prompt_hash(span.prompt)}".encode(), digest_size=8).digest()
    drawn = int.from_bytes(key, "little") < settings.own_share * 2**64
    return drawn and (not model.context or len(span.prompt) + settings.max_new_tokens <= model.context)


def sample_of(model: ChatModel, row: Transcript | Skipped, settings: ScreenSettings) -> Span | str:
    """A row as prompt and answer, or why it is none."""
    if isinstance(row, Skipped):
        return row.reason
    messages = row.messages[: len(asked_in(row)) + 1]
    limit = min(x for x in (settings.max_tokens, model.context, LONGEST) if x)
    characters = sum(len(m["content"]) for m in messages)
    if characters > limit * LONGEST_TOKEN or len(messages) > limit:
        return f"longer than {limit} tokens ({characters} characters in {len(messages)} messages)"
    try:
        span = dialogue_span(f"place {row.place}", last_answer(model, messages))
    except ValueError as error:
        return str(error)
    return span if len(span) <= limit else f"longer than {limit} tokens"


def _require_all(rows: Sequence[Transcript | Skipped], samples: Sequence[Span | str]) -> None:
    for row, sample in zip(rows, samples, strict=True):
        if isinstance(sample, str):
            raise ScreeningError(f"place {row.place} cannot be screened: {sample}; mend it, or skip such rows (without strict)")


def asked_in(row: Transcript) -> Sequence[Message]:
    """A conversation up to its last answer."""
    return row.messages[: max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")]


def _judged(row: Transcript | Skipped) -> Judged:
    """The last exchange that ends with an answer."""
    assert isinstance(row, Transcript)
    last = len(asked_in(row))
    return Judged(row.messages[last - 1]["content"], row.messages[last]["content"])


def _spread(values: Any, kept: Sequence[int], rows: int) -> Any:
    """Values of the rows that were screened, among all rows."""
    if isinstance(values, np.ndarray):
        found = np.full(rows, np.nan, dtype=np.float32)
        found[list(kept)] = values
        return found
    spread = [None] * rows
    for i, value in zip(kept, values, strict=True):
        spread[i] = value
    return spread


class _Sums:
    """Accumulates residuals of rows at the layers in use, in fp64."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)
        self.tensors: dict[str, Tensor] = {}

    def update(self, name: str, residuals: Float[Tensor, "row layer d_model"], weights: Float[Tensor, " row"]) -> None:
        total = torch.einsum("r,rld->ld", weights.double(), residuals.double())
        self.tensors[name] = self.tensors.get(name, torch.zeros_like(total)) + total

    def count(self, name: str, n: int) -> None:
        self.tensors[name] = torch.tensor(float(n), dtype=torch.float64)
