"""Whether the training data holds the problems: n-grams of words that they share.

Words are lower-cased runs of letters, digits and underscores, so that layout does not hide a copy. N-grams that
several problems share are their common form of words, not their content, and are left out.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tpu.schema import DataConfig

WORD = re.compile(r"\w+")
N = 13  # words; what GPT-3's and later reports use
COMMON = 3  # problems that must share an n-gram for it to be a form of words
SHARE = 0.5  # of a text's n-grams; from here on it is called contaminated


@dataclass(frozen=True)
class Overlap:
    problem: str
    part: str  # prompt or reference
    share: float  # of its own n-grams that the training data has
    grams: int
    place: str  # the first row that holds one


@dataclass(frozen=True)
class Report:
    rows: int
    texts: int  # problems' texts that are long enough to have an n-gram of their own
    short: int  # those that are not
    overlaps: list[Overlap]  # with any shared n-gram, largest share first

    @property
    def contaminated(self) -> list[Overlap]:
        return [one for one in self.overlaps if one.share >= SHARE]

    def json(self) -> dict[str, Any]:
        return {
            "rows": self.rows, "texts": self.texts, "short": self.short, "n": N, "share": SHARE,
            "overlaps": [vars(one) for one in self.overlaps], "contaminated": [vars(one) for one in self.contaminated],
        }  # fmt: skip

    def lines(self) -> list[str]:
        held = len({one.problem for one in self.contaminated})
        touched = len({one.problem for one in self.overlaps})
        said = [
            f"contamination: {self.rows:,} rows of training data against {self.texts} texts of problems by {N}-grams "
            f"of words: {held} problems with at least {SHARE:.0%} of a text in the data, {touched} with any"
            + (f"; {self.short} texts are too short to say" if self.short else "")
        ]
        return said + [
            f"  {one.problem} {one.part}: {one.share:.0%} of {one.grams} n-grams, first in {one.place}"
            for one in self.overlaps[:5]
        ]


def check(texts: Mapping[tuple[str, str], str], rows: Iterable[tuple[str, str]]) -> Report:
    """`texts` by (problem, part); `rows` of training data as (place, text), read once."""
    grams = {key: set(_grams(text)) for key, text in texts.items()}
    problems: dict[str, Counter[str]] = {}
    for (_, part), own in grams.items():
        problems.setdefault(part, Counter()).update(own)
    common = {gram for counts in problems.values() for gram, count in counts.items() if count >= COMMON}
    grams = {key: own - common for key, own in grams.items()}
    owners: dict[str, list[tuple[str, str]]] = {}
    for key, own in grams.items():
        for gram in own:
            owners.setdefault(gram, []).append(key)
    seen: dict[tuple[str, str], set[str]] = {}
    first: dict[tuple[str, str], str] = {}
    count = 0
    for place, text in rows:
        count += 1
        for gram in _grams(text):
            for key in owners.get(gram, ()):
                seen.setdefault(key, set()).add(gram)
                first.setdefault(key, place)
    found = [Overlap(*key, len(shared) / len(grams[key]), len(grams[key]), first[key]) for key, shared in seen.items()]
    short = sum(not own for own in grams.values())
    found.sort(key=lambda one: (-one.share, one.problem, one.part))
    return Report(count, len(grams) - short, short, found)


def _grams(text: str) -> Iterator[str]:
    words = WORD.findall(text.lower())
    return (" ".join(words[at : at + N]) for at in range(len(words) - N + 1))


def training_rows(section: DataConfig) -> Iterator[tuple[str, str]]:
    """(file:line, text) of each row that a config's `data` section trains on."""
    from gemma_tpu.data.formats import Text
    from gemma_tpu.data.rows import Reader

    for row in Reader(section):
        text = row.parsed.text if isinstance(row.parsed, Text) else "\n".join(m["content"] for m in row.messages)
        yield row.place.text, text
