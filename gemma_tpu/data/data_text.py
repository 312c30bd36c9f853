"""The figures of a corpus as the command `data` prints them: how long the rows are, what each layout would waste."""

from typing import Any

import numpy as np

from gemma_tpu.data.corpus import Prepared

BINS, WIDE = 20, 40
EIGHTHS = " ▏▎▍▌▋▊▉█"


def histogram(rows: Prepared, bins: int = BINS) -> tuple[list[int], list[int]]:
    """Edges and counts of the lengths as read."""
    step = max(1, -(-int(rows.measured.max()) // bins))
    edges = list(range(0, step * bins + 1, step))
    counts, _ = np.histogram(rows.measured, bins=[*edges[:-1], edges[-1] + 1])
    return edges, counts.tolist()


def figures(rows: Prepared) -> dict[str, Any]:
    """What --json prints of one corpus."""
    edges, counts = histogram(rows)
    return {**rows.to_dict(), "histogram": {"edges": edges, "counts": counts}}


def render(rows: Prepared) -> str:
    """The account, the layouts side by side, the lengths as a picture."""
    shares = "  ".join(f"{int(length) // 1024}k {share:.1%}" for length, share in rows.share_kept.items())
    waste = rows.padding_waste
    lines = [rows.report(), "", f"rows that fit, by max_seq_len: {shares}", "",
             f"tokens laid out for {rows.tokens:,} at max_seq_len {rows.max_seq_len:,}:"]  # fmt: skip
    for name, words in (("pad", "one row a sheet"), ("bucket", "padded to its bucket"), ("pack", "packed, best fit")):
        laid_out = round(rows.tokens / (1 - waste[name]))
        lines.append(f"  {name:<6} {laid_out:>15,}  {waste[name]:>6.1%} padding  {words}")
    lines += [f"packing efficiency {1 - waste['pack']:.2%}", "", "lengths as read:", *_picture(rows)]
    if rows.dropped.counts:
        lines += ["", "left out:", *(f"  {line}" for line in rows.dropped.details())]
    return "\n".join(lines)


def _picture(rows: Prepared) -> list[str]:
    edges, counts = histogram(rows)
    most, width = max(counts), len(f"{edges[-1]:,}")
    lines = []
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        eighths = round(count / most * WIDE * 8) or (1 if count else 0)
        bar = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        here = "  <- max_seq_len" if start < rows.max_seq_len <= end else ""
        lines.append(f"  {start:>{width},} to {end:>{width},}  {bar} {count:,}{here}")
    return lines
