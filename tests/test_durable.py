"""A run that is killed, or finds its newest checkpoint broken, goes on and ends as if nothing had happened."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs_helper import (
    assert_same_run,
    environment,
    one_device,
    run,
    write_config,
)  # fmt: skip


def kill_in_a_save(args: list[str], checkpoints: Path, rng: random.Random) -> bool:
    """Start the run and kill -9 it at a random moment after one of its saves has begun; False: it was done first."""
    process = subprocess.Popen(args, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wanted, seen = rng.randint(1, 2), set()
        left = list(checkpoints.glob("*.orbax-checkpoint-tmp*"))  # of the kill before: cleared before a save begins
        while process.poll() is None and any(path.exists() for path in left):
            time.sleep(0.0005)
        while process.poll() is None and len(seen) < wanted:
            seen |= {path.name.partition(".")[0] for path in checkpoints.glob("*.orbax-checkpoint-tmp*")}
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.08))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read().decode()
            return False
        process.send_signal(signal.SIGKILL)
        return True
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
def test_two_kills_in_the_middle_of_a_save_cost_nothing(base32, one_device_run, tmp_path):
    folder, rng = tmp_path / "run", random.Random(4)  # in the first save, then in a second one
    args = one_device(write_config(tmp_path / "run.yaml", base32, folder), "checkpoint.every=1")
    assert all(kill_in_a_save(args, folder / "checkpoints", rng) for _ in range(2))
    finished = run(args)
    assert finished.returncode == 0 and "resumed at step " in finished.stderr, finished.stderr
    assert_same_run(folder, one_device_run)
    assert not list((folder / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_ten_kills_in_the_middle_of_a_save_cost_nothing(base32, one_device_run, tmp_path):
    """Until ten have hit: a run that was through before its kill begins again elsewhere."""
    hits = 0
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        rng = random.Random(attempt)
        args = one_device(write_config(folder / "run.yaml", base32, folder / "run"), "checkpoint.every=1")
        while hits < 10 and kill_in_a_save(args, folder / "run" / "checkpoints", rng):
            hits += 1
        finished = run(args)
        assert finished.returncode == 0, finished.stderr
        assert_same_run(folder / "run", one_device_run)
        if hits == 10:
            return
    raise AssertionError(f"only {hits} kills hit a save")


@pytest.mark.slow
def test_the_newest_checkpoint_when_it_is_broken_is_named_and_the_one_before_is_used(
    base32, one_device_run, tmp_path
):
    shutil.copytree(one_device_run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for file in (checkpoints / "8").rglob("d/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    finished = run(one_device(write_config(tmp_path / "run.yaml", base32, tmp_path / "run")))
    assert finished.returncode == 0, finished.stderr
    assert f"warning: {checkpoints}/8: this checkpoint cannot be read" in finished.stderr
    assert "it is skipped, and lies in" in finished.stderr and "resumed at step 6 of 8" in finished.stderr
    aside = list(checkpoints.glob("unreadable-8-*"))
    assert len(aside) == 1, "not deleted: it may be wanted"
    assert_same_run(tmp_path / "run", one_device_run)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_compiled(base32, one_device_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    file = write_config(tmp_path / "run.yaml", base32, tmp_path / "run")
    finished = run(one_device(file, f"checkpoint.folder={tmp_path / 'file'}"))
    assert finished.returncode == 1, finished.stderr
    assert f"error: checkpoints cannot be saved in {tmp_path / 'file'}" in finished.stderr
    assert "compiled" not in finished.stderr and "Traceback" not in finished.stderr
