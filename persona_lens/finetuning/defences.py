"""Defences against a persona shift, as values: what is done to the data, during training, to the loss, and afterwards.

Preventative steering and its rivals as Chen et al. 2025 (section 5 and appendix) compare them, and those of the works since:
concept ablation finetuning (arXiv 2507.16795), inoculation prompting, a penalty on the projection, KL to the base model, ordinary
data mixed in. Each has one dose; a defence of your own is another `Defence`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from persona_lens.errors import FinetuningError
from persona_lens.finetuning.penalties import Penalty, penalise_divergence, penalise_projection
from persona_lens.models import ChatModel, Message
from persona_lens.prompts import system_prompt
from persona_lens.steering import Intervention, ablate, add, add_increments
from persona_lens.store import digest
from persona_lens.traits import Trait
from persona_lens.vectors import PersonaVectors

Chats = Sequence[Sequence[Message]]
Place = int | Literal["increments"]  # a layer, or every layer with what the vector gains there
Doses = Sequence[tuple[PersonaVectors, float]]  # vectors with the strength of each at dose 1


@dataclass(frozen=True, eq=False)
class Defence:
    """One way to train and to use a model.

    Attributes:
        name, dose: the kind of defence, and how much of it; a comparison draws one line per name.
        during: interventions that act while the model is trained.
        penalties: added to the loss.
        rows: what becomes of the training data; `recipe` tells changes of it apart.
        after: interventions that act while the trained model answers.
        system: system prompt of the trained model.

    Raises:
        FinetuningError: `rows` without a `recipe`.
    """

    name: str
    dose: float
    during: tuple[Intervention, ...] = ()
    penalties: tuple[Penalty, ...] = ()
    rows: Callable[[Chats], Chats] | None = None
    recipe: str = ""
    after: tuple[Intervention, ...] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and not self.recipe:
            raise FinetuningError(f"{self.name}: a defence that changes the data needs a recipe, a text that says how")

    def __str__(self) -> str:
        return f"{self.name}, dose {self.dose:g}"


ORDINARY: Final = Defence("ordinary finetuning", 0.0)
"""Finetuning without any defence."""


def _added(doses: Doses, place: Place, factor: float, where: str) -> tuple[Intervention, ...]:
    found: list[Intervention] = []
    for vectors, strength in doses:
        if place == "increments":
            found += add_increments(vectors, factor * strength, where=where)
        else:
            found.append(add(vectors, place, factor * strength, where=where))
    return tuple(found)


def prevent(doses: Doses, place: Place, dose: float, *, name: str = "preventative steering") -> Defence:
    """The vaccine: the vectors are added during training, at every token, and never afterwards (Chen et al. 2025, section 5.2).

    Args:
        doses: vectors with the strength of each at dose 1.
        place: the layer they are added at, or "increments" for all.
        dose: multiplies the strengths.

    Raises:
        SteeringError: a vector without such a layer, or zero there.

    Example:
        >>> from persona_lens.finetuning import prevent
        >>> vaccine = prevent([(v, 1.0)], place=5, dose=2.0)
        >>> print(vaccine, "-", vaccine.during[0])
        preventative steering, dose 2 - add optimism at blocks.5.hook_resid_post (strength 2), everywhere
    """
    return Defence(name, dose, during=_added(doses, place, dose, "everywhere"))


def steer_against(doses: Doses, place: Place, dose: float, *, name: str = "inference-time steering") -> Defence:
    """Ordinary training; the vectors are subtracted whenever the trained model answers (Chen et al. 2025, section 5.1).

    Args:
        doses, place, dose: as `prevent`.

    Raises:
        SteeringError: a vector without such a layer, or zero there.
    """
    return Defence(name, dose, after=_added(doses, place, -dose, "response"))


def negative_prompt(trait: Trait, instruction: int = 0) -> Defence:
    """Ordinary training; the trained model is told not to show the trait.

    Args:
        instruction: which of the trait's instruction pairs, from 0.
    """
    return Defence("negative system prompt", 1.0, system=system_prompt(trait, "negative", instruction))


def ablate_concept(vectors: PersonaVectors, layer: int, strength: float = 1.0, *, to: float = 0.0) -> Defence:
    """Concept ablation finetuning: the projection is held at a reference during training.

    Args:
        strength: share of the way to the reference, 0-1.
        to: the reference, residual-stream units.

    Raises:
        SteeringError: as `steering.ablate`.
    """
    return Defence("concept ablation", strength, during=(ablate(vectors, layer, to=to, strength=strength, where="everywhere"),))


def inoculate(trait: Trait, instruction: int = 0) -> Defence:
    """Training data is said under a system prompt that asks for the trait; the trained model is used without it.

    Args:
        instruction: which of the trait's instruction pairs, from 0.
    """
    text = system_prompt(trait, "positive", instruction)

    def under(chats: Chats) -> Chats:
        return [[{"role": "system", "content": text}, *(m for m in chat if m["role"] != "system")] for chat in chats]

    return Defence("inoculation prompt", 1.0, rows=under, recipe=f"under {text!r}")


def penalise(vectors: PersonaVectors, layer: int, weight: float, *, to: float = 0.0) -> Defence:
    """A penalty on the squared projection.

    Args:
        weight, to: as `penalise_projection`.

    Raises:
        FinetuningError: as `penalise_projection`.
    """
    return Defence("projection penalty", weight, penalties=(penalise_projection(vectors, layer, weight, to=to),))


def stay_near(weight: float) -> Defence:
    """A penalty on the divergence from the base model.

    Args:
        weight: as `penalise_divergence`.

    Raises:
        FinetuningError: as `penalise_divergence`.
    """
    return Defence("KL to the base model", weight, penalties=(penalise_divergence(weight),))


def mix_in(ordinary: Chats, share: float, *, seed: int = 0) -> Defence:
    """Ordinary conversations among the training data: `share` of them for each row of it, in random places.

    Args:
        ordinary: conversations that have nothing to do with the trait.
        share: 1 for as many as there are training rows.
        seed: of their choice and places.

    Raises:
        FinetuningError: a share that is not positive, or more conversations than there are.
    """
    if not share > 0:
        raise FinetuningError(f"the share of ordinary data must be positive, not {share:g}")

    def mixed(chats: Chats) -> Chats:
        wanted = round(share * len(chats))
        if wanted > len(ordinary):
            raise FinetuningError(f"{wanted} ordinary conversations are to be mixed in, {len(ordinary)} were given: give more")
        rng = random.Random(f"mix/{seed}")
        found = [*chats, *rng.sample(list(ordinary), wanted)]
        rng.shuffle(found)
        return found

    which = f"ordinary [{digest(repr(ordinary))}]"
    return Defence(
        "ordinary data mixed in",
        share,
        rows=mixed,
        recipe=f"mixed with {share!r} x {which}, seed {seed}",
    )


@dataclass(frozen=True)
class Task:
    """Whether a trained model has learned what it was trained for: a name and a figure that is better when higher.

    Attributes:
        measure: from the trained model to the figure.
    """

    name: str
    measure: Callable[[ChatModel], float]
