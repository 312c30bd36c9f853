"""The patch writer: exact sums, untouched bytes untouched, and a target that is whole or absent."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma_tpu import destination, layout, patch, quantise, staging
from gemma_tpu import updates as arithmetic
from gemma_tpu.difference import compare, ulp_distance
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.patch import LowRank, Replace, write_patched
from gemma_tpu.shards import INDEX_FILE, Checkpoint, open_checkpoint

BF16 = ml_dtypes.bfloat16
ROOT = Path(__file__).parent.parent
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EXTRA = {"config.json": b'{"a":1} \n', "tokenizer.json": b"{ }", "chat_template.jinja": b"{{ x }}\r\n",
         "sub/processor.json": b"\x00\xff"}


def make_base(folder: Path, dtype: np.dtype = BF16, seed: int = 0) -> Checkpoint:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.02).astype(dtype)

    folder.mkdir(parents=True)
    parts = {ONE: {"q": normal(192, 320), "norm": normal(320), "vision": normal(16, 16)},
             TWO: {"down": normal(320, 512), "experts": normal(3, 8, 8), "scalar": normal(1),
                   "steps": np.arange(5), "f8": normal(4, 4).astype(ml_dtypes.float8_e4m3fn)}}
    for file, tensors in parts.items():
        save_file(tensors, folder / file, metadata={"format": "pt", "note": "kept"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, ts in parts.items() for n in ts}}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=3))
    for name, content in EXTRA.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return open_checkpoint(folder)


def low_rank(out: int, inner: int, rank: int = 16, scale: float = 2.0, seed: int = 1) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((out, rank), np.float32) * 0.05,
                   rng.standard_normal((rank, inner), np.float32) * 0.05, scale)


def delta(part: LowRank) -> np.ndarray:
    return part.scale * (part.b.astype(np.float64) @ part.a.astype(np.float64))


def updates() -> dict:
    return {"q": low_rank(192, 320), "down": [low_rank(320, 512), low_rank(320, 512, 4, -0.5, seed=2)]}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def entries(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# --- numbers ---


@pytest.mark.parametrize("dtype", [BF16, np.float32, np.float16])
def test_changed_tensors_are_within_one_ulp_of_float64_and_nearly_all_identical(tmp_path, dtype):
    base = make_base(tmp_path / "base", dtype)
    write_patched(base, tmp_path / "out", updates())
    for name, file, parts in (("q", ONE, [updates()["q"]]), ("down", TWO, updates()["down"])):
        with safe_open(tmp_path / "out" / file, "numpy") as merged:
            ulps = ulp_distance(merged.get_tensor(name),
                                (base.read(name).astype(np.float64) + sum(map(delta, parts))).astype(dtype))
        assert ulps.max() <= 1
        assert (ulps == 0).mean() >= 0.999


def test_cancelling_weight_and_delta_stay_within_one_ulp(tmp_path):
    # W is -delta rounded to bfloat16, so the result is what a float32 sum would have lost.
    base, part = make_base(tmp_path / "base"), low_rank(192, 320, 64)
    cancelling = {"q": (-delta(part)).astype(BF16), "other": np.ones((2, 2), np.float32)}
    (tmp_path / "near").mkdir()
    save_file(cancelling, tmp_path / "near" / "model.safetensors")
    base = open_checkpoint(tmp_path / "near")
    write_patched(base, tmp_path / "out", {"q": part})
    exact = (cancelling["q"].astype(np.float64) + delta(part)).astype(BF16)
    assert ulp_distance(load_file(tmp_path / "out" / "model.safetensors")["q"], exact).max() <= 1
    in_float32 = cancelling["q"].astype(np.float32) + np.float32(part.scale) * (part.b @ part.a)
    assert ulp_distance(in_float32.astype(BF16), exact).max() > 1  # the case is the hard one


def test_the_result_does_not_depend_on_blocks_or_workers(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    write_patched(base, tmp_path / "whole", updates(), workers=1)
    monkeypatch.setattr(arithmetic, "BLOCK_ELEMENTS", 1000)  # 1 to 3 rows a block, the last one short
    report = write_patched(base, tmp_path / "cut", updates() | {"experts": Replace(base.read("experts"))},
                           workers=3)
    assert tree(tmp_path / "whole") == tree(tmp_path / "cut")
    assert report.changes["q"].moved > 60000 and report.changes["experts"].moved == 0


def test_replace_rounds_once_and_takes_any_float_and_layout(tmp_path):
    base = make_base(tmp_path / "base")
    rng = np.random.default_rng(5)
    new = {"q": rng.standard_normal((320, 192), np.float32).T, "experts": rng.standard_normal((3, 8, 8)),
           "scalar": np.array([3], np.float16), "steps": np.arange(5)[::-1], "vision": base.read("vision")}
    report = write_patched(base, tmp_path / "out", {name: Replace(array) for name, array in new.items()})
    out = open_checkpoint(tmp_path / "out")
    for name, array in new.items():
        assert out.read(name).tobytes() == array.astype(base.info(name).dtype).tobytes(), name
    assert report.changes["vision"].moved == 0 and report.changes["steps"].moved == 4
    assert report.changes["steps"].max_delta == 4


def test_blas_is_single_threaded_inside_the_block_and_as_before_after_it():
    script = (
        "from gemma_tpu import blas\n"
        "def threads(): return [lib.scipy_openblas_get_num_threads64_() for lib in blas._loaded()]\n"
        "before = threads()\n"
        "with blas.single_threaded() as count: inside = threads()\n"
        "assert count == len(before) == 1 and inside == [1] and threads() == before, (before, inside)"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment)


# --- bytes ---


def test_everything_but_the_changed_tensors_is_byte_identical(tmp_path):
    base = make_base(tmp_path / "base")
    calls = []
    report = write_patched(base, tmp_path / "new" / "out", updates(), progress=lambda *at: calls.append(at))
    out = open_checkpoint(tmp_path / "new" / "out")
    before, after = tree(tmp_path / "base"), tree(tmp_path / "new" / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {ONE, TWO}
    for shard in (ONE, TWO):
        assert out.shards[shard] == base.shards[shard]
        assert out.read_header(shard) == base.read_header(shard)
        assert b'"note":"kept"' in out.read_header(shard)
    untouched = set(base.names()) - {"q", "down"}
    for name in untouched:
        assert out.read(name).tobytes() == base.read(name).tobytes()
    assert (report.tensors_changed, report.tensors_copied) == (2, len(untouched))
    assert report.bytes == sum(map(len, after.values()))
    assert report.changes["q"].max_delta == pytest.approx(np.abs(delta(updates()["q"])).max())
    assert report.files_copied == sorted([*EXTRA, INDEX_FILE]) and report.left_out == []
    assert calls == sorted(calls) and calls[-1] == (base.total_bytes, base.total_bytes)
    assert report.peak_rss_mib > 1 and report.seconds > 0
    assert entries(tmp_path / "new") == {"out"}


def test_an_update_of_zero_moves_nothing_and_the_report_says_so(tmp_path):
    base = make_base(tmp_path / "base")
    zero = LowRank(np.zeros((192, 4), np.float32), np.ones((4, 320), np.float32), 1.0)
    report = write_patched(base, tmp_path / "out", {"q": zero})
    assert report.changes["q"] == patch.TensorChange(192 * 320, 0, 0.0)


def test_other_weights_and_bookkeeping_are_left_out_and_reported(tmp_path):
    base = make_base(tmp_path / "base")
    left = ["pytorch_model.bin", "stray.safetensors", "model.gguf", ".git/objects/x", ".cache/huggingface/y"]
    for name in [*left, ".gitattributes"]:
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text("x")
    report = write_patched(base, tmp_path / "out", updates(),
                           copy_files=lambda name: name != "tokenizer.json")
    assert report.left_out == sorted([*left, "tokenizer.json"])
    kept = {*EXTRA, INDEX_FILE, ONE, TWO, ".gitattributes"} - {"tokenizer.json"}
    assert tree(tmp_path / "out").keys() == kept


def test_a_hub_cache_of_links_is_copied_as_plain_files(tmp_path):
    make_base(tmp_path / "plain")
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "rev", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, content in tree(tmp_path / "plain").items():
        (snapshot / name).parent.mkdir(exist_ok=True)
        (blobs / name.replace("/", "_")).write_bytes(content)
        (snapshot / name).symlink_to(blobs / name.replace("/", "_"))
    write_patched(open_checkpoint(snapshot), tmp_path / "out", updates())
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "plain").keys()
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


def test_links_out_of_the_folder_are_refused_all_at_once(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "base" / "notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "base" / "broken").symlink_to("nowhere")
    (tmp_path / "base" / "up").symlink_to(tmp_path)
    (tmp_path / "base" / "inside.json").symlink_to("config.json")
    with pytest.raises(UserError, match=r"not copied: broken, notes\.txt, up;"):
        write_patched(base, tmp_path / "out", updates())
    for name in ("notes.txt", "broken", "up"):
        (tmp_path / "base" / name).unlink()
    write_patched(base, tmp_path / "out", updates())
    assert (tmp_path / "out" / "inside.json").read_bytes() == EXTRA["config.json"]


# --- refusals ---


def refused(base: Checkpoint, out: Path, changes: dict, kind: type = UserError) -> str:
    with pytest.raises(kind) as caught:
        write_patched(base, out, changes)
    assert not out.exists()
    return str(caught.value)


def test_every_update_that_hits_nothing_is_listed(tmp_path):
    base = make_base(tmp_path / "base")
    said = refused(base, tmp_path / "out", updates() | {"k": low_rank(2, 2), "v": low_rank(2, 2)})
    assert "no tensor for 2 of 4 updates: k, v" in said
    assert "no updates" in refused(base, tmp_path / "out", {})
    assert entries(tmp_path) == {"base"}


def test_every_update_that_does_not_fit_is_listed(tmp_path):
    base = make_base(tmp_path / "base")
    good = low_rank(192, 320)
    said = refused(base, tmp_path / "out", {
        "q": [good, low_rank(320, 192)], "down": LowRank(np.ones((320, 3)), np.ones((4, 512)), 1.0),
        "experts": LowRank(np.ones((3, 1)), np.ones((1, 64)), 1.0), "vision": [],
        "f8": LowRank(np.ones((4, 1)), np.ones((1, 4)), 1.0), "norm": Replace(np.ones((1, 320), np.float32)),
        "steps": Replace(np.ones(5, np.float32))})
    for line in ("q: b [320, 16] @ a [16, 192] must give the base's [192, 320]",
                 "down: b [320, 3] @ a [4, 512] must give the base's [320, 512]",
                 "experts: b [3, 1] @ a [1, 64] must give the base's [3, 8, 8]",
                 "vision: its list of updates is empty", "f8: a delta cannot be added to float8_e4m3fn",
                 "norm: its shape [1, 320] must be the base's [320]",
                 "steps: float32 cannot replace int64"):
        assert f"\n  - {line}" in said


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    base, part = make_base(tmp_path / "base"), low_rank(192, 320)
    changes = {"q": LowRank(part.b * bad, part.a, 1.0),
               "down": LowRank(np.ones((320, 1)), np.ones((1, 512)), bad)}
    assert "update of q, down" in refused(base, tmp_path / "out", changes, RunError)
    whole = base.read("experts").astype(np.float32)
    whole[2, 7, 7] = bad
    assert "experts: NaN or infinity in the result" in refused(
        base, tmp_path / "out", {"experts": Replace(whole)}, RunError)
    assert entries(tmp_path) == {"base"}


def test_a_result_beyond_the_dtypes_range_is_refused(tmp_path):
    base = make_base(tmp_path / "base", np.float16)
    huge = LowRank(np.full((192, 1), 300.0), np.full((1, 320), 300.0), 1.0)
    assert "q: NaN or infinity in the result" in refused(base, tmp_path / "out", {"q": huge}, RunError)


def test_a_base_that_holds_nan_is_named_as_the_cause(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"w": np.array([[1, np.nan]], np.float32)}, tmp_path / "base" / "model.safetensors")
    change = {"w": LowRank(np.ones((1, 1)), np.ones((1, 2)), 1.0)}
    assert "w: NaN or infinity in the base" in refused(
        open_checkpoint(tmp_path / "base"), tmp_path / "out", change, RunError)


def test_a_target_in_or_around_the_base_is_refused(tmp_path):
    base = make_base(tmp_path / "x" / "base")
    before = tree(tmp_path)
    for out in (tmp_path / "x" / "base", tmp_path / "x", tmp_path / "x" / "base" / "merged"):
        with pytest.raises(UserError, match="neither inside the other"):
            write_patched(base, out, updates(), overwrite=True)
    assert tree(tmp_path) == before


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**18}))
    said = refused(base, tmp_path / "out", updates(), RunError)
    assert "has 0.00 GiB free and the result needs 0.00 GiB" in said
    assert entries(tmp_path) == {"base"}


# --- whole or absent ---


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    read, reads = Checkpoint.read_slice, []

    def full(*args):
        reads.append(args)
        if len(reads) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return read(*args)

    monkeypatch.setattr(Checkpoint, "read_slice", full)
    assert "the disk is full" in refused(base, tmp_path / "out", updates(), RunError)
    assert entries(tmp_path) == {"base"}


def test_a_disk_that_fills_up_at_fsync_leaves_the_old_model(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    write_patched(base, tmp_path / "out", updates())
    before = tree(tmp_path)

    def full(fd):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full.* is as it was before"):
        write_patched(base, tmp_path / "out", {"q": low_rank(192, 320)}, overwrite=True)
    assert tree(tmp_path) == before


def test_a_target_in_use_is_refused_and_overwritten_only_on_demand(tmp_path):
    base = make_base(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    write_patched(base, out, updates())  # empty: free to use
    first = tree(out)
    with pytest.raises(UserError, match="exists and is not empty"):
        write_patched(base, out, {"q": low_rank(192, 320, seed=9)})
    assert tree(out) == first
    write_patched(base, out, {"q": low_rank(192, 320, seed=9)}, overwrite=True)
    assert {name for name, content in tree(out).items() if content != first[name]} == {ONE, TWO}
    (out / "my_notes.txt").write_text("precious")
    with pytest.raises(UserError, match="would lose files that the new model does not have: my_notes.txt"):
        write_patched(base, out, updates(), overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        write_patched(base, tmp_path / "file", updates(), overwrite=True)
    assert entries(tmp_path) == {"base", "out", "file"}


def test_a_file_that_appears_in_the_target_meanwhile_is_not_lost(tmp_path):
    base = make_base(tmp_path / "base")

    def intrude(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "notes").write_text("precious")

    with pytest.raises(UserError, match="not empty"):
        write_patched(base, tmp_path / "out", updates(), progress=intrude)
    assert tree(tmp_path / "out") == {"notes": b"precious"}
    assert entries(tmp_path) == {"base", "out"}


def test_a_swap_killed_in_the_middle_is_mended_by_the_next_run(tmp_path):
    base = make_base(tmp_path / "base")
    out, previous = tmp_path / "out", tmp_path / ".out.gemma-tpu-previous"
    write_patched(base, out, updates())
    old = tree(out)
    out.rename(previous)  # killed between the two renames
    with pytest.raises(UserError, match="not empty"):
        write_patched(base, out, updates())
    assert tree(out) == old and not previous.exists()
    out.rename(previous)
    write_patched(base, tmp_path / "again", updates())
    (tmp_path / "again").rename(out)  # killed after the second, before the old one was removed
    with staging.staged(out, set(old), overwrite=True) as folder:
        (folder / "x").write_text("new")
    assert tree(out) == {"x": b"new"}
    assert entries(tmp_path) == {"base", "out"}


def test_a_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    write_patched(base, tmp_path / "out", updates())
    before, rename = tree(tmp_path), os.rename

    def fail(source, target):
        if str(source).endswith("partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(RunError, match="Input/output error"):
        write_patched(base, tmp_path / "out", updates(), overwrite=True)
    assert tree(tmp_path) == before


def test_two_writers_of_one_target_exclude_each_other(tmp_path):
    base = make_base(tmp_path / "base")
    with staging.staged(tmp_path / "out", set(), overwrite=False) as folder:
        (folder / "theirs").write_text("x")
        with pytest.raises(RunError, match="another process is writing"):
            write_patched(base, tmp_path / "out", updates())
    assert tree(tmp_path / "out") == {"theirs": b"x"}


def test_a_target_that_is_a_link_keeps_the_link(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "merged")
    write_patched(base, tmp_path / "out", updates())
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "merged" / ONE).is_file()


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from gemma_tpu import patch, updates
from gemma_tpu.shards import open_checkpoint
updates.BLOCK_ELEMENTS = 2000
def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.002)
part = patch.LowRank(np.ones((192, 1)), np.ones((1, 320)), 1.0)
patch.write_patched(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), {"q": part}, progress=slowly)
"""


