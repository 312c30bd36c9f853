"""Byte ranges from far away: the same tensors as from a folder, through interruptions, short reads and refusals."""

import json
import re
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from hub_server import Hub
from safetensors.numpy import save_file

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.gemma import loading, mesh
from gemma_tpu.gemma.streaming import _pages, load
from gemma_tpu.storage import remote, retry
from gemma_tpu.storage.remote import BucketSource
from gemma_tpu.storage.shards import open_checkpoint
from gemma_tpu.storage.sources import local_folder, open_source
from gemma_tpu.storage.transfer import Transfer

TENSORS = {
    "a": np.arange(6 * 40, dtype=np.float32).reshape(6, 40),
    "b": np.arange(7, dtype=np.float32),
    "experts": np.arange(3 * 4 * 5, dtype=np.float16).reshape(3, 4, 5),
}
SMALL_FILES = {"config.json": b'{"model_type": "gemma4"}', "tokenizer.json": b"{}", "sub/notes.txt": b"x"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(remote, "_PART_BYTES", 64)  # so that even these tensors come in several parts
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), **SMALL_FILES}


@pytest.fixture
def bucket(files):
    """A checkpoint in fsspec's memory filesystem."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, data in files.items():
        memory.pipe_file(f"/bucket/model/{name}", data)
    yield "memory://bucket/model"
    memory.store.clear()


@pytest.fixture
def hub(files, monkeypatch):
    with Hub(files, monkeypatch) as server:
        yield server


def interrupted(source: BucketSource, faults: list, monkeypatch) -> list:
    """The source's next reads go wrong as listed: an exception is raised, a number is how many bytes are cut off."""
    real, seen = source.fs.cat_file, []

    def cat_file(path, start, end):
        seen.append((start, end))
        fault = faults.pop(0) if faults else 0
        if isinstance(fault, Exception):
            raise fault
        return real(path, start=start, end=end)[: end - start - fault]

    monkeypatch.setattr(source.fs, "cat_file", cat_file)
    return seen


# --- reading ---


def test_a_bucket_and_the_hub_read_like_a_folder(bucket, hub):
    for where in (bucket, f"hf://{hub.repo}", f"hf://{hub.repo}@main"):
        checkpoint = open_checkpoint(where)
        assert checkpoint.names() == sorted(TENSORS) and checkpoint.config == {"model_type": "gemma4"}
        for name, array in TENSORS.items():
            assert checkpoint.read(name).tobytes() == array.tobytes()
        assert (checkpoint.read_slice("a", (slice(2, 5), slice(7, 9))) == TENSORS["a"][2:5, 7:9]).all()


def test_paths_that_swallowed_a_slash_are_urls_again(bucket):
    assert str(Path(bucket)) == "memory:/bucket/model"
    assert open_checkpoint(Path(bucket)).where == bucket


def test_only_the_bytes_of_a_slice_are_read(bucket, monkeypatch):
    checkpoint = open_checkpoint(bucket)
    seen = interrupted(checkpoint.source, [], monkeypatch)
    checkpoint.read("a", slice(1, 2))
    assert sum(end - start for start, end in seen) == 40 * 4


def test_rows_are_read_once_for_all_the_column_slices_of_a_host(bucket, monkeypatch):
    checkpoint = open_checkpoint(bucket)
    seen = interrupted(checkpoint.source, [], monkeypatch)
    parts = [np.empty((6, 10), np.float64) for _ in range(4)]
    columns = [(slice(None), slice(10 * i, 10 * i + 10)) for i in range(4)]
    checkpoint.read_slices("a", list(zip(columns, parts, strict=True)))
    assert (np.concatenate(parts, axis=1) == TENSORS["a"]).all()
    assert sum(end - start for start, end in seen) == TENSORS["a"].nbytes


def test_the_hub_is_pinned_to_the_commit_that_was_opened(hub):
    checkpoint = open_checkpoint(f"hf://{hub.repo}")
    checkpoint.read("b")
    assert hub.revisions_read == {hub.commit}


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect = True
    assert (open_checkpoint(f"hf://{hub.repo}").read("b") == TENSORS["b"]).all()
    assert hub.tokens_at["hub"] == {"Bearer hf_secret"} and hub.tokens_at["store"] == {None}


# --- interruptions ---


