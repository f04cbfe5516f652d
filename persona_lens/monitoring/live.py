"""Reading while the model runs: a context manager whose hooks project the tokens that pass, one dot product per probe and token.

Nothing is computed twice and nothing is fetched from the device until somebody asks, unless a callback wants every token.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.models import ChatModel
from persona_lens.monitoring.probes import LayerProbes, Probed, as_probes, by_layer
from persona_lens.steering import Unspecified, content_of, reading_calls

TokenKind = Literal["prompt", "before", "answer"]


@dataclass(frozen=True)
class TokenReading:
    """One token as it passes.

    Attributes:
        row: of the batch, as whoever runs the model numbers them.
        kind: `prompt`; `before` (the last prompt token, from which the answer begins); `answer`.
        values: projection by probe, residual-stream units.
    """

    row: int
    token: int
    kind: TokenKind
    values: dict[str, float]


@dataclass(frozen=True, eq=False)
class AnswerReading:
    """One answer while it was decoded.

    Attributes:
        prompt: the tokens before `before`, of this answer's prompt, as far as they passed.
        before: the last prompt token, from which the answer begins.
        ids, values: the answer's tokens. The last token of an answer that reached its length limit was never given to the
            model, so it is not among them.
    """

    row: int
    probes: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    prompt: Float[Tensor, "prompt_position probe"]
    before: Float[Tensor, " probe"]
    ids: tuple[int, ...]
    values: Float[Tensor, "position probe"]


@dataclass(frozen=True, eq=False)
class _Seen:
    """One forward pass: its tokens, row by row, and their projections."""

    rows: Tensor
    shared: tuple[tuple[int, ...], ...]
    ids: Tensor
    real: Tensor
    kinds: Tensor  # 0 prompt, 1 before, 2 answer
    values: Tensor


class Monitor:
    """What was read so far."""

    def __init__(self, model: ChatModel, probes: tuple[str, ...]) -> None:
        self.model, self.probes = model, probes
        self._seen: list[_Seen] = []

    def update(self, seen: _Seen) -> None:
        self._seen.append(seen)

    @property
    def tokens(self) -> list[TokenReading]:
        """Every token that passed, pass by pass; the tokens of a shared prefill once per row."""
        return [reading for seen in self._seen for reading in _told(seen, self.probes)]

    @property
    def answers(self) -> list[AnswerReading]:
        """Every answer, in the order in which they began."""
        order: list[tuple[int, _Growing]] = []
        growing: dict[int, _Growing] = {}
        for seen in self._seen:
            for row, token, kind, values in _by_token(seen):
                one = growing.get(row)
                if one is None or (kind < 2 and one.before is not None):
                    one = growing[row] = _Growing([], [], None, [], [])
                if kind == 0:
                    one.prompt_ids.append(token)
                    one.prompt.append(values)
                elif kind == 1:
                    one.prompt_ids.append(token)
                    one.before = values
                    order.append((row, one))
                elif one.before is not None:
                    one.ids.append(token)
                    one.values.append(values)
        return [one.finished(row, self.probes) for row, one in order]


@dataclass
class _Growing:
    prompt_ids: list[int]
    prompt: list[Tensor]
    before: Tensor | None
    ids: list[int]
    values: list[Tensor]

    def finished(self, row: int, probes: tuple[str, ...]) -> AnswerReading:
        assert self.before is not None
        empty = self.before.new_empty(0, len(probes))
        prompt, values = (torch.stack(v) if v else empty for v in (self.prompt, self.values))
        return AnswerReading(row, probes, tuple(self.prompt_ids), prompt, self.before, tuple(self.ids), values)


@contextmanager
def monitor(
    model: ChatModel,
    vectors: Probed | Sequence[Probed],
    each_token: Callable[[TokenReading], object] | None = None,
) -> Generator[Monitor]:
    """Read the projections of every token that passes through the model inside the `with`.

    Inside a steering context it reads what the steering left; entered before one, what it is given.

    Args:
        vectors: persona vectors (at their most reliable layer) or probes.
        each_token: called with every token as it passes, in the order of the batch.

    Raises:
        MonitoringError, LineageError: vectors that do not fit the model or each other.

    Example: `with pl.monitor(model, [evil, humor]) as seen: model.chat("How are you?")`, then `seen.answers[0].values`
    """
    probes = as_probes(model, vectors)
    watch = Monitor(model, tuple(p.name for p in probes))
    layers = by_layer(model, probes)
    running: dict[str, Tensor] = {}

    def given(module: Any, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        running["ids"] = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        running["values"] = torch.zeros(*running["ids"].shape, len(probes), device=model.device)

    def project(probes: LayerProbes) -> Any:
        places = list(probes.places)

        def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
            with torch.inference_mode():
                running["values"][..., places] = residual.float() @ probes.directions

        return hook

    def passed(module: Any, args: Any, output: Any) -> None:  # noqa: ARG001
        seen = _seen(running["ids"], running["values"])
        watch.update(seen)
        if each_token is not None:
            for reading in _told(seen, watch.probes):
                each_token(reading)

    with ExitStack() as stack:
        stack.enter_context(reading_calls(model, int))
        stack.callback(model.hf.register_forward_pre_hook(given, with_kwargs=True).remove)
        stack.enter_context(model.hooks([(model.hook_name(x.layer), project(x)) for x in layers]))
        stack.callback(model.hf.register_forward_hook(passed).remove)
        yield watch


def _seen(ids: Tensor, values: Tensor) -> _Seen:
    content = content_of(ids)
    if isinstance(content, Unspecified):  # a full pass of the user's own: where an answer begins is not known
        return _Seen(content.rows, (), ids, content.real, torch.zeros_like(ids), values)
    kinds = torch.where(content.prompt, torch.where(content.response, 1, 0), 2)
    return _Seen(content.rows, content.shared, ids, content.real, kinds, values)


def _by_token(seen: _Seen) -> Generator[tuple[int, int, int, Tensor]]:
    """Row, token, kind and values of every real token; a row of a shared prefill once for each row it stands for."""
    ids, real, kinds, values = (x.cpu() for x in (seen.ids, seen.real, seen.kinds, seen.values))
    for place, row in enumerate(seen.rows.tolist()):
        for name in seen.shared[place] if seen.shared else (row,):
            for position in real[place].nonzero().squeeze(-1).tolist():
                yield name, int(ids[place, position]), int(kinds[place, position]), values[place, position]


def _told(seen: _Seen, probes: tuple[str, ...]) -> Generator[TokenReading]:
    names: tuple[TokenKind, ...] = ("prompt", "before", "answer")
    for row, token, kind, values in _by_token(seen):
        yield TokenReading(row, token, names[kind], dict(zip(probes, values.tolist(), strict=True)))
