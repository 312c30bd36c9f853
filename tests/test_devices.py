"""What the environment of a command says before JAX is imported."""

import importlib.util
import os
import sys

import pytest

from gemma_tpu.hardware import devices


@pytest.mark.parametrize("installed, there, given, wanted", [
    ("libtpu", "", None, "cpu"), ("libtpu", "/dev/accel0", None, None), (None, "", None, None),
    ("libtpu", "", "proxy", "proxy"), ("jax_plugins", "", None, "cpu"), ("jax_plugins", "/dev/nvidia0", None, None),
])  # fmt: skip
def test_an_accelerators_library_is_not_asked_where_none_is(monkeypatch, installed, there, given, wanted):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name.split(".")[0] == installed)
    monkeypatch.setattr(devices, "accelerators", lambda: there)
    told = []  # JAX, which has been imported and has read its environment
    monkeypatch.setitem(sys.modules, "jax", sys)
    monkeypatch.setattr(devices, "cpu", lambda: told.append("cpu"))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.delenv("JAX_PLATFORMS")
    if given:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    devices.quiet()
    found = os.environ.get("JAX_PLATFORMS")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # what quiet() set goes with the patches
    assert found == wanted
    assert told == (["cpu"] if wanted == "cpu" else [])


@pytest.mark.parametrize("given, wanted", [
    ({}, {"XLA_CLIENT_MEM_FRACTION": "0.94"}),
    ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
])  # fmt: skip
def test_a_run_may_take_most_of_a_gpu_unless_the_user_says_how_much(monkeypatch, given, wanted):
    monkeypatch.setattr(os, "environ", {"JAX_PLATFORMS": "cpu", **given})
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    devices.quiet()
    assert {name: value for name, value in os.environ.items() if "MEM_FRACTION" in name} == wanted
