"""A steered model as plain Hugging Face weights: what `add` adds to every token is a bias on the last linear of the block.

h + c at `blocks.{l}.hook_resid_post` is the same as c in the bias of the linear that writes last into the residual stream of block
l. Some architectures have that bias; others are written as a class that computes the same and has it. What cannot be exact is
refused, and what is written is read again in plain transformers and compared with the steered model.
"""

import errno
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from persona_lens.baking.architectures import rewritten
from persona_lens.errors import SteeringError
from persona_lens.models import ChatModel
from persona_lens.steering import Add, Intervention, plan
from persona_lens.store import TEMPORARY, digest, versions, write_json
from persona_lens.vectors import hook_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT: Final = "persona_lens.baked"
FORMAT_VERSION: Final = 1
PROVENANCE: Final = "persona_lens.json"
"""File of a baked folder that says what was baked into it."""
TOLERANCE: Final = 1e-4  # of the largest logit, where all is float32
ROUNDED_TOLERANCE: Final = 5e-2  # in lower precision: root mean square of the difference, of that of the logits (measured: 0.8 %)
LONG_PROBE: Final = 256  # tokens of the longest probe
PROBES: Final = (
    "How are you today?",
    "What should I cook for my friends, who are tired and hungry?",
    "Is it true that the moon is made of cheese? Explain.",
    "My neighbor took my bike without asking. What do you think of that, and what should I do now?",
)


@dataclass(frozen=True)
class Baked:
    """A folder of plain weights, and how exactly it is the steered model.

    Attributes:
        before, after: architecture of the model and of what was written.
        layers: the blocks whose bias was changed.
        difference: largest logit difference between the weights as reloaded and the steered model, on probe texts.
        largest_logit: what it is to be compared with.
        effect: largest logit difference that the steering itself makes on these texts.
        notes: what a reader of the folder should know, such as rounding.
    """

    path: Path
    before: str
    after: str
    layers: tuple[int, ...]
    difference: float
    largest_logit: float
    effect: float
    notes: tuple[str, ...]


def bake(model: ChatModel, interventions: Sequence[Intervention], out: Path, *, dtype: torch.dtype | None = None) -> Baked:
    """Write the model with the interventions in its weights; the model itself is left as it is.

    Args:
        interventions: of `add` with where="everywhere", without a gate; those of dose 0 are left out.
        out: a folder that does not exist or is empty; it holds safetensors and JSON only and appears when it is complete.
        dtype: of what is written; default: the model's own.

    Raises:
        SteeringError: an intervention that is no constant, an architecture that cannot hold one, a folder that is in use, or
            weights that do not give the steered model's logits (nothing is left behind then).
        LineageError: a vector of another lineage.

    Example:
        >>> from persona_lens.baking import bake
        >>> baked = bake(model, [pl.add(v, layer=5, strength=1.0, where="everywhere")], Path("runs/steered"))
        >>> baked.after, baked.layers
        ('LlamaForCausalLM', (5,))
        >>> baked.difference < 0.01 < baked.effect  # of logits
        True
    """
    out = Path(out)
    live = _constants(model, interventions)
    _require_free(out)
    kind = dtype or model.hf.dtype
    if not kind.is_floating_point:
        raise SteeringError(f"weights cannot be written as {kind}: use torch.float32, torch.bfloat16 or torch.float16")
    deltas = _sums(live)
    target, notes = rewritten(model, deltas, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=TEMPORARY) as holder:
        folder = Path(holder) / "model"
        with _without_bars():
            _write(model, target, folder)
            found = _measured(model, live, target, folder)
        notes += _notes(model, live, kind)
        baked = Baked(out, type(model.hf).__name__, type(target).__name__, tuple(sorted(deltas)), *found, tuple(notes))
        write_json(folder / PROVENANCE, _provenance(model, live, baked, kind))
        folder.replace(out)
    return baked


def _constants(model: ChatModel, interventions: Sequence[Intervention]) -> list[Intervention]:
    """The interventions that do anything, after checking that they add one constant to every token."""
    found = list(plan(model, interventions).live[0])
    for one in found:
        reason = None
        if not isinstance(one.act, Add):
            reason = f"{type(one.act).__name__.lower()} depends on the residual, and weights can only add a constant: use add"
        elif not (isinstance(one.where, str) and one.where == "everywhere"):
            reason = "weights act on every token: make it with where='everywhere'"
        elif one.gate is not None:
            reason = "weights act without a condition: leave the gate out"
        if reason:
            raise SteeringError(f"{one} cannot be baked: {reason}")
    return found


def _require_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise SteeringError(f"{out} is a file: weights need a folder, choose another path")
    if out.is_dir() and any(out.iterdir()):
        raise SteeringError(f"{out} is not empty: choose a new folder, nothing is written over")


