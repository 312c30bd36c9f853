"""What the compiler says of a train step. It is kept, so that the same step is compiled once: a sweep of an hour
that is interrupted goes on where it was.

The key is everything that the answer depends on: the request to the compiler, the chip's figures, the versions of
JAX and of the compiler, and this package's own code.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from gemma_tpu import assets
from gemma_tpu.compiled import buffers, hlo
from gemma_tpu.compiled.buffers import Buffer, Memory
from gemma_tpu.compiled.walk import Cost, Walk, schedule, walk
from gemma_tpu.errors import UserError
from gemma_tpu.estimate.budget import GIB
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.run import runs

VARIABLE = "GEMMA_TPU_PLANS"
PACKAGES = ("jax", "jaxlib", "flax", "optax")
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-pjrt", "jax-cuda12-pjrt")}  # by kind of chip, those that hold one


@dataclass(frozen=True)
class Compilation:
    """Memory and time of one step by the compiler. No walk, where it refused before there was a schedule."""

    seconds: float
    peak_gib: float  # of one device
    limit_gib: float
    memory: Memory | None
    walk: Walk | None
    kept: str | None = None  # since when, where the compiler was not asked again


def folder() -> Path:
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "gemma_tpu" / "plans"


def compile_step(
    request: dict[str, Any], place: Slice, dump: Path, full: bool, say: Callable[[str], None]
) -> Compilation:
    """Ask the compiler, whose dump goes to `dump`; what it says is kept."""
    from gemma_tpu.training.compiling import compile_for

    path = _file(request, place, full)  # by the code as it is now: minutes may pass
    found = compile_for(**request, folder=dump, full=full)
    limit = place.chip.device_hbm_gib
    if found.needs_gib is None:
        module = hlo.load(schedule(dump))
        memory = buffers.memory(dump, module)
        made = Compilation(found.seconds, memory.peak / GIB, limit, memory, walk(dump, place))
    else:
        made = Compilation(found.seconds, found.needs_gib, found.limit_gib or limit, None, None)
    _keep(path, made, place, say)
    return made


def kept(request: dict[str, Any], place: Slice, full: bool) -> Compilation | None:
    """What the compiler said of the very same before."""
    path = _file(request, place, full)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        held, walked = found["compilation"]["memory"], found["compilation"]["walk"]
        memory = held and Memory(**held | {"largest": [Buffer(**one) for one in held["largest"]]})
        steps = walked and Walk(**walked | {"costs": [Cost(**one) for one in walked["costs"]]})
        return Compilation(**found["compilation"] | {"memory": memory, "walk": steps, "kept": found["date"]})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as what a compiler said ({error}); remove it") from None


def _keep(path: Path, made: Compilation, place: Slice, say: Callable[[str], None]) -> None:
    tree = {"slice": place.name, "date": date.today().isoformat(), "compilation": asdict(replace(made, kept=None))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_text(path, json.dumps(tree) + "\n")
    except OSError as error:
        say(f"note: what the compiler said is not kept: {path}: {error.strerror}; set {VARIABLE} to another folder")


def _file(request: dict[str, Any], place: Slice, full: bool) -> Path:
    asked = {"request": request, "place": repr(place), "full": full, "versions": _versions(place), "code": _code()}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    return folder() / f"{place.name}-{key[:24]}.json"


def _versions(place: Slice) -> list[str]:
    names = (*PACKAGES, *COMPILERS[place.chip.kind])  # another chip's compiler changes nothing
    installed = {one: metadata.distributions(name=one) for one in names}
    return [f"{name} {one.version}" for name, found in installed.items() for one in found]


def compiler(place: Slice) -> str:
    """Its schedules differ from version to version."""
    names = COMPILERS[place.chip.kind]
    return next((one for one in _versions(place) if one.split()[0] in names), f"no {names[0]}")


@cache
def _code() -> str:
    """Of the whole package: which of its files a step depends on is nobody's to remember."""
    found = hashlib.sha256()
    for path in sorted(assets.PACKAGE.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            found.update(path.relative_to(assets.PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
