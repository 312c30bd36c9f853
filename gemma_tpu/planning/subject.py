"""What a plan is about: the model by its path or its size alone, and the slice by whatever names it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tpu import plain
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.gemma import hf_config, sizes
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import chips
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.storage.sources import local_folder


@dataclass(frozen=True)
class Subject:
    """The model that is planned for: its config.json, from the checkpoint or from the table of known sizes."""

    name: str
    config: dict[str, Any]
    architecture: Architecture
    told: str


def find_model(path: str) -> Subject:
    """The model at `path`; where nothing is there, the published size that the path is named after."""
    folder = Path(path).expanduser()
    if "://" not in path and (folder / "config.json").is_file():
        return _read(path, folder)
    last = path.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    for size in sizes.known():
        if last in (size, sizes.hub_id(size).rpartition("/")[2].lower()):
            told = f"{path} is not read: the published geometry of {sizes.hub_id(size)}"
            return Subject(last, sizes.config(size), sizes.architecture(size), told)
    if "://" in path:
        return _read(path, local_folder(path))
    named = ", ".join(sizes.hub_id(size).rpartition("/")[2] for size in sizes.known())
    raise UserError(
        f"model.path {path}: no config.json there, and its last part is no published size; planning without a "
        f"checkpoint knows {named}"
    )


def _read(path: str, folder: Path) -> Subject:
    config = plain.json_file(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"model.path {path}: its config.json is no JSON object")
    return Subject(folder.name, config, hf_config.from_config(config), f"config.json of {path}")


def find_slice(on: str | None, config: str) -> tuple[Slice, str]:
    """The slice to plan for and where it was named: --on, the devices that are here, the config's file name."""
    if on is not None:
        return chips.find(on), "--on"
    seen = _attached()
    if seen is not None:
        return seen, "the devices of this machine"
    named = re.search(rf"_({'|'.join(chips.chips())})(\d+)(?:_|$)", Path(config).stem)
    if named:
        return chips.find(f"{named[1]}-{named[2]}"), "the name of the config"
    raise UserError(
        f"which slice? This machine has none and {Path(config).name} names none: give --on SLICE, one of\n"
        + "\n".join(f"  {chip.name:<8}{', '.join(chip.slice(one).name for one in chip.slices)}"
                    for chip in chips.chips().values())
    )  # fmt: skip


def _attached() -> Slice | None:
    """Only where the kernel shows an accelerator is JAX asked: to ask takes seconds, and takes hold of the devices."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")):
        return None
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        raise RunError(f"the devices here do not answer ({str(error).splitlines()[0]}); give --on SLICE") from error
    return chips.of_devices(found[0].device_kind, len(found))
