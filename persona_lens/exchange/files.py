"""One way in and one way out: the format is found by a file's content, or by the name that a file is to get."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args

from torch import Tensor

from persona_lens.errors import AmbiguousFormatError, ExchangeError
from persona_lens.exchange.assistant_axis import AXIS, read_axis, write_axis
from persona_lens.exchange.gguf import read_gguf, write_gguf
from persona_lens.exchange.imported import Imported, Origin
from persona_lens.exchange.paper import POOLINGS, read_paper_vectors, write_paper_vectors
from persona_lens.exchange.steering_vectors import BLOCK, read_steering_vector, write_steering_vector
from persona_lens.exchange.untrusted import load_pt
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    from persona_lens.models import ChatModel

Format = Literal["persona_lens", "paper", "gguf", "steering_vectors", "assistant_axis"]
"""A format of vector files."""
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
"""All formats of vector files."""
VECTORS: Final = "vectors.safetensors"  # in a run folder
_SAFETENSORS_HEADER: Final = 8  # bytes before the JSON


def read_vectors(
    path: str | Path,
    *,
    file_format: Format | None = None,
    trait: str | None = None,
    model: "ChatModel | None" = None,
    lineage: str = "",
    n_layers: int | None = None,
    layer_type: str = BLOCK,
) -> Imported:
    """Vectors from a file of any format that is known here, or from a run folder of ours.

    Args:
        file_format: default: by content. Bare tensors of the paper and of assistant-axis look alike and are told apart by name or
            by the model's number of layers.
        trait: default: what the file or its name says.
        model: the model they are for; shape and lineage are checked or taken over.
        lineage, n_layers: the same without a model at hand.
        layer_type: of a steering-vectors file that does not say it.

    Raises:
        ExchangeError: no such file, an unknown format, or a file that is damaged or does not fit the model.
        RunFolderError: a damaged file of ours.
        LineageError: the file is of another lineage.

    Example:
        >>> found = pl.exchange.read_vectors("runs/optimism/vectors.safetensors", model=model)
        >>> found.vectors.trait
        'optimism'
    """
    path = Path(path)
    if path.is_dir():
        path = _vectors_in(path)
    match file_format or format_of(path, model.n_layers if model else n_layers):
        case "persona_lens":
            return _ours(path, Origin(model, lineage, trait))
        case "paper":
            return read_paper_vectors(path, trait=trait, model=model, lineage=lineage)
        case "gguf":
            return read_gguf(path, trait=trait, model=model, lineage=lineage)
        case "assistant_axis":
            return read_axis(path, trait=trait, model=model, lineage=lineage)
        case "steering_vectors":
            return read_steering_vector(path, trait=trait, model=model, lineage=lineage, layer_type=layer_type)


def _vectors_in(folder: Path) -> Path:
    if not (folder / VECTORS).is_file():
        raise ExchangeError(f"{folder} holds no {VECTORS}: give a file of vectors, or the run folder of an extraction")
    return folder / VECTORS


def write_vectors(vectors: PersonaVectors, path: str | Path, file_format: Format | None = None) -> tuple[str, ...]:
    """Write vectors in a format.

    Args:
        file_format: default: by the ending: .safetensors ours, .gguf a control vector, .pt the paper's.

    Returns:
        Notes on what the format cannot hold.

    Raises:
        ExchangeError: an unknown ending, or vectors that the format has no place for.

    Example:
        >>> notes = pl.exchange.write_vectors(v, "optimism_response_avg_diff.pt")
        >>> again = pl.exchange.read_vectors("optimism_response_avg_diff.pt", model=model)
        >>> again.vectors.trait, again.vectors.pooling
        ('optimism', 'response_mean')
        >>> bool(again.vectors[5].equal(v[5]))
        True
        >>> bool(again.vectors.reliability.isnan().all())  # the format cannot hold it
        True
    """
    path = Path(path)
    endings: dict[str, Format] = {".safetensors": "persona_lens", ".gguf": "gguf", ".pt": "paper"}
    match file_format or endings.get(path.suffix):
        case "persona_lens":
            vectors.save(path)
            return ()
        case "paper":
            return write_paper_vectors(vectors, path)
        case "gguf":
            return write_gguf(vectors, path)
        case "assistant_axis":
            return write_axis(vectors, path)
        case "steering_vectors":
            return write_steering_vector(vectors, path)
        case None:
            raise ExchangeError(f"{path}: the ending says no format: use {', '.join(endings)} or name one of {', '.join(FORMATS)}")


def format_of(path: Path, n_layers: int | None = None) -> Format:
    """The format of a file, by its content.

    Args:
        n_layers: of the model that it is for, which tells bare tensors apart.

    Raises:
        ExchangeError: no such file, or none of the formats.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_SAFETENSORS_HEADER + 1)
    except OSError as error:
        raise ExchangeError(f"{path}: cannot be read ({error.strerror or error})") from error
    if start.startswith(b"GGUF"):
        return "gguf"
    if start.startswith(b"PK"):
        return _format_of_pt(path, n_layers)
    if path.suffix == ".safetensors" or start[_SAFETENSORS_HEADER:] == b"{":
        return "persona_lens"
    raise ExchangeError(
        f"{path}: is none of the formats known here: ours (.safetensors), GGUF control vectors, and .pt files of the paper, "
        "steering-vectors and assistant-axis in torch's present form (a zip archive)"
    )


def _format_of_pt(path: Path, n_layers: int | None) -> Format:
    held = load_pt(path)
    if isinstance(held, Mapping):
        if "axis" in held or "vector" in held:
            return "assistant_axis"
        if "layer_activations" in held or (held and all(type(key) is int for key in held)):
            return "steering_vectors"
        raise ExchangeError(
            f"{path}: is a dictionary without 'axis', 'vector' or 'layer_activations' (read_capping reads capping settings)"
        )
    if isinstance(held, Tensor) and held.ndim == 2:
        if any(path.stem.endswith(f"_{name}_diff") for name in POOLINGS) or len(held) - 1 == n_layers:
            return "paper"
        if path.stem.endswith("axis") or len(held) == n_layers:
            return AXIS
    raise AmbiguousFormatError(
        f"{path}: its content does not say whether it is of the paper (row 0 the embeddings) or of assistant-axis (row 0 block 0): "
        "name the format, or give the model"
    )


def _ours(path: Path, origin: Origin) -> Imported:
    """A file of ours as it is, checked against the model."""
    vectors = PersonaVectors.load(path)
    origin.require_shape(vectors.directions.shape, str(path))
    if origin.known_lineage:
        vectors.require_lineage(origin.known_lineage)
    if origin.trait is not None and origin.trait != vectors.trait:
        raise ExchangeError(f"{path}: holds the {vectors.trait} vector, not {origin.trait}: files of ours say their trait")
    return Imported(vectors, tuple(str(note) for note in vectors.provenance.get("notes", ())))
