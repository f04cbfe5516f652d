"""What is watched while a model is trained: where its answers lie along a direction, and where the loss wants them to go.

Per step: the mean projection <h, v> / ||v|| over the learned tokens, and the derivative of the loss along the direction - how much
it would change, in nats per residual-stream unit, if the unit vector were added at every learned token (the sum over tokens of
<dL/dh, v> / ||v||). Both are read at the vector's layer before any intervention there.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.models import ChatModel
from persona_lens.steering import Intervention
from persona_lens.vectors import PersonaVectors


@dataclass(frozen=True, eq=False)
class Watched:
    """A direction at a layer, of norm 1.

    Attributes:
        unit: the direction, of norm 1.
    """

    name: str
    layer: int
    unit: Float[Tensor, " d_model"]


def watched(vectors: PersonaVectors, layer: int) -> Watched:
    """Watch a persona vector at a layer.

    Raises:
        IndexError: no such layer.
    """
    return Watched(vectors.trait, layer, vectors.unit(layer))


def watched_by(prevent: Sequence[Intervention]) -> tuple[Watched, ...]:
    """The directions of interventions, each at the highest layer that it is used at."""
    highest = {x.name: x for x in sorted(prevent, key=lambda x: x.layer)}
    return tuple(Watched(x.name, x.layer, x.direction / x.direction.norm()) for x in highest.values())


@dataclass(eq=False)
class Watch:
    """Accumulates over the passes of a step; `take` hands out and starts anew."""

    directions: tuple[Watched, ...]
    _sums: Float[Tensor, "direction three"] = field(init=False)  # sum of projections, tokens, derivative
    _learned: Bool[Tensor, "batch position"] | None = None

    def __post_init__(self) -> None:
        self._sums = torch.zeros(len(self.directions), 3, dtype=torch.float64)

    def hooks(self, model: ChatModel) -> AbstractContextManager[Any]:
        return model.hooks([(model.hook_name(w.layer), self._hook(i, w)) for i, w in enumerate(self.directions)])

    def batch(self, learned: Bool[Tensor, "batch position"] | None) -> None:
        """Say which tokens of the coming pass are learned; None: it is not to be watched."""
        self._learned = learned

    def take(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Figures since the last time, by name; `summed` adds them up over processes."""
        totals = summed(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        found: dict[str, float] = {}
        for w, (projection, tokens, derivative) in zip(self.directions, totals, strict=True):
            if tokens:
                found[f"projection/{w.name}/{w.layer}"] = projection / tokens
                found[f"derivative/{w.name}/{w.layer}"] = derivative
        return found

    def _hook(self, number: int, w: Watched) -> Callable[..., None]:
        def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
            learned = self._learned
            if learned is None:
                return
            unit = w.unit.to(residual.device, torch.float32)
            at = (residual.detach().float() @ unit)[learned]
            self._add(number, torch.stack([at.double().sum(), learned.sum().double(), torch.zeros_like(at.sum()).double()]))
            if residual.requires_grad:
                residual.register_hook(partial(self._derivative, number, unit, learned))

        return hook

    def _derivative(self, number: int, unit: Tensor, learned: Tensor, gradient: Tensor) -> None:
        total = (gradient.float() @ unit)[learned].double().sum()
        self._add(number, torch.stack([torch.zeros_like(total), torch.zeros_like(total), total]))

    def _add(self, number: int, values: Float[Tensor, " three"]) -> None:
        self._sums = self._sums.to(values.device)
        self._sums[number] += values
