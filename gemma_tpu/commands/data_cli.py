"""`gemma-tpu data`: what a config trains on, counted and made visible before anything is trained."""

import argparse
import os
import sys
from dataclasses import replace
from typing import Any

from gemma_tpu import config
from gemma_tpu.commands.arguments import page_option, write_page
from gemma_tpu.errors import UserError

Result = dict[str, Any]
ABOUT = "count, measure and show the rows that a config trains on"
HELD_OUT, REJECTED = "Held-out rows", "Training rows, rejected"
JSON_KEYS = {HELD_OUT: "validation", REJECTED: "rejected"}  # where --json has what is not the training rows
EXAMPLE = "gemma-tpu data configs/tiny_cpu.yaml --show 3 --html data.html"


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("config", metavar="CONFIG", help="a YAML file, yours or a shipped one by its name")
    one.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="e.g. data.max_seq_len=2048")
    one.add_argument("--show", metavar="N", type=int, default=0, help="print N rows, what is trained in colour")
    page_option(one)


def run(args: argparse.Namespace) -> tuple[Result, int]:
    """Prints the report and the rows asked for; the page, where one is asked for, always shows a few."""
    if args.show < 0:
        raise UserError(f"--show {args.show}: how many rows to print, 0 for none")
    chosen = config.load(args.config, args.overrides)
    from gemma_tpu.data import data_text, display
    from gemma_tpu.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(chosen.model.path)
    parts = _parts(chosen, tokenizer)
    for title, rows in parts:
        print(f"{title}\n{data_text.render(rows)}\n")
    main = parts[0][1]
    count = min(args.show, len(main))
    picked = [at * len(main) // count for at in range(count)]  # spread over all of them
    shown = [(main.where(row), display.turns(*main[row], tokenizer)) for row in picked]
    colour = _has_colours()
    for where, row in shown:
        print(f"== {where}\n{display.in_terminal(row, colour)}\n")
    if args.html:
        from gemma_tpu.data import data_page

        first = [(main.where(row), display.turns(*main[row], tokenizer)) for row in range(min(3, len(main)))]
        write_page(args.html, data_page.page_of(args.config, parts, shown or first))
    result = data_text.figures(main)
    for title, rows in parts[1:]:
        result[JSON_KEYS[title]] = data_text.figures(rows)
    return result, 0


def _parts(chosen: config.Config, tokenizer: Any) -> list[tuple[str, Any]]:
    """The corpora of the config, each with its title; preference pairs are two."""
    from gemma_tpu.data.corpus import prepare
    from gemma_tpu.data.rows import form_of

    data = chosen.data
    if form_of(data) == "preference":
        data = replace(data, validation=None)
        return [("Training rows, chosen", prepare(data, tokenizer, side="chosen")),
                (REJECTED, prepare(data, tokenizer, side="rejected"))]  # fmt: skip
    parts = [("Training rows", prepare(data, tokenizer))]
    if data.validation is not None:
        parts.append((HELD_OUT, prepare(data, tokenizer, data.validation)))
    return parts


def _has_colours() -> bool:
    """As most tools decide it: NO_COLOR and FORCE_COLOR over whether a person is looking."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
