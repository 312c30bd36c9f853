"""The claims of test_architectures.py for every architecture, fifty random ones, and every mesh of four."""

import tempfile
from pathlib import Path

import arch_helper
import helpers
import numpy as np
import pytest
import runs_helper
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

from gemma_tpu.tiny.checkpoint import write_tiny

__all__ = ["tiny_arch"]
pytestmark = pytest.mark.slow


def check_merge(folder: Path, out: Path, experts: bool) -> None:
    pytest.importorskip("peft")
    relative, figures = arch_helper.compare_merge(folder, out, experts)
    assert relative <= MERGED
    assert figures["updated"] == figures["changed"] and figures["max_ulp"] == 0


@pytest.mark.parametrize("name", ALL)
def test_the_logits_are_those_of_transformers(tiny_arch, name):
    assert helpers.compare_with_transformers(tiny_arch(name)) <= LOGITS


@pytest.mark.parametrize("name", ALL)
def test_the_gradients_are_those_of_peft(tiny_arch, name):
    check_gradients(tiny_arch(name), experts="26b" in name)


@pytest.mark.parametrize("name", ALL)
def test_the_merged_folder_is_in_transformers_what_peft_applies(tiny_arch, tmp_path, name):
    check_merge(tiny_arch(name), tmp_path / "merged", experts="26b" in name)


@pytest.mark.parametrize("name", ALL)
def test_greedy_completions_are_those_of_transformers(tiny_arch, name):
    ours, theirs = arch_helper.greedy(tiny_arch(name))
    assert ours == theirs


@settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(architectures())
def test_fifty_random_architectures_are_what_transformers_and_peft_compute(config):
    check_random(config)
    with tempfile.TemporaryDirectory() as made:
        folder = arch_helper.write(Path(made) / "model", config)
        check_merge(folder, Path(made) / "merged", experts=bool(config.get("enable_moe_block")))
        same = arch_helper.export_untrained(folder, Path(made) / "out")
        assert same.pop("identical") and not any(same.values()), same


@pytest.mark.parametrize("shape", [{"fsdp": 2, "tp": 2}, {"tp": 4}], ids=str)
@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-26b-a4b"])
def test_a_mesh_of_four_is_one_device(tiny_arch, name, shape):
    check_mesh(tiny_arch(name), shape, experts="26b" in name)


@pytest.mark.parametrize("shape", [{"expert": 4}, {"fsdp": 2, "expert": 2}, {"expert": 2, "tp": 2}], ids=str)
def test_an_expert_axis_changes_nothing(tiny_arch, shape):
    check_mesh(tiny_arch("gemma4-26b-a4b"), shape, experts=True)


def test_a_run_with_an_expert_axis_trains_the_experts_and_has_the_losses_of_one_without(tmp_path):
    base = write_tiny(tmp_path / "base", "gemma4-26b-a4b", dtype="float32")
    found = {}
    for name, axes in {"rows": {"fsdp": 4}, "experts": {"expert": 4}, "both": {"fsdp": 2, "expert": 2}}.items():
        overrides = [f"mesh.{axis}={axes.get(axis, 1)}" for axis in ("fsdp", "tp", "expert")]
        run_dir = tmp_path / name
        runs_helper.train(runs_helper.run_config(
            base, run_dir, *overrides, "lora.targets=.*|.*experts.*", "lora.dropout=0", "train.steps=3"))  # fmt: skip
        found[name] = runs_helper.losses(run_dir)
    assert any("experts" in path for path in runs_helper.saved(tmp_path / "experts", 3))
    assert found["rows"][-1] < found["rows"][0]
    np.testing.assert_allclose(found["experts"], found["rows"], rtol=1e-5)
    np.testing.assert_allclose(found["both"], found["rows"], rtol=1e-5)