def test_ten_kills_at_any_moment_leave_the_target_absent_and_the_next_run_clean(tmp_path):
    base = make_base(tmp_path / "base")
    pick = random.Random(0)
    for _ in range(10):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "base"), str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as child:
            assert child.stdout.readline()  # it is writing by now
            time.sleep(pick.uniform(0, 0.15))  # the whole would take 0.3 s
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL  # it was not done yet
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.gemma-tpu-partial").exists()
    write_patched(base, tmp_path / "out", updates())
    assert entries(tmp_path) == {"base", "out"}
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "base").keys()


def killed_in_the_second_shard(tmp_path, monkeypatch, base, out, changes):
    """Ctrl-C, which leaves what a kill leaves."""
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > base.shards[ONE].size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_patched(base, out, changes, progress=stop)


def test_an_interrupted_merge_goes_on_with_the_shards_that_it_had_finished(tmp_path, monkeypatch):
    base, out = make_base(tmp_path / "base"), tmp_path / "out"
    write_patched(base, tmp_path / "whole", updates())
    killed_in_the_second_shard(tmp_path, monkeypatch, base, out, updates())
    finished = (tmp_path / ".out.gemma-tpu-partial" / ONE).stat()
    report = write_patched(base, out, updates())
    assert (out / ONE).stat().st_ino == finished.st_ino and (out / ONE).stat().st_mtime_ns == finished.st_mtime_ns
    assert report.resumed == [ONE] and "q" not in report.changes and report.changes["down"].moved > 0
    assert tree(out) == tree(tmp_path / "whole") and entries(tmp_path) == {"base", "out", "whole"}


