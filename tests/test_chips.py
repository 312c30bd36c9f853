import os
import subprocess
import sys

import pytest
import yaml

from gemma_tpu.errors import UserError
from gemma_tpu.hardware import chips


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """user_file(tree or text): becomes the user's hardware file."""

    def write(content):
        path = tmp_path / "mine.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        monkeypatch.setenv(chips.VARIABLE, str(path))
        return path

    yield write
    chips._chips.cache_clear()


@pytest.mark.parametrize("name, count, topology", [
    ("v5p-8", 4, "2x2x1"), ("v5p-16", 8, "2x2x2"), ("v5p-32", 16, "2x2x4"), ("v5p-64", 32, "2x4x4"),
    ("v5p-128", 64, "4x4x4"), ("v6e-1", 1, "1x1"), ("v6e-8", 8, "2x4"), ("v6e-256", 256, "16x16"),
    ("v5e-4", 4, "2x2"), ("v5e-128", 128, "8x16"), ("tpu7x-2", 1, "1x1x1"), ("tpu7x-8", 4, "2x2x1"),
    ("tpu7x-128", 64, "4x4x4"), ("h100x2", 2, "2"), ("mi300xx8", 8, "8"),
])  # fmt: skip
def test_a_slice_is_so_many_chips_in_this_topology(name, count, topology):
    found = chips.find(name)
    assert (found.name, found.chips, found.topology) == (name, count, topology)


def test_a_tpu7x_chip_is_two_devices_that_share_its_memory_and_compute():
    found = chips.find("tpu7x-8")
    assert found.devices == 8 and found.compiler_name == "tpu7x:2x2x1"
    assert found.chip.device_hbm_gib == pytest.approx(94.74)
    assert found.chip.device_bf16_tflops == pytest.approx(1153.5)


def test_the_limits_are_those_that_the_compiler_states():
    limits = {name: chips.find(name).chip.device_hbm_gib for name in ("v5e-1", "v5p-8", "v6e-1")}
    assert limits == {"v5e-1": 15.75, "v5p-8": 95.73, "v6e-1": 31.25}


def test_an_hour_of_v5p_8_costs_four_chips():
    found = chips.find("v5p-8")
    assert found.usd == pytest.approx(16.80)
    assert found.spot_usd == pytest.approx((3.72, 6.72))


def test_where_no_price_is_known_none_is_made_up():
    found = chips.find("tpu7x-8")
    assert found.usd is None and found.spot_usd is None


def test_names_are_found_in_any_case_by_the_clouds_name_and_by_the_compilers():
    for name in ("V5E-8", "v5litepod-8", "v5e:2x4", " v5e-8 "):
        assert chips.find(name).name == "v5e-8"


def test_every_name_finds_its_own_slice_and_names_differ():
    names = chips.names()
    assert len(set(names)) == len(names)
    assert [chips.find(name).name for name in names] == names


def test_every_figure_has_a_source_and_a_date():
    for chip in chips.chips().values():
        assert set(chip.sources) == {"speeds", "memory", "prices", *(["network"] if chip.network_gbs else [])}
        assert (chip.network_gbs is not None) == (chip.kind == "tpu")
        assert all(source.text and source.date for source in chip.sources.values()), chip.name


@pytest.mark.parametrize("name, said", [
    ("v5p-12", ["v5p-8 (4 chips, 2x2x1)", "v5p-16 (8 chips, 2x2x2)", "N counts cores, 2 to a chip"]),
    ("v6e-6", ["v6e-4 (4 chips, 2x2)", "v6e-8 (8 chips, 2x4)", "v6e-N: N counts chips"]),
    ("v6-8", ["v6e-8 (8 chips, 2x4)", "v5p-8 is 4 chips, 2x2x1"]),
    ("h100x3", ["h100x2 (2 chips)", "h100xN is N GPUs"]),
    ("zebra", ["there are: v5e-1", "v5p-N: N counts cores"]),
    ("v5p-8\nv6e-8", ["v5p-N: N counts cores"]),
])  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest_and_what_n_means(name, said):
    with pytest.raises(UserError) as caught:
        chips.find(name)
    assert repr(name) in str(caught.value)
    assert all(words in str(caught.value) for words in said), str(caught.value)