def test_interrupted_and_short_reads_are_tried_again_counted_and_said(bucket, monkeypatch, capsys):
    checkpoint = open_checkpoint(bucket)
    interrupted(checkpoint.source, [ConnectionResetError("gone"), 3, TimeoutError()], monkeypatch)
    with Transfer("weights", checkpoint.source) as transfer:
        assert (checkpoint.read("b") == TENSORS["b"]).all()
        transfer.update(28, 28)
    assert checkpoint.source.retries == 3
    said = capsys.readouterr().err
    assert "interrupted (ConnectionResetError: gone)" in said and "a short read: 25 of 28 bytes" in said
    assert "attempt 4 of 6" in said and "3 reads tried again" in said


def test_what_never_comes_is_an_error_with_the_tensors_name(bucket, monkeypatch):
    checkpoint = open_checkpoint(bucket)
    interrupted(checkpoint.source, [ConnectionResetError("gone")] * 99, monkeypatch)
    with pytest.raises(RunError, match="^b: reading bytes .* failed 6 times, last with ConnectionResetError"):
        checkpoint.read("b")
    assert checkpoint.source.retries == 5


def test_a_file_that_is_gone_is_not_asked_for_again(bucket):
    checkpoint = open_checkpoint(bucket)
    fsspec.filesystem("memory").rm("/bucket/model/model.safetensors")
    with pytest.raises(RunError, match="^a: reading bytes .*FileNotFoundError"):
        checkpoint.read("a")
    assert checkpoint.source.retries == 0


def test_a_local_short_read_names_the_tensor(tmp_path, files):
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"][:-600])
    with pytest.raises(RunError, match="^a: .*changed while it was read"):
        checkpoint.read("a")


def test_hub_reads_survive_errors_of_the_server_and_dropped_connections(hub):
    checkpoint = open_checkpoint(f"hf://{hub.repo}")
    hub.faults = [503, "drop", 429, "short"]
    assert (checkpoint.read("b") == TENSORS["b"]).all()
    assert checkpoint.source.retries == 4


def test_a_server_that_ignores_ranges_is_not_mistaken_for_one_that_serves_them(hub):
    checkpoint = open_checkpoint(f"hf://{hub.repo}")
    hub.faults = ["whole"] * 99
    with pytest.raises(RunError, match="ignored the range"):
        checkpoint.read("b")


def test_a_signature_in_a_url_is_not_shown():
    shown = retry.explain(OSError("GET https://store.example/f?X-Signature=abc&k=1 failed"))
    assert shown == "OSError: GET https://store.example/f failed"


# --- refusals ---


def refused(where) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(where)
    return str(caught.value)