def test_another_merge_never_goes_on_with_them(tmp_path, monkeypatch):
    base, out = make_base(tmp_path / "base"), tmp_path / "out"
    other = {**updates(), "q": low_rank(192, 320, seed=9)}
    write_patched(base, tmp_path / "whole", other)
    for changes, size in ((other, None), (updates(), 4 << 20)):
        killed_in_the_second_shard(tmp_path, monkeypatch, base, out, updates())
        assert write_patched(base, out, changes, max_shard_bytes=size).resumed == []
        if size is None:
            assert tree(out) == tree(tmp_path / "whole")
        for path in out.iterdir():
            path.unlink() if path.is_file() else staging.shutil.rmtree(path)


# --- shards of another size, and buckets ---


def test_new_shards_hold_the_same_tensors_and_none_is_too_large(tmp_path):
    base = make_base(tmp_path / "base")
    write_patched(base, tmp_path / "like", updates())
    like = open_checkpoint(tmp_path / "like")
    for size in (200_000, 340_000, 1 << 30):
        out = tmp_path / str(size)
        write_patched(base, out, updates(), max_shard_bytes=size)
        cut = open_checkpoint(out)  # which holds index and headers against each other
        assert {n: cut.read(n).tobytes() for n in cut.names()} == {n: like.read(n).tobytes() for n in like.names()}
        for shard in cut.shards.values():
            held = sum(t.end - t.start for t in shard.tensors)
            assert held <= size or len(shard.tensors) == 1
            assert all(t.start % t.dtype.itemsize == 0 for t in shard.tensors)
            with safe_open(out / shard.name, "numpy") as file:
                assert set(file.keys()) == {t.name for t in shard.tensors}
            assert b'"note":"kept"' in cut.read_header(shard.name)
    assert len(open_checkpoint(tmp_path / "200000").shards) > 2
    assert entries(tmp_path / str(1 << 30)) == {"model.safetensors", "config.json", "tokenizer.json",
                                                "chat_template.jinja", "sub"}


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), ("77", 77)])
def test_sizes_of_shards_are_read(text, size):
    assert layout.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "0GB", "-1GB", "5 TB", "GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="a shard's size must be a number above 0"):
        layout.parse_size(text)


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


