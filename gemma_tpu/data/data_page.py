"""The sections of a corpus's page: what was kept, how long the rows are, how they pack, which tokens are trained."""

from collections.abc import Sequence

import numpy as np

from gemma_tpu.data.corpus import Prepared
from gemma_tpu.data.data_text import histogram
from gemma_tpu.data.display import Turn
from gemma_tpu.data.packing import best_fit
from gemma_tpu.pages import page
from gemma_tpu.pages.page import Bar, Section

SHEETS = 40  # of the picture: the first ones, and those that padding is left on
WAYS = {"pad": "pad: one row a sheet", "bucket": "bucket: to the next of 128, 256, …", "pack": "pack: best fit"}


def page_of(source: str, parts: Sequence[tuple[str, Prepared]], shown: Sequence[tuple[str, list[Turn]]]) -> str:
    """The page; `parts` are the training rows and what is held out, `shown` are rows to look at."""
    sections = []
    for title, rows in parts:
        sections += [
            Section(title, _facts(rows)), Section("Left out", _dropped(rows)), Section("Lengths", _lengths(rows)),
            Section("Padding", _padding(rows)), Section("Packed sheets", _sheets(rows)),
            Section("Read and not used", page.bullets(rows.notes)),
        ]  # fmt: skip
    sections += [Section(f"Row {name}", _row(row)) for name, row in shown]
    return page.page(f"Data of {source}", "Counted with the model's own tokenizer and chat template.", sections)


def _facts(rows: Prepared) -> str:
    share = rows.target_tokens / rows.tokens
    return page.facts([
        ("rows kept", f"{len(rows):,}", f"of {rows.rows:,}; format {rows.format}", ""),
        ("tokens", f"{rows.tokens:,}", f"{rows.tokens / len(rows):,.0f} a row", ""),
        ("trained tokens", f"{rows.target_tokens:,}", f"{share:.1%} of all", ""),
        ("packing efficiency", f"{1 - rows.padding_waste['pack']:.1%}", f"at max_seq_len {rows.max_seq_len:,}", ""),
        ("recommended max_seq_len", f"{rows.recommended_max_seq_len:,}", "holds 99.5 % of the rows", ""),
    ])  # fmt: skip


def _dropped(rows: Prepared) -> str:
    if not rows.dropped.counts:
        return page.paragraph("Nothing: every row is trained on.")
    table = [
        (reason.replace("_", " "), f"{count:,}", f"{count / rows.rows:.2%}",
         "; ".join(f"{place}: {detail}" if detail else place for place, detail in rows.dropped.places[reason]))
        for reason, count in rows.dropped.counts.most_common()
    ]  # fmt: skip
    return page.table(("reason", "rows", "share", "first places"), table, right=(1, 2))


def _lengths(rows: Prepared) -> str:
    edges, counts = histogram(rows, 40)
    marks = [(rows.max_seq_len, f"max_seq_len {rows.max_seq_len:,}"),
             (rows.percentiles["p99"], f"99 % of the rows: {rows.percentiles['p99']:,}")]  # fmt: skip
    told = ", ".join(f"{name} {value:,}" for name, value in rows.percentiles.items())
    kept = [(f"{int(length):,}", f"{share:.2%}") for length, share in rows.share_kept.items()]
    inside = [mark for mark in marks if mark[0] <= edges[-1]]
    return (
        page.histogram(edges, counts, inside, "Rows by their length in tokens")
        + page.paragraph(f"Tokens of a row as read: {told}.", "note")
        + page.table(("max_seq_len", "rows that fit"), kept, right=(0, 1))
    )


def _padding(rows: Prepared) -> str:
    drawn = [
        Bar(WAYS[name], rows.tokens / (1 - waste), f"{rows.tokens / (1 - waste):,.0f} tokens, {waste:.1%} padding",
            measured=True)
        for name, waste in rows.padding_waste.items()
    ]  # fmt: skip
    return page.bars(drawn, "Tokens laid out, padding included") + page.paragraph(
        f"For {rows.tokens:,} tokens of rows at max_seq_len {rows.max_seq_len:,}.", "note"
    )


def _sheets(rows: Prepared) -> str:
    """Some of the plan's sheets: the first, which the longest rows open, and the emptiest."""
    bins = best_fit(rows.lengths, rows.max_seq_len)
    tokens_S = np.add.reduceat(rows.lengths[bins.items_N], bins.starts_S[:-1])
    emptiest = np.argsort(tokens_S, kind="stable")[: SHEETS // 2]
    chosen = sorted({*range(min(SHEETS // 2, len(bins))), *emptiest.tolist()})


    def told(item: int) -> tuple[int, str]:
        return int(rows.lengths[item]), f"{rows.where(item)}: {rows.lengths[item]:,} tokens"

    drawn = [list(map(told, bins[sheet].tolist())) for sheet in chosen]
    padding = len(bins) * rows.max_seq_len - rows.tokens
    return page.sheets(drawn, rows.max_seq_len, "Rows on packed sheets") + page.paragraph(
        f"{len(chosen):,} of {len(bins):,} sheets of {rows.max_seq_len:,}, a line each: the first, and the emptiest. "
        f"In all of them {padding:,} tokens are padding. Attention never crosses from one row to the next.", "note"
    )  # fmt: skip


def _row(row: list[Turn]) -> str:
    return page.tokens([(turn.caption, [(piece.text, piece.kinds) for piece in turn.pieces]) for turn in row])
