"""Reading while the model runs: a context manager whose hooks project the tokens that pass, one dot product per probe and token.

Nothing is computed twice and nothing is fetched from the device until somebody asks, unless a callback wants every token.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_lens.models import ChatModel, Pass
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
        row: of the batch, as whoever runs the model numbers them.
        probes: names of the columns.
        prompt_ids, prompt: the tokens of this answer's prompt, as far as they passed.
        before: the last of them, from which the answer begins.
        ids, values: the answer's tokens. The last token of an answer that reached its length limit was never given to the
            model, so it is not among them.

    All projections are in residual-stream units.
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
    """One forward pass as it was seen; what its tokens are is worked out when somebody asks.

    Attributes:
        values: one tensor per layer that is read; `places` are their columns among the probes.
    """

    ids: Int[Tensor, "batch position"]
    content: Pass | Unspecified
    values: tuple[Float[Tensor, "batch position _"], ...]
    places: tuple[int, ...]

    @property
    def projections(self) -> Float[Tensor, "batch position probe"]:
        return torch.cat(self.values, dim=-1)[..., torch.tensor(self.places).argsort()].cpu()

    @property
    def kinds(self) -> Int[Tensor, "batch position"]:
        """0 prompt, 1 before, 2 answer; all prompt in a full pass of the user's own, where nobody says where an answer begins."""
        if isinstance(self.content, Unspecified):
            return torch.zeros_like(self.ids).cpu()
        return torch.where(self.content.prompt, torch.where(self.content.response, 1, 0), 2).cpu()


class Monitor:
    """What was read so far.

    Attributes:
        probes: names, in the order of the readings' columns.
    """

    def __init__(self, model: ChatModel, probes: tuple[str, ...]) -> None:
        self.model, self.probes = model, probes
        self._seen: list[_Seen] = []

    def update(self, seen: _Seen) -> None:
        """Take in one more forward pass (`monitor` calls it)."""
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
                    one.prompt.append(values)
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
        ValueError: the model has no such layer.

    Example:
        >>> with pl.monitor(model, [v]) as seen:
        ...     answer = model.chat("How should I handle my dog?", temperature=0.0)
        >>> seen.answers[0].probes
        ('optimism',)
        >>> seen.answers[0].before.shape, seen.answers[0].values.shape[1]  # last prompt token; answer: position, probe
        (torch.Size([1]), 1)
    """
    probes = as_probes(model, vectors)
    watch = Monitor(model, tuple(p.name for p in probes))
    layers = by_layer(model, probes)
    places = tuple(i for x in layers for i in x.places)
    ids: list[Tensor] = []  # of the running pass
    values: list[Tensor] = []

    def given(module: Any, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        ids[:] = [kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]]
        values.clear()

    def project(probes: LayerProbes) -> Any:
        def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
            values.append(residual.detach().float() @ probes.directions)

        return hook

    def passed(module: Any, args: Any, output: Any) -> None:  # noqa: ARG001
        seen = _Seen(ids[0], content_of(ids[0]), tuple(values), places)
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


def _by_token(seen: _Seen) -> Generator[tuple[int, int, int, Tensor]]:
    """Row, token, kind and values of every real token; a row of a shared prefill once for each row it stands for."""
    ids, real, kinds, values = seen.ids.cpu(), seen.content.real.cpu(), seen.kinds, seen.projections
    shared = () if isinstance(seen.content, Unspecified) else seen.content.shared
    for place, row in enumerate(seen.content.rows.tolist()):
        for name in shared[place] if shared else (row,):
            for position in real[place].nonzero().squeeze(-1).tolist():
                yield name, int(ids[place, position]), int(kinds[place, position]), values[place, position]


def _told(seen: _Seen, probes: tuple[str, ...]) -> Generator[TokenReading]:
    names: tuple[TokenKind, ...] = ("prompt", "before", "answer")
    for row, token, kind, values in _by_token(seen):
        yield TokenReading(row, token, names[kind], dict(zip(probes, values.tolist(), strict=True)))