def test_an_interrupted_merge_into_a_bucket_is_no_model_and_goes_on(tmp_path, bucket, monkeypatch):
    base = make_base(tmp_path / "base")
    write_patched(base, tmp_path / "out", updates())
    killed_in_the_second_shard(tmp_path, monkeypatch, base, "memory://patch/out", updates())
    assert ONE in held(bucket) and not {"config.json", INDEX_FILE, TWO} & held(bucket).keys()
    with pytest.raises(UserError, match="holds neither"):
        open_checkpoint("memory://patch/out")
    assert write_patched(base, "memory://patch/out", updates()).resumed == [ONE]
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
    monkeypatch.setattr("gemma_tpu.retry.time.sleep", lambda seconds: None)
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


def test_a_shard_is_tried_and_nothing_stays(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "run").mkdir()
    report = patch.try_shard(base, tmp_path / "run", updates())
    assert not list((tmp_path / "run").iterdir()) and report.tensors_changed == len(report.changes) > 0
    assert report.bytes == min(shard.size for shard in base.shards.values())


# --- magnitudes and quantised bases ---


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_what_the_run_saw(tmp_path, kind):
    base, part = make_base(tmp_path / "base"), low_rank(192, 320)
    asked = LowRank(part.b, part.a, part.scale, quantised=(kind, 64))
    report = write_patched(base, tmp_path / "out", {"q": asked})
    exact = quantise.round_trip(base.read("q"), kind, 64) + delta(part)
    assert ulp_distance(open_checkpoint(tmp_path / "out").read("q"), exact.astype(np.float32).astype(BF16)).max() <= 1
    assert report.changes["q"].max_delta == pytest.approx(np.abs(exact - base.read("q").astype(np.float64)).max())
    assert "must be the only one" in refused(base, tmp_path / "two", {"q": [asked, part]})


