"""What travels in a forward pass: which rows, and which of its tokens are real, prompt, or answered from.

Hooks see a residual and nothing else. Whoever runs the model says here what the pass holds, so that steering can touch the
right tokens of the right rows under padding, key-value cache and shared prefills. `response` is true where the next token
belongs to the answer: the last prompt token and every answer token; `earlier` is the same for the earlier answers of a dialogue,
found only when somebody asks.
"""

import inspect
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from persona_lens.models.dialogue import Interval

CACHE_NAMES: Final = ("cache", "past_key_values")  # of the key-value cache in transformers: since 5.24, and before


@dataclass(frozen=True, eq=False)
class Pass:
    """The rows (numbered by the caller) and tokens of one forward pass.

    Attributes:
        rows: what the rows are called.
        real: tokens that are no padding.
        prompt: tokens of the prompt.
        response: what steering touches by default: the last prompt token and the answer's tokens.
        earlier: the same for the earlier answers of a dialogue; None where these are not told apart.
        shared: the rows that each row of a shared prefill stands for; empty: itself alone.
    """

    rows: Int[Tensor, " batch"]
    real: Bool[Tensor, "batch position"]
    prompt: Bool[Tensor, "batch position"]
    response: Bool[Tensor, "batch position"]
    earlier: Callable[[], Bool[Tensor, "batch position"]] | None = None  # None where earlier answers are not told apart
    shared: tuple[tuple[int, ...], ...] = ()  # the rows that each row of a shared prefill stands for; empty: itself alone


def earlier_tokens(
    earlier: Sequence[Sequence[Interval]], offsets: Sequence[int], width: int, device: torch.device | str
) -> Bool[Tensor, "batch position"]:
    """The tokens that earlier answers are sampled from: each one's last prompt token and its own, shifted by padding.

    Args:
        earlier: [start, stop) of each row's earlier answers in its own tokens.
        offsets: padding tokens on the left of each row.
        width: of the padded batch, in tokens.
    """
    found = torch.zeros(len(earlier), width, dtype=torch.bool)
    for row, (intervals, offset) in enumerate(zip(earlier, offsets, strict=True)):
        for start, stop in intervals:
            found[row, offset + start - 1 : offset + stop] = True
    return found.to(device)


@runtime_checkable
class RowAware(Protocol):
    """Something that treats rows differently: rows with the same prompt share a prefill only where their keys agree."""

    def prefill_key(self, row: int) -> Hashable: ...


_CURRENT: ContextVar[Pass | None] = ContextVar("current_pass", default=None)
_AWARE: ContextVar[tuple[RowAware, ...]] = ContextVar("row_aware", default=())


@contextmanager
def forward_pass(content: Pass) -> Generator[None]:
    """Say what the forward pass inside holds."""
    token = _CURRENT.set(content)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_pass() -> Pass | None:
    """What the running forward pass holds; None where nobody said so (a forward pass of the user's own)."""
    return _CURRENT.get()


@contextmanager
def row_aware(aware: RowAware) -> Generator[None]:
    """Let generation ask `aware` which rows may share a prefill."""
    token = _AWARE.set((*_AWARE.get(), aware))
    try:
        yield
    finally:
        _AWARE.reset(token)


def prefill_key(row: int) -> Hashable:
    return tuple(aware.prefill_key(row) for aware in _AWARE.get())


@lru_cache(maxsize=32)
def cache_name(model_type: type[Any]) -> str:
    """What the forward pass of a class of models calls its key-value cache."""
    now, before = CACHE_NAMES
    return now if now in inspect.signature(model_type.forward).parameters else before


def cache_given(named: Mapping[str, Any]) -> Any:
    """The key-value cache among the keyword arguments of a forward pass; None without one."""
    return next((cache for name in CACHE_NAMES if (cache := named.get(name)) is not None), None)
