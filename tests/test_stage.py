"""stage: what arrives is what the hub vouches for, a second call goes on, and nothing of the user's is replaced."""

import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from hub_server import Hub
from safetensors.numpy import save_file

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.storage import retry
from gemma_tpu.storage import stage as stage_module
from gemma_tpu.storage.remote import MANIFEST, UNFINISHED
from gemma_tpu.storage.shards import INDEX_FILE, open_checkpoint
from gemma_tpu.storage.stage import stage

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LEFT = {".gitattributes": b"* lfs", "pytorch_model.bin": b"the same weights again"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(stage_module, "_CHUNK_BYTES", 50)  # so that even these files come in several


@pytest.fixture
def files(tmp_path):
    made = {"config.json": b'{"model_type": "gemma4"}', "tokenizer.json": b'{"model": 1}', "empty.txt": b"",
            "sub/notes.txt": b"notes"}  # fmt: skip
    for number, name in enumerate(SHARDS):
        save_file({f"t{number}": np.arange(100, dtype=np.float32) + number}, tmp_path / name)
        made[name] = (tmp_path / name).read_bytes()
    index = {"weight_map": {f"t{number}": name for number, name in enumerate(SHARDS)}}
    return made | {INDEX_FILE: json.dumps(index).encode()}


@pytest.fixture
def hub(files, monkeypatch):
    with Hub(files | LEFT, monkeypatch) as server:
        yield server


@pytest.fixture(params=["memory", "folder"])
def target(request, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield "memory://bucket/model" if request.param == "memory" else f"file://{tmp_path}/staged/model"
    memory.store.clear()


def held(target: str) -> dict[str, bytes]:
    fs, base = fsspec.core.url_to_fs(target)
    return {path.removeprefix(base).lstrip("/"): fs.cat_file(path) for path in fs.find(base)} if fs.exists(base) else {}


def put(target: str, name: str, data: bytes) -> None:
    fs, base = fsspec.core.url_to_fs(target)
    fs.makedirs(base, exist_ok=True)
    fs.pipe_file(f"{base}/{name}", data)


def manifest(target: str) -> dict:
    return json.loads(held(target)[MANIFEST])


def test_every_file_arrives_with_its_sha256_in_the_manifest(hub, files, target):
    said = []
    report = stage(hub.repo, target, say=said.append)
    there = held(target)
    assert there.keys() == files.keys() | {MANIFEST}
    assert all(there[name] == data for name, data in files.items())
    listed = manifest(target)
    assert (listed["source"], listed["revision"]) == (f"hf://{hub.repo}", hub.commit)
    assert {name: entry["sha256"] for name, entry in listed["files"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items()
    }
    assert (report["copied"], report["skipped"], report["bytes"]) == (len(files), 0, sum(map(len, files.values())))
    assert report["left_out"] == sorted(LEFT) and report["licence"] == "gemma"
    assert "licence: gemma" in said[0] and "pytorch_model.bin" in said[1]
    assert (open_checkpoint(target).read("t1") == np.arange(100) + 1).all()


def test_a_second_call_copies_nothing(hub, files, target):
    stage(hub.repo, target)
    hub.reads.clear()
    report = stage(hub.repo, target)
    assert (report["copied"], report["skipped"]) == (0, len(files))
    # The checkpoint is checked again by its index and headers; no whole shard and no other file is read.
    assert set(hub.reads) == {INDEX_FILE, *SHARDS} and len(hub.reads) == 3


def test_a_stopped_copy_goes_on_where_it_stopped(hub, files, target, monkeypatch):
    real, done = stage_module._Copy._copy, []

    def stopping(self, file, progress):
        if len(done) == 3:
            raise KeyboardInterrupt
        real(self, file, progress)
        done.append(file.name)

    monkeypatch.setattr(stage_module._Copy, "_copy", stopping)
    with pytest.raises(KeyboardInterrupt):
        stage(hub.repo, target)
    assert MANIFEST not in held(target) and set(json.loads(held(target)[UNFINISHED])["files"]) == set(done)
    monkeypatch.setattr(stage_module._Copy, "_copy", real)
    report = stage(hub.repo, target)
    assert (report["skipped"], report["copied"]) == (3, len(files) - 3)
    assert held(target).keys() == files.keys() | {MANIFEST}


def test_a_copy_that_dies_in_the_middle_of_a_file_leaves_none_of_it(hub, files, target, monkeypatch):
    monkeypatch.setattr(stage_module, "_UPLOADS", 1)
    real = stage_module._chunks

    def dying(source, file):
        for number, chunk in enumerate(real(source, file)):
            if file.name == SHARDS[0] and number == 2:
                raise ConnectionResetError("gone")
            yield chunk

    monkeypatch.setattr(stage_module, "_chunks", dying)
    with pytest.raises(RunError, match="failed 1 times, last with ConnectionResetError"):
        stage(hub.repo, target)
    assert not {name for name in held(target) if name.startswith(SHARDS[0])}
    monkeypatch.setattr(stage_module, "_chunks", real)
    stage(hub.repo, target)
    assert held(target)[SHARDS[0]] == files[SHARDS[0]]


def test_interrupted_reads_and_uploads_are_tried_again(hub, files, target, monkeypatch):
    source_faults, upload_faults = [503, "drop", "short"], [OSError("reset")]
    real = stage_module.writing

    def writing(bucket, name):
        if name == SHARDS[1] and upload_faults:
            raise upload_faults.pop()
        return real(bucket, name)

    monkeypatch.setattr(stage_module, "writing", writing)
    hub.faults = source_faults
    assert stage(hub.repo, target)["retries"] == 4
    assert held(target)[SHARDS[1]] == files[SHARDS[1]]


@pytest.mark.parametrize("name", [SHARDS[1], "tokenizer.json"])
def test_bytes_that_differ_from_what_the_hub_vouches_for_are_not_written(hub, target, name):
    real = hub.tree

    def lying():
        tree = real()
        for entry in tree:
            if entry["path"] == name:
                entry.get("lfs", entry)["oid"] = "0" * (64 if "lfs" in entry else 40)
        return tree

    hub.tree = lying
    with pytest.raises(RunError, match=f"{name}: its bytes have the .* the hub says 0000"):
        stage(hub.repo, target)
    assert name not in held(target) and MANIFEST not in held(target)


def test_files_brought_by_other_means_are_kept_if_their_checksum_is_right(hub, files, target):
    for name in (SHARDS[0], "config.json"):
        put(target, name, files[name])
    report = stage(hub.repo, target)
    assert report["skipped"] == 2 and manifest(target)["files"].keys() == files.keys()


def test_a_file_damaged_in_the_bucket_is_copied_again(hub, files, target):
    stage(hub.repo, target)
    put(target, SHARDS[0], files[SHARDS[0]][:-1] + b"!")  # the same size
    assert stage(hub.repo, target)["copied"] == 1
    assert held(target)[SHARDS[0]] == files[SHARDS[0]]


def test_a_new_revision_replaces_what_changed_and_the_manifest_never_lies(hub, files, target, monkeypatch):
    stage(hub.repo, target)
    hub.files["config.json"] = b'{"model_type": "gemma4", "v": 2}'
    real = stage_module._Copy._copy

    def watching(self, file, progress):
        assert MANIFEST not in held(target)  # while files are replaced it would claim the old ones
        real(self, file, progress)

    monkeypatch.setattr(stage_module._Copy, "_copy", watching)
    assert stage(hub.repo, target)["copied"] == 1
    assert held(target)["config.json"] == hub.files["config.json"]


def test_what_was_not_put_there_by_stage_is_not_replaced(hub, files, target):
    put(target, "config.json", b"mine")
    put(target, "my notes.txt", b"also mine")
    with pytest.raises(UserError, match="other files of the same names: config.json"):
        stage(hub.repo, target)
    assert held(target) == {"config.json": b"mine", "my notes.txt": b"also mine"}
    stage(hub.repo, target, overwrite=True)
    assert held(target)["config.json"] == files["config.json"]
    assert held(target)["my notes.txt"] == b"also mine"


def test_a_target_that_holds_another_model_is_refused(hub, files, target, tmp_path):
    stage(hub.repo, target)
    before = held(target)
    (tmp_path / "other").mkdir()
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other/model.safetensors")
    with pytest.raises(UserError, match=f"holds a copy of hf://{hub.repo}"):
        stage(tmp_path / "other", target)
    assert held(target) == before


def test_a_local_folder_can_be_staged_too_and_is_skipped_the_second_time(tmp_path, target):
    folder = tmp_path / "local"
    folder.mkdir()
    save_file({"x": np.zeros(300, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    assert stage(folder, target)["copied"] == 2
    assert stage(folder, target)["copied"] == 0
    (folder / "config.json").write_text('{"a": 1}')
    assert stage(folder, target)["copied"] == 1


def test_an_incomplete_source_is_refused_before_anything_is_copied(hub, target):
    del hub.files[SHARDS[1]]
    with pytest.raises(UserError, match=f"names {SHARDS[1]}, which is not there"):
        stage(hub.repo, target)
    assert held(target) == {}


def test_a_gated_model_and_a_wrong_target_are_refused_without_the_token(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match="the target is a bucket"):
        stage(hub.repo, "hf://me/copy")
    hub.gated = True
    with pytest.raises(UserError) as caught:
        stage(hub.repo, "memory://bucket/model")
    assert f"accept its licence at {hub.url}/{hub.repo}" in str(caught.value)
    assert "hf_secret" not in str(caught.value) + "".join(capsys.readouterr())


def test_the_disk_is_not_touched(hub, files, monkeypatch):
    opened, real = [], open

    def watching(path, mode="r", *rest, **more):
        opened.append((path, mode))
        return real(path, mode, *rest, **more)

    for place in ("builtins.open", "io.open"):
        monkeypatch.setattr(place, watching)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("a file was written"))
    stage(hub.repo, "memory://bucket/model")
    assert not [path for path, mode in opened if set(mode) & set("wax+")]
    fsspec.filesystem("memory").store.clear()


class ObjectStore:
    """What gcsfs and s3fs do: an object is there from commit() on, and discard() drops what was uploaded of it."""

    protocol = ("gs", "gcs")

    def __init__(self, discard_fails: bool = False):
        self.objects, self.calls, self._fails = {}, [], discard_fails

    def open(self, path, mode, block_size, autocommit):
        assert (mode, autocommit) == ("wb", False)
        upload = io.BytesIO()
        upload.close = lambda: self.calls.append("close")
        upload.commit = lambda: self.objects.update({path: upload.getvalue()})
        upload.discard = self.discard
        return upload

    def discard(self):
        self.calls.append("discard")
        if self._fails:
            raise OSError("501")


def test_an_upload_to_an_object_store_is_committed_whole_or_discarded(capsys):
    for store in (ObjectStore(), ObjectStore(discard_fails=True)):
        bucket = SimpleNamespace(fs=store, path=lambda name: f"bucket/{name}")
        with stage_module.writing(bucket, "whole") as out:
            out.write(b"all of it")
        with pytest.raises(KeyboardInterrupt), stage_module.writing(bucket, "half") as out:
            out.write(b"half")
            raise KeyboardInterrupt
        assert store.objects == {"bucket/whole": b"all of it"} and store.calls == ["close", "discard"]
    assert "bucket/half: its unfinished upload could not be cancelled (OSError: 501)" in capsys.readouterr().err
