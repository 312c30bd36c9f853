"""Four fake CPU devices for every test: the meshes 1x1, 2x2 and 1x4 run here as they would on a slice."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools  # noqa: E402  (jax reads the variables above when it is first imported)

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
def compile_cache(tmp_path_factory):
    """Runs of one config and mesh compile once a session, in this process and in those that tests start."""
    import jax

    folder = tmp_path_factory.mktemp("xla")
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for subprocesses
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
        os.environ.pop(name.upper())


@pytest.fixture(scope="session")
def base32(tmp_path_factory):
    """A float32 base with a tokenizer. Read-only, like everything below."""
    from runs_helper import write_base

    return write_base(tmp_path_factory.mktemp("base") / "float32")


@pytest.fixture(scope="session")
def base16(tmp_path_factory):
    """The same in bfloat16, other weights."""
    from runs_helper import write_base

    return write_base(tmp_path_factory.mktemp("base") / "bfloat16", "bfloat16", seed=1)


@pytest.fixture(scope="session")
def whole_run(base32, compile_cache, tmp_path_factory):
    """A complete run on a 2x2 mesh, without a stop; dropout, two micro-batches, packed rows."""
    from runs_helper import run_config, train

    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_config(base32, run_dir))
    return run_dir


@pytest.fixture(scope="session")
def held_out_run(base32, whole_run, tmp_path_factory):
    """The same run with held-out rows, whose loss is measured before and after."""
    from runs_helper import first_rows, run_config, train

    folder = tmp_path_factory.mktemp("held_out")
    rows = first_rows("bundled:tiny_verilog/validation.jsonl", 24, folder / "rows.jsonl")
    train(run_config(base32, folder / "run", f"data.validation={rows}"))
    return folder / "run"


@pytest.fixture(scope="session")
def whole_merged(whole_run, tmp_path_factory):
    """The model folder that `whole_run` merges to."""
    import gemma_tpu

    out = tmp_path_factory.mktemp("whole") / "merged"
    gemma_tpu.merge(whole_run, out=out)
    return out


@pytest.fixture(scope="session")
def one_device_run(base32, compile_cache, tmp_path_factory):
    """The same run on one device, by the command line in a process of its own."""
    from runs_helper import PLANTED, one_device, run, write_config

    folder = tmp_path_factory.mktemp("one_device")
    finished = run(one_device(write_config(folder / "run.yaml", base32, folder / "run")), **PLANTED)
    assert finished.returncode == 0, finished.stderr
    assert "planted-" not in finished.stdout + finished.stderr  # runs_helper.PLANTED
    return folder / "run"
