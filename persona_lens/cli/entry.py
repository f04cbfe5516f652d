"""The `persona-lens` command and how it ends: one clear line for a user's error, a resumable folder after Ctrl-C."""

import errno
import sys
from typing import Annotated, NoReturn

import typer

from persona_lens.cli import (
    bake,
    chat,
    demo,
    extract,
    finetune,
    geometry,
    judge,
    model,
    monitor,
    pocket,
    report,
    reproduce,
    screen,
    steer,
    sweep,
    traits,
    vectors,
)
from persona_lens.cli.options import LOADING, Loading, SeveralVectors
from persona_lens.errors import PersonaLensError

app = typer.Typer(
    name="persona-lens",
    help="Persona vectors: extract, inspect and report character traits of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def loading(
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto. Default: float32 on a CPU.")] = None,
    quantize: Annotated[str | None, typer.Option(help='Load the weights in "8bit" or "4bit" (bitsandbytes).')] = None,
    device_map: Annotated[str | None, typer.Option(help='"auto" spreads a model over several GPUs (accelerate).')] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let a model that thinks on demand think first.")] = False,
) -> None:
    LOADING.set(Loading(dtype, quantize, device_map, thinking))


app.command("demo")(demo.demo)
app.command("extract")(extract.extract)
app.command("steer")(steer.steer)
app.command("sweep")(sweep.sweep)
app.command("chat")(chat.chat)
app.command("geometry")(geometry.geometry)
app.command("roles")(geometry.roles)
app.command("spill-over")(geometry.spill_over)
app.command("finetune")(finetune.finetune)
app.command("shift", cls=SeveralVectors)(finetune.shift)
app.command("pilot", cls=SeveralVectors)(finetune.pilot)
app.command("defend", cls=SeveralVectors)(finetune.defend)
app.command("screen", cls=SeveralVectors)(screen.screen)
app.command("report")(report.report)
app.command("reproduce")(reproduce.reproduce)
app.command("bake")(bake.bake)
app.command("model")(model.model)
app.add_typer(monitor.app, name="monitor")
app.add_typer(vectors.app, name="vectors")
app.add_typer(judge.app, name="judge")
app.add_typer(traits.app, name="traits")
app.add_typer(pocket.app, name="pocket")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point."""
    try:
        app()
    except PersonaLensError as error:
        _fail(str(error))
    except OSError as error:
        _fail(_file_error(error))
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as stop:  # how typer passes Ctrl-C on
        if stop.code == EXIT_INTERRUPTED:
            _interrupted()
        raise


def _interrupted() -> NoReturn:
    print("interrupted: what was finished is kept; run the same command again to go on", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)


def _file_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}the disk is full: free space and run the same command again, it resumes"
    return f"{where}{error.strerror or error}"


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
