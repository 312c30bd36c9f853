"""What ships, to choose from: every config with its model, slice and planned figures, every recipe with its purpose.

The figures are bundled/catalogue.json, so that a list takes no planning: scripts/make_catalogue.py writes them, by the
arithmetic of `plan --fast`, and a test computes them again.
"""

import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tpu import assets, config
from gemma_tpu.errors import UserError
from gemma_tpu.pages.columns import table

if TYPE_CHECKING:
    from gemma_tpu.hardware.chips import Slice

FIGURES = "bundled:catalogue.json"
FOLDERS = ("configs", "recipes")


@dataclass(frozen=True)
class Planned:
    """A config on the slice that its name says, by arithmetic; padding counts in tokens_per_s."""

    slice: str
    chips: int
    fits: bool
    peak_gib: float  # of a chip
    limit_gib: float
    tokens_per_s: float
    usd_per_million_tokens: float | None
    hours: float | None  # where its rows, or how many there are, is known
    usd: float | None


def plan(file: Path) -> Planned | None:
    """The figures of a config, made anew; None for a CPU's, of which the planner knows nothing."""
    from gemma_tpu.planning import plan, subject
    from gemma_tpu.planning.workload import workload

    place = slice_of(file)
    if place is None:
        return None
    chosen = config.load(file)
    made = plan.make(chosen, str(file), place, subject.find_model(chosen.model.path), workload(chosen), compiled=False,
                     suggest=False)  # fmt: skip
    found = plan.to_json(made)
    rate, hour = made.job.tokens_per_update / made.predicted_step_s, place.usd
    return Planned(
        place.name, place.chips, made.fits, round(found["peak_gib_per_chip"], 2), round(found["limit_gib"], 2),
        round(rate), round(hour / rate / 3600 * 1e6, 4) if hour else None, _rounded(found["hours"]),
        _rounded(found["usd"]),
    )  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def slice_of(file: Path) -> "Slice | None":
    """By the name of the file; the devices of this machine have no say in what ships."""
    from gemma_tpu.hardware import chips

    named = re.search(rf"_({'|'.join(chips.chips())})(\d+)(?:_|$)", file.stem)
    return chips.find(f"{named[1]}-{named[2]}") if named else None


def shipped(folder: str) -> list[Path]:
    """The files, and the folders with a README, that ship in recipes or configs."""
    root = assets.folder(folder)
    return sorted(path for path in root.iterdir()
                  if path.suffix in (".py", ".yaml") or (path / "README.md").is_file())  # fmt: skip


def about(path: Path) -> str:
    """The first sentence that a file, or a folder's README, says of itself."""
    if path.is_dir():
        lines = [line for line in (path / "README.md").read_text().splitlines() if line and not line.startswith("#")]
        return _sentence(" ".join(lines))
    text = path.read_text()
    if path.suffix == ".py":
        return _sentence(text.split('"""')[1])
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return _sentence(" ".join(" ".join(head).replace("#", " ").split()))


def _sentence(text: str) -> str:
    return re.split(r"(?<=\w)\. ", " ".join(text.split()))[0].rstrip(".")


def figures() -> dict[str, Planned | None]:
    known = json.loads(assets.resolve(FIGURES).read_text())
    return {name: Planned(**one) if one else None for name, one in known.items()}


def entries() -> dict[str, Any]:
    """For --json: configs and recipes."""
    planned = figures()
    return {
        "configs": [{"name": path.name, "about": about(path), "model": config.load(path).model.path}
                    | (asdict(one) if (one := planned.get(path.name)) else {"slice": None})
                    for path in shipped("configs")],
        "recipes": [{"name": path.name, "about": about(path)} for path in shipped("recipes")],
        "basis": "analytic",
    }  # fmt: skip


HEAD = ("config", "model", "slice", "chips", "GiB a chip", "tokens/s", "$/M tokens", "run")


def render(found: dict[str, Any]) -> str:
    rows = [HEAD] + [_row(one) for one in found["configs"]]
    width = max(len(one["name"]) for one in found["recipes"])
    return "\n".join([
        *table(rows, right=(3, 4, 5, 6), indent=0),
        "predicted by arithmetic; padding counts as tokens. `gemma-tpu plan CONFIG` plans a config closely.", "",
        "recipe" + " " * (width - 4) + "what it is",
        *(f"{one['name']:<{width}}  {one['about']}" for one in found["recipes"]), "",
        "gemma-tpu cp NAME DEST copies one to change it; gemma-tpu init writes a config for your data.",
    ])  # fmt: skip


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    model = one["model"].rpartition("/")[2]
    if one["slice"] is None:
        return one["name"], model, "CPU", "-", "-", "-", "-", "minutes"
    price = "-" if one["usd_per_million_tokens"] is None else f"${one['usd_per_million_tokens']:.3f}"
    run = "-" if one["hours"] is None else f"{one['hours']:.1f} h"
    run += "" if one["usd"] is None else f", ${one['usd']:.2f}"
    memory = f"{one['peak_gib']:.1f} of {one['limit_gib']:.1f}" + ("" if one["fits"] else " (!)")
    return one["name"], model, one["slice"], str(one["chips"]), memory, f"{one['tokens_per_s']:,.0f}", price, run


def copy(name: str, to: Path) -> Path:
    """A shipped config or recipe to a new file, or into a folder; what is there stays."""
    source = find(name)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UserError(f"{target} exists: cp never overwrites; give another name")
    if target.suffix != source.suffix:
        raise UserError(f"{target}: {source.name} is a {source.suffix or 'folder'}, and so must be its copy")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    try:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            with target.open("xb") as out:  # another's file that has come meanwhile stays too
                out.write(source.read_bytes())
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    return target


def find(name: str) -> Path:
    known = {f"{folder}/{path.name}": path for folder in FOLDERS for path in shipped(folder)}
    wanted = [path for key, path in known.items() if name in (key, path.name, path.stem)]
    if not wanted:
        near = _near(name, [path.name for path in known.values()]) or "`gemma-tpu ls` lists what does"
        raise UserError(f"{name}: nothing that ships has this name; {near}")
    if len(wanted) > 1:
        raise UserError(f"{name}: could be {' or '.join(key for key, path in known.items() if path in wanted)}")
    return wanted[0]


def _near(name: str, names: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]}?" if near else ""
