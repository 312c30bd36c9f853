"""Onto the shards: several hosts read different bytes and hold the same weights as one; pieces make the whole."""

import functools
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import DIMS, EVEN, mesh_of, write
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs_helper import environment

from gemma_tpu.gemma import loading, streaming
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.projection import Base
from gemma_tpu.tiny.checkpoint import write_tiny

CHILD = Path(__file__).parent / "streaming_child.py"
NEVER = 1 << 60
MOVED = 1 << 10  # bytes: what is smaller is read by every host
MESHES = (
    ("dense", {"fsdp": 8}), ("dense", {"tp": 8}), ("dense", {"data": 2, "fsdp": 2, "tp": 2}),
    ("experts", {"fsdp": 2, "expert": 4}), ("per_layer", {"fsdp": 4, "tp": 2}),
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints whose widths divide by 8; KV heads do not: they are split within the heads."""
    root = tmp_path_factory.mktemp("hosts")
    return {
        "dense": str(write(root / "dense", **EVEN)),
        "experts": str(write_tiny(root / "experts", "gemma4-26b-a4b", dtype="float32", tokenizer=False)),
        "per_layer": str(write_tiny(root / "per_layer", "gemma4-e2b", dtype="float32", tokenizer=False)),
    }


def on_two_hosts(requests: list) -> list[list[dict]]:
    """What each of two processes of four devices says of each request."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(CHILD), coordinator, "2"]
    hosts = [
        subprocess.Popen([*command, str(process), json.dumps(requests)], env=environment(), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for process in range(2)
    ]  # fmt: skip
    try:
        said = [host.communicate(timeout=240) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    for host, (_, errors) in zip(hosts, said, strict=True):
        assert host.returncode == 0, errors
        assert "rematerialization" not in errors, errors  # whole tensors on every device, on their way
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.slow
def test_each_of_two_hosts_reads_its_half_and_both_hold_the_right_weights(folders):
    requests = [(folders[name], sizes, MOVED) for name, sizes in MESHES]
    around = (folders["dense"], {"fsdp": 8}, NEVER)  # what splits its columns, both read all of
    *found, whole = zip(*on_two_hosts([*requests, around]), strict=True)
    for (name, sizes), hosts in zip(MESHES, found, strict=True):
        for host in hosts:
            assert host["wrong"] == [] and host["placed"], (name, sizes)
            assert host["read"] <= host["total"] / 2 + host["small"] / 2, (name, sizes)
            assert host["small"] < host["total"] / 10
        assert sum(host["read"] for host in hosts) >= hosts[0]["total"], (name, sizes)
    for host in whole:
        assert host["wrong"] == [] and host["read"] > 0.75 * host["total"]


def test_moving_undoes_one_mesh_axis_after_the_other_and_no_device_ever_holds_all():
    """In one go XLA would gather the whole tensor on every device and cut it up there."""
    mesh = meshes.build({"data": 2, "fsdp": 2})
    rows_of_each, rows, columns = (
        NamedSharding(mesh, P(*spec))
        for spec in ((None, ("fsdp", "data"), None), (None, "fsdp", None), (None, None, "fsdp"))
    )

    def collectives(*route: NamedSharding) -> set[str]:
        piece = jax.ShapeDtypeStruct((2, 16, 64), np.float32, sharding=route[0])
        program = streaming._mover(route).lower(piece).compile().as_text()
        return set(re.findall(r" (all-to-all|all-gather|all-reduce|collective-permute)[-(]", program))

    assert collectives(rows_of_each, rows, columns) == {"all-gather", "all-to-all"}
    assert collectives(rows, columns) == {"all-to-all"}


@functools.cache
def arrays(folder: str, sizes: tuple[tuple[str, int], ...], platforms: frozenset[str]) -> dict[str, np.ndarray]:
    model, checkpoint = loading.build(folder, dtype="bfloat16")
    shardings, _ = loading.place(model, meshes.build(dict(sizes)))
    before, streaming.TAKES_OVER = streaming.TAKES_OVER, platforms
    try:
        loading.load_base(model, checkpoint, shardings)
    finally:
        streaming.TAKES_OVER = before
    return {path: np.asarray(variable[...]) for path, variable in loading.variables(model, Base).items()}


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tp": 2}, {"data": 4}], ids=str)
@pytest.mark.parametrize("name", ["experts", "per_layer"])
def test_what_is_put_together_on_the_devices_is_what_is_taken_over(folders, name, sizes):
    whole = arrays(folders[name], tuple(sizes.items()), frozenset({"cpu"}))
    pieces = arrays(folders[name], tuple(sizes.items()), frozenset())
    assert whole.keys() == pieces.keys()
    assert not [path for path in whole if whole[path].tobytes() != pieces[path].tobytes()]


def test_a_stacked_variable_comes_in_equal_pieces_no_larger_than_the_largest_tensor(tiny, monkeypatch):
    monkeypatch.setattr(streaming, "TAKES_OVER", frozenset())
    model, checkpoint = loading.build(tiny(**DIMS | {"pattern": 2, "mlp": 1000}), dtype="float32")
    shardings, _ = loading.place(model, mesh_of())
    shapes = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in loading.variables(model, Base).items()}
    sizes, made = [], streaming._pages

    def pages(shape, dtype):
        array = made(shape, dtype)
        sizes.append(array.nbytes)
        return array

    monkeypatch.setattr(streaming, "_pages", pages)
    streaming.load(checkpoint, model.arch, shapes, shardings)
    assert max(sizes) <= 1000 * 40 * 4 < max(v.size * 4 for v in shapes.values())
    assert sum(sizes) == sum(v.size * 4 for v in shapes.values())
