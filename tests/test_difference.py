"""What differs between two checkpoints, and by how many representable numbers."""

import numpy as np
import pytest
from patch_helper import BF16, make_base
from safetensors.numpy import save_file

from gemma_tpu.handoff.difference import compare, ulp_distance
from gemma_tpu.handoff.patch import Replace, write_patched
from gemma_tpu.storage.shards import Checkpoint, open_checkpoint


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
    monkeypatch.setattr("gemma_tpu.handoff.difference._BLOCK_ELEMENTS", 999)
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
