"""A small chat in the terminal, by the checkpoint's own template."""

import sys
from collections.abc import Callable
from typing import Any

from gemma_tpu.errors import UserError
from gemma_tpu.run.metrics import say
from gemma_tpu.sampling.asking import Asked

HELP = "/new begins another conversation, /quit or Ctrl-D ends; Ctrl-C stops an answer"


def chat(write: Callable[..., list[dict[str, Any]]], settings: Any, *, system: str | None = None,
         stop: tuple[str, ...] = ()) -> dict[str, Any]:  # fmt: skip
    """Turns until the user ends them; `write` is that of a Writer or of an Endpoint. Returns the last conversation."""
    before = [] if system is None else [{"role": "system", "content": system}]
    turns: list[dict[str, Any]] = []
    say(HELP)
    while (line := _read()) is not None:
        words = line.strip()
        if words == "/quit":
            break
        if words == "/new":
            turns = []
        elif words.startswith("/"):
            say(HELP)
        elif words:
            turns = _answer(write, settings, before, turns, line, stop)
    return {"messages": before + turns}


def _answer(write, settings: Any, before: list, turns: list, line: str, stop: tuple[str, ...]) -> list:
    asked = [*turns, {"role": "user", "content": line}]
    said: list[str] = []

    def show(_: int, text: str) -> None:
        said.append(text)
        print(text, end="", flush=True)

    try:
        # Each answer has its own number among the samples: the same words twice need not get the same answer.
        found = write([Asked([*before, *asked], len(turns))], settings, stop=stop, on_text=show)[0]
    except UserError as error:  # too long, or refused by the template: nothing was answered
        say(f"error: {error}; {HELP}")
        return turns
    except KeyboardInterrupt:
        found = {"text": "".join(said), "finish_reason": "interrupted"}
    print(flush=True)
    if found["finish_reason"] == "length":
        say(f"note: cut at {settings.max_new_tokens} tokens")
    return [*asked, {"role": "assistant", "content": found["text"]}]


def _read() -> str | None:
    """The next line; the prompt only where somebody sees it."""
    try:
        if sys.stdin.isatty():
            return input("> ")
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