@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_a_magnitude_sets_the_length_of_every_row(tmp_path, dtype):
    base, part = make_base(tmp_path / "base", dtype), low_rank(192, 320)
    magnitude = np.random.default_rng(3).uniform(0.5, 2, 192).astype(np.float32)
    report = write_patched(base, tmp_path / "out", {"q": LowRank(part.b, part.a, part.scale, magnitude)})
    sum_OI = base.read("q").astype(np.float64) + delta(part)
    exact = sum_OI * (magnitude / np.sqrt((sum_OI**2).sum(1)))[:, None]
    got = open_checkpoint(tmp_path / "out").read("q")
    assert ulp_distance(got, exact.astype(dtype)).max() <= 1
    assert np.linalg.norm(got.astype(np.float64), axis=1) == pytest.approx(magnitude, rel=1e-2)
    assert report.changes["q"].max_delta == pytest.approx(np.abs(exact - base.read("q").astype(np.float64)).max())


def test_a_magnitude_of_another_shape_or_beside_another_update_is_refused(tmp_path):
    base, part = make_base(tmp_path / "base"), low_rank(192, 320)
    short = LowRank(part.b, part.a, 1.0, np.ones(320, np.float32))
    assert "its magnitude [320] must be one number a row of [192, 320]" in refused(base, tmp_path / "out", {"q": short})
    right = LowRank(part.b, part.a, 1.0, np.ones(192, np.float32))
    assert "must be the only one" in refused(base, tmp_path / "out", {"q": [right, part]})


