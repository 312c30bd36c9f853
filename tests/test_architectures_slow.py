"""The claims of test_architectures.py for every architecture, fifty random ones, and every mesh of four."""

import arch_helper
import helpers
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from test_architectures import (
    ALL,
    LOGITS,
    MERGED,
    architectures,
    check_gradients,
    check_mesh,
    check_random,
    tiny_arch,
)

__all__ = ["tiny_arch"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ALL)
def test_the_logits_are_those_of_transformers(tiny_arch, name):
    assert helpers.compare_with_transformers(tiny_arch(name)) <= LOGITS


@pytest.mark.parametrize("name", ALL)
def test_the_gradients_are_those_of_peft(tiny_arch, name):
    check_gradients(tiny_arch(name), experts="26b" in name)


@pytest.mark.parametrize("name", ALL)
def test_the_merged_folder_is_in_transformers_what_peft_applies(tiny_arch, tmp_path, name):
    pytest.importorskip("peft")
    relative, figures = arch_helper.compare_merge(tiny_arch(name), tmp_path / "merged", "26b" in name)
    assert relative <= MERGED
    assert figures["updated"] == figures["changed"] and figures["max_ulp"] == 0


@pytest.mark.parametrize("name", ALL)
def test_greedy_completions_are_those_of_transformers(tiny_arch, name):
    ours, theirs = arch_helper.greedy(tiny_arch(name))
    assert ours == theirs


@settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(architectures())
def test_fifty_random_architectures_are_what_transformers_and_peft_compute(config):
    check_random(config)


@pytest.mark.parametrize("shape", [{"fsdp": 2, "tp": 2}, {"tp": 4}], ids=str)
@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-26b-a4b"])
def test_a_mesh_of_four_is_one_device(tiny_arch, name, shape):
    check_mesh(tiny_arch(name), shape, experts="26b" in name)


@pytest.mark.parametrize("shape", [{"expert": 4}, {"fsdp": 2, "expert": 2}, {"expert": 2, "tp": 2}], ids=str)
def test_an_expert_axis_changes_nothing(tiny_arch, shape):
    check_mesh(tiny_arch("gemma4-26b-a4b"), shape, experts=True)
