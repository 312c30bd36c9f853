"""Packing: no sheet overfills, no row is lost, nothing is predicted across a border, little is padding."""

import itertools
import runpy
import time
from pathlib import Path

import numpy as np
import pytest

from gemma_tpu.data.packing import best_fit, bucket_widths, fill, longest_first, one_each, padding_waste
from gemma_tpu.errors import UserError

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "packing.py"
codev_lengths = runpy.run_path(str(BENCHMARK))["codev_lengths"]

# Nine requests of mixed length, and the four sheets of 8,192 that hold them.
NINE = np.array([2000, 5000, 1000, 8000, 3000, 3000, 2100, 4000, 4000])


def drawn(seed: int) -> tuple[np.ndarray, int]:
    """Random lengths of one of three shapes, with a random sheet size that holds them."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 400))
    count = int(rng.integers(0, 300))
    shape = seed % 3
    if shape == 0:
        return rng.integers(1, capacity + 1, count), capacity
    if shape == 1:
        return np.full(count, rng.integers(1, capacity + 1)), capacity
    return np.clip(rng.lognormal(3, 1, count).astype(int), 1, capacity), capacity


def first_principles(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every sheet: the lengths on each."""
    sheets: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        roomy = [s for s in sheets if capacity - sum(s) >= length]
        if roomy:
            min(roomy, key=lambda s: capacity - sum(s)).append(length)
        else:
            sheets.append([length])
    return sheets


def rows_of_lengths(lengths: list[int], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(5, 99, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths]


@pytest.mark.parametrize("seed", range(60))
def test_every_row_is_placed_once_and_no_sheet_overfills(seed: int) -> None:
    lengths, capacity = drawn(seed)
    bins = best_fit(lengths, capacity)
    assert sorted(bins.items_N.tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[items].sum() <= capacity for items in bins)


@pytest.mark.parametrize("seed", range(30))
def test_sheets_are_as_full_as_best_fit_decreasing_from_first_principles_makes_them(seed: int) -> None:
    lengths, capacity = drawn(seed)
    ours = sorted(int(lengths[items].sum()) for items in best_fit(lengths, capacity))
    assert ours == sorted(sum(sheet) for sheet in first_principles(lengths.tolist(), capacity))


def test_nine_requests_on_four_sheets_of_8192_leave_668_tokens_of_padding() -> None:
    bins = best_fit(NINE, 8192)
    assert len(bins) == 4
    assert len(bins) * 8192 - NINE.sum() == 668
    batch = fill([rows_of_lengths(NINE[items].tolist()) for items in bins], 8192, pad_id=0)
    assert batch["tokens"].shape == (4, 8192)
    assert (batch["segment_ids"] == 0).sum() == 668


def test_the_plan_is_deterministic() -> None:
    lengths = codev_lengths(2_000)
    first, second = best_fit(lengths, 4096), best_fit(lengths.copy(), 4096)
    assert (first.items_N == second.items_N).all() and (first.starts_S == second.starts_S).all()


def test_lengths_like_codev_r1_pack_to_98_percent_at_4096() -> None:
    waste = padding_waste(codev_lengths(10_000), 4096)
    assert waste["pack"] <= 0.02
    assert waste["pack"] < waste["bucket"] < waste["pad"]
    assert waste["pad"] > 0.75


def test_a_million_rows_are_planned_in_seconds() -> None:
    lengths = codev_lengths(1_000_000)
    start = time.perf_counter()
    bins = best_fit(lengths, 4096)
    assert time.perf_counter() - start < 20
    assert len(bins.items_N) == 1_000_000


def test_longest_first_shuffles_only_among_equal_lengths() -> None:
    lengths = np.array([5, 3, 5, 3, 5, 9] * 20)
    plain, shuffled = longest_first(lengths), longest_first(lengths, np.random.default_rng(0))
    assert (lengths[plain] == lengths[shuffled]).all()
    assert (plain != shuffled).any()
    assert plain.tolist() == sorted(range(120), key=lambda i: (-lengths[i], i))


def test_no_packing_is_one_row_a_sheet() -> None:
    assert [items.tolist() for items in one_each(3)] == [[0], [1], [2]]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_lengths_pad_less_than_the_buckets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(100, 1100))
    lengths = np.clip(rng.lognormal(5, 1, int(rng.integers(1, 60))).astype(int), 1, capacity)
    found = bucket_widths(lengths, capacity, 3)
    candidates = sorted({min(128 * i, capacity) for i in range(1, -(-int(lengths.max()) // 128) + 1)})

    def positions(widths) -> int:
        return sum(min(w for w in widths if w >= length) for length in lengths.tolist())

    choices = [c for k in range(3) for c in itertools.combinations(candidates[:-1], k)]
    assert positions(found.tolist()) == min(positions([*c, candidates[-1]]) for c in choices)
    assert set(found.tolist()) <= set(candidates) and len(found) <= 3


@pytest.mark.parametrize(
    "lengths, capacity, widths",
    [([100], 100, [100]), ([5], 4096, [128]), ([128, 129], 300, [128, 256]), ([260], 300, [300])],
)
def test_a_bucket_is_a_multiple_of_128_that_rows_need(lengths: list, capacity: int, widths: list) -> None:
    assert bucket_widths(np.array(lengths), capacity).tolist() == widths


def test_padding_waste_counts_what_each_way_pads() -> None:
    waste = padding_waste(np.array([100, 200, 56]), 256)
    assert waste == {"pad": 1 - 356 / 768, "bucket": 1 - 356 / (128 + 256 + 128), "pack": 1 - 356 / 512}


def test_a_row_longer_than_the_sheet_is_refused_with_the_rule() -> None:
    with pytest.raises(UserError, match="2 rows are longer than a sheet of 100 tokens, the longest has 130"):
        best_fit(np.array([50, 101, 130]), 100)


def test_a_row_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 is empty"):
        best_fit(np.array([5, 0]), 10)


def test_the_batch_equals_a_token_by_token_construction() -> None:
    sheets = [rows_of_lengths([3, 1, 4], seed=1), [], rows_of_lengths([8], seed=2)]
    batch = fill(sheets, 8, pad_id=7)
    expected = {name: np.zeros((3, 8)) for name in batch}
    expected["tokens"][:] = expected["targets"][:] = 7
    for b, rows in enumerate(sheets):
        at = 0
        for segment, (ids, mask) in enumerate(rows, start=1):
            for t in range(len(ids)):
                expected["tokens"][b, at] = ids[t]
                expected["segment_ids"][b, at] = segment
                expected["positions"][b, at] = t
                if t + 1 < len(ids):
                    expected["targets"][b, at] = ids[t + 1]
                    expected["weights"][b, at] = mask[t + 1]
                at += 1
    for name, leaf in batch.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
        assert leaf.dtype == (np.float32 if name == "weights" else np.int32)


def test_padding_has_segment_zero_and_no_weight() -> None:
    batch = fill([rows_of_lengths([4, 2]), []], 10, pad_id=3)
    padding = batch["segment_ids"] == 0
    assert padding.sum() == 4 + 10
    assert (batch["weights"][padding] == 0).all() and (batch["tokens"][padding] == 3).all()


def test_rows_that_do_not_fit_their_sheet_are_an_error() -> None:
    with pytest.raises(ValueError, match="sheet 0: 9 tokens do not fit in 8"):
        fill([rows_of_lengths([5, 4])], 8, pad_id=0)
