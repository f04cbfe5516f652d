"""`persona-lens report`: write a run's report again."""

from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli.options import Json, emit


def report(folder: Annotated[Path, typer.Argument(help="A finished run folder.")], as_json: Json = False) -> None:
    """Write the HTML report and figures of a finished run into its folder.

    Example: persona-lens report runs/demo
    """
    from persona_lens.reports import report as write_report
    from persona_lens.store import read_manifest

    if read_manifest(folder).get("command") == "reproduce":
        from persona_lens.reproduction.run import write_report
    page = write_report(folder)
    emit({"report": str(page)}, f"Report: {page}", as_json)
