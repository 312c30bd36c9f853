"""HTML pages: one file with its style and its pictures inside, nothing fetched, light and dark.

Commands supply sections; this module knows nothing of what they show. In every picture what was predicted is drawn
as an outline and what was measured is filled.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_tpu.assets import resolve

WIDTH = 760  # of a picture, in its own units; the page scales it
LETTER = 7.0  # the width of a letter at the size of labels, on average
COLOURS = 8  # of the style: c0 … c7
STYLE = "bundled:page.css"


@dataclass(frozen=True)
class Section:
    title: str
    body: str  # HTML, made by the functions below


def page(title: str, about: str, sections: Sequence[Section]) -> str:
    """The whole file. A section without a title stands without a heading."""
    parts = [(f"<h2>{escape(one.title)}</h2>\n" if one.title else "") + one.body for one in sections if one.body]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{resolve(STYLE).read_text()}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="about">{escape(about)}</p>\n' + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    return html.escape(str(text))


# --- words and numbers ---


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    return '<ul class="note">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def facts(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Large figures side by side: (name, figure, what stands under it, "good", "bad" or "")."""
    cells = (
        f'<div><dt>{escape(name)}</dt><dd class="{kind}">{escape(figure)}</dd>'
        f'<dd class="more">{escape(more)}</dd></div>'
        for name, figure, more, kind in rows
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        marked = (f'<{tag}{" class=r" if at in right else ""}>{escape(cell)}</{tag}>' for at, cell in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def details(summary: str, body: str) -> str:
    """What is shown when its summary is clicked; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Whose colour is whose, above pictures that share them: (name, colour)."""
    swatch = '<svg class="swatch" viewBox="0 0 12 12"><rect class="c{} measured" width="12" height="12"/></svg>'
    return '<p class="legend">' + "".join(
        f"<span>{swatch.format(colour % COLOURS)} {escape(name)}</span>" for name, colour in names
    ) + "</p>"


# --- pictures ---


@dataclass(frozen=True)
class Bar:
    label: str
    value: float | None  # None: an empty line with its text
    text: str
    colour: int = 0
    measured: bool = False
    start: float = 0.0  # where a range is shown: the bar reaches from here to `value`


def bars(rows: Sequence[Bar], label: str) -> str:
    """Horizontal bars from one zero, each with its label and its figure."""
    left = 14 + LETTER * max(len(row.label) for row in rows)
    right = 14 + LETTER * max(len(row.text) for row in rows)
    most = max((row.value for row in rows if row.value is not None), default=1.0) or 1.0
    scale = (WIDTH - left - right) / most
    drawn = []
    for at, row in enumerate(rows):
        y = at * 24
        drawn.append(_text(left - 8, y + 15, row.label, "end"))
        end = left
        if row.value is not None:
            x, end = left + row.start * scale, left + row.value * scale
            drawn.append(_rect(x, y + 3, end - x, 17, row.colour, row.measured, f"{row.label}: {row.text}"))
        drawn.append(_text(end + 6, y + 15, row.text))
    drawn.append(f'<path class="axis" d="M{left:.1f} 0V{24 * len(rows)}"/>')
    return _svg(24 * len(rows) + 4, label, drawn)


def stack(parts: Sequence[tuple[str, float, int]], limit: float, unit: str, label: str) -> str:
    """One bar of (name, value, colour) laid end to end, against a limit; the names below, in columns."""
    total = sum(value for _, value, _ in parts)
    scale = (WIDTH - 20) / (max(total, limit) * 1.02)
    drawn, x = [], 10.0
    for name, value, colour in parts:
        drawn.append(_rect(x, 22, value * scale, 34, colour, False, f"{name}: {value:.2f} {unit}"))
        x += value * scale
    at = 10 + limit * scale
    drawn.append(f'<path class="limit" d="M{at:.1f} 14V64"/>')
    drawn.append(_text(at - 5, 13, f"limit {limit:.2f} {unit}", "end", "soft"))
    drawn.append(_text(10, 13, f"{total:.1f} {unit} in all"))
    columns, down = 3, -(-len(parts) // 3)
    for number, (name, value, colour) in enumerate(parts):
        column, row = divmod(number, down)
        left, y = 10 + column * (WIDTH - 20) / columns, 76 + row * 19
        drawn.append(_rect(left, y, 11, 11, colour, False, name))
        drawn.append(_text(left + 18, y + 10, name))
        drawn.append(_text(left + (WIDTH - 20) / columns - 24, y + 10, f"{value:.2f}", "end", "soft"))
    return _svg(80 + down * 19, label, drawn)


def histogram(edges: Sequence[float], counts: Sequence[int], marks: Sequence[tuple[float, str]], label: str) -> str:
    """Columns over an axis from 0; `marks` are lines across it, each with its words."""
    left, wide, top, bottom = 48, WIDTH - 48 - 20, 14 + 16 * len(marks), 236
    high, most = edges[-1], max(counts) or 1
    drawn = [f'<path class="axis" d="M{left} {bottom}H{left + wide}"/>']
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        tall = count / most * (bottom - top)
        told = f"{start:,.0f} to {end:,.0f}: {count:,}"
        x, thick = left + start / high * wide, (end - start) / high * wide - 1
        drawn.append(_rect(x, bottom - tall, thick, tall, 0, True, told))
    for value in Axis("", 0, high).ticks():
        drawn.append(_text(left + value / high * wide, bottom + 17, _short(value), "middle", "soft"))
    for at, (value, words) in enumerate(marks):
        x, y = left + min(value / high, 1) * wide, 12 + 16 * at
        drawn += [f'<path class="limit" d="M{x:.1f} {y + 3}V{bottom}"/>',
                  _text(x - 5 if x > WIDTH / 2 else x + 5, y, words, "end" if x > WIDTH / 2 else "start")]  # fmt: skip
    drawn += [_text(left - 6, top + 8, f"{most:,}", "end", "soft"), _text(left - 6, bottom, "0", "end", "soft")]
    return _svg(bottom + 26, label, drawn)


def sheets(rows: Sequence[Sequence[tuple[int, str]]], capacity: int, label: str) -> str:
    """One line a sheet, filled from the left by its rows of (tokens, words); what stays empty is padding."""
    left, wide, tall = 48, WIDTH - 48 - 20, 13
    drawn = []
    for number, sheet in enumerate(rows):
        y, x = number * tall, float(left)
        drawn += [_text(left - 6, y + 10, str(number), "end", "soft"),
                  f'<path class="axis" d="M{left} {y + 1.5}H{left + wide}V{y + tall - 1.5}H{left}Z"/>']  # fmt: skip
        for at, (tokens, told) in enumerate(sheet):
            drawn.append(_rect(x, y + 1.5, max(1.5, tokens / capacity * wide - 1), tall - 3, at % COLOURS, True, told))
            x += tokens / capacity * wide
    return _svg(len(rows) * tall + 4, label, drawn)


def tokens(turns: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """Turns of (caption, pieces); a piece is its text and the kinds it is of: trained, special."""
    parts = (
        f'<div class="turn"><p class="note">{escape(caption)}</p><pre>'
        + "".join(f'<span class="{kinds}">{escape(text)}</span>' for text, kinds in pieces) + "</pre></div>"
        for caption, pieces in turns
    )
    return "".join(parts)


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    label: str  # written beside it when not empty
    told: str  # shown when pointed at
    colour: int = 0
    radius: float = 5.0
    measured: bool = False
    empty: bool = False  # a state of its own, like "does not fit"


@dataclass(frozen=True)
class Axis:
    label: str
    low: float
    high: float
    log: bool = False
    marks: Sequence[tuple[float, str]] = ()  # ticks with words of their own, in place of round numbers

    def place(self, value: float) -> float:
        """From 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.log:
            low, high = math.floor(math.log10(self.low)), math.floor(math.log10(self.high))
            every = [step * 10.0**n for n in range(low, high + 1) for step in (1, 2, 5)]
            decades = [value for value in every[::3] if self.low <= value <= self.high]
            return decades if len(decades) > 1 else [value for value in every if self.low <= value <= self.high]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
        step *= next(more for more in (1, 2, 5, 10) if (self.high - self.low) / (step * more) <= 7)
        count = math.floor((self.high - self.low) / step + 1e-9)
        return [self.low + step * n for n in range(count + 1)]

    def labels(self) -> list[tuple[float, str]]:
        return list(self.marks) or [(value, _short(value)) for value in self.ticks()]


@dataclass(frozen=True)
class Curve:
    points: Sequence[tuple[float, float]]
    colour: int | None = None  # None: a line of reference
    label: str = ""
    dashed: bool = False  # what lies under it shows


def plot(x: Axis, y: Axis, curves: Sequence[Curve], dots: Sequence[Dot], label: str, height: int = 330) -> str:
    """Lines and dots over two axes."""
    left, bottom, top, wide = 64, height - 42, 14, WIDTH - 64 - 20

    def at(one: tuple[float, float]) -> tuple[float, float]:
        return left + x.place(one[0]) * wide, bottom - y.place(one[1]) * (bottom - top)

    drawn = [f'<path class="axis" d="M{left} {top}V{bottom}H{left + wide}"/>']
    for value, words in x.labels():
        px, _ = at((value, y.low))
        drawn += [f'<path class="axis" d="M{px:.1f} {bottom}v4"/>',
                  _text(px, bottom + 17, words, "middle", "soft")]  # fmt: skip
    for value, words in y.labels():
        _, py = at((x.low, value))
        drawn += [f'<path class="axis" d="M{left} {py:.1f}H{left + wide}"/>',
                  _text(left - 7, py + 4, words, "end", "soft")]  # fmt: skip
    drawn.append(_text(left + wide, bottom + 35, x.label, "end", "soft"))
    drawn.append(_text(left + 6, top - 2, y.label, "start", "soft"))
    for curve in curves:
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in map(at, curve.points))
        kind = "ridge" if curve.colour is None else f"c{curve.colour} curve" + " dashed" * curve.dashed
        drawn.append(f'<path class="{kind}" d="M{path}"/>')
        if curve.label:
            px, py = at(curve.points[-1])
            drawn.append(_text(px - 4, py - 7, curve.label, "end"))
    for dot in sorted(dots, key=lambda one: -one.radius):
        px, py = at((dot.x, dot.y))
        state = "empty" if dot.empty else "measured" if dot.measured else "predicted"
        drawn.append(f'<circle class="c{dot.colour} {state}" cx="{px:.1f}" cy="{py:.1f}" r="{dot.radius:.1f}">'
                     f"<title>{escape(dot.told)}</title></circle>")  # fmt: skip
        if dot.label:
            side = "end" if px > left + 0.6 * wide else "start"
            drawn.append(_text(px + (-1 if side == "end" else 1) * (dot.radius + 4), py + 4, dot.label, side))
    return _svg(height, label, drawn)


def standalone(svg: str) -> str:
    """A picture with the page's own style inside, for a Markdown file to point at."""
    css = resolve(STYLE).read_text()
    (roots,) = re.findall(r":root \{.*?\n\}\n@media.*?\n\}\n", css, re.S)
    rules = [line.removeprefix("svg ") for line in css.splitlines() if line.startswith("svg .")]
    text = "text { font: 12px system-ui, sans-serif; fill: var(--fg); }"
    style = "\n".join([roots.strip(), "svg { background: var(--bg); }", text, *rules])
    return re.sub(r"(<svg [^>]*>)", lambda found: f"{found[1]}<style>{style}</style>", svg, count=1) + "\n"


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _svg(height: float, label: str, drawn: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(drawn)}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, colour: int, measured: bool, told: str) -> str:
    state = "measured" if measured else "predicted"
    return (
        f'<rect class="c{colour} {state}" x="{x:.1f}" y="{y:.1f}" width="{max(1.5, width):.1f}" height="{height:.1f}">'
        f"<title>{escape(told)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    more = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
