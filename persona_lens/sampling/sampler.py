"""What a sampler is: `(rows, sampling, seed) -> rollouts`, wherever the answers come from."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from persona_lens.errors import PersonaLensError
from persona_lens.models import Sampling
from persona_lens.sampling.rollout import Rollout, Row


@runtime_checkable
class Sampler(Protocol):
    """Samples answers in place of the model at hand. `name` says where they come from, and goes into the run's record."""

    @property
    def name(self) -> str:
        """Where the answers come from."""
        ...

    def __call__(self, rows: Sequence[Row], sampling: Sampling, seed: int, /) -> list[Rollout]: ...


def sampled(sampler: Sampler, rows: Sequence[Row], sampling: Sampling, seed: int) -> list[Rollout]:
    """A sampler's rollouts, one per row.

    Raises:
        PersonaLensError: it returned others than it was asked for.
    """
    rollouts = sampler(rows, sampling, seed)
    wanted, found = [f"{prompt.id}#{number}" for prompt, number in rows], [r.key for r in rollouts]
    if found != wanted:
        raise PersonaLensError(
            f"sampler {sampler.name!r} returned {len(found)} rollouts that are not those of the {len(wanted)} rows: "
            "it must return one per row, in order"
        )
    return rollouts
