"""Prompts to measure with: random words of exactly so many tokens, or the user's own; none is ever used twice.

A server that keeps the prefixes of prompts answers a repeated one without computing it. So each point has prompts of
its own, drawn from a number that differs from run to run unless the user fixes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.sampling.asking import Messages, conversation
from gemma_tpu.storage.sources import local_folder

WORDS = 2048  # that prompts are made of: as many as this of the vocabulary
LEAST = 16
TRIES = 60


@dataclass(frozen=True)
class Prompt:
    content: str | Messages
    tokens: int | None  # by the tokenizer, with what it adds itself; None: not known
    output: int | None = None  # where the user's own row says it


class Vocabulary:
    """The tokenizer of the served model: how many tokens a text has, and texts of a given number."""

    def __init__(self, folder: str | Path):
        from tokenizers import Tokenizer

        file = local_folder(folder) / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"--tokenizer {folder}: no tokenizer.json there; name a folder (or hf://org/name) with one")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception on a corrupt file
            raise UserError(f"--tokenizer {file}: not a readable tokenizer ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.added = len(self._ids("a", True)) - len(self._ids("a", False))
        self._words = self._find_words()

    def count(self, text: str) -> int:
        """Of a text by itself, without a BOS."""
        return len(self._ids(text, False))

    def _ids(self, text: str, whole: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=whole).ids

    def _find_words(self) -> list[str]:
        """Words that stay what they are between spaces, so that a text has few tokens more than words."""
        special = set(self._tokenizer.get_added_tokens_decoder())
        every = sorted(set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - special)
        short: dict[str, None] = {}
        plain: dict[str, None] = {}
        for at in np.random.default_rng(0).permutation(len(every)):
            word = self._tokenizer.decode([every[at]]).strip()
            if word.isascii() and word.isalnum():
                plain[word] = None
                if self.count(f" {word}") == 1:
                    short[word] = None
            if len(short) == WORDS:
                break
        words = list(short if len(short) >= LEAST else plain)[:WORDS]
        if len(words) < LEAST:
            raise UserError(f"--tokenizer: {len(words)} words of letters in its vocabulary are too few for prompts")
        return words

    def text(self, tokens: int, random: np.random.Generator, start: str = "") -> str:
        """Random words of exactly `tokens` tokens, after `start`; no space at either end, which templates strip."""
        fixed = self.count(start) if start else 0
        for _ in range(TRIES):
            words = [self._words[at] for at in random.integers(0, len(self._words), max(1, tokens - fixed))]
            ids = self._ids(" ".join([start, *words] if start else words), False)[:tokens]
            text: str = self._tokenizer.decode(ids).strip()
            # Where a space is a token of its own, a cut behind one leaves a token too few.
            for end in ("", *words[:8]):
                if self.count(text + end) == tokens and text.startswith(start):
                    return f"{text}{end}"
        raise UserError(f"no text of exactly {tokens} tokens was found in {TRIES} tries with this tokenizer")


def random_prompts(
    vocabulary: Vocabulary, count: int, tokens: int, *, key: list[int], chat: bool, shared: int = 0, extra: int = 0,
    seen: set[str] | None = None,
) -> list[Prompt]:  # fmt: skip
    """`count` different prompts that the server reads as `tokens` tokens each, none of them in `seen`, to which they
    are added.

    `extra`: tokens that the server adds by itself (a template, a BOS). The first `shared` are the same in all.
    """
    own = tokens - extra
    if own < 1:
        raise UserError(f"a prompt of {tokens} tokens has no room: the server adds {extra} tokens of its own to each")
    if shared >= own:
        raise UserError(f"--shared-prefix {shared}: must be less than the {own} tokens of a prompt")
    random = np.random.default_rng(key)
    start = vocabulary.text(shared, random) if shared else ""
    seen = set() if seen is None else seen
    found: list[str] = []
    for _ in range(TRIES + 4 * count):
        if len(found) == count:
            break
        text = vocabulary.text(own, random, start)
        if text not in seen:
            seen.add(text)
            found.append(text)
    if len(found) < count:
        raise UserError(f"this tokenizer has too few texts of {own} tokens for {count} more prompts: make them longer")
    return [Prompt(conversation(text) if chat else text, tokens) for text in found]


def own_prompts(path: Path, chat: bool) -> Iterator[Prompt]:
    """Rows of {"prompt": text} or {"messages": [...]}, with {"output": tokens} where a row has its own length."""
    lines = plain.text(path, f"--data {path}").split("\n")
    found: list[Prompt] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            fault, prompt = _row(line, chat)
            faults += [f"line {number}: {fault}"] if fault else []
            found += [prompt] if prompt else []
    if faults:
        more = f"\n  … and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"--data {path}:\n  " + "\n  ".join(faults[:5]) + more)
    return iter(found)


def _row(line: str, chat: bool) -> tuple[str, Prompt | None]:
    try:
        row: Any = plain.json_value(line)
    except ValueError:
        return "no JSON", None
    if not isinstance(row, dict):
        return "no JSON object", None
    output = row.get("output")
    if output is not None and (type(output) is not int or output < 1):
        return f"output is {plain.shown(output)}: it must be an integer of at least 1", None
    if isinstance(row.get("messages"), list) and row["messages"]:
        if not chat:
            return "messages go to --endpoint chat", None
        return "", Prompt(row["messages"], None, output)
    if isinstance(row.get("prompt"), str) and row["prompt"]:
        text = row["prompt"]
        return "", Prompt(conversation(text) if chat else text, None, output)
    return 'needs {"prompt": text} or {"messages": [...]}', None
