"""Several slices as one place: by name and price, in the mesh, and what of a step crosses the network between them."""

import json
import math
import re
from types import SimpleNamespace

import jax
import pytest
from helpers import QUICK
from runs_helper import run_config

from gemma_tpu import cli, config
from gemma_tpu.compiled.links import replica_groups
from gemma_tpu.errors import UserError
from gemma_tpu.estimate import advice, budget, roofline
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma import sizes
from gemma_tpu.gemma.variants import gemma4_31b
from gemma_tpu.hardware import chips, clouds, torus
from gemma_tpu.schema import MeshConfig
from gemma_tpu.step.job import Job, placed
from gemma_tpu.training import compiling, program

BIG = gemma4_31b()


def job(mesh: dict[str, int], rows: int = 8) -> Job:
    base = Job("lora", "all", (), 64, "bfloat16", rows, 1, 4096, "full", (), False)
    return base.change(mesh=mesh)


# --- names, prices, refusals ---


def test_two_slices_are_twice_the_chips_and_the_price_by_any_name_of_one():
    one, two = chips.find("v5p-8"), chips.find("2xv5p-8")
    assert (two.name, two.slices, two.chips, two.devices, two.topology) == ("2xv5p-8", 2, 8, 8, "2x2x1")
    assert two.usd == 2 * one.usd and two.spot_usd == tuple(2 * usd for usd in one.spot_usd)
    assert chips.find("2xv5p:2x2x1") == two and chips.find("1xv5p-8") == one
    assert chips.find("2xv5litepod-8") == chips.find("2XV5E-8")
    assert str(two) == "2xv5p-8 (8 chips, 2x2x1 each)"


def test_devices_are_the_slices_that_they_say_they_are():
    assert chips.of_devices("TPU v5", 8, slices=2) == chips.find("2xv5p-8")
    assert chips.of_devices("TPU v5", 8) == chips.find("v5p-16")
    assert chips.of_devices("cpu", 8, slices=2) is None


@pytest.mark.parametrize("name, told", [
    ("0xv5p-8", "from 1"), ("2xh100x8", "several slices are for TPUs"), ("2xv5p-9", "nearest: v5p-8"),
    ("2x2x1", "no slice that is known"),
])  # fmt: skip
def test_what_is_no_number_of_slices_is_refused(name, told):
    with pytest.raises(UserError, match=re.escape(told)):
        chips.find(name)


