"""The `persona-lens` command and how it ends: one clear line for a user's error, a resumable folder after Ctrl-C."""

import errno
import sys

import typer

from persona_lens.cli import demo, extract, pocket, report, traits
from persona_lens.errors import PersonaLensError

app = typer.Typer(
    name="persona-lens",
    help="Persona vectors: extract, inspect and report character traits of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("extract")(extract.extract)
app.command("report")(report.report)
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
        if error.errno == errno.ENOSPC:
            _fail(f"the disk is full ({error.filename or 'while writing'}): free space and run the same command again, it resumes")
        if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError | NotADirectoryError):
            _fail(f"{error.filename}: {error.strerror}")
        raise
    except KeyboardInterrupt:
        print("interrupted: finished chunks are kept; run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
