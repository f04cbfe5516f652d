"""Persona vectors: one trait, one pooling, every layer, unnormalised, with the questions' differences and where they come from.

Layers count blocks from 0 (`blocks.{l}.hook_resid_post`; the paper's layer l + 1). A projection divides by the vector's norm,
steering uses the raw vector, so a coefficient counts mean differences (Chen et al. 2025, sections 2-3).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_lens.errors import LineageError, PersonaLensError, RunFolderError
from persona_lens.store import write_atomically

FORMAT: Final = "persona_lens.vectors"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True, eq=False, repr=False)
class PersonaVectors:
    """A trait's direction at every layer.

    Attributes:
        trait: its name.
        pooling: which residuals it is made of: "response_mean", "prompt_mean" or "prompt_last".
        estimator: how it is made of them: "mean_difference" or another of `extraction.ESTIMATORS`.
        directions: unnormalised, fp32, residual-stream units.
        differences: what they are the mean of (or estimated from), one row per surviving question.
        reliability, norm, p_value: per layer, see `reliability.Reliability` (`norm` is cross-validated).
        p_any: p value of "a direction exists at some layer"; NaN where the estimator has no such test.
        provenance: model fingerprint, counts, estimator, seed - whatever a reader needs to trust or repeat it.

    Raises:
        ValueError: a direction that is not finite.

    Example:
        >>> v = pl.load_run("runs/optimism").vectors
        >>> v.directions.shape  # layer, d_model
        torch.Size([8, 256])
        >>> bool(v.reliability[v.best_layer] > 0.9)
        True
        >>> bool((-v)[5].equal(-v[5]))  # the opposite direction
        True
    """

    trait: str
    pooling: str
    estimator: str
    directions: Float[Tensor, "layer d_model"]
    differences: Float[Tensor, "question layer d_model"]
    reliability: Float[Tensor, " layer"]
    norm: Float[Tensor, " layer"]
    p_value: Float[Tensor, " layer"]
    p_any: float = math.nan
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not bool(self.directions.isfinite().all()):
            layer = int((~self.directions.isfinite().all(-1)).nonzero()[0])
            raise ValueError(f"the {self.trait} vector is not finite at {hook_name(layer)}")

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers x {self.d_model}"
        return f"PersonaVectors({self.trait!r}, {self.pooling}, {self.estimator}, {shape}, {len(self.differences)} questions)"

    @property
    def n_layers(self) -> int:
        """How many layers there are directions for."""
        return self.directions.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.directions.shape[1]

    @property
    def lineage(self) -> str:
        """Lineage of the model it was extracted from; vectors do not move between lineages."""
        return str(self.provenance.get("model", {}).get("lineage", ""))

    @property
    def best_layer(self) -> int:
        """The layer of highest split-half reliability (a description of the vector, not a choice of where to steer).

        Raises:
            PersonaLensError: reliability was not measured (vectors from other programs' files).
        """
        if not bool(self.reliability.isfinite().any()):
            raise PersonaLensError(f"the reliability of the {self.trait} vector is not known at any layer: name the layer to use")
        return int(self.reliability.nan_to_num(-math.inf).argmax())

    def __getitem__(self, layer: int) -> Float[Tensor, " d_model"]:
        """The unnormalised direction at a layer.

        Raises:
            IndexError: no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer {layer} does not exist: the {self.trait} vector has layers 0 to {self.n_layers - 1}")
        return self.directions[layer]

    def unit(self, layer: int) -> Float[Tensor, " d_model"]:
        """The direction at a layer, of norm 1.

        Raises:
            IndexError: no such layer.
        """
        return self[layer] / self[layer].norm()

    def project(self, residuals: Float[Tensor, "*batch d_model"], layer: int) -> Float[Tensor, "*batch"]:
        """The projection `<h, v> / |v|` of residuals on the direction at a layer.

        Args:
            residuals: of that layer; any leading shape.

        Returns:
            A number per residual, in residual-stream units, fp32.

        Raises:
            IndexError: no such layer.

        Example:
            >>> v.project(run.neutral[:, 5], layer=5).shape  # one number per neutral answer
            torch.Size([19])
        """
        return residuals.float() @ self.unit(layer).to(residuals.device)

    def __neg__(self) -> "PersonaVectors":
        return self * -1.0

    def __mul__(self, factor: float) -> "PersonaVectors":
        """The vectors scaled by a number; what was measured about them is scaled along."""
        return replace(
            self, directions=self.directions * factor, differences=self.differences * factor, norm=self.norm * abs(factor)
        )

    __rmul__ = __mul__

    def require_lineage(self, lineage: str) -> None:
        """Raise unless the vectors come from a model of this lineage.

        Raises:
            LineageError: they come from another one.
        """
        if self.lineage and self.lineage != lineage:
            model = self.provenance["model"].get("name", "unknown")
            raise LineageError(
                f"the {self.trait} vector was extracted from lineage {self.lineage} ({model}), "
                f"this model is of lineage {lineage}: extract it again on this model"
            )

    def save(self, path: Path) -> None:
        """Write safetensors with a JSON header (atomically).

        Raises:
            OSError: the disk is full, or the folder cannot be written.

        Example:
            >>> v.save(Path("optimism.safetensors"))
            >>> bool(pl.PersonaVectors.load("optimism.safetensors").directions.equal(v.directions))
            True
        """
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "trait": self.trait,
            "pooling": self.pooling,
            "estimator": self.estimator,
            "layers": "blocks counted from 0; layer l is blocks.{l}.hook_resid_post",
            "p_any": None if math.isnan(self.p_any) else self.p_any,
            "provenance": dict(self.provenance),
        }
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        metadata = {"header": json.dumps(header, sort_keys=True)}
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> "PersonaVectors":
        """Read a file written by `save`.

        Raises:
            RunFolderError: missing, damaged, of another format, or with tensors of the wrong shape.

        Example:
            >>> pl.PersonaVectors.load("runs/optimism/vectors.safetensors").trait
            'optimism'
        """
        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {}).get("header", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            ours = str(path).endswith(".safetensors")
            more = "" if ours else f": persona-lens vectors convert {path} OUT.safetensors reads other formats"
            raise RunFolderError(f"{path}: cannot be read as persona vectors ({error}){more}") from error
        _check_content(path, header, tensors)
        try:
            return cls(
                header["trait"],
                header["pooling"],
                header["estimator"],
                **tensors,
                p_any=_number(header.get("p_any")),
                provenance=header["provenance"],
            )
        except ValueError as error:
            raise RunFolderError(f"{path}: {error}") from error


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _check_content(path: str | Path, header: Any, tensors: Mapping[str, Tensor]) -> None:
    """Format, fields, ranks and shapes of a file that claims to hold vectors."""
    fields = ("trait", "pooling", "estimator", "provenance")
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
        raise RunFolderError(f"{path}: is no file of format {FORMAT} version {FORMAT_VERSION}")
    if set(tensors) != set(_TENSORS) or any(field not in header for field in fields):
        raise RunFolderError(f"{path}: lacks tensors or header fields of format {FORMAT} (has {sorted(tensors)}, {sorted(header)})")
    texts, provenance = [header[name] for name in fields[:-1]], header["provenance"]
    if not all(isinstance(text, str) for text in texts) or not isinstance(provenance, dict):
        raise RunFolderError(f"{path}: trait, pooling and estimator must be texts and provenance an object in format {FORMAT}")
    if not isinstance(provenance.get("model", {}), dict):
        raise RunFolderError(f"{path}: the provenance's model must be an object in format {FORMAT}")
    if tensors["directions"].ndim != 2:
        raise RunFolderError(f"{path}: tensor directions has shape {tuple(tensors['directions'].shape)}, expected (layer, d_model)")
    layers, d_model = tensors["directions"].shape
    questions = len(tensors["differences"]) if tensors["differences"].ndim else 0
    expected = {"differences": (questions, layers, d_model), **dict.fromkeys(_TENSORS[2:], (layers,))}
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise RunFolderError(f"{path}: tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")


_TENSORS: Final = ("directions", "differences", "reliability", "norm", "p_value")


def hook_name(layer: int) -> str:
    """TransformerLens's name of a layer's residual: `blocks.{layer}.hook_resid_post`."""
    return f"blocks.{layer}.hook_resid_post"
