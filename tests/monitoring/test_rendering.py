"""Coloured conversations: everything said is shown and nothing else, whatever the text; colours are fair and readable."""

import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from math import inf, nan
from unicodedata import category

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from persona_lens.errors import MonitoringError, UnknownNameError
from persona_lens.models import Interval
from persona_lens.monitoring.reading import Part, Reading
from persona_lens.monitoring.rendering import INK, KEPT, THINKING_INK, Scale, html_of, notebook, scale_of, text_of, visible

UNIT = Scale(0.0, 1.0)
TAGS = {"div", "span", "b"}
ATTRIBUTES = {"style", "title", "dir"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror="',
    "'&amp;",
    "\x1b]0;x\x07",
    "\x9b31m",
    "\u202egnp",
    "\ud800",
    "\u2028",
    "\x00",
)


class Fragment(HTMLParser):
    """What a browser would see: tags with attributes, tokens (text, value, style), the rest of the text, and what is boxed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[dict[str, str | None]] = []
        self.tokens: list[tuple[str, str, str]] = []
        self.labels: list[str] = []
        self.boxed: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(dict(attrs))
        if "title" in dict(attrs):
            self.tokens.append(("", str(dict(attrs)["title"]), str(dict(attrs)["style"])))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "title" not in self.open[-1]:
            self.labels.append(data)
            return
        text, value, style = self.tokens[-1]
        self.tokens[-1] = text + data, value, style
        if any("dashed" in str(a.get("style")) for a in self.open[:-1]):
            self.boxed.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    handle_decl = unknown_decl = handle_pi = handle_comment

    @property
    def text(self) -> str:
        return "".join(text for text, _, _ in self.tokens)

    def colours(self) -> list[str | None]:
        return [m[1] if (m := re.search("background:(#[0-9a-f]{6})", style)) else None for _, _, style in self.tokens]


def a_reading(
    pieces: Sequence[str], values: Sequence[float], parts: Sequence[Part] = (), probes: tuple[str, ...] = ("evil",)
) -> Reading:
    columns = torch.tensor(values).reshape(-1, 1) * torch.arange(1.0, len(probes) + 1)
    parts = tuple(parts) or (Part(1, "user", 0, len(pieces)),)
    return Reading("chat", probes, tuple(range(len(pieces))), tuple(pieces), parts, columns)


def a_conversation(thinking: Interval | None = (8, 12)) -> Reading:
    pieces = [
        "<s>",
        "Be",
        " kind.",
        "<u>",
        "Hi",
        "\n\n",
        "there",
        "<a>",
        "<think>",
        "hm",
        "\n",
        "</think>",
        "\n",
        "Hello",
        "!",
        "</s>",
    ]
    values = [99.0, 0.5, 1.5, 99.0, -1.0, 0.0, 1.0, 99.0, 7.0, 8.0, 9.0, 8.0, 2.0, 3.0, 4.0, 99.0]
    parts = [Part(0, "system", 1, 3), Part(1, "user", 4, 7), Part(1, "assistant", 8, 15, thinking)]
    return a_reading(pieces, values, parts)


def shades(values: Sequence[float], scale: Scale = UNIT) -> list[tuple[int, ...]]:
    """The colours of tokens in HTML, as numbers from 0 to 255."""
    found = Fragment(html_of(a_reading(["x"] * len(values), values), scale=scale)).colours()
    return [tuple(bytes.fromhex(str(c)[1:])) for c in found]


def luminance(colour: str) -> float:
    parts = [p / 255 for p in bytes.fromhex(colour[1:])]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_what_was_said_is_recovered_from_the_html() -> None:
    reading = a_conversation()
    shown = Fragment(html_of(reading))
    said = [reading.pieces[i] for part in reading.parts for i in range(part.start, part.stop)]
    assert [text for text, _, _ in shown.tokens] == said
    assert shown.text == "Be kind.Hi\n\nthere<think>hm\n</think>\nHello!"
    assert "white-space:pre-wrap" in html_of(reading)


def test_headings_name_turn_and_role_with_the_mean_without_thinking() -> None:
    labels = Fragment(html_of(a_conversation())).labels
    heads = [(role, mean) for role, mean in zip(labels, labels[2:], strict=False) if mean.startswith("mean")]
    assert heads == [("system", "mean +1.00"), ("turn 1, user", "mean +0.00"), ("turn 1, assistant", "mean +3.00")]
    assert "mean +5.86" in html_of(a_conversation(thinking=None))  # all seven tokens
    for heading in ("system  mean +1.00\n", "turn 1, user  mean +0.00\n", "turn 1, assistant  mean +3.00\n"):
        assert heading in text_of(a_conversation()).plain


def test_thinking_is_shown_apart() -> None:
    shown = Fragment(html_of(a_conversation()))
    assert "".join(shown.boxed) == "<think>hm\n</think>"
    assert shown.labels.count("thinking ") == 1
    plain = Fragment(html_of(a_conversation(thinking=None)))
    assert (plain.boxed, plain.text) == ([], shown.text)
    text = text_of(a_conversation())
    assert "⟦thinking: <think>hm↵\n</think>⟧↵\nHello!" in text.plain
    slanted = "".join(text.plain[s.start : s.end] for s in text.spans if "italic" in str(s.style))
    assert slanted == "⟦thinking: <think>hm↵\n</think>⟧"


def test_values_stand_in_titles() -> None:
    tokens = Fragment(html_of(a_reading(["a", "b", "c"], [3.214, -0.5, -0.001]))).tokens
    assert [value for _, value, _ in tokens] == ["+3.21", "-0.50", "+0.00"]
    fine = Fragment(html_of(a_reading(["a", "b"], [0.0123, 0.0124]), scale=Scale(0.0, 0.01))).tokens
    assert [value for _, value, _ in fine] == ["+0.0123", "+0.0124"]


def test_probes_are_chosen_by_name() -> None:
    reading = a_reading(["a"], [1.5], probes=("evil", "calm"))
    assert html_of(reading) == html_of(reading, "evil")
    assert Fragment(html_of(reading, "calm")).tokens[0][1] == "+3.00"
    assert "projection on calm" in html_of(reading, "calm")
    assert "projection on calm" in text_of(reading, "calm").plain
    for draw in (html_of, text_of, notebook):
        with pytest.raises(UnknownNameError, match=r"unknown probe 'clam': did you mean calm\?"):
            draw(reading, "clam")


def test_colours_run_from_blue_through_white_to_vermillion() -> None:
    low, middle, high = shades([-1.0, 0.0, 1.0])
    assert middle == (255, 255, 255)
    for end, hue in ((low, (0x00, 0x72, 0xB2)), (high, (0xD5, 0x5E, 0x00))):
        shares = [(255 - e) / (255 - h) for e, h in zip(end, hue, strict=True)]
        assert shares == pytest.approx([shares[0]] * 3, abs=0.01)
        assert shares[0] > 0.5


def test_colours_are_monotone_symmetric_and_clipped() -> None:
    scale = Scale(2.0, 4.0)
    up, down = (shades([2.0 + sign * k / 5 for k in range(21)], scale) for sign in (1, -1))
    for side in (up, down):
        assert all(a[i] >= b[i] for a, b in pairwise(side) for i in range(3))
        assert len(set(side)) == 21
    full = (255 - up[-1][2]) / 255, (255 - down[-1][0]) / 255  # each hue has one channel at zero
    for k in range(21):
        assert (255 - up[k][2]) / 255 == pytest.approx(full[0] * k / 20, abs=0.004)
        assert 255 - up[k][2] == 255 - down[k][0]
    assert shades([6.0, 7.0, 1e30, inf], scale) == [up[-1]] * 4
    assert shades([-2.0, -3.0, -1e30, -inf], scale) == [down[-1]] * 4


def test_both_inks_are_readable_on_every_colour() -> None:
    backgrounds = {str(UNIT.colour(k / 50)) for k in range(-50, 51)}
    ratios = [(luminance(b) + 0.05) / (luminance(ink) + 0.05) for b in backgrounds for ink in (INK, THINKING_INK)]
    assert min(ratios) >= 4.5
    html = html_of(a_conversation())
    assert re.findall(r"[;\"]color:(#\w+)", html).count(INK) == 1
    assert THINKING_INK in html


def test_values_that_are_missing_have_no_colour_and_no_weight() -> None:
    reading = a_reading(
        ["a", "b", "c"], [1.0, nan, 3.0], [Part(1, "user", 0, 2), Part(1, "assistant", 1, 2), Part(2, "user", 2, 2)]
    )
    shown = Fragment(html_of(reading, scale=UNIT))
    assert shown.colours()[0] is not None
    assert shown.colours()[1:] == [None, None]
    assert [value for _, value, _ in shown.tokens] == ["+1.00", "n/a", "n/a"]
    assert [label for label in shown.labels if label.startswith("mean")] == ["mean +1.00", "mean n/a", "mean n/a"]
    text = text_of(a_reading(["a"], [nan]), scale=UNIT)
    assert [s for s in text.spans if s.end == len(text)] == []


def test_the_legend_tells_the_scale() -> None:
    html = html_of(a_reading(["a"], [0.0]), scale=Scale(1.0, 2.5))
    shown = Fragment(html)
    assert shown.labels[:3] == ["chat: projection on evil", "-1.50", "+3.50 (white: +1.00)"]
    low, middle, high = (UNIT.colour(v) for v in (-1.0, 0.0, 1.0))
    assert f"linear-gradient(to right,{low},{middle},{high})" in html
    text = text_of(a_reading(["a"], [0.0]), scale=Scale(1.0, 2.5))
    assert text.plain.startswith("chat: projection on evil\n -1.50  +1.00  +3.50 \n\nturn 1, user")
    assert [str(s.style) for s in text.spans[:3]] == [f"{INK} on {c}" for c in (low, middle, high)]


def test_the_scale_is_robust() -> None:
    values = torch.cat([torch.arange(-50.0, 51.0) + 3.0, torch.tensor([nan, inf, -inf])])
    assert scale_of(values) == Scale(3.0, 48.0)  # distances 0, 1, 1, ... 50, 50: the 95th percentile is the 97th of 101
    assert scale_of(torch.cat([values, torch.tensor([1e6])])).half < 50
    assert scale_of(torch.zeros(0)) == scale_of(torch.tensor([nan])) == Scale(0.0, 1.0)
    assert scale_of(torch.full((9,), 2.0)) == Scale(2.0, 1.0)
    assert scale_of(torch.tensor([2.0] * 99 + [7.0])) == Scale(2.0, 5.0)
    assert scale_of(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True)).middle == 2.0


@given(st.lists(st.floats(width=32), max_size=30))
def test_a_scale_of_any_values_has_a_half(values: list[float]) -> None:
    scale = scale_of(torch.tensor(values))
    assert scale.half > 0
    assert all(re.fullmatch(r"[+-]\d+\.\d{2,12}", scale.number(m)) for m in scale.marks)


def test_the_default_scale_looks_at_what_is_shown() -> None:
    reading = a_conversation()
    shown = torch.cat([reading.values[p.start : p.stop, 0] for p in reading.parts])
    assert html_of(reading) == html_of(reading, scale=scale_of(shown)) != html_of(reading, scale=scale_of(reading.values[:, 0]))


@pytest.mark.parametrize(("middle", "half"), [(nan, 1.0), (inf, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, nan), (0.0, inf)])
def test_scales_without_extent_are_refused(middle: float, half: float) -> None:
    with pytest.raises(MonitoringError, match=r"of a colour scale must be finite.*not (nan|inf|0\.0|-1\.0): .*scale_of"):
        Scale(middle, half)


def test_half_a_character_is_shown_with_its_other_half() -> None:
    reading = a_reading(["a", "", "", "語", "b", ""], [0.0, -1.0, -0.5, 0.9, 0.0, 0.6])
    tokens = Fragment(html_of(reading, scale=UNIT)).tokens
    assert [(text, value) for text, value, _ in tokens] == [("a", "+0.00"), ("語", "-1.00, -0.50, +0.90"), ("b", "+0.00")]
    assert Fragment(html_of(reading, scale=UNIT)).colours()[1] == UNIT.colour(-0.2)
    assert "mean +0.00" in html_of(reading, scale=UNIT)  # of all six
    assert text_of(reading).plain.endswith("\na語b")


def test_line_breaks_can_be_seen_and_hovered_over() -> None:
    reading = a_reading(["a", "\n\n", "b\n", " "], [0.0, 1.0, 1.0, 1.0])
    styles = [style for _, _, style in Fragment(html_of(reading)).tokens]
    assert ["padding-left" in style for style in styles] == [False, True, False, False]
    assert text_of(reading).plain.endswith("\na↵\n↵\nb\n ")


def test_hostile_pieces_are_harmless() -> None:
    reading = a_reading(HOSTILE, [0.0] * len(HOSTILE))
    html, text = html_of(reading), text_of(reading).plain
    assert "<script" not in html
    assert "<img" not in html
    expected = [*HOSTILE[:3], "␛]0;x␇", "⟨U+009B⟩31m", "⟨U+202E⟩gnp", "⟨U+D800⟩", "⟨U+2028⟩", "␀"]
    assert [t for t, _, _ in Fragment(html).tokens] == expected
    assert text.endswith("".join(expected))
    assert html.encode()
    assert visible("\t\r\x7f\u200b\ufeff\U000e0041") == "␉␍␡⟨U+200B⟩⟨U+FEFF⟩⟨U+E0041⟩"
    assert visible("a\u200cb\u200d \n\u00a0é") == "a\u200cb\u200d \n\u00a0é"


def test_hostile_names_are_harmless() -> None:
    reading = Reading("<b id=x>\x1b", ("<i>\n\u202e&",), (0,), ("a",), (Part(1, "user", 0, 1),), torch.zeros(1, 1))
    title = "<b id=x>␛: projection on <i>␊⟨U+202E⟩&"
    assert Fragment(html_of(reading)).labels[0] == title
    assert text_of(reading).plain.startswith(title + "\n")


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=())), st.floats(width=32))), st.text(st.characters()))
def test_no_text_becomes_markup_or_steers_a_terminal(tokens: list[tuple[str, float]], name: str) -> None:
    pieces, values = [t for t, _ in tokens], [v for _, v in tokens]
    cut = len(pieces) // 2
    parts = [Part(1, "user", 0, cut), Part(1, "assistant", cut, len(pieces), (cut, (cut + len(pieces)) // 2))]
    reading = a_reading(pieces, values, parts, (name,))
    html, text = html_of(reading), text_of(reading)
    shown = Fragment(html)
    assert {tag for tag, _ in shown.tags} <= TAGS
    assert {key for _, attributes in shown.tags for key in attributes} <= ATTRIBUTES
    assert [t for t, _, _ in shown.tokens] == [visible(p) for p in pieces if p]
    assert not [c for c in html + text.plain if category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and c not in KEPT]
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system="truecolor", width=80).print(text)
    assert not re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).count("\x1b")


def test_terminals_show_the_same_colours() -> None:
    reading = a_reading(["low", "high"], [-1.0, 1.0])
    text = text_of(reading, scale=UNIT)
    styles = {text.plain[s.start : s.end]: str(s.style) for s in text.spans}
    assert (styles["low"], styles["high"]) == tuple(f"{INK} on {UNIT.colour(v)}" for v in (-1.0, 1.0))
    file = io.StringIO()
    Console(file=file, width=60, color_system=None).print(text_of(a_conversation()))
    assert "\x1b" not in file.getvalue()
    assert "turn 1, assistant  mean +3.00" in file.getvalue()


def test_notebooks_display_the_html() -> None:
    reading = a_conversation()
    assert notebook(reading, "evil", UNIT)._repr_html_() == html_of(reading, "evil", UNIT)
    assert not re.findall(r"<script|<style|src=|href=|url\(|class=", html_of(reading))
