"""What an adapter adds to a weight, against the formulas written out row by row."""

import numpy as np
import pytest

from gemma_tpu.adapter.lowrank import Adapter

OUT, INSIDE, RANK = 5, 4, 2


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def test_a_start_is_taken_off_again(draw):
    w, a, b, a0, b0 = (draw(OUT, INSIDE), draw(RANK, INSIDE), draw(OUT, RANK), draw(RANK, INSIDE), draw(OUT, RANK))
    wanted = w.astype(np.float64) + 1.5 * (b.astype(np.float64) @ a - b0.astype(np.float64) @ a0)
    np.testing.assert_allclose(Adapter(a, b, 1.5, a0=a0, b0=b0).merged(w), wanted, rtol=1e-12)
    np.testing.assert_array_equal(Adapter(a0, b0, 1.5, a0=a0, b0=b0).merged(w), w)  # nothing was trained yet


def test_a_magnitude_is_the_length_of_every_row(draw):
    w, a, b, lengths = draw(OUT, INSIDE), draw(RANK, INSIDE), draw(OUT, RANK), np.arange(1.0, OUT + 1)
    merged = Adapter(a, b, 0.5, magnitude=lengths).merged(w)
    plain = w.astype(np.float64) + 0.5 * (b.astype(np.float64) @ a)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), lengths, rtol=1e-12)
    for row, other in zip(merged, plain, strict=True):  # and its direction is the sum's
        assert row @ other == pytest.approx(np.linalg.norm(row) * np.linalg.norm(other), rel=1e-12)


def test_every_expert_of_a_stack_has_its_own(draw):
    w, a, b = draw(3, OUT, INSIDE), draw(3, RANK, INSIDE), draw(3, OUT, RANK)
    lengths = 1 + np.abs(draw(3, OUT))
    whole = Adapter(a, b, 2.0, magnitude=lengths).merged(w)
    for number in range(3):
        alone = Adapter(a[number], b[number], 2.0, magnitude=lengths[number]).merged(w[number])
        np.testing.assert_allclose(whole[number], alone, rtol=1e-12)
