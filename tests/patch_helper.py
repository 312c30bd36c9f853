"""A small base of every kind of tensor, updates of two of them, and what a folder holds."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_tpu.errors import UserError
from gemma_tpu.handoff.patch import LowRank, write_patched
from gemma_tpu.storage.shards import INDEX_FILE, Checkpoint, open_checkpoint

BF16 = ml_dtypes.bfloat16
ROOT = Path(__file__).parent.parent
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EXTRA = {"config.json": b'{"a":1} \n', "tokenizer.json": b"{ }", "chat_template.jinja": b"{{ x }}\r\n",
         "sub/processor.json": b"\x00\xff"}


def make_base(folder: Path, dtype: np.dtype = BF16, seed: int = 0) -> Checkpoint:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.02).astype(dtype)

    folder.mkdir(parents=True)
    parts = {ONE: {"q": normal(192, 320), "norm": normal(320), "vision": normal(16, 16)},
             TWO: {"down": normal(320, 512), "experts": normal(3, 8, 8), "scalar": normal(1),
                   "steps": np.arange(5), "f8": normal(4, 4).astype(ml_dtypes.float8_e4m3fn)}}
    for file, tensors in parts.items():
        save_file(tensors, folder / file, metadata={"format": "pt", "note": "kept"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, ts in parts.items() for n in ts}}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=3))
    for name, content in EXTRA.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return open_checkpoint(folder)


def low_rank(out: int, inner: int, rank: int = 16, scale: float = 2.0, seed: int = 1) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((out, rank), np.float32) * 0.05,
                   rng.standard_normal((rank, inner), np.float32) * 0.05, scale)


def delta(part: LowRank) -> np.ndarray:
    return part.scale * (part.b.astype(np.float64) @ part.a.astype(np.float64))


def updates() -> dict:
    return {"q": low_rank(192, 320), "down": [low_rank(320, 512), low_rank(320, 512, 4, -0.5, seed=2)]}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def entries(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def refused(base: Checkpoint, out: Path, changes: dict, kind: type = UserError) -> str:
    with pytest.raises(kind) as caught:
        write_patched(base, out, changes)
    assert not out.exists()
    return str(caught.value)


def killed_in_the_second_shard(base, out, changes):
    """Ctrl-C, which leaves what a kill leaves."""
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > base.shards[ONE].size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_patched(base, out, changes, progress=stop)
