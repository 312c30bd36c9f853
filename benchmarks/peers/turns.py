"""How a contender takes its turns: it is told a number of steps, runs them, and answers with tokens and seconds.

Only the standard library: this file runs in every contender's own environment, under the parent of peers_cpu.py.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

Rows = list[list[int]]


class Turns:
    """The contender's end of the line. Between two turns it waits on a read, so that it takes no core from others."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not come between
        self._left = self._tokens = 0
        self._begun = self._cpu = 0.0

    def wait(self) -> int:
        """The number of steps of the next turn; ends the process when there is none. The clock starts on return."""
        line = sys.stdin.readline()
        steps = int(line) if line.strip() else 0
        if not steps:
            sys.exit(0)
        self._left, self._tokens = steps, 0
        self._begun, self._cpu = time.perf_counter(), time.process_time()
        return steps

    def done(self, tokens: int, **about: Any) -> None:
        seconds, cpu = time.perf_counter() - self._begun, time.process_time() - self._cpu
        self._say(tokens=tokens, seconds=seconds, cpu_seconds=cpu, **about)

    def step(self, tokens: int, **about: Any) -> None:
        """For a training loop that is not ours: call it once a finished step, after a first `wait`."""
        self._left -= 1
        self._tokens += tokens
        if not self._left:
            self.done(self._tokens, **about)
            self.wait()

    def _say(self, **what: Any) -> None:
        self._answers.write(json.dumps(what) + "\n")
        self._answers.flush()


def settings() -> tuple[dict[str, Any], Rows]:
    """The settings file named on the command line, and the rows that it names."""
    found = json.loads(Path(sys.argv[1]).read_text())
    return found, json.loads(Path(found["rows"]).read_text())
