"""Persona vectors: extract, steer, sweep, monitor, compare and prevent character traits in language models.

Every public name is loaded on first use, so that `import persona_lens` imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

_HOME: Final = {
    "ChatModel": "models",
    "PersonaVectors": "vectors",
    "Trait": "traits",
    "ExtractionSettings": "extraction",
    "Sampling": "models",
    "SweepSettings": "sweeps",
    "evaluation": "",
    "extraction": "",
    "models": "",
    "steering": "",
    "sweeps": "",
    "traits": "",
    "ablate": "steering",
    "add": "steering",
    "add_increments": "steering",
    "bake": "baking",
    "cap": "steering",
    "rotate": "steering",
    "steer": "steering",
    "exchange": "",
    "extract": "extraction",
    "finetune": "finetuning",
    "finetuning": "",
    "geometry": "",
    "judges": "",
    "list_traits": "traits",
    "load_model": "models",
    "load_run": "extraction",
    "load_sweep": "sweeps",
    "monitor": "monitoring",
    "monitoring": "",
    "load_trait": "traits",
    "plot": "figures",
    "report": "reports",
    "sample": "sampling",
    "screen": "screening",
    "screening": "",
    "sweep": "sweeps",
}

__all__ = [
    "ChatModel",
    "ExtractionSettings",
    "PersonaVectors",
    "Sampling",
    "SweepSettings",
    "Trait",
    "__version__",
    "ablate",
    "add",
    "add_increments",
    "bake",
    "cap",
    "evaluation",
    "exchange",
    "extract",
    "extraction",
    "finetune",
    "finetuning",
    "geometry",
    "judges",
    "list_traits",
    "load_model",
    "load_run",
    "load_sweep",
    "load_trait",
    "models",
    "monitor",
    "monitoring",
    "plot",
    "report",
    "rotate",
    "sample",
    "screen",
    "screening",
    "steer",
    "steering",
    "sweep",
    "sweeps",
    "traits",
]

if TYPE_CHECKING:
    from persona_lens import (
        evaluation,
        exchange,
        extraction,
        finetuning,
        geometry,
        judges,
        models,
        monitoring,
        screening,
        steering,
        sweeps,
        traits,
    )
    from persona_lens.baking import bake
    from persona_lens.extraction import ExtractionSettings, extract, load_run
    from persona_lens.figures import plot
    from persona_lens.finetuning import finetune
    from persona_lens.models import ChatModel, Sampling, load_model
    from persona_lens.monitoring import monitor
    from persona_lens.reports import report
    from persona_lens.sampling import sample
    from persona_lens.screening import screen
    from persona_lens.steering import ablate, add, add_increments, cap, rotate, steer
    from persona_lens.sweeps import SweepSettings, load_sweep, sweep
    from persona_lens.traits import Trait, list_traits, load_trait
    from persona_lens.vectors import PersonaVectors


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'persona_lens' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = _HOME[name]
    value = getattr(import_module(f"persona_lens.{module}"), name) if module else import_module(f"persona_lens.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
