"""Four fake CPU devices for every test: the meshes 1x1, 2x2 and 1x4 run here as they would on a slice."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs compile once, for all workers, for the processes that tests start, and for the next call.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import fcntl  # noqa: E402
import functools  # noqa: E402  (jax reads the variables above when it is first imported)
import shutil  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(**dims) -> folder of a tiny float32 checkpoint without tokenizer, written once a session."""
    from helpers import write

    @functools.cache
    def make(**dims):
        return write(tmp_path_factory.mktemp("tiny") / "model", **dims)

    return make


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> the folder that make(folder) fills, in whichever worker asks for it first."""
    workers = tmp_path_factory.getbasetemp()
    workers = workers.parent if "PYTEST_XDIST_WORKER" in os.environ else workers

    def get(name, make):
        folder = workers / "once" / name
        folder.parent.mkdir(exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (made := folder.with_suffix(".made")).exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def base32(once):
    """A float32 base with a tokenizer. Read-only, like everything below."""
    from runs_helper import write_base

    return once("base32", lambda folder: write_base(folder / "float32")) / "float32"


@pytest.fixture(scope="session")
def base16(once):
    """The same in bfloat16, other weights."""
    from runs_helper import write_base

    return once("base16", lambda folder: write_base(folder / "bfloat16", "bfloat16", seed=1)) / "bfloat16"


@pytest.fixture(scope="session")
def whole_run(base32, once):
    """A complete run on a 2x2 mesh, without a stop; dropout, two micro-batches, packed rows."""
    from runs_helper import run_config, train

    return once("whole", lambda folder: train(run_config(base32, folder / "run"))) / "run"


@pytest.fixture(scope="session")
def held_out_run(base32, once):
    """The same run with held-out rows, whose loss is measured before and after."""
    from runs_helper import first_rows, run_config, train

    def make(folder):
        rows = first_rows("bundled:tiny_verilog/validation.jsonl", 24, folder / "rows.jsonl")
        train(run_config(base32, folder / "run", f"data.validation={rows}"))

    return once("held_out", make) / "run"


@pytest.fixture(scope="session")
def whole_merged(whole_run, once):
    """The model folder that `whole_run` merges to."""
    import gemma_tpu

    return once("merged", lambda folder: gemma_tpu.merge(whole_run, out=folder / "model")) / "model"


@pytest.fixture(scope="session")
def one_device_run(base32, once):
    """The same run on one device, by the command line in a process of its own."""
    from runs_helper import PLANTED, one_device, run, write_config

    def make(folder):
        finished = run(one_device(write_config(folder / "run.yaml", base32, folder / "run")), **PLANTED)
        assert finished.returncode == 0, finished.stderr
        assert "planted-" not in finished.stdout + finished.stderr  # runs_helper.PLANTED

    return once("one_device", make) / "run"