def test_what_cannot_be_opened_is_one_message(bucket, tmp_path, monkeypatch):
    assert "memory://bucket/none: there is nothing of that name" in refused("memory://bucket/none")
    assert "holds neither model.safetensors" in refused("memory://bucket")
    assert "Protocol not known: gopher" in refused("gopher://bucket/x")
    assert "a web address cannot be listed" in refused("https://huggingface.co/org/name")
    assert "written hf://org/name" in refused("hf://name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert "models/typo cannot be opened (No such file or directory)" in refused("models/typo")


@pytest.mark.parametrize("scheme, extra", [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_bucket_package_is_named_with_its_extra(scheme, extra):
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        assert f"pip install 'gemma_tpu[{extra}]'" in refused(f"{scheme}://bucket/x")
    else:
        pytest.skip(f"the package for {scheme}:// is installed")


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_a_gated_model_says_where_to_accept_and_how_to_give_a_token(hub, monkeypatch, token, capsys):
    hub.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refused(f"hf://{hub.repo}")
    assert f"{hub.url}/{hub.repo}" in said and "is gated" in said
    assert ("export HF_TOKEN" in said) == (token is None)
    assert "hf_secret" not in said + "".join(capsys.readouterr())


def test_an_unknown_model_a_bad_token_and_an_unknown_revision_differ(hub):
    assert "the hub shows no model org/other" in refused("hf://org/other")
    assert "hf://org/name" in refused("org/other")  # a folder's name, and never a question to the network
    assert f"{hub.repo} has no revision 'v9'" in refused(f"hf://{hub.repo}@v9")
    hub.bad_token = True
    assert "the token is wrong, expired" in refused(f"hf://{hub.repo}")


def test_offline_mode_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("hf://org/name")


def test_names_that_lead_out_of_the_folder_are_refused(hub):
    hub.files["../evil.json"] = b"{}"
    assert "no plain relative paths: '../evil.json'" in refused(f"hf://{hub.repo}")


# --- the small files ---


def test_config_and_tokenizer_come_to_a_local_folder_once(bucket, hub, monkeypatch):
    for where in (bucket, f"hf://{hub.repo}"):
        folder = open_checkpoint(where).folder
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert found == set(SMALL_FILES)
        assert (folder / "config.json").read_bytes() == SMALL_FILES["config.json"]
        source = open_source(where)
        monkeypatch.setattr(source, "_fetch", lambda *_: pytest.fail("it was there already"))
        assert source.local_files() == local_folder(where) == folder


def test_a_changed_file_gets_a_folder_of_its_own(bucket):
    before = local_folder(bucket)
    fsspec.filesystem("memory").pipe_file("/bucket/model/tokenizer.json", b"[]")
    after = local_folder(bucket)
    assert after != before and (after / "tokenizer.json").read_bytes() == b"[]"


def test_a_local_folder_is_its_own(tmp_path):
    assert local_folder(tmp_path) == tmp_path
    assert local_folder(f"file://{tmp_path}") == tmp_path


# --- onto shards ---


@pytest.fixture
def tiny_bucket(tiny):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    folder = tiny()
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/tiny/{path.name}", path.read_bytes())
    yield folder, "memory://bucket/tiny"
    memory.store.clear()


def loaded(where, sizes: dict[str, int], dtype: str = "float32") -> dict[str, np.ndarray]:
    model, checkpoint = loading.build(where, dtype=dtype)
    shardings, _ = loading.place(model, mesh.build(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]))
    loading.load_base(model, checkpoint, shardings)
    return {path: np.asarray(variable[...]) for path, variable in loading.variables(model).items()}


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tp": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2}])
def test_every_mesh_and_every_source_loads_the_same_weights(tiny_bucket, monkeypatch, sizes):
    monkeypatch.setattr(remote, "_PART_BYTES", 1 << 20)
    folder, url = tiny_bucket
    whole, spread = loaded(folder, {"fsdp": 1}), loaded(url, sizes)
    assert whole.keys() == spread.keys() and len(whole) > 10
    assert not [path for path in whole if whole[path].tobytes() != spread[path].tobytes()]


@pytest.mark.parametrize("sizes", [{"data": 4}, {"fsdp": 4}, {"fsdp": 2, "tp": 2}])
def test_no_byte_is_read_twice_however_many_devices_hold_it(tiny_bucket, monkeypatch, sizes):
    monkeypatch.setattr(remote, "_PART_BYTES", 1 << 20)
    model, checkpoint = loading.build(tiny_bucket[1], dtype="bfloat16")
    seen = interrupted(checkpoint.source, [], monkeypatch)
    shardings, _ = loading.place(model, mesh.build(sizes))
    shapes = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in loading.variables(model).items()}
    marks = []
    load(checkpoint, model.arch, shapes, shardings, lambda done, total: marks.append((done, total)))
    text = sum(int(np.prod(shape.shape)) * 4 for shape in shapes.values())
    assert sum(end - start for start, end in seen) == text
    assert marks[-1] == (text, text) and marks == sorted(marks)


def test_a_cpu_device_takes_the_loaded_memory_over_without_a_copy():
    array = _pages([3, 5], np.dtype(np.float32))
    assert jax.device_put(array, jax.devices()[1]).unsafe_buffer_pointer() == array.ctypes.data


def test_a_wrong_shape_and_a_quantised_dtype_are_named_by_tensor(tiny, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoint = open_checkpoint(tiny())
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    q_proj, norm = (next(n for n in tensors if n.endswith(end)) for end in ("q_proj.weight", "q_norm.weight"))
    tensors[q_proj], tensors[norm] = tensors[q_proj].astype(np.int8), tensors[norm][:-1].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        loaded(folder, {"fsdp": 1})
    assert re.search(rf"{re.escape(q_proj)}: dtype int8, weights must be one of bfloat16", str(caught.value))
    assert re.search(rf"{re.escape(norm)}: shape \(\d+,\), config.json says", str(caught.value))
