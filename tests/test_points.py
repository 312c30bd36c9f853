"""Points of a sweep, and when their requests are sent."""

import math

import numpy as np
import pytest

from gemma_tpu.bench import arrivals, points
from gemma_tpu.bench.points import Point
from gemma_tpu.errors import UserError


def test_the_papers_sweep_is_six_shapes_at_eight_rates_with_thirty_prompts():
    sweep = points.PRESETS["paper"]
    assert len(sweep) == 48 and len(set(sweep)) == 48
    assert [one.shape for one in sweep[::8]] == ["128/256", "512/256", "1024/512", "4096/512", "8192/512", "15360/512"]
    assert [one.rate for one in sweep[:8]] == ["1", "2", "4", "8", "16", "32", "64", "inf"]
    assert {one.prompts for one in sweep} == {30}
    assert max(one.input + one.output for one in sweep) <= 16384


def test_a_grid_has_every_rate_for_every_shape():
    found = points.grid([128, 512], [64], [1.0, math.inf], 10)
    wanted = ["128/64 at QPS 1", "128/64 at QPS inf", "512/64 at QPS 1", "512/64 at QPS inf"]
    assert [one.name for one in found] == wanted
    assert [one.shape for one in points.grid([128, 512], [64, 32], [1.0], 10)] == ["128/64", "512/32"]
    with pytest.raises(UserError, match="3 inputs and 2 outputs"):
        points.grid([1, 2, 3], [4, 5], [1.0], 10)


def test_points_are_read_from_yaml_and_a_list_of_rates_makes_a_point_each(tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text("- {input: 64, output: 32, qps: [2, .inf, inf], prompts: 5}\n".replace(", inf]", "]")
                    + "- {input: 8, output: 4, qps: inf}\n")  # fmt: skip
    assert points.read(file) == (
        Point(64, 32, 2.0, 5), Point(64, 32, math.inf, 5), Point(8, 4, math.inf, points.PAPER_PROMPTS)
    )  # fmt: skip


def test_all_that_is_wrong_with_a_file_of_points_is_said_at_once(tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text("- {input: 64, ouput: 32, qps: fast}\n- 7\n- {input: 1.5, output: 2, qps: 1}\n")
    with pytest.raises(UserError) as error:
        points.read(file)
    for said in ("did you mean output", "output is None", "qps is 'fast'", "point 2: 7", "input is 1.5"):
        assert said in str(error.value)
    for text in ("", "a: 1", "- [", "[]"):
        file.write_text(text)
        with pytest.raises(UserError):
            points.read(file)
    with pytest.raises(UserError, match="cannot be read"):
        points.read(tmp_path / "none.yaml")


def test_numbers_out_of_bounds_and_points_given_twice_are_refused():
    with pytest.raises(UserError, match="input is 0.*from 1"):
        points.checked([Point(0, 4, 1.0, 1)])
    with pytest.raises(UserError, match="qps must be above 0"):
        points.checked([Point(4, 4, -1.0, 1)])
    with pytest.raises(UserError, match="given twice"):
        points.checked([Point(4, 4, 1.0, 1), Point(4, 4, 1.0, 1)])


def test_poisson_arrivals_have_exponential_gaps_the_exact_rate_and_a_seed():
    times = arrivals.times(4000, 8.0, "poisson", 3)
    gaps = np.diff([0.0, *times])
    assert times[-1] == pytest.approx(500.0) and (gaps > 0).all()
    assert np.std(gaps) == pytest.approx(1 / 8, rel=0.05)  # of an exponential: its mean
    assert np.mean(gaps > 1 / 8) == pytest.approx(math.exp(-1), abs=0.03)
    assert arrivals.times(4000, 8.0, "poisson", 3) == times != arrivals.times(4000, 8.0, "poisson", 4)


def test_constant_arrivals_are_even_and_infinite_rates_are_at_once():
    assert arrivals.times(4, 2.0, "constant", 0) == [0.5, 1.0, 1.5, 2.0]
    assert arrivals.times(3, math.inf, "poisson", 0) == [0.0, 0.0, 0.0]
