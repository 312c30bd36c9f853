"""Shards of another size than the base's."""

import pytest
from patch_helper import entries, make_base, updates
from safetensors import safe_open

from gemma_tpu.errors import UserError
from gemma_tpu.handoff.patch import write_patched
from gemma_tpu.storage import layout
from gemma_tpu.storage.shards import open_checkpoint


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
