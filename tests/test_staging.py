"""A target is whole or absent, whatever happens while it is written; and a merge goes on where it stopped."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from patch_helper import (
    ONE,
    ROOT,
    TWO,
    entries,
    killed_in_the_second_shard,
    low_rank,
    make_base,
    refused,
    tree,
    updates,
)

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.handoff.patch import write_patched
from gemma_tpu.storage import staging
from gemma_tpu.storage.shards import Checkpoint


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
from gemma_tpu.adapter import updates; from gemma_tpu.handoff import patch
from gemma_tpu.storage.shards import open_checkpoint
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


def test_an_interrupted_merge_goes_on_with_the_shards_that_it_had_finished(tmp_path):
    base, out = make_base(tmp_path / "base"), tmp_path / "out"
    write_patched(base, tmp_path / "whole", updates())
    killed_in_the_second_shard(base, out, updates())
    finished = (tmp_path / ".out.gemma-tpu-partial" / ONE).stat()
    report = write_patched(base, out, updates())
    assert (out / ONE).stat().st_ino == finished.st_ino and (out / ONE).stat().st_mtime_ns == finished.st_mtime_ns
    assert report.resumed == [ONE] and "q" not in report.changes and report.changes["down"].moved > 0
    assert tree(out) == tree(tmp_path / "whole") and entries(tmp_path) == {"base", "out", "whole"}


def test_another_merge_never_goes_on_with_them(tmp_path):
    base, out = make_base(tmp_path / "base"), tmp_path / "out"
    other = {**updates(), "q": low_rank(192, 320, seed=9)}
    write_patched(base, tmp_path / "whole", other)
    for changes, size in ((other, None), (updates(), 4 << 20)):
        killed_in_the_second_shard(base, out, updates())
        assert write_patched(base, out, changes, max_shard_bytes=size).resumed == []
        if size is None:
            assert tree(out) == tree(tmp_path / "whole")
        for path in out.iterdir():
            path.unlink() if path.is_file() else staging.shutil.rmtree(path)
