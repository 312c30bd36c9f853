"""Checkpoints: what goes in comes out, on any mesh; what is broken is said; a full disk costs no good one."""

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from runs_helper import assert_same_run, files, one_device, run, saved, write_config

from gemma_tpu.adapter import adapters
from gemma_tpu.errors import UserError
from gemma_tpu.run.checkpoint import Checkpoints, open_existing, shapes_of

RECORD = {"shapes": {"a": [[4, 8], "float32"]}, "none": None, "text": "ü \" \n", "list": [1, 2.5, "x", None],
          "big": 2**40, "tiny": 1e-30, "true": True, "empty": {}}  # fmt: skip


def state(fsdp: int, tp: int, seed: int | None = None) -> tuple[dict, dict]:
    """What trains and an optimizer of it, on a mesh; zeros without a seed."""
    mesh = Mesh(np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp), ("fsdp", "tp"))
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tp"))
    rng = np.random.default_rng(seed)

    def array(dtype=np.float32):
        value = np.zeros((4, 8)) if seed is None else rng.standard_normal((4, 8))
        return jax.device_put(value.astype(dtype), split)

    trained = {"a": array(), "b.c": array(jnp.bfloat16)}
    return trained, {"mu": {"a": array()}, "count": jax.device_put(np.int32(0 if seed is None else 7))}


def without_checksum(record: dict) -> dict:
    """What was handed over; the checksum is the checkpoint's own."""
    assert record["checksum"].keys() == {"trained", "opt"}
    return {key: value for key, value in record.items() if key != "checksum"}


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2), (4, 1)])
def test_a_checkpoint_comes_back_byte_for_byte_on_another_mesh(mesh, tmp_path):
    trained, opt = state(1, 4, seed=0)
    writer = Checkpoints(tmp_path, keep=3)
    writer.save(5, trained, opt, RECORD)
    writer.close()
    reader = Checkpoints(tmp_path, keep=3)
    like, like_opt = state(*mesh)
    found = reader.restore(reader.latest, like, like_opt)
    reader.close()
    trees = (trained, opt), (found["trained"], found["opt"]), (like, like_opt)
    for want, got, wanted_on in zip(*map(jax.tree.leaves, trees), strict=True):
        assert np.asarray(want).tobytes() == np.asarray(got).tobytes() and want.dtype == got.dtype
        assert got.sharding.is_equivalent_to(wanted_on.sharding, got.ndim)
    assert without_checksum(found["record"]) == RECORD


def test_the_record_comes_back_as_it_was_and_names_the_shapes(tmp_path):
    trained, opt = state(2, 2, seed=1)
    writer = Checkpoints(tmp_path, keep=3)
    record = RECORD | {"shapes": shapes_of(trained)}
    writer.save(1, trained, opt, record)
    writer.wait()
    assert without_checksum(writer.record(1)) == record
    assert record["shapes"] == {"a": [[4, 8], "float32"], "b.c": [[4, 8], "bfloat16"]}
    alone = writer.restore_trained(1)
    assert {path: np.asarray(value).tobytes() for path, value in alone.items()} == {
        path: np.asarray(value).tobytes() for path, value in trained.items()
    }
    assert all(len(value.sharding.device_set) == 1 for value in alone.values())
    writer.close()


def test_what_is_saved_is_the_step_that_was_handed_over(tmp_path):
    """The loop donates the state to the next step while the save runs in the background."""
    trained = {"a": jax.device_put(np.arange(1 << 20, dtype=np.float32))}
    writer = Checkpoints(tmp_path, keep=3)
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    writer.save(1, trained, {"mu": jnp.ones(3)}, RECORD)
    for _ in range(3):
        trained = change(trained)
    writer.close()
    np.testing.assert_array_equal(saved(tmp_path.parent, 1)["a"], np.arange(1 << 20, dtype=np.float32))


