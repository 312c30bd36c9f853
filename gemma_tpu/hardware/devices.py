"""Which devices a command runs on, and how much the libraries under it may say.

JAX reads its platform once, when the first array is made: everything here must run before that.
"""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.hardware import gpus

GPU_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # as JAX calls it, and as it did


def quiet() -> None:
    """Libraries below the level of an error stay silent; what a user must know, this package says itself."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA and TensorFlow: errors only
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not any(name in os.environ for name in GPU_SHARE):
        os.environ[GPU_SHARE[0]] = "0.94"  # of a GPU's memory: JAX takes 0.75 by itself, and plans are made with all
    foreign = importlib.util.find_spec("libtpu") or gpus.installed()
    if "JAX_PLATFORMS" not in os.environ and foreign and not accelerators():
        os.environ["JAX_PLATFORMS"] = "cpu"  # these complain to stderr where they find no accelerator, for seconds
        if "jax" in sys.modules:  # a recipe has imported it, and it has read its environment
            cpu()
    for name in ("jax", "orbax", "grain", "etils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A save that fails, Orbax raises, and logs once more from each of its threads with a traceback.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
    # To read a checkpoint onto one device, whatever mesh it was saved on, is what merge and sample mean.
    warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")


def accelerators() -> str:
    """The first device file of an accelerator on this machine: TPU, NVIDIA, AMD, or a GPU under WSL."""
    patterns = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")
    return str(next((path for pattern in patterns for path in Path("/dev").glob(pattern)), ""))


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """After a save that failed, threads still report to Orbax's event loop, which is gone: nobody needs to know."""

    def quiet_hook(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and "Event loop is closed" in str(found.exc_value)):
            hook(found)

    return quiet_hook


def cpu(count: int | None = None) -> None:
    """Run on the CPU whatever accelerator this machine has; with `count`, as that many fake devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if count is None:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags:
        raise UserError(
            f"XLA_FLAGS={flags} and mesh.cpu_devices={count} both set the number of CPU devices; "
            "unset XLA_FLAGS, or set mesh.cpu_devices=0"
        )
    jax.config.update("jax_num_cpu_devices", count)


def setting(name: str) -> str | None:
    """One of JAX's own settings; its config makes them as attributes that no type knows."""
    import jax

    value: str | None = getattr(jax.config, name)
    return value


class CompileCache:
    """Compiled programs on disk (or in a bucket): a run that starts again, on spot say, does not compile again.

    JAX_COMPILATION_CACHE_DIR, where it is set, has the last word.
    """

    def __init__(self, folder: str | None):
        import jax

        if setting("jax_compilation_cache_dir") is None and folder is not None:
            local = "://" not in folder
            jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()) if local else folder)
        self.folder = setting("jax_compilation_cache_dir")
        self._hits = 0
        jax.monitoring.register_event_listener(self._note)

    def _note(self, event: str, **_: Any) -> None:
        self._hits += event == "/jax/compilation_cache/cache_hits"

    def told(self, name: str) -> str:
        """What became of the program that was compiled last, for the log; call it once for each."""
        if not self.folder:
            return "no compile cache"
        hit, self._hits = self._hits > 0, 0
        keys = [] if "://" in self.folder else sorted(Path(self.folder).glob(f"jit_{name}-*-cache"), key=_used)
        key = f", key {keys[-1].name.removesuffix('-cache')[-12:]}" if keys else ""
        return f"{'from' if hit else 'now in'} the compile cache {self.folder}{key}"


def _used(file: Path) -> float:
    """When a cached program was last written or read; JAX notes the reading beside it."""
    stamp = file.with_name(file.name.removesuffix("-cache") + "-atime")
    return (stamp if stamp.exists() else file).stat().st_mtime


def require() -> None:
    """The devices must answer: a TPU that another process holds is a failed run, not a bug."""
    import jax

    try:
        jax.devices()
    except RuntimeError as error:
        raise RunError(f"no device to run on: {str(error).splitlines()[0]}") from error
