"""Orbax checkpoints of a run: what trains, the optimizer, and one JSON record of everything else that resume needs.

The base is not in them: it is named by its fingerprint. Orbax writes into a temporary folder and renames, so a
checkpoint that is listed is whole; a save that fails leaves the ones before it alone. The record carries a checksum
of every bit of the state, which does not depend on the mesh: what is restored is what was saved, or is refused.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.hardware import distributed
from gemma_tpu.run import runs
from gemma_tpu.run.metrics import say

ATTEMPTS = 3  # to save one state, with growing pauses: a network comes back, a full disk is cleared
METRIC = "held_out_loss"


_EXTRAS = {"gs": "gcs", "s3": "s3"}  # what a bucket of this kind needs, by its name in pyproject.toml


class Checkpoints:
    """The checkpoints of a run; with `keep` for the run that writes them, without for a reader."""

    def __init__(self, folder: str | Path, keep: int | None = None, keep_best: int = 0):
        self.folder = _bucket(str(folder)) if "://" in str(folder) else Path(folder).expanduser().absolute()
        self._keep, self._keep_best = keep, keep_best
        self._saving: tuple[int, Any] | None = None
        self._save_failed = False
        self._orbax = self._open()

    def _open(self) -> Any:
        policies = ocp.training.preservation_policies
        keeping: Any = policies.PreserveAll()
        if self._keep is not None:
            newest = policies.LatestN(self._keep)
            best = policies.BestN(get_metric_fn=lambda found: found[METRIC], reverse=True, n=self._keep_best,
                                  keep_checkpoints_without_metrics=False)  # fmt: skip
            keeping = policies.AnyPreservationPolicy([newest, best]) if self._keep_best else newest
        # A reader leaves temporary folders alone: one may be a save in progress of a run that is still training.
        try:
            return ocp.training.Checkpointer(
                str(self.folder), preservation_policy=keeping, cleanup_tmp_directories=self._keep is not None
            )
        except Exception as error:  # a disk says OSError; each store's client has exceptions of its own
            scheme = str(self.folder).partition("://")[0]
            if isinstance(error, ImportError) and scheme in _EXTRAS:
                raise UserError(f"checkpoints in {self.folder} need one more package: "
                                f"pip install 'gemma_tpu[{_EXTRAS[scheme]}]'") from error  # fmt: skip
            raise RunError(f"{self.folder} cannot be opened: {getattr(error, 'strerror', None) or error}") from error

    @property
    def steps(self) -> list[int]:
        return sorted(found.step for found in self._orbax.checkpoints)

    @property
    def latest(self) -> int | None:
        return max(self.steps, default=None)

    def at(self, step: int) -> str:
        """Where a checkpoint lies, for a message."""
        return f"{self.folder}/{step}"

    # --- saving -----------------------------------------------------------------------------------------------

    def save(self, step: int, trained: Mapping[str, jax.Array], opt: Any, record: Mapping[str, Any],
             held_out: float | None = None) -> None:  # fmt: skip
        """Start saving in the background; the arrays are copied off the device before this returns."""
        self.wait()
        record = dict(record) | {"checksum": {"trained": checksum(dict(trained)), "opt": checksum(opt)}}
        metrics = None if held_out is None else {METRIC: held_out}
        try:
            response = self._orbax.save_checkpointables_async(
                step, {"trained": dict(trained), "opt": opt, "record": record}, metrics=metrics
            )
        except Exception as error:  # Orbax and TensorStore raise what they please for a full or read-only disk
            raise self._failed_to_save(step, error) from error
        self._saving = (step, response)

    def save_now(self, step: int, trained: Mapping[str, jax.Array], opt: Any, record: Mapping[str, Any],
                 held_out: float | None = None) -> None:  # fmt: skip
        """Save and wait, again after a pause where it fails; then the failure."""
        if self._save_failed:
            self._reopen()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self.save(step, trained, opt, record, held_out)
                return self.wait()
            except RunError as error:
                if attempt == ATTEMPTS:
                    raise
                pause = 2.0 ** (attempt - 1)
                say(f"{str(error).splitlines()[0]}; trying again in {pause:.0f} s, attempt {attempt + 1} of {ATTEMPTS}")
                time.sleep(pause)
                self._reopen()

    def poll(self) -> RunError | None:
        """The failure of the save in progress, if it has failed; what is still running is left alone."""
        if self._saving is None or self._orbax.is_saving_in_progress():
            return None
        try:
            self.wait()
        except RunError as error:
            return error
        return None

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

    def probe(self, trained: Mapping[str, jax.Array], opt: Any, record: Mapping[str, Any]) -> float:
        """Save the state beside the checkpoints, read its record back, delete it: what a bad bucket or a full disk
        would say after hours, it says now. Returns the seconds that it took."""
        begun = time.monotonic()
        test = None
        try:
            self._clear_probe()  # of a run that was killed here
            test = Checkpoints(f"{self.folder}/probe", keep=1)
            test.save(0, trained, opt, record)
            test.wait()
            if test.record(0)["shapes"] != record["shapes"]:
                raise RunError(f"{test.folder}: what was saved there is not what is read back")
        except (RunError, OSError) as error:
            raise RunError(
                f"checkpoints cannot be saved in {self.folder}: {str(error).splitlines()[0]}\n"
                "nothing is trained yet; mend the folder (checkpoint.folder, or run_dir) or free some space first"
            ) from error
        finally:
            if test is not None:
                test.close()
        self._clear_probe()
        return time.monotonic() - begun

    def _clear_probe(self) -> None:
        distributed.barrier("before the probe is cleared")
        if distributed.is_first():
            (self._orbax.directory / "probe").rmtree(missing_ok=True)
        distributed.barrier("after the probe is cleared")

    def _reopen(self) -> None:
        """After a failed save, which leaves Orbax's threads and half a folder: both are cleared."""
        self.close()
        self._orbax, self._save_failed = self._open(), False

    def close(self) -> None:
        try:
            self.wait()
        finally:
            try:
                self._orbax.close()
            except Exception:  # a failed save, which Orbax raises here a second time
                if not self._save_failed:
                    raise

    # --- reading ----------------------------------------------------------------------------------------------

    def record(self, step: int) -> dict[str, Any]:
        record: dict[str, Any] = self._load(step, {"record": None})["record"]
        return record

    def restore(self, step: int, trained: Mapping[str, jax.Array], opt: Any) -> dict[str, Any]:
        """Everything, onto the shardings of the given state: on another mesh than it was saved on, too."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (dict(trained), opt))
        found = self._load(step, {"trained": like[0], "opt": like[1], "record": None})
        self._hold(step, found["record"], {"trained": found["trained"], "opt": found["opt"]})
        return found

    def restore_trained(self, step: int, shardings: Mapping[str, NamedSharding] | None = None) -> dict[str, jax.Array]:
        """What was trained alone; without shardings on the first device (a merge or a sample needs no mesh)."""
        record = self.record(step)
        shapes = record["shapes"]
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path] if shardings else alone)
            for path, (shape, dtype) in shapes.items()
        }
        trained: dict[str, jax.Array] = self._load(step, {"trained": like})["trained"]
        self._hold(step, record, {"trained": trained})
        return trained

    def _hold(self, step: int, record: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        """Against the checksums in the record; a version before them wrote none."""
        saved = record.get("checksum", {})
        for name, part in parts.items():
            if name in saved and saved[name] != checksum(part):
                raise RunError(f"{self.at(step)}: this checkpoint cannot be read: the bits of {name} are not those "
                               "that were saved")  # fmt: skip

    def _load(self, step: int, what: dict[str, Any]) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._orbax.load_checkpointables(step, what)
            return found
        except Exception as error:
            raise RunError(f"{self.at(step)}: this checkpoint cannot be read: {_first_line(error)}") from error

    def put_aside(self, step: int) -> str:
        """Out of the way, not deleted: a checkpoint that cannot be read. Returns its new place."""
        place = self._orbax.directory / str(step)
        aside = self._orbax.directory / f"unreadable-{step}-{int(time.time())}"
        distributed.barrier(f"put aside {step}")
        if distributed.is_first() and place.exists():
            place.rename(aside)
        distributed.barrier(f"put {step} aside")
        self._orbax.reload()
        return str(aside)

    def failure(self, what: str, error: Exception) -> RunError:
        """What failed, and from where the run can go on."""
        latest = self.latest
        left = "there is no earlier checkpoint" if latest is None else f"the last good checkpoint is step {latest}"
        goes_on = "" if latest is None else " to go on from it"
        return RunError(
            f"{what} failed: {_first_line(error)}\n{left}; "
            f"free some space (or mend the permission) and run the same command again{goes_on}"
        )

    def diagnosis(self, error: RunError) -> RunError:
        """A run that ended by itself, with where it can be taken up again after a change."""
        latest = self.latest
        where = "no checkpoint was saved yet" if latest is None else f"the last good checkpoint is step {latest}"
        return RunError(f"{error}\n{where}: what was trained up to there is whole")

    def _failed_to_save(self, step: int, error: Exception) -> RunError:
        self._save_failed = True
        return self.failure(f"saving the checkpoint of step {step} in {self.folder}", error)


def _bucket(url: str) -> str:
    if url.partition("://")[0] not in _EXTRAS:
        raise UserError(f"checkpoint.folder {url}: must be a folder, gs://… or s3://…")
    return url.rstrip("/")


def checksum(tree: Any) -> int:
    """Of every bit of every array and its place in it; the same on every mesh, because integers add up exactly."""
    leaves = jax.tree.leaves(tree)
    found: dict[int, int] = {}
    for devices in {frozenset(leaf.sharding.device_set) for leaf in leaves}:
        here = [at for at, leaf in enumerate(leaves) if leaf.sharding.device_set == devices]
        found |= dict(zip(here, jax.device_get(_checksums([leaves[at] for at in here])), strict=True))
    total = 0
    for at in range(len(leaves)):
        total = (total * 1000003 + int(found[at])) % 2**32
    return total


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(leaf: jax.Array) -> jax.Array:
    bits = leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else _bits(leaf)
    weight = jnp.ones(leaf.shape, jnp.uint32)
    for dim in range(leaf.ndim):
        weight = weight * jnp.uint32(31) + 2 * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
    # Odd weights: no single bit that flips is lost.
    return jnp.sum(bits.astype(jnp.uint32) * (weight | jnp.uint32(1)), dtype=jnp.uint32)


def _bits(leaf: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, width)


def shapes_of(trained: Mapping[str, jax.Array | np.ndarray]) -> dict[str, list[Any]]:
    """For the record: so that a reader needs no model to restore."""
    return {path: [list(value.shape), str(value.dtype)] for path, value in trained.items()}


def folder_of(run_dir: Path, folder: str | None) -> str | Path:
    """Where a run's checkpoints lie: its own checkpoints/, or what `checkpoint.folder` says."""
    return run_dir / "checkpoints" if folder is None else folder


