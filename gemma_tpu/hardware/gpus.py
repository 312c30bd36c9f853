"""What XLA's compiler is told of a GPU that is not there, and the devices that it then compiles for."""

import importlib.util
from functools import cache
from typing import Any

from gemma_tpu import plain
from gemma_tpu.assets import resolve

PLUGINS = ("xla_cuda13", "xla_cuda12")  # JAX's, either of which holds the compiler
VERSIONS = {"runtime_version": (13, 0), "dnn_version_info": (9, 7)}  # of CUDA and cuDNN, which choose no schedule here


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = plain.yaml_file(resolve("bundled:gpus.yaml"))
    return table


def known(name: str) -> bool:
    """Whether the compiler can be told of this chip."""
    return name != "common" and name in _table()


def installed() -> bool:
    """Whether JAX's CUDA plugin is here: it compiles without a GPU, and without CUDA's own libraries."""
    return bool(importlib.util.find_spec("jax_plugins")) and any(
        importlib.util.find_spec(f"jax_plugins.{name}") for name in PLUGINS
    )


def target(name: str, hbm_gib: float, hbm_gbs: float) -> str:
    """The chip as text of the compiler's own form (a GpuTargetConfigProto)."""
    told = dict(_table()["common"] | _table()[name])
    (major, minor), title = told.pop("capability"), told.pop("name")
    fields = told | {"memory_bandwidth": int(hbm_gbs * 1e9), "device_memory_size": int(hbm_gib * 2**30)}
    info = " ".join(f"{key}: {value}" for key, value in fields.items())
    versions = " ".join(f"{key} {{ major: {first} minor: {second} }}" for key, (first, second) in VERSIONS.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return f'gpu_device_info {{ {info} {capability} }} platform_name: "CUDA" {versions} ' \
           f'device_description_str: "{title}"'  # fmt: skip


def devices(name: str, count: int, hbm_gib: float, hbm_gbs: float) -> list[Any]:
    """So many of them in one machine."""
    from jax.experimental import topologies

    config = target(name, hbm_gib, hbm_gbs)
    found = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{count}")
    return list(found.devices)
