"""Compiler options come from the data file, each with its reason and its measurement."""

from types import SimpleNamespace

import numpy as np
import yaml

from gemma_tpu.assets import resolve
from gemma_tpu.training import flags

YNN = "xla_cpu_experimental_ynn_fusion_type"
PERMUTES, USERS = "xla_max_concurrent_async_collective_permutes", "xla_tpu_skip_checking_windowed_einsum_users"


def mesh_of(platform: str, kind: str, **axes: int):
    devices = np.array([SimpleNamespace(platform=platform, device_kind=kind)] * 4, dtype=object)
    return SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": 1, "expert": 1, "tp": 1} | axes)


def test_every_flag_says_why_and_what_was_measured():
    table = yaml.safe_load(resolve("bundled:xla_flags.yaml").read_text())
    for entries in table.values():
        for entry in entries:
            assert set(entry) - {"where"} == {"flag", "value", "reason", "measured"}
            assert all(str(value) for value in entry.values())


def test_a_cpu_gets_its_own_and_a_tpu_those_of_its_platform_and_mesh():
    assert flags.for_mesh(mesh_of("cpu", "cpu", fsdp=4)) == {YNN: "LIBRARY_FUSION_TYPE_DOT"}
    assert flags.for_mesh(mesh_of("tpu", "TPU v5", fsdp=4)) == {PERMUTES: 2, USERS: True}
    assert flags.for_mesh(mesh_of("tpu", "TPU v5", fsdp=2, tp=2)) == {PERMUTES: 2}
    assert flags.for_mesh(mesh_of("tpu", "TPU v6 lite", fsdp=8)) == {PERMUTES: 2}
