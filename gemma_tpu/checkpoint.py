"""Orbax checkpoints of a run: what trains, the optimizer, and one JSON record of everything else that resume needs.

The base is not in them: it is named by its fingerprint. Orbax writes into a temporary folder and renames, so a
checkpoint that is listed is whole; a save that fails leaves the ones before it alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from gemma_tpu.errors import RunError, UserError


class Checkpoints:
    """The checkpoints/ folder of a run; with `keep` for the run that writes it, without for a reader."""

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder = folder.absolute()
        self._saving: tuple[int, Any] | None = None
        self._save_failed = False
        policies = ocp.training.preservation_policies
        keeping = policies.PreserveAll() if keep is None else policies.LatestN(keep)
        # A reader leaves temporary folders alone: one may be a save in progress of a run that is still training.
        try:
            self._orbax = ocp.training.Checkpointer(
                self.folder, preservation_policy=keeping, cleanup_tmp_directories=keep is not None
            )
        except OSError as error:
            raise RunError(f"{self.folder} cannot be opened: {error.strerror or error}") from error

    @property
    def steps(self) -> list[int]:
        return sorted(found.step for found in self._orbax.checkpoints)

    @property
    def latest(self) -> int | None:
        return max(self.steps, default=None)

    def save(self, step: int, trained: Mapping[str, jax.Array], opt: Any, record: Mapping[str, Any]) -> None:
        """Start saving in the background; the arrays are copied off the device before this returns."""
        self.wait()
        try:
            response = self._orbax.save_checkpointables_async(
                step, {"trained": dict(trained), "opt": opt, "record": dict(record)}
            )
        except Exception as error:  # Orbax and TensorStore raise what they please for a full or read-only disk
            raise self._failed_to_save(step, error) from error
        self._saving = (step, response)

    def wait(self) -> None:
        """Until the save in progress is on disk."""
        if self._saving is None:
            return
        step, response = self._saving
        self._saving = None
        try:
            response.result()
        except Exception as error:
            raise self._failed_to_save(step, error) from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            try:
                self._orbax.close()
            except Exception:  # a failed save, which Orbax raises here a second time
                if not self._save_failed:
                    raise

    def record(self, step: int) -> dict[str, Any]:
        return self._load(step, {"record": None})["record"]

    def restore(self, step: int, trained: Mapping[str, jax.Array], opt: Any) -> dict[str, Any]:
        """Everything, onto the shardings of the given state: on another mesh than it was saved on, too."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (dict(trained), opt))
        return self._load(step, {"trained": like[0], "opt": like[1], "record": None})

    def restore_trained(self, step: int, shardings: Mapping[str, NamedSharding] | None = None) -> dict[str, jax.Array]:
        """What was trained alone; without shardings on the first device (a merge or a sample needs no mesh)."""
        shapes = self.record(step)["shapes"]
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path] if shardings else alone)
            for path, (shape, dtype) in shapes.items()
        }
        return self._load(step, {"trained": like})["trained"]

    def _load(self, step: int, what: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._orbax.load_checkpointables(step, what)
        except Exception as error:
            where = self.folder / str(step)
            raise RunError(f"{where}: this checkpoint cannot be read: {_first_line(error)}") from error

    def failure(self, what: str, error: Exception) -> RunError:
        """What failed, and from where the run can go on."""
        latest = self.latest
        left = "there is no earlier checkpoint" if latest is None else f"the last good checkpoint is step {latest}"
        goes_on = "" if latest is None else " to go on from it"
        return RunError(
            f"{what} failed: {_first_line(error)}\n{left}; "
            f"free some space (or mend the permission) and run the same command again{goes_on}"
        )

    def _failed_to_save(self, step: int, error: Exception) -> RunError:
        self._save_failed = True
        return self.failure(f"saving the checkpoint of step {step} in {self.folder}", error)


def shapes_of(trained: Mapping[str, jax.Array | np.ndarray]) -> dict[str, list[Any]]:
    """For the record: so that a reader needs no model to restore."""
    return {path: [list(value.shape), str(value.dtype)] for path, value in trained.items()}


def open_existing(run_dir: Path) -> Checkpoints:
    """The checkpoints of a run that has some."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_dir}: no checkpoints/ here; is it a run folder, and has `gemma-tpu train` run in it?")
    checkpoints = Checkpoints(folder)
    if checkpoints.latest is None:
        raise UserError(f"{folder} holds no finished checkpoint; train first, or run the same train command again")
    return checkpoints


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    for known in ("No space left on device", "Permission denied", "Read-only file system", "File too large"):
        if known in text:
            return known
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
