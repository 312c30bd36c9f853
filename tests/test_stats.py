"""pass@k, its interval, and the paired test, against what can be worked out by hand or by listing every case."""

import itertools
import math

import numpy as np
import pytest

from gemma_tpu.evaluation import stats


def test_pass_at_k_is_the_unbiased_estimate():
    assert stats.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert stats.pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert (stats.pass_at_k(4, 0, 4), stats.pass_at_k(4, 1, 4)) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"passed \(3\) <= samples \(2\)"):
        stats.pass_at_k(2, 3, 1)


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_pass():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            outcomes = [1] * c + [0] * (n - c)
            chosen = [any(pick) for pick in itertools.combinations(outcomes, k)]
            assert stats.pass_at_k(n, c, k) == pytest.approx(sum(chosen) / len(chosen))


def test_the_interval_narrows_with_the_problems_and_holds_the_value():
    for passed in (1, 20, 39):
        value, low, high = stats.interval([1] * passed + [0] * (40 - passed))
        assert low <= value == passed / 40 <= high
        if passed == 20:
            assert 0.25 < low < 0.42 and 0.58 < high < 0.75, "0.5 +- 1.96 * sqrt(0.25 / 40) is 0.35 to 0.65"
    wide, narrow = stats.interval([0, 1] * 10), stats.interval([0, 1] * 1000)
    assert narrow[2] - narrow[1] < (wide[2] - wide[1]) / 5


def test_nothing_of_156_is_not_certainly_nothing():
    assert stats.interval([0.0] * 156) == [0.0, 0.0, pytest.approx(0.0234, abs=1e-4)]
    assert stats.interval([1.0] * 3) == [1.0, pytest.approx(0.2924, abs=1e-4), 1.0]
    assert stats.interval([0.5] * 8) == [0.5, 0.5, 0.5]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.default_rng(3), 0
    for _ in range(100):
        _, low, high = stats.interval(random.random(60) < 0.4)
        covered += low <= 0.4 <= high
    assert covered >= 88


def test_the_paired_test_lists_every_choice_of_signs():
    random = np.random.default_rng(1)
    for _ in range(20):
        first, second = random.integers(0, 6, (2, 9)) / 5
        difference = second - first
        sums = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=9)]
        expected = np.mean(np.array(sums) >= abs(difference.sum()) - 1e-9)
        found = stats.paired(first, second)
        assert found.exact and found.p_value == pytest.approx(expected)
        assert len(found.wins) == (difference > 0).sum() and len(found.losses) == (difference < 0).sum()


def test_with_one_sample_each_it_is_mcnemars_exact_test():
    first, second = [0] * 9 + [1] * 2 + [1] * 20, [1] * 9 + [0] * 2 + [1] * 20
    expected = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert stats.paired(first, second).p_value == pytest.approx(expected)


def test_scores_without_a_common_unit_are_tested_by_draws_that_agree_with_the_list():
    random = np.random.default_rng(2)
    first, second = random.random((2, 10))
    found = stats.paired(first, second)
    sums = [abs(np.dot(signs, second - first)) for signs in itertools.product((-1, 1), repeat=10)]
    assert not found.exact
    assert found.p_value == pytest.approx(np.mean(np.array(sums) >= abs((second - first).sum()) - 1e-12), abs=0.01)
    assert stats.paired(first, second) == found, "the same again"


def test_the_sentence_says_which_is_better_by_how_much_and_whether_it_is_significant():
    base, tuned = [0.0] * 30, [1.0] * 10 + [0.0] * 20
    said = stats.paired(base, tuned).sentence("base", "tuned")
    assert said.startswith("tuned is better than base by 33.3 points (95 % interval +16.7 to +50.0; 10 problems better")
    assert "the difference is significant (p = 0.0020, exact paired permutation test)." in said
    said = stats.paired([0, 1, 1, 0], [1, 0, 1, 0]).sentence("a", "b")
    assert "no different on average" in said and "is not significant (p = 1.0000" in said
    assert stats.paired([1, 0], [1, 0]).sentence("a", "b") == "b and a score the same on every one of the problems."
    assert "b is worse than a by 100.0 points" in stats.paired([1, 1], [0, 0]).sentence("a", "b")
    with pytest.raises(ValueError, match="the same problems, not 2 and 3"):
        stats.paired([1, 1], [0, 0, 0])


def test_twins_are_significant_about_one_time_in_twenty_or_less():
    random, false = np.random.default_rng(4), 0
    for _ in range(300):
        chances = random.random(80)
        first, second = (random.binomial(5, chances) / 5 for _ in range(2))
        false += stats.paired(first, second).significant
    assert false <= 27
