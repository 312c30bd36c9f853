"""Checkpoints in a bucket: a run on gs:// is saved, resumed, merged from and rehearsed there, and a bad one is said."""

import threading

import pytest
from gcs_server import Bucket
from runs_helper import command, losses, one_device, run, tensors, write_config

pytest.importorskip("gcsfs")  # pip install 'gemma_tpu[gcs]'
pytestmark = pytest.mark.slow
PLACE = "checkpoint.folder=gs://bucket/runs/one"


@pytest.fixture
def bucket():
    with Bucket() as one:
        yield one


def train(bucket, file, *overrides: str):
    return run(one_device(file, PLACE, *overrides), **bucket.environment)


def steps(bucket) -> set[str]:
    return {name.split("/")[2] for name in bucket.objects if name.endswith("/_CHECKPOINT_METADATA")}


def test_a_run_saves_in_a_bucket_goes_on_from_there_and_merges(bucket, base32, one_device_run, tmp_path):
    file = write_config(tmp_path / "run.yaml", base32, tmp_path / "run")
    first = train(bucket, file)
    assert first.returncode == 0 and "a checkpoint can be saved in gs://bucket/runs/one" in first.stderr, first.stderr
    assert steps(bucket) == {"3", "6", "8"} and not any("probe" in name for name in bucket.objects)
    assert not (tmp_path / "run" / "checkpoints").exists()

    for name in [name for name in bucket.objects if name.startswith("runs/one/8/") and "/d/" in name]:
        bucket.put(name, bucket.objects[name][0][:10])
    again = train(bucket, file)
    assert again.returncode == 0, again.stderr
    assert "warning: gs://bucket/runs/one/8: this checkpoint cannot be read" in again.stderr
    assert "resumed at step 6 of 8" in again.stderr and "lies in gs://bucket/runs/one/unreadable-8-" in again.stderr
    assert losses(tmp_path / "run") == losses(one_device_run)

    for folder in (tmp_path / "run", one_device_run):
        out = tmp_path / f"merged-{folder.parent.name}"
        merged = run(command("merge", folder, "--out", out), **bucket.environment)
        assert merged.returncode == 0, merged.stderr
    one, other = (tensors(folder) for folder in sorted(tmp_path.glob("merged-*")))
    assert one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_a_bucket_without_the_right_to_write_is_said_in_the_first_minute(bucket, base32, tmp_path):
    bucket.refuse = lambda method, name: 403 if method in ("POST", "PUT") else None
    file = write_config(tmp_path / "run.yaml", base32, tmp_path / "run")
    for rehearse in ((), ("--rehearse",)):
        finished = train(bucket, file, *rehearse)
        assert finished.returncode == 1 and "Traceback" not in finished.stderr, finished.stderr
        assert "checkpoints cannot be saved in gs://bucket/runs/one" in finished.stderr
        assert "403" in finished.stderr or "Forbidden" in finished.stderr, "the word of the client that came first"
        assert "compiled" not in finished.stderr


def test_a_network_that_comes_back_costs_nothing(bucket, base32, one_device_run, tmp_path):
    refused = []

    def away(method: str, name: str) -> int | None:
        """The first 20 requests of the save of step 3."""
        if "/3" in name and len(refused) < 20:
            refused.append(name)
            return 503
        return None

    bucket.refuse = away
    finished = train(bucket, write_config(tmp_path / "run.yaml", base32, tmp_path / "run"))
    assert finished.returncode == 0 and len(refused) == 20, finished.stderr
    assert steps(bucket) == {"3", "6", "8"} and losses(tmp_path / "run") == losses(one_device_run)


def test_rights_that_are_lost_on_the_way_stop_the_run_with_what_is_good(bucket, base32, one_device_run, tmp_path):
    lost = threading.Event()

    def lose(method: str, name: str) -> int | None:
        if "runs/one/6" in name:
            lost.set()
        return 403 if lost.is_set() and method in ("POST", "PUT") else None

    bucket.refuse = lose
    file = write_config(tmp_path / "run.yaml", base32, tmp_path / "run")
    stopped = train(bucket, file)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr, stopped.stderr
    assert "attempt 3 of 3" in stopped.stderr and "the last good checkpoint is step 3" in stopped.stderr
    bucket.refuse = lambda method, name: None
    again = train(bucket, file)
    assert again.returncode == 0 and "resumed at step 3 of 8" in again.stderr, again.stderr
    assert losses(tmp_path / "run") == losses(one_device_run)
