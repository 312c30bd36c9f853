"""The checkpoint reader: every bad folder is one UserError, every good one reads back byte for byte."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.storage.shards import INDEX_FILE, open_checkpoint

BF16 = ml_dtypes.bfloat16


def make_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.standard_normal((32, 8)).astype(BF16),
        "experts": rng.standard_normal((3, 5, 7)).astype(np.float32),
        "layer.scalar": rng.standard_normal(1).astype(BF16),
        "scale": np.array(1.5, np.float32),
        "wide": rng.standard_normal((6, 40)).astype(np.float16),
        "zero": np.zeros((0, 4), np.float32),
    }


def write_folder(folder: Path, tensors: dict[str, np.ndarray], shards: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "gemma4"}')
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_single(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw + data)
    return folder


def message(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def entry(start: int, end: int, shape: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# --- good checkpoints ---


@pytest.mark.parametrize("shards", [1, 2, 6])
def test_reads_back_what_the_reference_writer_wrote(tmp_path, shards):
    tensors = make_tensors()
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, shards))
    assert checkpoint.names() == sorted(tensors)
    assert checkpoint.total_bytes == sum(array.nbytes for array in tensors.values())
    assert checkpoint.config == {"model_type": "gemma4"}
    for name, array in tensors.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()


def test_reads_a_single_file_without_an_index(tmp_path):
    save_file(make_tensors(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.info("embed").shape == (32, 8)
    assert checkpoint.index_file is None


@pytest.mark.parametrize("name, index", [
    ("embed", (slice(3, 9),)),
    ("embed", (slice(-4, None), slice(2, 5))),
    ("embed", (slice(5, 2),)),
    ("experts", (slice(None), slice(1, 3))),
    ("experts", (slice(1, 3), slice(None), slice(4, 99))),
    ("wide", (slice(None), slice(7, 31))),
    ("zero", (slice(None), slice(1, 3))),
    ("scale", ()),
])
@pytest.mark.parametrize("large_row, gather", [(1 << 20, 16 << 20), (16, 64)])
def test_a_slice_equals_numpys_slice_of_the_whole(tmp_path, monkeypatch, name, index, large_row, gather):
    # The second pair of limits makes even these tiny tensors take the paths of the large ones.
    monkeypatch.setattr("gemma_tpu.storage.shards._LARGE_ROW_BYTES", large_row)
    monkeypatch.setattr("gemma_tpu.storage.shards._GATHER_BYTES", gather)
    tensors = make_tensors()
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors))
    expected = tensors[name][index]
    read = checkpoint.read_slice(name, index)
    assert read.shape == expected.shape and read.tobytes() == expected.tobytes()


def test_a_row_range_reads_only_its_bytes(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_folder(tmp_path, make_tensors()))
    seen = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: seen.append(len(views[0])) or real(fd, views, at))
    checkpoint.read("embed", slice(4, 6))
    assert sum(seen) == 2 * 8 * 2


def test_slices_that_cannot_be_read_are_refused(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, make_tensors()))
    with pytest.raises(ValueError, match="step 1"):
        checkpoint.read_slice("embed", (slice(0, 8, 2),))
    with pytest.raises(ValueError, match="3 slices for shape"):
        checkpoint.read_slice("embed", (slice(1),) * 3)
    with pytest.raises(ValueError, match="outside its 256 elements"):
        checkpoint.read_flat("embed", 0, 257)
    with pytest.raises(UserError, match="no tensor 'nope'"):
        checkpoint.read("nope")


def test_a_file_cut_after_opening_fails_by_name_of_the_cause(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, make_tensors(), 1))
    shard = tmp_path / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-600])
    with pytest.raises(RunError, match="changed while it was read"):
        checkpoint.read("wide")
        checkpoint.read("experts")


def test_fingerprint_ignores_sharding_and_sees_every_kind_of_change(tmp_path):
    tensors = make_tensors()
    prints = {"one": open_checkpoint(write_folder(tmp_path / "one", tensors, 1)).fingerprint()}
    assert prints["one"] == open_checkpoint(write_folder(tmp_path / "two", tensors, 2)).fingerprint()
    first, last = (dict(tensors, embed=tensors["embed"].copy()) for _ in range(2))
    first["embed"][0, 0] += 1
    last["embed"][-1, -1] += 1
    renamed = {("embed2" if name == "embed" else name): array for name, array in tensors.items()}
    retyped = dict(tensors, embed=tensors["embed"].view(np.float16))
    reshaped = dict(tensors, embed=tensors["embed"].reshape(8, 32))
    variants = dict(first=first, last=last, renamed=renamed, retyped=retyped, reshaped=reshaped)
    for label, changed in variants.items():
        prints[label] = open_checkpoint(write_folder(tmp_path / label, changed)).fingerprint()
    assert len(set(prints.values())) == 6


def test_memory_stays_flat_while_a_large_checkpoint_is_read(tmp_path):
    tensors = {f"t{i}": np.zeros((1024, 8192), np.float32) for i in range(8)}  # 256 MiB in tensors of 32
    write_folder(tmp_path, tensors)
    script = (
        "import resource, sys; from pathlib import Path; from gemma_tpu.storage.shards import open_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "c = open_checkpoint(Path(sys.argv[1])); before = peak()\n"
        "for n in c.names(): c.read(n)\n"
        "for n in c.names(): c.read_slice(n, (slice(None), slice(0, 16)))\n"
        "print(peak() - before)"
    )
    root = Path(__file__).parent.parent
    grown = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True,
                           text=True, cwd=root).stdout
    assert float(grown) < 80  # two tensors at most are alive: the one being replaced and the next


def test_importing_the_reader_does_not_import_jax_or_torch():
    script = "import sys, gemma_tpu.handoff.patch; sys.exit(bool({'jax', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


# --- bad folders ---


def test_a_missing_folder_and_a_file_instead_of_one_are_named(tmp_path):
    assert "No such file" in message(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in message(tmp_path / "file")
    assert "too long" in message(tmp_path / ("x" * 300))


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("x")
    assert "holds neither model.safetensors nor model.safetensors.index.json" in message(tmp_path)


@pytest.mark.parametrize("text, said", [
    ("{", "not valid JSON"),
    ("\ufeff{}", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("[]", "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"),
    ('{"weight_map": ["a"]}', "no weight_map"),
    ('{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}', "keys given twice: 't'"),
])
def test_a_broken_index_is_named(tmp_path, text, said):
    (tmp_path / INDEX_FILE).write_text(text)
    assert said in message(tmp_path)


def test_shard_names_with_a_path_are_refused_all_at_once(tmp_path):
    bad = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "config.json",
           "..", "nul\0.safetensors", 7, None]
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": dict(enumerate(bad))}))
    said = message(tmp_path)
    assert "no path in it" in said
    assert all(ascii(str(name)) in said for name in bad)


def test_every_missing_shard_is_named(tmp_path):
    write_folder(tmp_path, make_tensors(), 4)
    for number in (2, 4):
        (tmp_path / f"model-0000{number}-of-00004.safetensors").unlink()
    said = message(tmp_path)
    assert "model-00002-of-00004.safetensors, which is not there" in said
    assert "model-00004-of-00004.safetensors, which is not there" in said
    assert "model-00001" not in said


def test_a_truncated_shard_is_named_with_its_sizes(tmp_path):
    write_folder(tmp_path, make_tensors(), 1)
    shard = tmp_path / "model-00001-of-00001.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1])
    assert f"its header describes {len(raw)} bytes and the file has {len(raw) - 1}" in message(tmp_path)
    shard.write_bytes(raw + b"x")
    assert "1 bytes follow the last tensor" in message(tmp_path)
    shard.write_bytes(raw[:100])
    assert "truncated or not a safetensors file" in message(tmp_path)
    shard.write_bytes(b"")
    assert "it has 0 bytes" in message(tmp_path)


def test_all_damaged_shards_are_reported_together(tmp_path):
    write_folder(tmp_path, make_tensors(), 3)
    for number in (1, 3):
        shard = tmp_path / f"model-0000{number}-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
    said = message(tmp_path)
    assert said.count("truncated") == 2 and "model-00001" in said and "model-00003" in said


@pytest.mark.parametrize("header, data, said", [
    (b"{nope}", b"", "not valid JSON"),
    (b'{"t": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    (b"\xff\xfe{}", b"", "not valid JSON"),
    (b'[["t"]]', b"", "must be a JSON object, not list"),
    (b'{"t": {}, "t": {}}', b"", "keys given twice: 't'"),
    ({"__metadata__": 1}, b"", "__metadata__ is not an object"),
    ({"t": 1}, b"", "'t': its entry needs dtype, shape and data_offsets"),
    ({"t": entry(0, 4, [1], "F4")}, b"1234", "dtype 'F4' is not one of BOOL"),
    ({"t": entry(0, 4, [1], ["F32"])}, b"1234", "dtype ['F32'] is not one of"),
    ({"t": entry(0, 4, [-1])}, b"1234", "shape [-1] must be"),
    ({"t": entry(0, 4, [True])}, b"1234", "shape [True] must be"),
    ({"t": entry(0, 4, [1.0])}, b"1234", "shape [1.0] must be"),
    ({"t": entry(0, 4, [1] * 33)}, b"1234", "at most 32 whole numbers"),
    ({"t": entry(0, 0, [0, 2**62, 2**62])}, b"", "too large to address"),
    ({"t": entry(10**30, 10**30, [0])}, b"", "must be two whole numbers"),
    ({"t": entry(10**4000, 10**4000, [0])}, b"", "a number of 4001 digits is too large"),
    ({"\ud800": entry(0, 4, [1])}, b"1234", "half of a letter"),
    ({"t": entry(4, 0, [1])}, b"1234", "span -4 bytes, F32 [1] needs 4"),
    ({"t": entry(0, 8, [1])}, b"12345678", "span 8 bytes, F32 [1] needs 4"),
    ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"0" * 12, "'b' leaves a gap after 'a'"),
    ({"a": entry(4, 8, [1])}, b"0" * 8, "'a' leaves a gap after the header"),
    ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, b"0" * 8, "'b' overlaps 'a'"),
    ({"a": entry(0, 4, [1])}, b"", "truncated"),
])
def test_each_fault_of_a_header_has_its_message(tmp_path, header, data, said):
    assert said in message(write_single(tmp_path, header, data))


def test_all_bad_tensors_of_a_header_are_named_at_once(tmp_path):
    said = message(write_single(tmp_path, {"a": 1, "b": entry(0, 4, [1], "X"), "c": entry(0, 4, [3])}))
    assert all(f"'{name}': " in said for name in "abc")


@pytest.mark.parametrize("length", [0, 1, 3, 99, 2**63, 2**64 - 1])
def test_an_insane_header_length_is_refused_before_it_is_read(tmp_path, length):
    assert f"a header of {length}" in message(write_single(tmp_path, b"{}", length=length))


def test_header_order_need_not_be_the_order_of_the_bytes(tmp_path):
    write_single(tmp_path, {"b": entry(4, 8, [1]), "a": entry(0, 4, [1])}, struct.pack("<ff", 1, 2))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.read("a")[0], checkpoint.read("b")[0]) == (1, 2)


def test_index_and_headers_must_agree_and_every_difference_is_listed(tmp_path):
    tensors = make_tensors()
    write_folder(tmp_path, tensors)  # shard 1: embed, layer.scalar, wide; shard 2: experts, scale, zero
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    one, two = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    del index["weight_map"]["embed"]
    index["weight_map"] |= {"ghost": one, "ghoul": one, "wide": two}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    said = message(tmp_path)
    assert f"{one} lacks tensors that the index says it holds: 'ghost', 'ghoul'" in said
    assert f"{one} holds tensors that the index does not list: 'embed'" in said
    assert f"{one} holds tensors that the index lists under another shard: 'wide'" in said
    assert f"{two} lacks tensors that the index says it holds: 'wide'" in said


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = make_tensors()
    write_folder(tmp_path, tensors)
    save_file({name: tensors[name] for name in ("experts", "scale", "zero", "wide")},
              tmp_path / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors holds tensors that the index lists under another shard: 'wide'" \
        in message(tmp_path)


def test_a_single_file_beside_an_index_of_other_shards_is_ambiguous(tmp_path):
    write_folder(tmp_path, make_tensors())
    save_file(make_tensors(1), tmp_path / "model.safetensors")
    assert "remove the one that is not meant" in message(tmp_path)


@pytest.mark.parametrize("text, said", [
    (None, "no config.json"), ("{", "not valid JSON"), ("[]", "not list"),
])
def test_a_bad_config_is_named(tmp_path, text, said):
    checkpoint = open_checkpoint(write_folder(tmp_path, make_tensors()))
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        _ = checkpoint.config


# --- anything at all ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["model.safetensors", "F32", "BF16", 2**63, 10**4000, 4]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8)
numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**4000]) | json_values
entries = json_values | st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E8M0"]) | json_values,
    "shape": st.lists(numbers, max_size=4) | json_values,
    "data_offsets": st.lists(numbers, min_size=2, max_size=2) | json_values})
headers = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entries, max_size=3)
fuzz = settings(max_examples=150, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def open_and_read_all(folder: Path) -> None:
    """A folder that opens must also read, whole."""
    try:
        checkpoint = open_checkpoint(folder)
    except UserError as error:
        str(error).encode()  # a message that cannot be printed is a crash as well
        return
    checkpoint.fingerprint()
    for name in checkpoint.names():
        assert checkpoint.read(name).nbytes == checkpoint.info(name).end - checkpoint.info(name).start


@fuzz
@given(raw=st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_a_user_error(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    open_and_read_all(tmp_path)


@fuzz
@given(header=headers | json_values, data=st.binary(max_size=64),
       slack=st.sampled_from([0, 0, 0, -1, 1, 2**40]))
@example(header={"t": entry(0, 0, [0, 2**62])}, data=b"", slack=0)
@example(header={"\ud800": entry(0, 3, [3], "U8")}, data=b"abc", slack=0)
@example(header={"t": entry(0, 4, None)}, data=b"abcd", slack=0)  # what is drawn is seldom right but for one thing
@example(header={"t": entry(0, 4, ["1"])}, data=b"abcd", slack=0)
@example(header={"t": entry(0, None, [1])}, data=b"abcd", slack=0)
def test_random_headers_never_raise_anything_but_a_user_error(tmp_path, header, data, slack):
    raw = json.dumps(header).encode()
    write_single(tmp_path, raw, data, length=max(0, len(raw) + slack))
    open_and_read_all(tmp_path)


@fuzz
@given(index=json_values | st.fixed_dictionaries({"weight_map": st.dictionaries(
    st.sampled_from(["embed", "wide", "x", "\udcff"]), json_values | st.just("a.safetensors"))}))
def test_random_indexes_never_raise_anything_but_a_user_error(tmp_path, index):
    save_file({"embed": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    open_and_read_all(tmp_path)
