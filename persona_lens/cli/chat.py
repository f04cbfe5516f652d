"""`persona-lens chat`: talk to a model while steering it; answers appear as they are sampled, with their tokens' projections."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from persona_lens.cli.options import Device, Model, Seed, load
from persona_lens.cli.steer import vectors_of

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from persona_lens.models import ChatModel
    from persona_lens.monitoring import AnswerReading, Calibration, Probe, TokenReading
    from persona_lens.steering import Intervention
    from persona_lens.vectors import PersonaVectors

HELP = """/set TRAIT STRENGTH [LAYER]   steer (0 stops it)      /system TEXT   system prompt, begins anew
/show   what is steered               /new   begins anew      /help   this      /quit"""

BARS: Final = "▁▂▃▄▅▆▇█"
BAR_TOKENS: Final = 40  # longest trace shown


@dataclass
class _Live:
    """An answer while it is sampled: its text is printed as its tokens pass."""

    model: "ChatModel"
    tokens: list[int] = field(default_factory=list[int])
    printed: str = ""

    def passed(self, reading: "TokenReading") -> None:
        """Print a token of the answer; the tokens of its prompt are silent."""
        if reading.kind == "answer":
            self.tokens.append(reading.token)
            self.show(self.tokens)

    def show(self, tokens: Sequence[int]) -> None:
        """Print what the tokens add to what is printed; half a character waits for its other half."""
        text = self.model.decode(tokens)
        if text.startswith(self.printed) and not text.endswith("\ufffd"):
            typer.echo(text[len(self.printed) :], nl=False)
            self.printed = text


def _bars(values: Sequence[float]) -> str:
    """The projections of the answer's first tokens, from their lowest to their highest."""
    shown = values[:BAR_TOKENS]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for v in shown)


@dataclass
class _Watch:
    """Alarms of the running conversation: the scores of its turns so far."""

    model: "ChatModel"
    probes: "tuple[Probe, ...]"
    calibration: "Calibration"
    rate: float
    scores: list["Float[np.ndarray, ' probe']"] = field(default_factory=list["Float[np.ndarray, ' probe']"])

    def turn(self, message: str, reading: "AnswerReading") -> str:
        """How unusual the new answer is among neutral ones, and what it makes of the conversation."""
        import numpy as np

        from persona_lens.monitoring import content_of_messages
        from persona_lens.monitoring.reading import answer_means, thinking_of

        settings = self.calibration.settings
        content = content_of_messages(self.model, [message], self.probes, settings.content, None)[message]
        values = reading.values.double().numpy()
        means, _ = answer_means(values, thinking_of(self.model, reading.ids, settings.thinking))
        observed = means if settings.observed == "answer" else reading.before.double().numpy()
        self.scores.append(self.calibration.expectation.scores(observed, content))
        scores = np.stack(self.scores)
        alarms = self.calibration.alarms(scores, self.rate)
        shares = self.calibration.percentiles(scores)[-1]
        told = ", ".join(f"{p.name} {share:.0f} %" for p, share in zip(self.probes, shares, strict=True))
        lines = [f"    [above this share of neutral answers: {told}]"]
        if loud := [name for name, loud in zip(alarms.names, alarms.answers[-1], strict=True) if loud]:
            lines.append(f"    [ALARM, this answer: {', '.join(loud)} (one neutral answer in {1 / self.rate:.0f})]")
        if since := [f"{name} since turn {t}" for name, t in zip(alarms.names, alarms.turns, strict=True) if t]:
            lines.append(f"    [ALARM, this conversation: {', '.join(since)} (one neutral conversation in {1 / self.rate:.0f})]")
        return "\n".join(lines)