def test_memory_stays_below_twice_the_largest_tensor(tmp_path):
    tensors = {f"t{i}": np.zeros((8192, 8192), BF16) for i in range(3)}  # 128 MiB each
    save_file(tensors, tmp_path / "model.safetensors")
    script = (
        "import sys, numpy as np; from pathlib import Path; from gemma_tpu import patch, shards\n"
        "base = shards.open_checkpoint(Path(sys.argv[1])); before = patch.peak_rss_mib()\n"
        "part = patch.LowRank(np.ones((8192, 8), np.float32), np.ones((8, 8192), np.float32), 1.0)\n"
        "report = patch.write_patched(base, Path(sys.argv[2]), {n: part for n in base.names()})\n"
        "print(report.peak_rss_mib - before)"
    )
    out = tmp_path.with_name(tmp_path.name + "-out")
    grown = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(out)], check=True, text=True,
                           capture_output=True, cwd=ROOT).stdout
    assert float(grown) < 160  # blocks, not tensors: it would be 512 with whole float32 tensors


# --- differences ---


def test_compare_names_identical_changed_reshaped_missing_and_extra(tmp_path):
    def make(name: str, **tensors: np.ndarray) -> Checkpoint:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return open_checkpoint(tmp_path / name)

    ones = np.ones((3, 4), BF16)
    nan = np.array([np.nan, 1, 2], np.float32)
    a = make("a", same=ones, moved=ones, shape=ones, kind=ones, gone=ones, nan=nan, nans=nan, sign=0 * ones)
    b = make("b", same=ones, moved=ones * np.arange(4).astype(BF16), shape=ones.T.copy(), new=ones,
             kind=ones.astype(np.float32), nan=nan[::-1].copy(), nans=nan, sign=-(0 * ones))
    result = compare(a, b)
    assert result.pop("changed") == pytest.approx({"moved": 2.0, "nan": np.nan, "sign": 0.0}, nan_ok=True)
    assert result == {"identical": ["nans", "same"], "reshaped": ["kind", "shape"], "missing": ["gone"],
                      "extra": ["new"]}


