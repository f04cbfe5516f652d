"""What travels in a forward pass: which rows, and which of its tokens are real, prompt, or answered from.

Hooks see a residual and nothing else. Whoever runs the model says here what the pass holds, so that steering can touch the
right tokens of the right rows under padding, key-value cache and shared prefills. `response` is true where the next token
belongs to the answer: the last prompt token and every answer token.
"""

from collections.abc import Generator, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """The rows (numbered by the caller) and tokens of one forward pass."""

    rows: Int[Tensor, " batch"]
    real: Bool[Tensor, "batch position"]
    prompt: Bool[Tensor, "batch position"]
    response: Bool[Tensor, "batch position"]


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