@dataclass
class _Session:
    """A conversation and what steers it."""

    model: "ChatModel"
    vectors: dict[str, "PersonaVectors"]
    probes: "tuple[Probe, ...]"
    seed: int
    max_new_tokens: int
    where: str = "response"
    watch: _Watch | None = None
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    doses: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    turns: int = 0

    def interventions(self) -> list["Intervention"]:
        from persona_lens.steering import add

        return [add(self.vectors[trait], layer, strength, where=self.where) for trait, (layer, strength) in self.doses.items()]

    def say(self, text: str) -> str:
        """One turn: prints the answer while it is sampled, returns the projections of its tokens."""
        import numpy as np

        from persona_lens.models import Sampling, dialogue, generate_tokens, uniforms
        from persona_lens.monitoring import monitor
        from persona_lens.steering import steer

        turns = [*self.messages, {"role": "user", "content": text}]
        ids = self.model.render(turns)
        live = _Live(self.model)
        with steer(self.model, *self.interventions()):
            draws = np.stack([uniforms(self.seed, f"chat#{self.turns}", self.max_new_tokens)])
            sampling, earlier = Sampling(self.max_new_tokens), lambda: [dialogue(self.model, turns).answers]
            with monitor(self.model, self.probes, live.passed) as seen:
                [found] = generate_tokens(self.model, [ids], draws, sampling, earlier=earlier)
        live.show(found.token_ids)
        [reading] = seen.answers
        thinking, said = self.model.template.split(found.token_ids)
        self.messages = [*turns, {"role": "assistant", "content": self.model.decode(said)}]
        self.turns += 1
        lines = [] if said else ["(no answer)"]
        values = reading.values[len(thinking) :]
        if len(values):
            means = values.mean(0).tolist()
            shown = [
                f"{p.name} {mean:+.2f} {_bars(values[:, k].tolist())}"
                for k, (p, mean) in enumerate(zip(self.probes, means, strict=True))
            ]
            lines.append(f"\n    [projection: {', '.join(shown)}]")
        return "\n".join([*lines, self.watch.turn(text, reading)] if self.watch else lines)

    def begin(self, messages: list[dict[str, str]]) -> str:
        """A new conversation, with its system prompt if it has one."""
        self.messages = messages
        if self.watch:
            self.watch.scores.clear()
        return "a new conversation begins"

    def command(self, line: str) -> str | None:
        """What a line that begins with a slash does; None ends the session."""
        from persona_lens.errors import SteeringError, UnknownNameError

        name, _, rest = line.strip().partition(" ")
        words = rest.split() if name == "/system" else shlex.split(rest)
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
                return self.begin([{"role": "system", "content": rest.strip()}] if words else [])
            case "/new", []:
                return self.begin([m for m in self.messages if m["role"] == "system"])
            case "/show", []:
                return self._steering()
            case _:
                return HELP

    def _steering(self) -> str:
        return "\n".join(str(x) for x in self.interventions() if x.dose) or "unsteered"


def _watch(model: "ChatModel", probes: "tuple[Probe, ...]", path: Path, rate: float) -> _Watch:
    """Alarms by a stored calibration, checked before the conversation begins."""
    from persona_lens.errors import MonitoringError
    from persona_lens.monitoring import load_calibration

    calibration = load_calibration(path)
    if calibration.settings.content == "embedding":
        raise MonitoringError(f"{path} holds content by an embedding, which the command line does not have: calibrate without one")
    if note := calibration.require(model, probes):
        typer.echo(f"note: {note}")
    calibration.require_enough(rate)
    return _Watch(model, probes, calibration, rate)


def chat(
    vectors: Annotated[list[Path], typer.Argument(help="Run folders of extractions, or vectors.safetensors files.")],
    model: Model = "pocket",
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    where: Annotated[str, typer.Option(help="everywhere, prompt, response, or responses (of every turn).")] = "response",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 200,
    layer: Annotated[int | None, typer.Option(help="Where vectors are read. Default: each at its most reliable layer.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Folder of `monitor calibrate` for these vectors: alarms.")] = None,
    rate: Annotated[float, typer.Option(help="False-positive rate of alarms, per answer and per conversation.")] = 0.05,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Chat with a model, steered as you go; every answer shows its projection on each loaded vector.

    Example: persona-lens chat runs/demo-evil-seed0
    """
    from persona_lens.errors import PersonaLensError
    from persona_lens.monitoring import as_probes, probe

    loaded = {v.trait: v for v in map(vectors_of, vectors)}
    chat_model = load(model, device)
    probes = as_probes(chat_model, [probe(v, layer) for v in loaded.values()])
    watch = _watch(chat_model, probes, calibration, rate) if calibration else None
    session = _Session(chat_model, loaded, probes, seed, max_new_tokens, where, watch)
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
