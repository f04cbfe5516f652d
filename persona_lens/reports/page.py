"""The parts of a report's page: figures inline, every text escaped, nothing loaded from anywhere."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from persona_lens.monitoring.rendering import visible

LONGEST: Final = 80  # characters of a name
STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
figure { margin: 1rem 0; }
.answer { border-left: 3px solid #bbb; padding: .2rem .8rem; margin: .6rem 0; }
.positive { border-color: #D55E00; }
.negative { border-color: #0072B2; }
.meta { color: #666; font-size: .85rem; }
"""


def image(content: bytes, caption: str) -> str:
    data = base64.b64encode(content).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption class="meta">{text}</figcaption></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + f"</tr>{cells}</table>"


def provenance(manifest: Mapping[str, Any]) -> str:
    """Versions, source revision and model of a run."""
    shown = {**manifest["versions"], "git": manifest["git_revision"], **manifest["model"]}
    return "<h2>Provenance</h2>" + table(("what", "value"), list(shown.items()))


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document."""
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def short(text: str, longest: int = LONGEST) -> str:
    """One short line without anything invisible; not escaped."""
    line = " ".join(visible(text).split())
    return line if len(line) <= longest else line[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number(value: float | None, form: str = "+.2f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{form}}"


def listed(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:-1])} and {texts[-1]}" if len(texts) > 1 else texts[0]
