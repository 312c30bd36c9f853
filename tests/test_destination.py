"""A merge that is written straight to a bucket."""

import contextlib

import fsspec
import pytest
from patch_helper import ONE, TWO, killed_in_the_second_shard, low_rank, make_base, tree, updates
from safetensors.numpy import load_file

from gemma_tpu.errors import UserError
from gemma_tpu.handoff.patch import write_patched
from gemma_tpu.storage import destination
from gemma_tpu.storage.shards import INDEX_FILE, open_checkpoint


@pytest.fixture
def bucket():
    memory = fsspec.filesystem("memory")
    yield memory
    if memory.exists("/patch"):
        memory.rm("/patch", recursive=True)


def held(memory) -> dict[str, bytes]:
    return {name.removeprefix("/patch/out/"): memory.cat_file(name) for name in memory.find("/patch/out")}


def test_a_bucket_gets_the_bytes_of_a_folder_and_config_and_index_last(tmp_path, bucket, monkeypatch):
    base, order = make_base(tmp_path / "base"), []
    write_patched(base, tmp_path / "out", updates())
    write = destination.Bucket.write
    monkeypatch.setattr(destination.Bucket, "write",
                        lambda self, name, fill: (order.append(name), write(self, name, fill))[1])
    report = write_patched(base, "memory://patch/out", updates())
    assert held(bucket) == tree(tmp_path / "out") and report.out == "memory://patch/out"
    assert order[-2:] == ["config.json", INDEX_FILE]
    assert open_checkpoint("memory://patch/out").read("q").tobytes() == load_file(tmp_path / "out" / ONE)["q"].tobytes()


def test_an_interrupted_merge_into_a_bucket_is_no_model_and_goes_on(tmp_path, bucket):
    base = make_base(tmp_path / "base")
    write_patched(base, tmp_path / "out", updates())
    killed_in_the_second_shard(base, "memory://patch/out", updates())
    assert ONE in held(bucket) and not {"config.json", INDEX_FILE, TWO} & held(bucket).keys()
    with pytest.raises(UserError, match="holds neither"):
        open_checkpoint("memory://patch/out")
    report = write_patched(base, "memory://patch/out", updates())
    assert report.resumed == [ONE] and report.changes and not report.changes.keys() & load_file(tmp_path / "out" / ONE)
    assert held(bucket) == tree(tmp_path / "out")


def test_an_upload_that_breaks_off_is_made_again_whole(tmp_path, bucket, monkeypatch):
    base, faults = make_base(tmp_path / "base"), [OSError("reset")]
    write_patched(base, tmp_path / "out", updates())
    writing = destination.stage.writing

    @contextlib.contextmanager
    def broken(place, name):
        with writing(place, name) as file:
            yield file
            if name == TWO and faults:
                raise faults.pop()

    monkeypatch.setattr(destination.stage, "writing", broken)
    monkeypatch.setattr("gemma_tpu.storage.retry.time.sleep", lambda seconds: None)
    whole = write_patched(base, "memory://patch/out", updates())
    assert not faults and held(bucket) == tree(tmp_path / "out")
    assert whole.changes["down"].moved <= whole.changes["down"].elements


def test_what_lies_in_a_bucket_is_kept_without_leave(tmp_path, bucket):
    base = make_base(tmp_path / "base")
    write_patched(base, "memory://patch/out", updates())
    first = held(bucket)
    with pytest.raises(UserError, match="is not empty"):
        write_patched(base, "memory://patch/out", {"q": low_rank(192, 320, seed=9)})
    assert held(bucket) == first
    write_patched(base, "memory://patch/out", updates(), max_shard_bytes=200_000, overwrite=True)
    assert ONE not in held(bucket) and len(open_checkpoint("memory://patch/out").shards) > 2
    bucket.pipe_file("/patch/out/notes.txt", b"precious")
    with pytest.raises(UserError, match="would lose files.*notes.txt"):
        write_patched(base, "memory://patch/out", updates(), overwrite=True)
    with pytest.raises(UserError, match="write to a folder or a bucket"):
        write_patched(base, "hf://org/name", updates())
    with pytest.raises(UserError, match="neither inside the other"):
        write_patched(open_checkpoint("memory://patch/out"), "memory://patch/out/merged", updates())