def open_existing(run_dir: Path) -> Checkpoints:
    """The checkpoints of a run that has some."""
    chosen = runs.read_config(run_dir).checkpoint.folder if (run_dir / "config.yaml").exists() else None
    folder = folder_of(run_dir, chosen)
    if "://" not in str(folder) and not Path(folder).expanduser().is_dir():
        raise UserError(f"{run_dir}: no checkpoints/ here; is it a run folder, and has `gemma-tpu train` run in it?")
    checkpoints = Checkpoints(folder)
    if checkpoints.latest is None:
        raise UserError(f"{folder} holds no finished checkpoint; train first, or run the same train command again")
    return checkpoints


def delete_all(folder: str, may_go: Callable[[Mapping[str, Any]], bool]) -> None:
    """The checkpoints in a folder, on a disk or in a bucket, if the record of each may go; nothing else of it. Every
    host asks, and the first one deletes."""
    there = Checkpoints(folder)
    try:
        steps, place = there.steps, there._orbax.directory
        others = [step for step in steps if not may_go(there.record(step))]
    finally:
        there.close()
    if others:
        raise UserError(f"{folder} holds checkpoints of another run (steps {', '.join(map(str, others))}), which are "
                        "not to be deleted; move them, or give another checkpoint.folder")  # fmt: skip
    if distributed.is_first():
        for step in steps:
            (place / str(step)).rmtree()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    for known in ("No space left on device", "Permission denied", "Read-only file system", "File too large"):
        if known in text:
            return known
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
