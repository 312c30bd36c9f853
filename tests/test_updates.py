"""What happens to one tensor: exact sums, rounded once; magnitudes and quantised bases."""

import subprocess
import sys

import numpy as np
import pytest
from patch_helper import BF16, ONE, ROOT, TWO, delta, low_rank, make_base, refused, tree, updates
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma_tpu.adapter import updates as arithmetic
from gemma_tpu.gemma import quantise
from gemma_tpu.handoff.difference import ulp_distance
from gemma_tpu.handoff.patch import LowRank, Replace, write_patched
from gemma_tpu.storage.shards import open_checkpoint


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
        "from gemma_tpu.handoff import blas\n"
        "def threads(): return [lib.scipy_openblas_get_num_threads64_() for lib in blas._loaded()]\n"
        "for lib in blas._loaded(): lib.scipy_openblas_set_num_threads64_(2)\n"
        "before = threads()\n"
        "with blas.single_threaded() as count: inside = threads()\n"
        "assert count == len(before) == 1 and inside == [1] and threads() == before == [2], (before, inside)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


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