def test_a_chip_whose_network_is_not_known_makes_no_several(monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("chips: {v5e: {network_gbs: null}}\n")
    monkeypatch.setenv(chips.VARIABLE, str(file))
    assert chips.find("v5e-4").chips == 4
    with pytest.raises(UserError, match="chips.v5e.network_gbs is not known"):
        chips.find("2xv5e-4")


def test_launch_and_serve_say_that_they_take_one_slice(capsys):
    with pytest.raises(UserError, match="launch creates one slice.*--node-count 2"):
        clouds.machine_of(chips.find("2xv5p-8"))
    assert cli.main(["serve", "models/x", "--on", "2xv5e-8"]) == 2
    assert "a server runs on one slice" in capsys.readouterr().err


# --- the mesh ---


def device(index: int, x: int, y: int) -> SimpleNamespace:
    return SimpleNamespace(platform="tpu", slice_index=index, coords=(x, y, 0), core_on_chip=0)


def test_the_first_axis_is_divided_among_the_slices_and_the_others_stay_inside():
    devices = [device(index, x, y) for x in range(2) for index in range(2) for y in range(2)]
    assert torus.slices(devices) == 2
    mesh = torus.arrange(devices, (2, 2, 1, 2))
    assert mesh.shape == (2, 2, 1, 2)
    assert [{one.slice_index for one in half.flat} for half in mesh] == [{0}, {1}]
    assert len({id(one) for one in mesh.flat}) == 8
    four = torus.arrange(devices, (4, 2, 1, 1))
    assert [{one.slice_index for one in part.flat} for part in four] == [{0}, {0}, {1}, {1}]


def test_an_axis_other_than_data_may_not_cross_the_network():
    for section in (MeshConfig(fsdp=8), MeshConfig(data=1, fsdp=4, tp=2)):
        with pytest.raises(UserError, match="mesh.data=1 on 2 slices: it must be a multiple of 2"):
            meshes.sizes(section, BIG, 8, 8, slices=2)
    assert meshes.sizes(MeshConfig(data=2, fsdp=4), BIG, 8, 8, slices=2)["data"] == 2
    with pytest.raises(UserError, match="must be a multiple of 2"):
        meshes.build({"fsdp": 4}, [device(index, 0, y) for index in range(2) for y in range(2)])


def test_auto_gives_data_to_the_slices():
    chosen = meshes.sizes(MeshConfig(auto=True), BIG, 8, 8, slices=2)
    assert chosen == {"data": 2, "fsdp": 4, "expert": 1, "tp": 1}
    assert meshes.sizes(MeshConfig(auto=True), BIG, 8, 4, slices=2) == {"data": 2, "fsdp": 2, "expert": 1, "tp": 2}
    with pytest.raises(UserError, match="2 slices x fsdp"):
        meshes.sizes(MeshConfig(auto=True), BIG, 8, 3, slices=2)


# --- the plan ---


def test_the_meshes_of_two_slices_have_two_on_the_data_axis():
    found = budget.valid_meshes(BIG, chips.find("2xv5p-8"), job({"data": 2, "fsdp": 4}))
    assert {one.sizes["data"] for one in found} == {2} and any(one.valid for one in found)
    assert all(math.prod(one.sizes.values()) == 8 for one in found)


def test_two_slices_do_twice_the_work_but_for_the_gradients_on_the_network():
    arch, one, two = sizes.architecture("gemma4-31b"), chips.find("v5p-8"), chips.find("2xv5p-8")
    alone = roofline.estimate(arch, job({"fsdp": 4}, rows=4), one)
    both = roofline.estimate(arch, job({"data": 2, "fsdp": 4}, rows=8), two)
    float32 = sum(v.bytes for v in placed(arch, job({"data": 2, "fsdp": 4})) if v.trains)
    assert both.parts["network"] == pytest.approx(float32 / 2 / 6.25e9)  # bfloat16: each sends half, and half again
    assert alone.parts["network"] == 0
    # One slice hides a part of its weight gathers; with a data axis they are synchronous.
    gathers = alone.parts["fsdp links"] / roofline.PACE.exposed_fsdp
    assert both.parts["fsdp links"] == pytest.approx(gathers)
    same = alone.step_s - alone.parts["fsdp links"] + gathers
    assert both.step_s - both.parts["network"] == pytest.approx(same, rel=1e-6)
    memory = [budget.memory(arch, job(mesh, rows), place).total
              for mesh, rows, place in (({"fsdp": 4}, 4, one), ({"data": 2, "fsdp": 4}, 8, two))]  # fmt: skip
    assert memory[1] == pytest.approx(memory[0], rel=0.01)


def test_a_fast_plan_of_two_slices_prices_both_and_names_the_network(capsys):
    words = ["gemma4_31b_v5p8_fast.yaml", "--fast", "--on", "2xv5p-8", "train.batch_size=8"]
    assert cli.main(["plan", *words]) == 2
    assert cli.main(["plan", *words]) == 2
    assert "there are 8 devices" in capsys.readouterr().err  # the config's mesh is of 4
    assert cli.main(["plan", *words, "mesh.fsdp=8"]) == 2
    assert "mesh.data=1 on 2 slices" in capsys.readouterr().err
    assert cli.main(["plan", *words, "mesh.data=2"]) == 0
    out = capsys.readouterr().out
    assert "2xv5p-8 (8 chips, 2x2x1 each)" in out and "the network between slices: 6.25 GB/s a chip" in out
    assert cli.main(["plan", *words, "mesh.data=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["slice"], found["chips"], found["mesh"]["data"]) == ("2xv5p-8", 8, 2)
    assert found["usd"] == pytest.approx(found["hours"] * 8 * 4.20)


def test_advice_for_one_slice_takes_the_data_axis_back():
    two, one = job({"data": 2, "fsdp": 4}), job({"fsdp": 4})
    place, arch = chips.find("v5p-8"), sizes.architecture("gemma4-31b")
    asked = config.load("gemma4_31b_v5p8_fast.yaml", ["mesh.data=2", "train.batch_size=8"])
    memory, estimate = budget.memory(arch, one, place), roofline.estimate(arch, one, place)
    option = advice.Option("slice", one, place, memory, estimate, auto=False)
    assert option.overrides(asked, two) == ["mesh.data=1", "mesh.fsdp=4", "mesh.tp=1"]


# --- the step ---

_COLLECTIVE = re.compile(
    r"= (?P<out>\([^)]*\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"(?:f32|s32|u32|bf16|pred)\[([\d,]*)\]")


def crossing(text: str, half: int) -> list[tuple[str, int, str]]:
    """(kind, elements, line) of every collective that joins the first half of the devices with the second."""
    found = []
    for line in text.splitlines():
        if one := _COLLECTIVE.search(line):
            if one["kind"] == "collective-permute":
                groups = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", line.split("pairs=")[1])]
            else:
                groups = replica_groups(line, 2 * half)
            assert groups is not None, line
            if any(len({number // half for number in group}) > 1 for group in groups):
                shapes = _SHAPE.findall(one["out"])
                elements = sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
                found.append((one["kind"], elements, line))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("inside", [{"fsdp": 2}, {"tp": 2}], ids=str)
def test_nothing_but_the_sum_of_gradients_crosses_the_data_axis(base32, tmp_path, monkeypatch, inside):
    """By the compiled step itself: all-reduces of what trains, once an update, and some numbers beside them."""
    held = []
    monkeypatch.setattr(compiling, "devices", lambda topology, slices: jax.devices())
    compile_step = program.Program.compile

    def compile_here(self, lowered, more):
        held.append((self, compile_step(self, lowered, QUICK)))

    monkeypatch.setattr(program.Program, "compile", compile_here)
    chosen = run_config(base32, tmp_path / "run", "mesh.data=2", "mesh.fsdp=1", "mesh.tp=1", "train.accumulation=1")
    compiling.main({
        "config": config.to_dict(chosen), "topology": "", "slices": 1, "mesh": {"data": 2, **inside},
        "folder": str(tmp_path), "architecture": json.loads((base32 / "config.json").read_text()),
        "remat": "full", "total_steps": 8,
    })  # fmt: skip
    ((made, compiled),) = held
    found = crossing(compiled.as_text(), 2)
    assert found and {kind for kind, _, _ in found} == {"all-reduce"}, [line for kind, _, line in found]
    trained = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in made.abstract_state()["trained"].values())
    whole = sum(math.prod(x.shape) for x in made.abstract_state()["trained"].values())
    moved = sum(count for _, count, _ in found)
    assert trained <= moved <= whole + 64, f"{moved} elements cross, {trained} of {whole} train here"
