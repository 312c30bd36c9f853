"""XLA's flags for each kind of chip, from one data file that gives each its reason and its measurement."""

from functools import cache
from typing import Any, NotRequired, TypedDict

from gemma_tpu import plain
from gemma_tpu.assets import resolve


class Entry(TypedDict):
    """One flag; the file says why, too."""

    flag: str
    value: Any
    where: NotRequired[dict[str, int]]  # the sizes of mesh axes that it is for


@cache
def _table() -> dict[str, list[Entry]]:
    table: dict[str, list[Entry]] = plain.yaml_file(resolve("bundled:xla_flags.yaml"))
    return table


def for_mesh(mesh: Any) -> dict[str, Any]:
    """Compiler options for a program on this `jax.sharding.Mesh`: its platform's, and those of its kind of chip."""
    device = mesh.devices.flat[0]
    entries = [
        entry
        for kind in (device.platform, f"{device.platform}:{device.device_kind}")
        for entry in _table().get(kind, [])
    ]
    return {
        entry["flag"]: entry["value"]
        for entry in entries
        if all(mesh.shape[axis] == size for axis, size in entry.get("where", {}).items())
    }
