"""A run folder in a bucket: a machine that comes back finds what the one before has left, and loses nothing."""

import json
import threading
import time

import fsspec
import pytest

from gemma_tpu import cli
from gemma_tpu.run import metrics, runs
from gemma_tpu.training.mirrored import Mirror, kept

BUCKET = "memory://bucket/run"


@pytest.fixture
def bucket():
    """Name -> content of what lies there."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    read = lambda name: fs.cat_file(name).decode(errors="replace")  # noqa: E731
    yield lambda: {name.removeprefix("/bucket/run/"): read(name) for name in fs.find("/bucket/run")}
    fs.store.clear()


def test_what_changes_is_copied_and_what_does_not_is_not(bucket, tmp_path):
    mirror = Mirror(tmp_path, BUCKET, print)
    (tmp_path / "metrics.jsonl").write_text("1\n")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/events").write_text("x")
    (tmp_path / "checkpoints/10").mkdir(parents=True)
    (tmp_path / "checkpoints/10/state").write_text("large")
    (tmp_path / ".config.yaml.tmp").write_text("half")
    assert mirror.push() == 2 and bucket() == {"metrics.jsonl": "1\n", "tensorboard/events": "x"}
    assert mirror.push() == 0
    (tmp_path / "metrics.jsonl").write_text("1\n2\n")
    assert mirror.push() == 1 and bucket()["metrics.jsonl"] == "1\n2\n"


def test_a_new_machine_fetches_it_and_does_not_send_it_back(bucket, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "metrics.jsonl").write_text("1\n")
    assert Mirror(old, BUCKET, print).push() == 1
    mirror = Mirror(new, BUCKET, print)
    assert mirror.fetch() == 1 and (new / "metrics.jsonl").read_text() == "1\n"
    (old / "metrics.jsonl").write_text("1\n2\n")  # another host of the same run, which has gone on
    Mirror(old, BUCKET, print).push()
    assert mirror.push() == 0 and bucket()["metrics.jsonl"] == "1\n2\n"


def test_what_is_here_already_is_not_replaced(bucket, tmp_path):
    fsspec.filesystem("memory").pipe_file("/bucket/run/metrics.jsonl", b"theirs")
    (tmp_path / "metrics.jsonl").write_text("ours")
    assert Mirror(tmp_path, BUCKET, print).fetch() == 0 and (tmp_path / "metrics.jsonl").read_text() == "ours"


def test_it_is_copied_while_the_run_goes_on_and_when_it_fails(bucket, tmp_path):
    said = []
    with pytest.raises(ZeroDivisionError), kept(tmp_path / "run", BUCKET, said.append, every=0.02):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.jsonl").write_text("1\n")
        deadline = time.monotonic() + 10
        while not bucket() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert bucket() == {"metrics.jsonl": "1\n"}
        (tmp_path / "run/metrics.jsonl").write_text("1\n2\n")
        raise ZeroDivisionError
    assert bucket() == {"metrics.jsonl": "1\n2\n"}
    assert said[-1].startswith(f"the run folder is in {BUCKET}")
    assert not [thread for thread in threading.enumerate() if thread.name == "mirror"]


def test_a_bucket_that_fails_is_said_and_does_not_end_the_run(bucket, tmp_path, monkeypatch):
    said = []
    (tmp_path / "metrics.jsonl").write_text("1\n")
    mirror = Mirror(tmp_path, BUCKET, said.append)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403: no write access")

    monkeypatch.setattr(mirror._bucket.fs, "pipe_file", refuse, raising=False)
    assert mirror.try_to_push() is False
    assert "could not be copied to memory://bucket/run: PermissionError: 403" in said[0]


@pytest.mark.parametrize("words, told", [
    (["--mirror", "runs/here"], "must be in a bucket"),
    (["--mirror", "gs://b/run"], "set checkpoint.folder to a bucket too, e.g. gs://b/run/checkpoints"),
    (["--mirror", "gs://b/run", "--rehearse"], "do not go together"),
])  # fmt: skip
def test_a_mirror_that_would_not_keep_the_run_is_refused(words, told, capsys):
    assert cli.main(["train", "configs/tiny_cpu.yaml", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_on_a_machine_that_has_nothing(base32, bucket, tmp_path, monkeypatch):
    """The first machine trains 4 of 8 steps and vanishes; the second has the bucket alone."""
    checkpoints = tmp_path / "far/checkpoints"

    def train(machine: str, steps: int) -> None:
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / machine)
        words = [f"model.path={base32}", "run_dir=run", f"checkpoint.folder={checkpoints}", "train.epochs=null",
                 "data.validation=null", "data.limit=32", "train.batch_size=4", f"train.steps={steps}",
                 "data.cache=null", "log.tensorboard=false"]  # fmt: skip
        assert cli.main(["train", "tiny_cpu.yaml", *words, "--mirror", BUCKET]) == 0

    monkeypatch.setattr(runs, "FREE", (*runs.FREE, "train.steps", "optim."))
    train("first", 4)
    assert set(bucket()) >= {"config.yaml", "metrics.jsonl", "summary.json"}
    train("second", 8)
    rows = metrics.read(tmp_path / "second/run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert json.loads(bucket()["summary.json"])["steps"] == 8
    assert not (tmp_path / "second/run/checkpoints").exists()