def test_compare_goes_through_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_tpu.difference._BLOCK_ELEMENTS", 999)
    base = make_base(tmp_path / "base")
    write_patched(base, tmp_path / "out", {"vision": Replace(base.read("vision").astype(np.float32) + 1)})
    result = compare(base, open_checkpoint(tmp_path / "out"))
    assert result["changed"] == {"vision": pytest.approx(1, abs=0.01)}
    assert len(result["identical"]) == len(base.names()) - 1


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_ulp_distance_counts_representable_numbers(dtype):
    x = np.array([0.0, -0.0, 1, -1, 1, 3e4, 0], dtype)
    bits = x.view(np.uint16 if x.itemsize == 2 else np.uint32)
    tiny = np.array([1], bits.dtype).view(dtype)[0]
    y = (bits + np.array([0, 0, 1, 1, 3, 0, 0], bits.dtype)).view(dtype)
    y[0], y[6] = -0.0, -tiny
    assert ulp_distance(x, y).tolist() == [0, 0, 1, 1, 3, 0, 1]
    assert ulp_distance(y, x).tolist() == ulp_distance(x, y).tolist()
    assert ulp_distance(np.array([tiny]), np.array([-tiny])).tolist() == [2]
    assert ulp_distance(np.array([np.nan, 1], dtype), np.array([np.nan, np.inf], dtype))[0] >= 2**31 - 1
    biggest = np.array([np.inf], dtype)
    assert ulp_distance(biggest, -biggest)[0] == 2 * int(biggest.view(bits.dtype)[0])


def test_ulp_distance_refuses_what_it_cannot_count():
    for x, y in ((np.ones(2), np.ones(2)), (np.ones(2, BF16), np.ones(2, np.float16)),
                 (np.ones(2, BF16), np.ones(3, BF16))):
        with pytest.raises(ValueError, match="two arrays of one shape"):
            ulp_distance(x, y)
