"""The README's generated tables: its commands, from the command line itself, and its results, from a stored reproduction.

Run: python tests/readme_tables.py            (prints what would change)
     python tests/readme_tables.py --write    (changes the README)
     python tests/readme_tables.py --store runs/reproduce-full   (takes over the findings of a finished `persona-lens reproduce`)
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer

from persona_lens.cli import app
from persona_lens.records import decoded
from persona_lens.reproduction import FIGURES, Finding

README = Path(__file__).parent.parent / "README.md"
STORED = Path(__file__).parent / "reproduction.json"
SHOWN = 3  # claims of a figure that the README shows


def commands() -> str:
    """A row per command: how it is called, and the first sentence of its help."""
    rows = [f"| `{usage}` | {said} |" for usage, said in _commands(typer.main.get_command(app), "persona-lens")]
    return "\n".join(["| command | what it does |", "| --- | --- |", *rows])


def _commands(command: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(command, click.Group) or hasattr(command, "commands"):
        if getattr(command, "invoke_without_command", False):
            yield _row(command, name)
        for sub in command.commands.values():
            yield from _commands(sub, f"{name} {sub.name}")
        return
    yield _row(command, name)


def _row(command: Any, name: str) -> tuple[str, str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    named = [f"{(p.metavar or p.name or '').upper().strip('[]')}{'...' if p.nargs == -1 else ''}" for p in arguments]
    required = [n if p.required else f"[{n}]" for n, p in zip(named, arguments, strict=True)]
    sentence = " ".join((command.help or "").split("\n\n")[0].split())
    return " ".join([name, *required]), sentence.replace("|", "\\|")


def results() -> str:
    """A row per figure of the paper, and the first claims of each, from the stored findings."""
    stored = json.loads(STORED.read_text())
    found = {f["key"]: decoded(Finding, f) for f in stored["findings"]}
    rows = ["| figure of the paper | claim | here [95 %] | paper | verdict |", "| --- | --- | --- | --- | --- |"]
    for figure in FIGURES:
        if figure.key not in found:
            continue
        hold, of = found[figure.key].holding
        for number, row in enumerate(found[figure.key].rows[:SHOWN]):
            where = f"{figure.where}: {figure.title} ({hold} of {of})" if number == 0 else ""
            rows.append(f"| {where} | {row.claim} | {row.figure} | {row.paper} | {row.verdict} |")
    hold, of = (sum(x) for x in zip(*(f.holding for f in found.values()), strict=True))
    return "\n".join([f"{hold} of {of} claims hold (`persona-lens reproduce`, {stored['scale']} scale).", "", *rows])


BLOCKS = {"commands": commands, "results": results}


def filled(text: str) -> str:
    """The README with every block as it is generated now."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, rest = text.split(begin, 1)
        _, after = rest.split(end, 1)
        text = f"{before}{begin}{make()}{end}{after}"
    return text


def store(folder: Path) -> None:
    """Keep the findings of a finished reproduction without its images."""
    record = json.loads((folder / "reproduction.json").read_text())
    manifest = json.loads((folder / "run.json").read_text())
    findings = [{**f, "images": []} for f in record["findings"]]
    kept = {
        "scale": manifest["arguments"]["scale"],
        "versions": manifest["versions"],
        "model": manifest["model"],
        "findings": findings,
    }
    STORED.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if "--store" in sys.argv:
        store(Path(sys.argv[sys.argv.index("--store") + 1]))
    before, now = README.read_text(), filled(README.read_text())
    if "--write" in sys.argv:
        README.write_text(now)
    print("unchanged" if before == now else "changed" if "--write" in sys.argv else "README.md is out of date: --write changes it")
