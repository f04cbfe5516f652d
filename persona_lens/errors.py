"""The errors a user can cause and mend: each message names the thing, the rule and the value, and the next step.

The command line prints them as one line and exits with code 2; whatever was computed before stays on disk.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class PersonaLensError(Exception):
    """Base of every error whose cause lies in the input or the environment."""


class UnknownNameError(PersonaLensError):
    """A name that is not among the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}: {hint}")


class TraitFileError(PersonaLensError):
    """A trait file that breaks the schema."""


class ModelLoadError(PersonaLensError):
    """A model that cannot be loaded, or fails a check at load."""


class RunFolderError(PersonaLensError):
    """A run folder that is damaged, or belongs to another command or model."""


class FilterError(PersonaLensError):
    """Too few rollouts survive the filter to extract a vector."""


class ActivationError(PersonaLensError):
    """Activations that are not finite."""


class LineageError(PersonaLensError):
    """Vectors of one lineage used on a model of another."""


class SteeringError(PersonaLensError):
    """An intervention that cannot be applied as it was asked for."""


class GeometryError(PersonaLensError):
    """Vectors that cannot be compared, or a comparison they are too few for."""


class MonitoringError(PersonaLensError):
    """Something that cannot be monitored, or a calibration that does not fit or does not suffice."""


class ExchangeError(PersonaLensError):
    """A file or object of another program that cannot be read, or cannot hold what should be written."""


class AmbiguousFormatError(ExchangeError):
    """A file whose content does not say which of several formats it has."""


class TranscriptError(PersonaLensError):
    """A file of conversations that cannot be read."""


class FinetuningError(PersonaLensError):
    """Training data or settings that cannot be trained with, or a training that failed."""


class ScreeningError(PersonaLensError):
    """Data that cannot be screened, or scores that do not suffice for what was asked of them."""


class EndpointError(PersonaLensError):
    """A model server that cannot be used as it was asked for, or that stopped answering."""
