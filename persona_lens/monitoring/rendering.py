"""A conversation coloured by the projection of its tokens on one probe: for notebooks and pages, and for terminals.

Pieces are anyone's text: markup is escaped, and whatever could steer a terminal or a line of text (control characters, bidi
overrides and other invisible format characters, lone surrogates) is shown as a visible sign instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from math import floor, isfinite, isnan, log10, nan
from typing import TYPE_CHECKING, Final
from unicodedata import category

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import MonitoringError, UnknownNameError
from persona_lens.monitoring.reading import Part, Reading

if TYPE_CHECKING:
    from rich.text import Text

LOW: Final = (0x00, 0x72, 0xB2)
HIGH: Final = (0xD5, 0x5E, 0x00)
FULL: Final = 0.55  # share of the hue in the strongest background, the rest is white: both inks stay readable on it
INK: Final = "#1a1a1a"
THINKING_INK: Final = "#3d3d3d"

INVISIBLE: Final = {"Cc", "Cf", "Cs", "Zl", "Zp"}
KEPT: Final = "\n\u200c\u200d"  # the joiners are spelling in Persian and Hindi, and hold emoji together

OUTER: Final = f"font:15px/1.7 system-ui,sans-serif;color:{INK};background:#fff;padding:.5rem .8rem"
META: Final = "color:#595959;font-size:.85em"
BODY: Final = "white-space:pre-wrap;overflow-wrap:anywhere;overflow:hidden;border-left:3px solid #bbb;padding:.1rem .8rem"
THINKING: Final = f"display:inline-block;border:1px dashed #888;padding:0 .4em;font-style:italic;color:{THINKING_INK}"
BAR: Final = "display:inline-block;width:12em;height:.9em;margin:0 .5em;vertical-align:middle;border:1px solid #bbb"


@dataclass(frozen=True)
class Scale:
    """Which projections the colours run from and to; beyond them the colour stays full.

    Attributes:
        middle: what white stands for, in residual-stream units.
        half: blue is full at middle - half, vermillion at middle + half.

    Raises:
        MonitoringError: a middle that is not finite, or a half that is not finite and above zero.
    """

    middle: float
    half: float

    def __post_init__(self) -> None:
        if not isfinite(self.middle):
            raise MonitoringError(f"the middle of a colour scale must be finite, not {self.middle}: leave it to scale_of(values)")
        if not (isfinite(self.half) and self.half > 0):
            raise MonitoringError(f"the half of a colour scale must be finite and above 0, not {self.half}: try scale_of(values)")

    def colour(self, value: float) -> str | None:
        """The background of a value as #rrggbb; None for NaN."""
        if isnan(value):
            return None
        place = min(max((value - self.middle) / self.half, -1.0), 1.0)
        mixed = (round(255 + abs(place) * FULL * (hue - 255)) for hue in (HIGH if place > 0 else LOW))
        return "#" + "".join(f"{part:02x}" for part in mixed)

    def number(self, value: float) -> str:
        """A value with its sign, to at least two decimals and to a hundredth of the scale."""
        digits = min(max(2, 2 - floor(log10(self.half))), 12)
        return "n/a" if isnan(value) else f"{value:+z.{digits}f}"

    @property
    def marks(self) -> tuple[float, float, float]:
        """The lowest, middle and highest value of the legend."""
        return self.middle - self.half, self.middle, self.middle + self.half


def scale_of(values: Float[Tensor, " position"]) -> Scale:
    """A scale on which 95 % of the values lie, around their median: outliers take the full colour.

    Values that are not finite are ignored. Where the 95 % do not differ the farthest value decides, and where no two values
    differ half is 1. For colours that compare across conversations, make one scale from all their values.
    """
    told = values.detach().cpu().double()
    told = told[told.isfinite()]
    if not len(told):
        return Scale(0.0, 1.0)
    middle = float(told.quantile(0.5))
    distance = (told - middle).abs()
    return Scale(middle, float(distance.quantile(0.95)) or float(distance.max()) or 1.0)


@dataclass(frozen=True)
class _Token:
    """What is shown of a token; `text` is visible, not escaped."""

    text: str
    label: str
    colour: str | None


@dataclass(frozen=True)
class _View:
    """One probe's column of a reading."""

    reading: Reading
    probe: str
    values: list[float]
    scale: Scale

    def mean(self, part: Part) -> str:
        """Over a message's tokens without the thinking."""
        said = [v for start, stop, thinking in _intervals(part) if not thinking for v in self.values[start:stop]]
        return f"mean {self.scale.number(_mean(said))}"

    def sections(self, part: Part) -> list[tuple[bool, list[_Token]]]:
        """The tokens of a message in turn, and whether they are thinking."""
        return [(thinking, self.tokens(start, stop)) for start, stop, thinking in _intervals(part)]

    def tokens(self, start: int, stop: int) -> list[_Token]:
        """Tokens of empty text (parts of a character) are shown with the next one that has any, coloured by their mean."""
        found: list[_Token] = []
        waiting: list[float] = []
        for piece, value in zip(self.reading.pieces[start:stop], self.values[start:stop], strict=True):
            waiting.append(value)
            if piece:
                label = ", ".join(map(self.scale.number, waiting))
                found.append(_Token(visible(piece), label, self.scale.colour(_mean(waiting))))
                waiting = []
        return found

    @property
    def title(self) -> str:
        return visible(f"{self.reading.name}: projection on {self.probe}").replace("\n", "\N{SYMBOL FOR LINE FEED}")


