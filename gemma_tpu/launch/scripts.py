"""Generated scripts, run: bash in the foreground of the user's terminal, who may answer it and interrupt it."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from gemma_tpu.errors import UserError


def run(text: str) -> int:
    """Runs a bash script to its end and gives its exit code as this package has them: 0, 1 or 2.

    A file, so that its stdin is the user's. An interruption is the script's to answer: it takes down what it has
    started, and is waited for. Its stdout goes to stderr, since the caller's may be kept for --json.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.sh"
        path.write_text(text, encoding="utf-8")
        try:
            process = subprocess.Popen(["bash", str(path)], stdout=sys.stderr.fileno())
        except FileNotFoundError:
            raise UserError("bash is not installed, and the script is written for it") from None
        handlers = {
            signal.SIGINT: lambda *_: None,  # the terminal has sent it to the script too
            signal.SIGTERM: lambda *_: process.terminate(),
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code in (0, 1, 2) else 1
