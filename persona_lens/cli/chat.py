"""`persona-lens chat`: talk to a model while steering it; answers appear as they are sampled, with their tokens' projections."""

import shlex
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from persona_lens.cli.options import Device, Model, Seed
from persona_lens.cli.steer import vectors_of

if TYPE_CHECKING:
    from persona_lens.models import ChatModel
    from persona_lens.steering import Intervention
    from persona_lens.vectors import PersonaVectors

HELP = """/set TRAIT STRENGTH [LAYER]   steer (0 stops it)      /system TEXT   system prompt, begins anew
/show   what is steered               /new   begins anew      /help   this      /quit"""

BARS: Final = "▁▂▃▄▅▆▇█"
BAR_TOKENS: Final = 40  # longest trace shown


@dataclass
class _Live:
    """An answer while it is sampled: its text is printed as it comes, its tokens' projections are kept."""

    model: "ChatModel"
    vectors: dict[str, "PersonaVectors"]
    tokens: list[int] = field(default_factory=list[int])
    printed: str = ""
    projections: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    @contextmanager
    def watching(self) -> Generator[None]:
        """Read every decoded token that the model is given, and its residuals after any steering."""
        hooks = [(self.model.hook_name(v.best_layer), self._reader(trait, v)) for trait, v in self.vectors.items()]
        with ExitStack() as stack:
            stack.callback(self.model.hf.register_forward_pre_hook(self._token, with_kwargs=True).remove)
            stack.enter_context(self.model.hooks(hooks))
            yield

    def _token(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if _answering():
            self.tokens.append(int(args[0][0, -1]))
            self.show(self.tokens)

    def _reader(self, trait: str, vectors: "PersonaVectors") -> Any:
        unit = vectors.unit(vectors.best_layer)

        def hook(residual: Any, hook: Any) -> None:  # noqa: ARG001
            if _answering():
                value = float(residual[0, -1].float() @ unit.to(residual.device))
                self.projections.setdefault(trait, []).append(value)

        return hook

    def show(self, tokens: Sequence[int]) -> None:
        """Print what the tokens add to what is printed; half a character waits for its other half."""
        text = self.model.decode(tokens)
        if text.startswith(self.printed) and not text.endswith("\ufffd"):
            typer.echo(text[len(self.printed) :], nl=False)
            self.printed = text

    def bars(self, trait: str) -> str:
        """The projections of the answer's first tokens, from their lowest to their highest."""
        values = self.projections.get(trait, [])[:BAR_TOKENS]
        low, high = min(values, default=0.0), max(values, default=0.0)
        return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for v in values)


def _answering() -> bool:
    """Whether the running pass decodes a token of the answer."""
    from persona_lens.models import current_pass

    content = current_pass()
    return content is not None and content.real.shape[1] == 1 and not bool(content.prompt[0, -1])


@dataclass
class _Session:
    """A conversation and what steers it."""

    model: "ChatModel"
    vectors: dict[str, "PersonaVectors"]
    seed: int
    max_new_tokens: int
    where: str = "response"
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    doses: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    turns: int = 0

    def interventions(self) -> list["Intervention"]:
        from persona_lens.steering import add

        return [add(self.vectors[trait], layer, strength, where=self.where) for trait, (layer, strength) in self.doses.items()]

    def say(self, text: str) -> str:
        """One turn: prints the answer while it is sampled, returns the projections of its tokens."""
        import numpy as np

        from persona_lens.activations import Span, pool
        from persona_lens.models import Sampling, dialogue, generate_tokens, uniforms
        from persona_lens.steering import steer

        turns = [*self.messages, {"role": "user", "content": text}]
        ids = self.model.render(turns)
        live = _Live(self.model, self.vectors)
        with steer(self.model, *self.interventions()):
            draws = np.stack([uniforms(self.seed, f"chat#{self.turns}", self.max_new_tokens)])
            sampling, earlier = Sampling(self.max_new_tokens), lambda: dialogue(self.model, turns).answers
            with live.watching():
                [found] = generate_tokens(self.model, [ids], draws, sampling, earlier=lambda: [earlier()])
            live.show(found.token_ids)
            answer = self.model.decode(found.token_ids)
            told = earlier() if self.where == "responses" else ()
            span = Span("answer", tuple(ids), found.token_ids, told)
            pooled = next(iter(pool(self.model, [span]))) if found.token_ids else None
        self.messages = [*turns, {"role": "assistant", "content": answer}]
        self.turns += 1
        if pooled is None:
            return "(no answer)"
        shown = [
            f"{trait} {float(v.project(pooled.values[0, 0, v.best_layer], v.best_layer)):+.2f} {live.bars(trait)}"
            for trait, v in self.vectors.items()
        ]
        return f"\n    [projection: {', '.join(shown)}]"

    def command(self, line: str) -> str | None:
        """What a line that begins with a slash does; None ends the session."""
        from persona_lens.errors import SteeringError, UnknownNameError

        name, *words = shlex.split(line)
        match name, words:
            case "/quit", _:
                return None
            case "/set", [trait, strength, *layer] if len(layer) <= 1:
                if trait not in self.vectors:
                    raise UnknownNameError("vector", trait, self.vectors)
                try:
                    dose = (int(layer[0]) if layer else self.vectors[trait].best_layer, float(strength))
                except ValueError as error:
                    raise SteeringError("/set TRAIT STRENGTH [LAYER] takes numbers, for instance /set evil 1.5 5") from error
                from persona_lens.steering import add, plan

                plan(self.model, add(self.vectors[trait], *dose, where=self.where))  # checks before it is used
                self.doses[trait] = dose
                return self._steering()
            case "/system", _:
                self.messages = [{"role": "system", "content": " ".join(words)}] if words else []
                return "a new conversation begins"
            case "/new", []:
                self.messages = [m for m in self.messages if m["role"] == "system"]
                return "a new conversation begins"
            case "/show", []:
                return self._steering()
            case _:
                return HELP

    def _steering(self) -> str:
        return "\n".join(str(x) for x in self.interventions() if x.dose) or "unsteered"


def chat(
    vectors: Annotated[list[Path], typer.Argument(help="Run folders of extractions, or vectors.safetensors files.")],
    model: Model = "pocket",
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    where: Annotated[str, typer.Option(help="everywhere, prompt, response, or responses (of every turn).")] = "response",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 200,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Chat with a model, steered as you go; every answer shows its projection on each loaded vector.

    Example: persona-lens chat runs/demo-evil-seed0
    """
    from persona_lens.errors import PersonaLensError
    from persona_lens.models import load_model

    loaded = {v.trait: v for v in map(vectors_of, vectors)}
    session = _Session(load_model(model, device=device), loaded, seed, max_new_tokens, where)
    for v in loaded.values():
        v.require_lineage(session.model.fingerprint.lineage)
    if system:
        session.messages = [{"role": "system", "content": system}]
    typer.echo(f"{session.model.name} with {', '.join(loaded)}. {HELP}")
    while True:
        typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            break
        if not line.strip():
            continue
        try:
            said = session.command(line) if line.startswith("/") else session.say(line.strip())
        except (PersonaLensError, ValueError) as error:
            said = f"error: {error}"
        if said is None:
            break
        typer.echo(said)