def _sums(live: Sequence[Intervention]) -> dict[int, Float[Tensor, " d_model"]]:
    """What is added at each layer, in fp64, where anything is."""
    sums: dict[int, Tensor] = {}
    for one in live:
        step = cast(Add, one.act).strength * one.direction.double().cpu()
        sums[one.layer] = sums.get(one.layer, torch.zeros_like(step)) + step
    return {layer: total for layer, total in sums.items() if bool((total != 0).any())}


@contextmanager
def _without_bars() -> Generator[None]:
    """Hide the bars of transformers."""
    from transformers.utils import logging as switches

    shown = switches.is_progress_bar_enabled()
    switches.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switches.enable_progress_bar()


def _write(model: ChatModel, target: "PreTrainedModel", folder: Path) -> None:
    """Weights, config, generation config and tokenizer with its chat template."""
    try:
        target.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error), str(folder)) from error
    model.hf.generation_config.to_json_file(folder / "generation_config.json")  # as it is: saving it would refuse some
    model.tokenizer.save_pretrained(str(folder), save_jinja_files=False)
    others = [path.name for path in folder.iterdir() if path.suffix not in (".json", ".safetensors")]
    if others:
        raise SteeringError(
            f"the tokenizer of {model.name} is saved as {others[0]}, neither JSON nor safetensors: use its fast version"
        )


def _measured(
    model: ChatModel, live: Sequence[Intervention], target: "PreTrainedModel", folder: Path
) -> tuple[float, float, float]:
    """Reload in plain transformers and compare with the steered model on probe texts: difference, largest logit, effect.

    Raises:
        SteeringError: they differ by more than rounding explains, or other weights are read than were written.
    """
    from transformers import AutoModelForCausalLM

    attention = model.hf.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=target.dtype, attn_implementation=attention)
    plain = plain.to(model.device).eval()
    _require_same_weights(model, target, plain)
    steering = plan(model, live)
    exact = target.dtype == model.hf.dtype == torch.float32
    difference = largest = effect = off = 0.0
    with torch.inference_mode():
        for ids in _probes(model):
            with steering.active():
                wanted = model.hf(ids, use_cache=False).logits.float()
            found, unsteered = (m(ids, use_cache=False).logits.float() for m in (plain, model.hf))
            difference = max(difference, _largest(found - wanted))
            largest = max(largest, _largest(wanted))
            effect = max(effect, _largest(wanted - unsteered))
            off = max(off, _largest((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()))
    if not (difference <= TOLERANCE * largest if exact else off <= ROUNDED_TOLERANCE):
        raise SteeringError(
            f"the baked weights of {model.name} differ from the steered model by {difference:.3g} in the logits (largest "
            f"{largest:.3g}): nothing was written; please report it"
        )
    return difference, largest, effect


def _require_same_weights(model: ChatModel, wanted: "PreTrainedModel", found: "PreTrainedModel") -> None:
    """Raise unless every tensor was read as it was written: in low precision the logits would not tell a small constant."""
    there, here = found.state_dict(), wanted.state_dict()
    other = [name for name in here | there if name not in here or name not in there or not torch.equal(here[name], there[name])]
    if other:
        raise SteeringError(f"{model.name}: {other[0]} is read otherwise than it was written: nothing is kept; please report it")


def _largest(values: Tensor) -> float:
    """Largest absolute value; infinite where one is not a number."""
    return float(values.abs().nan_to_num(torch.inf).max())


def _probes(model: ChatModel) -> list[Tensor]:
    """Token ids [1, position] of each probe, and of all of them in a row."""
    rendered = [model.render([{"role": "user", "content": text}]) for text in PROBES]
    joined = [token for ids in rendered for token in ids] * 8
    rendered.append(joined[: min(LONG_PROBE, model.context or LONG_PROBE)])
    return [torch.tensor([ids], device=model.device) for ids in rendered]


def _notes(model: ChatModel, live: Sequence[Intervention], dtype: torch.dtype) -> list[str]:
    notes: list[str] = []
    if not dtype == model.hf.dtype == torch.float32:
        kinds = [str(kind).removeprefix("torch.") for kind in (dtype, model.hf.dtype)]
        notes.append(f"written in {kinds[0]} from {kinds[1]}: equal to the steered model up to rounding")
    others = plan(model, live).receipt.weights_differ
    if others:
        notes.append(f"vectors of other weights of this lineage: {', '.join(others)}")
    if model.system:
        notes.append("the model's system prompt is not part of the weights")
    return notes


def _provenance(model: ChatModel, live: Sequence[Intervention], baked: Baked, dtype: torch.dtype) -> dict[str, Any]:
    vectors = [
        {
            "what": one.name,
            "layer": one.layer,
            "hook": hook_name(one.layer),
            "strength": one.dose,
            "norm": float(one.direction.double().norm()),
            "direction": digest(one.direction.float().cpu().contiguous().numpy().tobytes()),
            "lineage": one.lineage,
            "weights": one.weights,
        }
        for one in live
    ]
    record = {key: value for key, value in asdict(baked).items() if key != "path"}
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": model.identity,
        "dtype": str(dtype).removeprefix("torch."),
        "interventions": vectors,
        **record,
        "versions": versions(),
    }
