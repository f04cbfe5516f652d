"""What may be added to the loss: a penalty on the projection, or the divergence from the base model.

A penalty is a value with the layers it reads and a function from a training step to one number per learned token; whatever it
returns is averaged as the loss is. Both are rivals of preventative steering (Chen et al. 2025, section 5 and appendix).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import FinetuningError
from persona_lens.models import ChatModel
from persona_lens.store import digest
from persona_lens.vectors import PersonaVectors


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """What a penalty sees of a forward pass.

    Attributes:
        logits: of the tokens that are learned.
        residuals: at the layers that the penalty reads, on the tokens that are learned, before any intervention there.
        base_logits: the same logits by the model without its adapter and unsteered (one more forward pass, without gradient).
    """

    logits: Float[Tensor, "learned vocab"]
    residuals: Mapping[int, Float[Tensor, "learned d_model"]]
    base_logits: Callable[[], Float[Tensor, "learned vocab"]]


@runtime_checkable
class Penalty(Protocol):
    """Something that is added to the loss; `str` of it goes into the run's record."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose residuals it reads."""
        ...

    def __call__(self, step: TrainingStep, /) -> Float[Tensor, " learned"]: ...


@dataclass(frozen=True, eq=False)
class ProjectionPenalty:
    """`weight x ((<h, v> / |v| - to) / |v|)^2`: squared distance of the projection from a reference, in mean differences."""

    vectors: PersonaVectors
    layer: int
    weight: float
    to: float = 0.0

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer."""
        return (self.layer,)

    def __call__(self, step: TrainingStep, /) -> Float[Tensor, " learned"]:
        h, v = step.residuals[self.layer], self.vectors[self.layer].to(step.logits.device)
        return self.weight * (((h.float() @ v) / v.norm() - self.to) / v.norm()).square()

    def __str__(self) -> str:
        direction = digest(self.vectors[self.layer].contiguous().numpy().tobytes())
        where = f"{self.vectors.trait} at layer {self.layer} [{direction}]"
        return f"penalty on the projection on {where}, weight {self.weight!r}, to {self.to!r}"


@dataclass(frozen=True)
class DivergencePenalty:
    """weight x KL(base || model) of the next token, in nats."""

    weight: float
    layers: tuple[int, ...] = ()

    def __call__(self, step: TrainingStep, /) -> Float[Tensor, " learned"]:
        base, ours = step.base_logits().float().log_softmax(-1), step.logits.float().log_softmax(-1)
        return self.weight * (base.exp() * (base - ours)).sum(-1)

    def __str__(self) -> str:
        return f"divergence from the base model, weight {self.weight!r}"


def penalise_projection(vectors: PersonaVectors, layer: int, weight: float, *, to: float = 0.0) -> ProjectionPenalty:
    """Keep the projection of the answers near a reference (the paper found it ineffective).

    Args:
        weight: of the squared distance, counted in mean differences, beside the loss in nats.
        to: the reference, residual-stream units.

    Raises:
        FinetuningError: a weight that is negative or no number, or no such layer.
    """
    if not 0 <= layer < vectors.n_layers:
        raise FinetuningError(f"layer {layer} does not exist: the {vectors.trait} vector has layers 0 to {vectors.n_layers - 1}")
    return ProjectionPenalty(vectors, layer, _weight(weight), float(to))


def penalise_divergence(weight: float) -> DivergencePenalty:
    """Keep the model near its base (LoRA only: the base is the model with the adapter off).

    Args:
        weight: of the divergence in nats, beside the loss in nats.

    Raises:
        FinetuningError: a weight that is negative or no number.
    """
    return DivergencePenalty(_weight(weight))


def check_penalties(model: ChatModel, penalties: Sequence[Penalty], method: str) -> None:
    """Raise unless penalties can be used in a training of the model.

    Raises:
        FinetuningError: a layer that does not exist, vectors of another width, or a divergence without an adapter to take off.
        LineageError: vectors of another lineage.
    """
    for penalty in penalties:
        for layer in penalty.layers:
            if not 0 <= layer < model.n_layers:
                raise FinetuningError(f"{penalty}: layer {layer} does not exist: {model.name} has layers 0 to {model.n_layers - 1}")
        if isinstance(penalty, ProjectionPenalty):
            penalty.vectors.require_lineage(model.fingerprint.lineage)
            if penalty.vectors.d_model != model.d_model:
                raise FinetuningError(
                    f"{penalty}: the vector has {penalty.vectors.d_model} dimensions, {model.name} has {model.d_model}"
                )
        if isinstance(penalty, DivergencePenalty) and method == "full":
            raise FinetuningError(f"{penalty}: with method='full' there is no base model to compare with: train an adapter")


def _weight(weight: float) -> float:
    if not weight >= 0.0:
        raise FinetuningError(f"the weight of a penalty must be 0 or more, not {weight:g}")
    return float(weight)
