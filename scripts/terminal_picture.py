"""A picture of a command's output, as a terminal shows it: an SVG that fetches nothing.

    python scripts/terminal_picture.py OUT.svg [--lines 1-40] [--columns 118] -- gemma-tpu plan CONFIG --on v5p-8

The command runs in a terminal of its own, so that colours and progress bars are there; what a later line has
overwritten is not in the picture. `--lines` cuts, and the cut is marked.
"""

import argparse
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PAGE = """<svg class="rich-terminal" viewBox="0 0 {terminal_width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}"
  height="{height}" /></clipPath>{lines}</defs>
<rect fill="#1b1d1e" x="0" y="0" width="{terminal_width}" height="{height}" rx="8"/>
<g transform="translate(10, 6)" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def recorded(command: list[str], columns: int) -> str:
    """All that the command writes to its terminal."""
    environment = os.environ | {"COLUMNS": str(columns), "LINES": "60", "TERM": "xterm-256color"}
    mine, its = pty.openpty()
    process = subprocess.Popen(command, stdout=its, stderr=its, stdin=subprocess.DEVNULL, env=environment)
    os.close(its)
    parts = []
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError:  # Linux ends a terminal so
            break
        if not part:
            break
        parts.append(part)
    if process.wait():
        raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{b''.join(parts[-5:]).decode()}")
    return b"".join(parts).decode("utf-8", "replace")


def screen(output: str) -> list[str]:
    """Its lines as they stand at the end: a progress bar once, not a hundred times."""
    lines, row = [""], 0
    for token in re.split(r"(\r\n|\n|\r|\x1b\[\d*A|\x1b\[2?K|\x1b\[\?\d+[hl])", output):
        if token in ("\n", "\r\n"):
            row += 1
            if row == len(lines):
                lines.append("")
        elif token == "\r" or token.endswith("K") and token.startswith("\x1b["):
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", token):
            row = max(row - int(token[2:-1] or 1), 0)
        elif not re.fullmatch(r"\x1b\[\?\d+[hl]", token):
            lines[row] += token
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lines", help="e.g. 1-40")
    parser.add_argument("--columns", type=int, default=118)
    parser.add_argument("--prompt", help="the command as the picture shows it; by default as it is run")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    lines = screen(recorded(args.command, args.columns))
    while lines and not lines[-1].strip():
        lines.pop()
    if args.lines:
        first, last = (int(number) for number in args.lines.split("-"))
        lines = lines[first - 1 : last] + (["…"] if last < len(lines) else [])
    console = Console(record=True, width=args.columns, file=open(os.devnull, "w"), force_terminal=True)
    console.print(Text(f"$ {args.prompt or ' '.join(args.command)}", style="bold green"))
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    temporary = args.out.with_suffix(".part")
    temporary.write_text(console.export_svg(title="", theme=MONOKAI, code_format=PAGE))
    temporary.replace(args.out)
    print(f"{args.out}: {len(lines)} lines", file=sys.stderr)


if __name__ == "__main__":
    main()
