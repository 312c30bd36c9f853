"""The patch writer: untouched bytes untouched, and what is refused before anything is written."""

import subprocess
import sys

import numpy as np
import pytest
from patch_helper import BF16, EXTRA, ONE, ROOT, TWO, delta, entries, low_rank, make_base, refused, tree, updates
from safetensors.numpy import save_file

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.handoff import patch
from gemma_tpu.handoff.patch import LowRank, Replace, write_patched
from gemma_tpu.storage import destination
from gemma_tpu.storage.shards import INDEX_FILE, open_checkpoint

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


def test_a_shard_is_tried_and_nothing_stays(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "run").mkdir()
    report = patch.try_shard(base, tmp_path / "run", updates())
    assert not list((tmp_path / "run").iterdir()) and report.tensors_changed == len(report.changes) > 0
    assert report.bytes == min(shard.size for shard in base.shards.values())


def test_peak_memory_is_known_where_the_status_of_a_process_lacks_it(monkeypatch):
    monkeypatch.setattr(patch.Path, "read_text", lambda *_: "Name:\tpython\nVmRSS:\t 5120 kB\n")
    assert patch.peak_rss_mib() > 10


def test_memory_stays_below_twice_the_largest_tensor(tmp_path):
    tensors = {f"t{i}": np.zeros((8192, 8192), BF16) for i in range(3)}  # 128 MiB each
    save_file(tensors, tmp_path / "model.safetensors")
    script = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from gemma_tpu.handoff import patch; from gemma_tpu.storage import shards\n"
        "base = shards.open_checkpoint(Path(sys.argv[1])); before = patch.peak_rss_mib()\n"
        "part = patch.LowRank(np.ones((8192, 8), np.float32), np.ones((8, 8192), np.float32), 1.0)\n"
        "report = patch.write_patched(base, Path(sys.argv[2]), {n: part for n in base.names()})\n"
        "print(report.peak_rss_mib - before)"
    )
    out = tmp_path.with_name(tmp_path.name + "-out")
    grown = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(out)], check=True, text=True,
                           capture_output=True, cwd=ROOT).stdout
    assert float(grown) < 160  # blocks, not tensors: it would be 512 with whole float32 tensors
