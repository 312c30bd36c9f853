"""Text in aligned columns, for a terminal."""

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str]], right: Sequence[int] = (), indent: int = 2) -> list[str]:
    """Columns as wide as they must be; those in `right` end flush."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) if at in right else cell.ljust(width)
                  for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )  # fmt: skip
    return [" " * indent + line.rstrip() for line in lines]
