"""A tokenised row made visible, turn by turn: which tokens are trained, which are special.

It decodes the very ids and shows the very mask that training gets; nothing is rendered again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

BOLD, GREEN, DIM, RESET = "\x1b[1m", "\x1b[32m", "\x1b[36m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"  # around trained text where there are no colours


class Decoder(Protocol):
    @property
    def stop_ids(self) -> Sequence[int]: ...
    def decode(self, ids: list[int], skip_special: bool = False) -> str: ...


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind."""

    text: str
    trained: bool
    special: bool

    @property
    def kinds(self) -> str:
        return " ".join(name for name in ("trained", "special") if getattr(self, name))


@dataclass(frozen=True)
class Turn:
    pieces: list[Piece]
    tokens: int
    trained: int

    @property
    def caption(self) -> str:
        return f"{self.tokens:,} tokens, {self.trained:,} trained"


def turns(
    ids: Sequence[int] | np.ndarray, mask: Sequence[bool] | np.ndarray, tokenizer: Decoder
) -> list[Turn]:
    """The row cut where a turn has ended and a special token begins the next."""
    special: dict[int, bool] = {}
    runs: list[list[tuple[list[int], bool, bool]]] = [[]]
    ended = False
    for number, trained in zip(map(int, ids), map(bool, mask), strict=True):
        if number not in special:
            special[number] = tokenizer.decode([number], skip_special=True) == "" != tokenizer.decode([number])
        if ended and special[number]:
            runs.append([])
            ended = False
        ended |= number in tokenizer.stop_ids
        last = runs[-1][-1] if runs[-1] else None
        if last and last[1:] == (trained, special[number]) and not special[number]:
            last[0].append(number)
        else:
            runs[-1].append(([number], trained, special[number]))
    return [
        Turn([Piece(tokenizer.decode(run), trained, is_special) for run, trained, is_special in turn],
             sum(len(run) for run, _, _ in turn), sum(len(run) for run, trained, _ in turn if trained))
        for turn in runs if turn
    ]  # fmt: skip


def visible(text: str) -> str:
    """Nothing of the data may steer the terminal that shows it."""
    return "".join(letter if letter.isprintable() or letter == "\n" else _symbol(letter) for letter in text)


def in_terminal(row: Sequence[Turn], colour: bool) -> str:
    """The turns one under the other; without colours what is trained stands in ⟦brackets⟧."""
    lines = []
    for number, turn in enumerate(row, start=1):
        lines.append(f"-- turn {number}: {turn.caption}")
        text, inside = "", False
        for piece in turn.pieces:
            shown = visible(piece.text)
            if colour:
                style = (BOLD + GREEN if piece.trained else "") + (DIM if piece.special and not piece.trained else "")
                text += f"{style}{shown}{RESET}" if style else shown
                continue
            if piece.trained != inside:
                text += OPEN if piece.trained else CLOSE
                inside = piece.trained
            text += shown
        lines.append(text + (CLOSE if inside else ""))
    return "\n".join(lines)


def _symbol(letter: str) -> str:
    if letter == "\t":
        return "    "
    return chr(0x2400 + ord(letter)) if ord(letter) < 32 else "�"
