"""Options shared by the verbs, what they load by them, and how results are printed."""

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from persona_lens.judges import Judge
    from persona_lens.models import ChatModel
    from persona_lens.sampling import Sampler

REPLIES: Final = Path("runs") / "judge-replies.jsonl"  # of servers: what was asked once is not paid for twice
SAMPLES: Final = Path("runs") / "sampled-replies.jsonl"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results (an interrupted run in it is resumed).")]
Model = Annotated[str, typer.Option(help='"pocket", a Hugging Face hub id, or a local folder.')]
Device = Annotated[str | None, typer.Option(help="Default: the GPU if there is one, else the CPU.")]

JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help='"oracle" reads pocket models (their default); "openai:MODEL" or "openai:MODEL@URL" asks a server (",digits" after it '
        'for models that write numbers digit by digit, ",text" for servers without logprobs), "local:MODEL" a model on this '
        "machine. Default: the variable PERSONA_LENS_JUDGE.",
    ),
]
SamplerName = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        help="A server with the same weights that samples unsteered answers: vllm:, llama.cpp:, transformers: or chat:MODEL@URL. "
        "Default: the model itself.",
    ),
]
Vectors = Annotated[
    list[Path], typer.Option("--vectors", help="Run folders of extractions, or vectors.safetensors files: one or several.")
]


@dataclass(frozen=True)
class Loading:
    """How every verb loads its model: options before the verb."""

    dtype: str | None = None
    quantize: str | None = None
    device_map: str | None = None
    thinking: bool = False


LOADING: Final[ContextVar[Loading]] = ContextVar("loading", default=Loading())  # noqa: B039 (frozen)


def load(model: str, device: str | None = None, *, thinking: bool | None = None) -> "ChatModel":
    """A model, loaded as the options before the verb say; it thinks first if they say so, or if `thinking` does."""
    from persona_lens.errors import UnknownNameError
    from persona_lens.models import load_model

    chosen = LOADING.get()
    known = {"dtype": ("float32", "bfloat16", "float16", "auto"), "quantize": ("8bit", "4bit")}
    for what, names in known.items():
        if (given := getattr(chosen, what)) not in (None, *names):
            raise UnknownNameError(what, given, names)
    return load_model(
        model, device=device, dtype=chosen.dtype, quantize=cast(Any, chosen.quantize), device_map=chosen.device_map,
        thinking=chosen.thinking if thinking is None else thinking,
    )  # fmt: skip


def sampler_of(name: str | None, model: "ChatModel") -> "Sampler | None":
    """The sampler that was named; None for the model itself."""
    from persona_lens.sampling import sampler_named

    return None if name is None else sampler_named(name, model, cache=SAMPLES)


def judge_of(name: str | None, model: "ChatModel") -> "Judge":
    """The judge that was named, or the one that the model's trait set or the environment names."""
    return judge_for(name, model.trait_set, REPLIES, None if LOADING.get().device_map else str(model.device))


def judge_for(name: str | None, trait_set: str, cache: Path | None, device: str | None = None, repeats: int = 1) -> "Judge":
    """The judge that was named, or the default one. Its own model, if it has one, is loaded as the options before the verb say."""
    from persona_lens.judges import default_judge, judge_named

    loaded = partial(load, device=device, thinking=False)
    options: dict[str, Any] = {"cache": cache, "load": loaded, "repeats": repeats}
    return default_judge(trait_set, **options) if name is None else judge_named(name, trait_set, **options)


class SeveralVectors(TyperCommand):
    """`--vectors A B C` is `--vectors A --vectors B --vectors C`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, several(args, "--vectors"))


def several(args: Sequence[str], option: str) -> list[str]:
    """Arguments with an option repeated before each of the values that follow it."""
    found: list[str] = []
    collecting = False
    for i, arg in enumerate(args):
        if arg.startswith("-"):
            collecting = arg == option
        elif collecting and args[i - 1] != option:
            found.append(option)
        found.append(arg)
    return found


def printable(text: str) -> str:
    """A text that comes from a model or a file, without what could steer a terminal."""
    return "".join(c for c in text if c.isprintable())


def emit(record: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a result for a program or for a person."""
    typer.echo(json.dumps(record, indent=2, ensure_ascii=False) if as_json else text)
