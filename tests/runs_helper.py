"""What the tests of whole runs share: a really small base with a tokenizer, one config, and ways to run it
and to read what it left without the package's own readers.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
import yaml

from gemma_tpu import assets, cli, config
from gemma_tpu.schema import Config
from gemma_tpu.tiny.checkpoint import write_tiny

ROOT = Path(__file__).parent.parent
# Local and global layers in turn, two repeats of the period: compiles three times as fast as 5 + 1.
DIMS = dict(
    layers=4, pattern=1, hidden=32, mlp=48, heads=4, kv_heads=4, global_kv_heads=4, head_dim=16,
    global_head_dim=32, window=16, vocab=1024,
)  # fmt: skip
STEPS, EVERY = 8, 3  # saves at 3, 6 and 8
KEYS = {"step", "loss", "lr", "grad_norm", "tokens", "target_tokens", "tokens_per_s"}
MEASURED = {"tokens_per_s", "step_s", "data_wait", "mfu", "memory_gib", "host_gib", "usd"}

# What must never be seen again, from the environment of a process (test_security.py).
PLANTED = {
    name: f"planted-{number}-{name.lower().replace('_', '-')}"
    for number, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
                                   "OPENAI_API_KEY", "TRACKIO_TOKEN"), 1)
}  # fmt: skip

Arrays = dict[str, np.ndarray]


def write_base(folder: Path, dtype: str = "float32", seed: int = 0) -> Path:
    return write_tiny(folder, dtype=dtype, seed=seed, **DIMS)


def write_config(file: Path, base: Path, run_dir: Path) -> Path:
    """The one config of these tests: everything that makes resuming hard is on."""
    tree = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"limit": 40, "max_seq_len": 256, "validation": None},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "mesh": {"fsdp": 2, "tp": 2},
        "train": {"steps": STEPS, "batch_size": 8, "accumulation": 2},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every": EVERY},
        "log": {"progress": False},
        "run_dir": str(run_dir),
    }
    file.write_text(yaml.safe_dump(tree))
    return file


def first_rows(path: str, count: int, file: Path) -> Path:
    file.write_text("".join(assets.resolve(path).read_text().splitlines(keepends=True)[:count]))
    return file


def run_config(base: Path, run_dir: Path, *overrides: str) -> Config:
    file = write_config(run_dir.with_name(f"{run_dir.name}.yaml"), base, run_dir)
    return config.load(file, overrides)


def train(run: Config) -> dict[str, Any]:
    """The recipe's main, in this process."""
    return cli._recipe(assets.find("recipes", run.recipe))(run)


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "gemma_tpu", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """Without the fake devices of this process: a subprocess asks for its own by mesh.cpu_devices."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | more


def one_device(file: Path, *overrides: str) -> list[str]:
    return command("train", file, "mesh.fsdp=1", "mesh.tp=1", "mesh.cpu_devices=1", *overrides)


def run(args: Sequence[str], **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(args, env=environment(**more), capture_output=True, text=True, timeout=300)


def run_and_signal(args: Sequence[str], number: signal.Signals, metrics: Path, after: int) -> tuple[int, str]:
    """Start the command, signal it once `after` steps are in metrics.jsonl; its exit code and stderr."""
    process = subprocess.Popen(
        args, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= after:
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return process.returncode, stderr


# A recipe of the user's own: the shipped one at 0.3 s a step, so that a signal finds the run in the middle.
SLOW_RECIPE = """\
import time

from gemma_tpu import assets, cli; from gemma_tpu.run import metrics

write = metrics.Journal.write


def slow(self, row):
    write(self, row)
    time.sleep(0.3)


def main(config):
    metrics.Journal.write = slow
    return cli._recipe(assets.find("recipes", "lora_sft.py"))(config)
"""


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir)]


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock and the machine say."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows(run_dir)]


def saved(run_dir: Path, step: int, part: str = "trained") -> Arrays:
    """The arrays of a checkpoint, read by TensorStore alone."""
    base = f"file://{(run_dir / 'checkpoints' / str(step) / part).absolute()}/"
    kvstore = {"driver": "ocdbt", "base": base}
    keys = [key.decode() for key in ts.KvStore.open(kvstore).result().list().result()]
    names = [key.removesuffix("/zarr.json") for key in keys if key.endswith("/zarr.json")]
    return {
        name: ts.open({"driver": "zarr3", "kvstore": {**kvstore, "path": name}}).result().read().result()
        for name in names
    }


def assert_same_bytes(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys() and one
    different = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    assert not different, f"{len(different)} of {len(one)} arrays differ: {different[:3]}"
    assert all(one[name].dtype == other[name].dtype and one[name].shape == other[name].shape for name in one)


def assert_same_run(one: Path, other: Path, step: int = STEPS) -> None:
    """Losses, adapters and moments, bit for bit; and every step is in metrics.jsonl once."""
    assert [row["step"] for row in rows(one)] == list(range(1, step + 1))
    assert comparable(one) == comparable(other)
    for part in ("trained", "opt"):
        assert_same_bytes(saved(one, step, part), saved(other, step, part))


def tensors(folder: Path) -> Arrays:
    """Every tensor of a checkpoint folder, straight from the files."""
    kinds = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
    found: Arrays = {}
    for file in sorted(folder.glob("*.safetensors")):
        blob = file.read_bytes()
        start = 8 + int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8:start]).items():
            if name != "__metadata__":
                low, high = (start + offset for offset in entry["data_offsets"])
                found[name] = np.frombuffer(blob[low:high], kinds[entry["dtype"]]).reshape(entry["shape"])
    return found


def overwrite(folder: Path, name: str, change: Any) -> None:
    """Change one tensor of a checkpoint folder in place: change(array) -> array of the same shape."""
    for file in sorted(folder.glob("*.safetensors")):
        blob = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8:start])
        if name in header:
            low, high = (start + offset for offset in header[name]["data_offsets"])
            blob[low:high] = np.ascontiguousarray(change(tensors(folder)[name].copy())).tobytes()
            file.write_bytes(blob)
            return
    raise KeyError(name)


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
