"""Pages: one file that fetches nothing, where predictions and measurements cannot be taken for each other."""

import re
from html.parser import HTMLParser

import pytest

from gemma_tpu.pages import page
from gemma_tpu.pages.page import Axis, Bar, Curve, Dot, Section

VOID = {"meta", "br", "hr", "img", "link"}


class Tags(HTMLParser):
    """Every tag is closed in the order it was opened; keeps tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check(text: str) -> Tags:
    """A page that stands alone."""
    found = Tags(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found.seen}
    fetched = [value for _, attributes in found.seen for name, value in attributes.items() if name in ("src", "href")]
    assert not fetched
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    return found


def drawn(text: str, tag: str) -> list[dict[str, str]]:
    return [attributes for seen, attributes in Tags(text).seen if seen == tag]


def test_a_page_stands_alone_and_says_what_it_was_given():
    text = page.page("A & B", "about <it>", [Section("First", page.paragraph("x < y")), Section("Empty", "")])
    words = "".join(check(text).words)
    assert "A & B" in words and "about <it>" in words and "x < y" in words
    assert "Empty" not in words  # a heading over nothing


def test_every_colour_of_the_light_style_has_another_value_in_the_dark_one():
    text = page.page("t", "", [])
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S))
    assert light.keys() == dark.keys() and all(light[name] != dark[name] for name in light)
    assert {f"c{n}" for n in range(page.COLOURS)} <= light.keys()
    pictures = re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    assert not re.search(r"#[0-9a-f]{6}", pictures)  # nothing is painted past the style


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_background(scheme):
    text = page.page("t", "", [])
    blocks = re.findall(r":root \{(.*?)\}", text, re.S)
    colours = dict(re.findall(r"--(\w+): (#\w+)", blocks[scheme == "dark"]))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(name: str, ground: str) -> float:
        a, b = sorted((luminance(colours[name]), luminance(colours[ground])))
        return (b + 0.05) / (a + 0.05)

    assert all(contrast(name, ground) >= 4.5 for name in ("fg", "soft", "good", "bad") for ground in ("bg", "card"))
    assert all(contrast(f"c{n}", "bg") >= 3 for n in range(page.COLOURS))


def test_bars_are_as_long_as_their_values_from_one_zero():
    text = page.bars([Bar("a", 10.0, "10"), Bar("b", 5.0, "5"), Bar("c", None, "none"), Bar("d", 10.0, "r", start=4.0)],
                     "told")  # fmt: skip
    a, b, d = drawn(text, "rect")
    assert float(a["width"]) == pytest.approx(2 * float(b["width"]), abs=0.2) and a["x"] == b["x"]
    assert float(d["width"]) == pytest.approx(0.6 * float(a["width"]), abs=0.2)
    assert float(d["x"]) + float(d["width"]) == pytest.approx(float(a["x"]) + float(a["width"]), abs=0.2)


def test_a_prediction_is_drawn_another_way_than_a_measurement():
    predicted, measured = drawn(page.bars([Bar("a", 1.0, "1"), Bar("b", 1.0, "1", measured=True)], ""), "rect")
    assert predicted["class"].split() == ["c0", "predicted"] and measured["class"].split() == ["c0", "measured"]
    dots = [Dot(1, 1, "", ""), Dot(2, 2, "", "", measured=True), Dot(2, 2, "", "", empty=True)]
    found = drawn(page.plot(Axis("x", 0, 3), Axis("y", 0, 3), [], dots, ""), "circle")
    assert [one["class"].split()[1] for one in found] == ["predicted", "measured", "empty"]


def test_a_stack_lies_end_to_end_and_its_limit_where_it_belongs():
    text = page.stack([("a", 3.0, 0), ("b", 1.0, 1)], 8.0, "GiB", "")
    a, b = drawn(text, "rect")[:2]
    assert float(b["x"]) == pytest.approx(float(a["x"]) + float(a["width"]), abs=0.2)
    limit = next(one for one in drawn(text, "path") if one["class"] == "limit")
    at = float(re.match(r"M([\d.]+)", limit["d"])[1])
    assert at - float(a["x"]) == pytest.approx(8 / 3 * float(a["width"]), rel=0.01)


def test_a_logarithmic_axis_puts_decades_at_equal_distances():
    axis = Axis("x", 1.0, 1000.0, log=True)
    assert [axis.place(v) for v in (1, 10, 100, 1000)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert axis.ticks() == [1, 10, 100, 1000]


@pytest.mark.parametrize("high", [0.3, 1.0, 7.0, 64.0, 13_700.0])
def test_a_linear_axis_has_a_few_round_ticks(high):
    ticks = Axis("x", 0.0, high).ticks()
    assert 3 <= len(ticks) <= 8 and ticks[0] == 0 and ticks[-1] <= high * (1 + 1e-9)


def test_whatever_a_label_holds_the_picture_stays_whole():
    hostile = '"></text><script>alert("1")</script>&'  # ends an attribute, a text, and what it stands in
    axes = Axis(hostile, 0, 1), Axis(hostile, 0, 1)
    parts = [
        page.bars([Bar(hostile, 1.0, hostile)], hostile), page.stack([(hostile, 1.0, 0)], 2.0, hostile, hostile),
        page.plot(*axes, [Curve([(0, 0), (1, 1)], 0, hostile)], [Dot(0.5, 0.5, hostile, hostile)], hostile),
        page.table([hostile], [[hostile]]), page.facts([(hostile, hostile, hostile, "")]), page.bullets([hostile]),
    ]  # fmt: skip
    found = check(page.page(hostile, hostile, [Section(hostile, "".join(parts))]))
    assert "".join(found.words).count(hostile) >= len(parts)