def _heading(part: Part) -> str:
    return f"turn {part.turn}, {part.role}" if part.turn else part.role


def _view(reading: Reading, probe: str | None, scale: Scale | None) -> _View:
    name = reading.probes[0] if probe is None else probe
    if name not in reading.probes:
        raise UnknownNameError("probe", name, reading.probes)
    column = reading.values[:, reading.probes.index(name)].detach().cpu().double()
    shown = torch.cat([column[:0], *(column[p.start : p.stop] for p in reading.parts)])
    return _View(reading, name, column.tolist(), scale_of(shown) if scale is None else scale)


def _intervals(part: Part) -> list[tuple[int, int, bool]]:
    """[start, stop) of what a message consists of, and whether it is thinking."""
    a, b = part.thinking or (part.stop, part.stop)
    cuts = (part.start, a, False), (a, b, True), (b, part.stop, False)
    return [cut for cut in cuts if cut[0] < cut[1]]


def _mean(values: Sequence[float]) -> float:
    told = [v for v in values if not isnan(v)]
    return sum(told) / len(told) if told else nan


def visible(text: str) -> str:
    """Text whose control characters (but newlines) and invisible format characters (but joiners) are replaced by visible signs."""
    return "".join(c if c in KEPT or category(c) not in INVISIBLE else _sign(ord(c)) for c in text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of the control characters
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else f"⟨U+{code:04X}⟩"


def html_of(reading: Reading, probe: str | None = None, scale: Scale | None = None) -> str:
    """An HTML fragment: a legend, then every message under its heading, its tokens coloured and told by value on hovering.

    The template's marks are not shown, thinking stands in a box. A character of several tokens lists all their values; a
    character that the message breaks off within is not shown, but counts in the message's mean.

    Args:
        probe: default: the first one.
        scale: default: `scale_of` the values that are shown. Give the same one to compare conversations.

    Returns:
        A `<div>` with inline styles: no scripts, nothing loaded.

    Raises:
        UnknownNameError: the reading has no such probe.
    """
    view = _view(reading, probe, scale)
    messages = "".join(_html_message(view, part) for part in reading.parts)
    return f'<div style="{OUTER}">{_html_legend(view)}{messages}</div>'


def _html_legend(view: _View) -> str:
    low, middle, high = map(view.scale.number, view.scale.marks)
    colours = ",".join(str(view.scale.colour(v)) for v in view.scale.marks)
    bar = f'<span style="{BAR};background:linear-gradient(to right,{colours})"></span>'
    return f'<div><b>{escape(view.title)}</b></div><div style="{META}">{low}{bar}{high} (white: {middle})</div>'


def _html_message(view: _View, part: Part) -> str:
    heading = f'<b>{escape(_heading(part))}</b> <span style="{META}">{view.mean(part)}</span>'
    body = "".join(_html_section(thinking, tokens) for thinking, tokens in view.sections(part))
    return f'<div style="margin-top:.8rem">{heading}</div><div dir="auto" style="{BODY}">{body}</div>'


def _html_section(thinking: bool, tokens: Sequence[_Token]) -> str:
    inner = "".join(map(_html_token, tokens))
    return f'<span style="{THINKING}"><b dir="ltr" style="{META}">thinking </b>{inner}</span>' if thinking else inner


def _html_token(token: _Token) -> str:
    colour = f"background:{token.colour};" if token.colour else ""
    width = "" if token.text.strip("\n") else "padding-left:.6em"  # a line break has none to colour or to hover over
    return f'<span title="{token.label}" style="{colour}{width}">{escape(token.text)}</span>'


def text_of(reading: Reading, probe: str | None = None, scale: Scale | None = None) -> "Text":
    """The same for a terminal: bold headings with the means, tokens on coloured backgrounds, thinking in double brackets.

    Tokens that are nothing but line breaks get a sign to carry their colour. Without colours the means remain.

    Args:
        probe: default: the first one.
        scale: default: `scale_of` the values that are shown.

    Raises:
        UnknownNameError: the reading has no such probe.
    """
    from rich.text import Text

    view = _view(reading, probe, scale)
    text = Text(f"{view.title}\n", style="")
    for mark in view.scale.marks:
        text.append(f" {view.scale.number(mark)} ", _style(view.scale.colour(mark)))
    for part in reading.parts:
        text.append(f"\n\n{_heading(part)}", "bold").append(f"  {view.mean(part)}\n")
        for thinking, tokens in view.sections(part):
            slant = "italic" if thinking else ""
            text.append("⟦thinking: " if thinking else "", slant)
            for token in tokens:
                shown = token.text if token.text.strip("\n") else token.text.replace("\n", "↵\n")
                text.append(shown, f"{slant} {_style(token.colour)}".strip())
            text.append("⟧" if thinking else "", slant)
    return text


def _style(colour: str | None) -> str:
    return f"{INK} on {colour}" if colour else ""


@dataclass(frozen=True)
class Shown:
    """HTML that notebooks display when it is the last value of a cell."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def notebook(reading: Reading, probe: str | None = None, scale: Scale | None = None) -> Shown:
    """A reading for the last line of a notebook's cell; arguments and errors are those of `html_of`.

    Raises:
        UnknownNameError: the reading has no such probe.
    """
    return Shown(html_of(reading, probe, scale))
