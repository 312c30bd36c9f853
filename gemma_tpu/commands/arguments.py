"""What commands take alike: numbers within their bounds, and what the user points at."""

import argparse
from pathlib import Path

from gemma_tpu.errors import UserError
from gemma_tpu.run import runs
from gemma_tpu.run.metrics import say


def run_folder(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such folder; RUN_DIR is the run_dir of a config that was trained")
    runs.read_config(path)
    return path


def target(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise UserError(f"{path}: no such folder; TARGET is a run folder or a model folder")
    if not runs.is_run(path) and not (path / "config.json").is_file():
        raise UserError(f"{path}: neither a run folder (config.yaml) nor a model folder (config.json)")
    return path


def any_target(text: str) -> Path | str:
    """A folder, or the URL of a server."""
    return text if "://" in text else target(text)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to 4294967295")
    return number


def page_option(one: argparse.ArgumentParser, about: str = "write a page with pictures") -> None:
    one.add_argument("--html", metavar="FILE", type=_page_file, help=about)


def _page_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    return path


def write_page(path: Path, text: str) -> None:
    """What --html asked for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_text(path, text)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error.strerror}") from None
    say(f"wrote {path}")


# argparse names the type in "invalid … value".
positive.__name__ = seed.__name__ = "integer"
