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
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # for subprocesses
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield folder
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    jax.config.update("jax_compilation_cache_dir", None)


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
    """A complete run on a 2x2 mesh, without a stop; dropout, two micro-batches, held-out rows."""
    from runs_helper import HELD_OUT, run_config, train

    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_config(base32, run_dir, HELD_OUT))
    return run_dir


@pytest.fixture(scope="session")
def whole_merged(whole_run, tmp_path_factory):
    """The model folder that `whole_run` merges to."""
    import gemma_tpu

    out = tmp_path_factory.mktemp("whole") / "merged"
    gemma_tpu.merge(whole_run, out=out)
    return out