def test_the_users_price_replaces_the_bundled_one_and_names_its_file(user_file):
    path = user_file({"chips": {"v6e": {"usd": 2.0}}})
    chip = chips.find("v6e-8").chip
    assert chips.find("v6e-8").usd == 16.0
    assert chip.hbm_gbs == 1638 and chips.find("v5p-8").usd == pytest.approx(16.8)
    assert chip.sources["prices"].text == str(path)
    assert "cloud.google.com" in chip.sources["speeds"].text


def test_the_user_may_say_where_a_price_is_from(user_file):
    source = {"from": "contract", "date": "2026-11-02"}
    user_file({"chips": {"v6e": {"usd": 2.0, "sources": {"prices": source}}}})
    assert str(chips.find("v6e-1").chip.sources["prices"]) == "contract, 2026-11-02"


def test_the_user_may_add_a_chip(user_file):
    new = {"kind": "gpu", "device_kind": "X1", "bf16_tflops": 100, "int8_tflops": None, "hbm_gib": 20, "hbm_gbs": 500,
           "links": 1, "link_gbs": 30, "devices": 1, "name_counts": 1, "aliases": [], "slices": ["1", "4"], "usd": 1,
           "spot_usd": [0.2, 0.5]}  # fmt: skip
    user_file({"chips": {"x1": new}})
    assert chips.find("x1x4").spot_usd == (0.8, 2.0)
    del new["hbm_gbs"]
    chips._chips.cache_clear()
    user_file({"chips": {"x1": new}})
    with pytest.raises(UserError, match="a new chip .* missing: hbm_gbs"):
        chips.find("x1x4")


def test_everything_wrong_in_the_users_file_is_named_at_once(user_file):
    path = user_file({
        "chips": {
            "v6e": {"hbm_gb": 32, "links": 0, "spot_usd": [2, 1], "slices": ["2by2"], "usd": "cheap"},
            "v5p": 3,
            "v5e": {"sources": {"price": {}, "prices": {"from": "me"}}},
        },
        "prices": {},
    })  # fmt: skip
    with pytest.raises(UserError) as caught:
        chips.chips()
    said = str(caught.value)
    assert str(path) in said
    for words in (
        "chips.v6e.hbm_gb: unknown key; did you mean hbm_gib?",
        "chips.v6e.links: 0 must be an integer of at least 1", "chips.v6e.spot_usd", "chips.v6e.slices",
        "chips.v6e.usd: 'cheap' must be a number above 0, or null", "chips.v5p: must be a mapping",
        "chips.v5e.sources.price: unknown", "chips.v5e.sources.prices: must be", "prices: unknown key",
    ):  # fmt: skip
        assert words in said, words


@pytest.mark.parametrize("content", ["chips: [", "- 1", "chips: 3", ""])
def test_a_users_file_that_is_no_such_file_is_refused(user_file, content):
    user_file(content)
    with pytest.raises(UserError, match=chips.VARIABLE):
        chips.chips()


def test_a_users_file_that_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(chips.VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="none.yaml: cannot be read"):
        chips.chips()


def test_importing_the_planners_arithmetic_does_not_import_jax():
    code = (
        "import sys; import gemma_tpu.estimate.budget, gemma_tpu.estimate.roofline, gemma_tpu.hardware.chips; "
        "import gemma_tpu.step.job; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


@pytest.mark.parametrize(("kind", "count", "name"), [
    ("TPU v5", 4, "v5p-8"), ("TPU v5 lite", 8, "v5e-8"), ("TPU v6 lite", 4, "v6e-4"), ("TPU7x", 8, "tpu7x-8"),
    ("NVIDIA H100 80GB HBM3", 2, "h100x2"), ("NVIDIA A100-SXM4-80GB", 1, "a100x1"),
])  # fmt: skip
def test_devices_are_known_by_what_jax_calls_them(kind, count, name):
    assert chips.of_devices(kind, count).name == name


def test_a_cpu_is_no_slice():
    assert chips.of_devices("cpu", 4) is None