@pytest.fixture
def tmp_path(tmp_path):
    """`saved` looks for checkpoints/ in a run folder."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def test_the_newest_are_kept(tmp_path):
    writer = Checkpoints(tmp_path, keep=2)
    assert writer.latest is None and writer.steps == []
    for step in (3, 6, 9, 10):
        writer.save(step, *state(1, 1, seed=step), {"at": step})
    writer.close()
    reader = Checkpoints(tmp_path, keep=2)
    assert reader.steps == [9, 10] and reader.latest == 10
    assert [reader.record(step)["at"] for step in reader.steps] == [9, 10]
    reader.close()


def test_a_reader_leaves_the_save_of_a_running_training_alone(tmp_path):
    writer = Checkpoints(tmp_path, keep=2)
    writer.save(1, *state(1, 1, seed=1), RECORD)
    writer.close()
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", unfinished)
    before = files(unfinished)
    reader = open_existing(tmp_path.parent)
    assert reader.steps == [1]
    time.sleep(0.3)  # Orbax would clear it in the background
    reader.close()
    assert files(unfinished) == before

    writer = Checkpoints(tmp_path, keep=2)
    deadline = time.monotonic() + 10
    while unfinished.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not unfinished.exists(), "the run itself clears what an earlier one left"
    writer.close()


# --- what cannot be read ------------------------------------------------------------------------------------


def test_a_folder_without_checkpoints_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no finished checkpoint; train first"):
        open_existing(tmp_path.parent)
    tmp_path.rmdir()
    with pytest.raises(UserError, match="no checkpoints/ here; is it a run folder"):
        open_existing(tmp_path.parent)


def test_a_place_that_is_no_folder_and_no_bucket_is_refused_and_a_missing_package_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="checkpoint.folder ftp://host/run: must be a folder, gs://… or s3://…"):
        Checkpoints("ftp://host/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"in gs://bucket/run need one more package: pip install 'gemma_tpu\[gcs\]'"):
        Checkpoints("gs://bucket/run/")


def test_a_step_that_is_not_there_is_refused_with_those_that_are(whole_run):
    with pytest.raises(UserError, match="has no checkpoint of step 4; it has 3, 6, 8"):
        adapters.read(whole_run, 4)


def data_files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("d/*") if path.is_file()]
    assert found
    return found


def truncate(folder: Path) -> None:
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose(folder: Path) -> None:
    for file in data_files(folder):
        file.unlink()


def flip(folder: Path) -> None:
    for file in data_files(folder):
        file.write_bytes(bytes(byte ^ 255 for byte in file.read_bytes()))


# In a process of its own: TensorStore's threads complain to pytest about loops that Orbax has closed.
READ = """\
import sys
from gemma_tpu import errors; from gemma_tpu.adapter import adapters; from gemma_tpu.hardware import devices

devices.quiet()
for run, step in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        print("read", adapters.read(run, int(step)).step)
    except errors.RunError as error:
        print(error)
"""


def test_a_corrupt_checkpoint_is_one_clear_message_and_the_others_can_be_read(whole_run, tmp_path):
    args = []
    for harm in (truncate, lose, flip, shutil.rmtree):
        copy = tmp_path / harm.__name__
        shutil.copytree(whole_run, copy)
        harm(copy / "checkpoints" / "8" / "trained")
        args += [str(copy), "8", str(copy), "6"]
    finished = run([sys.executable, "-c", READ, *args])
    assert finished.returncode == 0 and "Traceback" not in finished.stderr, finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == 8, finished.stdout
    for copy, broken, whole in zip(args[::4], lines[::2], lines[1::2], strict=True):
        assert broken.startswith(f"{copy}/checkpoints/8: this checkpoint cannot be read: "), broken
        assert whole == "read 6"


# --- a full disk --------------------------------------------------------------------------------------------

FILLING_RECIPE = """\
from pathlib import Path

from gemma_tpu import assets, cli; from gemma_tpu.run import checkpoint

save = checkpoint.Checkpoints.save


def save_on_a_full_disk(self, step, *rest):
    self.wait()
    if step == 6:
        with open(Path(self.folder).parent.parent / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass  # full
    save(self, step, *rest)


def main(config):
    checkpoint.Checkpoints.save = save_on_a_full_disk
    return cli._recipe(assets.find("recipes", "lora_sft.py"))(config)
"""


def can_mount() -> bool:
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=30).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="a small disk needs `unshare -rm` and a tmpfs mount")
def test_a_full_disk_costs_no_good_checkpoint_and_the_run_goes_on_when_there_is_room(
    one_device_run, base32, tmp_path
):
    disk, out, recipe = (tmp_path / name for name in ("disk", "out", "fill.py"))
    disk.mkdir()
    recipe.write_text(FILLING_RECIPE)
    file = write_config(tmp_path / "run.yaml", base32, disk / "run")
    first, again = shlex.join(one_device(file, f"recipe={recipe}")), shlex.join(one_device(file))
    finished = run(["unshare", "-rm", "sh", "-c", f"""
        mount -t tmpfs -o size=8m none {disk} || exit 99
        {first}; echo exit $?; ls {disk}/run/checkpoints
        echo ----- >&2
        rm {disk}/filler; {again}; echo exit $?
        cp -r {disk}/run {out}
    """])  # fmt: skip
    assert finished.stdout.split()[:3] == ["exit", "1", "3"], finished.stdout + finished.stderr
    assert finished.stdout.split()[-2:] == ["exit", "0"], finished.stdout + finished.stderr
    full, resumed = finished.stderr.split("-----")
    # It fails in the background: at which step the run hears of it is a matter of time.
    assert re.search("error: saving the checkpoint of step [678] .* failed: No space left on device", full), full
    assert "attempt 3 of 3" in full, "it is tried again before the run gives up"
    assert "the last good checkpoint is step 3; free some space" in full
    assert "Traceback" not in full and "ERROR" not in full, "one message"
    assert "resumed at step 3 of 8" in resumed
    assert_same_run(out, one_device_run)
