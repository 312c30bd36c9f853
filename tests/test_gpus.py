# ruff: noqa: E501 (HLO has one instruction to a line)
"""Plans for GPUs by XLA's own compiler, which JAX's CUDA plugin brings and which needs no GPU."""

import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gemma_tpu import cli, config
from gemma_tpu.compiled.links import Switch, Transfer
from gemma_tpu.compiled.walk import GPU_ASSUMPTIONS, schedule, walk
from gemma_tpu.estimate import advice, budget
from gemma_tpu.gemma import flash
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.hardware import chips, gpus
from gemma_tpu.planning import compilation, plan, subject, sweep
from gemma_tpu.planning.workload import workload
from gemma_tpu.step.job import Job
from gemma_tpu.training import compiling

FAST = "gemma4_31b_v5p8_fast.yaml"
H100S = chips.find("h100x8")
# A product of 494.5 GFLOP on a chip of 989 TFLOP/s: half a millisecond; the gather's 225 MB at 450 GB/s: the same.
PROGRAM = """HloModule jit_train_step, is_scheduled=true, num_partitions=8

%product (a: bf16[10000,2472], b: bf16[2472,10000]) -> bf16[10000,10000] {
  %a = bf16[10000,2472]{1,0} parameter(0)
  %b = bf16[2472,10000]{1,0} parameter(1)
  ROOT %d = bf16[10000,10000]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[10000,2472], w: bf16[2472,10000], p: f32[1,8035715]) -> bf16[10000,10000] {
  %x = bf16[10000,2472]{1,0} parameter(0)
  %w = bf16[2472,10000]{1,0} parameter(1)
  %p = f32[1,8035715]{1,0} parameter(2)
  %s = (f32[1,8035715]{1,0}, f32[8,8035715]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %f = bf16[10000,10000]{1,0} fusion(%x, %w), kind=kCustom, calls=%product, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %g = f32[8,8035715]{1,0} all-gather-done(%s)
  ROOT %r = bf16[10000,10000]{1,0} copy(%f)
}
"""


def test_the_compiler_is_told_the_figures_of_the_chip_by_name():
    table = {name: chip for name, chip in chips.chips().items() if gpus.known(name)}
    assert set(table) == {"h100", "h200", "b200", "a100", "l4"} and {one.kind for one in table.values()} == {"gpu"}
    for name, chip in table.items():
        told = gpus.target(name, chip.hbm_gib, chip.hbm_gbs)
        assert f"memory_bandwidth: {round(chip.hbm_gbs * 1e9)} " in told and told.count("{") == told.count("}")
        assert f"device_memory_size: {int(chip.hbm_gib * 2**30)} " in told
        assert chip.device_kind in re.search(r'device_description_str: "([^"]+)"', told)[1]
    assert "cuda_compute_capability { major: 9 minor: 0 }" in gpus.target("h100", 74.5, 3350)
    assert "threads_per_core_limit: 1536 " in gpus.target("l4", 22.3, 300)
    assert H100S.compiler_name == "h100:8" and chips.find("h100:8") == H100S
    assert chips.find("mi300xx8").compiler_name is None


def test_the_compiler_is_asked_for_as_many_as_there_are(monkeypatch):
    asked = []
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **of: asked.append(of) or SimpleNamespace(devices=[1]))
    assert compiling.devices("h100:8") == [1] and compiling.devices("a100:2x4") == [1]
    assert [one["topology"] for one in asked] == ["1x1x8", "1x1x8"] and {one["platform"] for one in asked} == {"cuda"}
    assert "H100" in asked[0]["target_config"] and "A100" in asked[1]["target_config"]


def test_what_is_kept_of_a_chip_is_of_its_own_compiler(monkeypatch):
    found = {"jax": "1", "libtpu": "2", "jax-cuda13-pjrt": "3"}
    monkeypatch.setattr(compilation.metadata, "distributions",
                        lambda name: [SimpleNamespace(version=found[name])] if name in found else [])  # fmt: skip
    assert compilation._versions(H100S) == ["jax 1", "jax-cuda13-pjrt 3"]
    assert compilation._versions(chips.find("v5p-8")) == ["jax 1", "libtpu 2"]
    assert compilation.compiler(H100S) == "jax-cuda13-pjrt 3" and compilation.compiler(chips.find("v5p-8")) == "libtpu 2"


def test_who_chooses_for_the_user_leaves_more_of_a_gpu_free():
    chosen = config.load(f"configs/{FAST}", ["mesh.fsdp=8", "train.batch_size=16", "train.remat=auto"])
    arch = subject.find_model(chosen.model.path).architecture
    sizes = {"data": 1, "fsdp": 8, "expert": 1, "tp": 1}
    policy, _ = advice.choose_remat(arch, chosen, H100S, sizes)
    peak = budget.memory(arch, Job.of(chosen, sizes, policy), H100S)  # the compiler needs up to 15 % more
    assert peak.total <= 0.8 * peak.limit


def test_a_gpu_that_was_compiled_for_is_not_called_a_roofline():
    asked, unasked = (SimpleNamespace(compilation=of, basis="schedule", fits=True) for of in (object(), None))
    assert [sweep.Row(H100S, of, None).basis for of in (asked, unasked, None)] == ["schedule", "roofline", "roofline"]


def test_a_switch_is_one_way_that_collectives_share():
    switch = Switch(H100S)  # 18 links of 25 GB/s
    assert switch.loads(Transfer("all-gather", 450e9, groups=((0, 1, 2, 3, 4, 5, 6, 7),))) == {(0, 0): 1.0}
    assert switch.loads(Transfer("collective-permute", 45e9, pairs=((0, 1), (1, 0)))) == {(0, 0): pytest.approx(0.1)}
    assert switch.loads(Transfer("all-gather", 1e9, groups=((0,), (1,)))) == {}
    assert switch.loads(Transfer("collective-permute", 1e9, pairs=((0, 0), (1, 1)))) == {}


def test_a_program_for_gpus_is_walked_with_the_gather_beside_the_product(tmp_path):
    file = tmp_path / "module_0001.jit_train_step.sm_9.0a_gpu_after_optimizations.txt"
    file.write_text(PROGRAM)
    found = walk(tmp_path, H100S)
    product, copied = 2 * 10000 * 2472 * 10000 / 989e12, 2 * 2e8 / 3350e9
    assert schedule(tmp_path) == file and not found.unknown
    assert found.by_kind["matmul"] == pytest.approx(product) and found.by_kind["copy"] == pytest.approx(copied)
    assert found.collective_bytes == 7 * 4 * 8035715 and found.hidden_seconds == pytest.approx(product, rel=1e-3)
    assert found.seconds == pytest.approx(product + copied, rel=1e-3)
    assert "links: a switch, 450 GB/s a GPU in each direction" in found.assumptions
    assert set(GPU_ASSUMPTIONS) <= set(found.assumptions) and not any("VMEM" in line for line in found.assumptions)


@pytest.mark.parametrize("slice_, installed, full, said", [
    ("h100x1", False, (), "pip install 'gemma_tpu[cuda]'"),
    ("h100x1", True, ("--full",), "leave it out"),
    ("mi300xx1", True, (), "cannot be told of a mi300x that is not here"),
])  # fmt: skip
def test_where_no_compiler_can_be_asked_the_plan_is_arithmetic_and_says_why(
    monkeypatch, capsys, slice_, installed, full, said
):
    monkeypatch.setattr(gpus, "installed", lambda: installed)
    assert cli.main(["plan", f"configs/{FAST}", "--on", slice_, "mesh.fsdp=1", "model.quantise=nf4", *full]) == 0
    out, err = capsys.readouterr()
    assert said in err and "planned by arithmetic alone" in err and "by arithmetic, to about 20%" in out


@pytest.mark.slow
@pytest.mark.skipif(not gpus.installed(), reason="JAX's CUDA plugin is not installed: `make test-gpu-plans`")
@pytest.mark.skipif(not shutil.which("ptxas"), reason="no ptxas, which CUDA's toolkit brings, to make the code")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name, target", [
    ("h100", "sm_90a"), ("h200", "sm_90a"), ("b200", "sm_100a"), ("a100", "sm_80"), ("l4", "sm_89"),
])  # fmt: skip
def test_the_attention_kernel_has_the_registers_and_the_memory_that_it_needs(tmp_path, name, target, head_dim):
    """Too much shared memory is an error of the compiler; registers that do not fit are written to memory and back."""
    chip = chips.chips()[name]
    device = gpus.devices(name, 1, chip.hbm_gib, chip.hbm_gbs)[0]
    here = SingleDeviceSharding(device)

    def of(*dims, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=here)

    def loss(q, k, v, segments):
        return flash.flash(q, k, v, segments, scale=1.0, window=1024).astype("float32").sum()

    kv = of(1, 4096, 2, head_dim)
    with jax.set_mesh(meshes.build({}, [device])):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(of(1, 4096, 8, head_dim), kv, kv,
                                                                  of(1, 4096, dtype="int32"))  # fmt: skip
        traced.lower(lowering_platforms=("cuda",)).compile(compiler_options={"xla_dump_to": str(tmp_path)})
    seen = set()
    for file in tmp_path.glob("*.ptx"):
        kernel = re.search(r"entry (flash_[a-z]+)_", file.read_text())
        if kernel:
            told = subprocess.run(["ptxas", f"-arch={target}", "-v", file, "-o", "/dev/null"], capture_output=True,
                                  text=True, check=True).stderr  # fmt: skip
            assert int(re.search(r"(\d+) bytes spill stores", told)[1]) <= 16, told  # of 1,020 that a thread has
            seen.add(kernel[1])
    assert seen == {"flash_forward", "flash_dq", "flash_dkv"}


@pytest.mark.slow
@pytest.mark.skipif(not gpus.installed(), reason="JAX's CUDA plugin is not installed: `make test-gpu-plans`")
@pytest.mark.parametrize("file, slice_, more", [
    ("gemma4_e2b_v6e1.yaml", "h100x1", ()),
    ("gemma3_4b_v6e1.yaml", "h200x1", ()),
    (FAST, "h100x8", ("mesh.fsdp=8", "train.batch_size=8")),
    (FAST, "b200x8", ("mesh.fsdp=4", "mesh.tp=2")),
])  # fmt: skip
def test_the_step_compiles_for_gpus_that_are_not_there_and_its_memory_is_as_planned(
    monkeypatch, tmp_path, file, slice_, more
):
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path))
    chosen = config.load(f"configs/{file}", more)
    made = plan.make(chosen, file, chips.find(slice_), subject.find_model(chosen.model.path), workload(chosen),
                     say=print, suggest=False)  # fmt: skip
    found = plan.to_json(made)
    print(json.dumps({key: found[key] for key in ("slice", "peak_gib_per_chip", "analytic_peak_gib_per_chip", "step_s",
                                                  "tokens_per_s", "mfu", "compile_s")}))  # fmt: skip
    assert made.fits and made.basis == "schedule" and not made.walk.unknown
    assert made.memory.total == pytest.approx(made.peak_gib, rel=plan.ANALYTIC["gpu"])
    assert made.estimate.step_s == pytest.approx(made.step_s, rel=0.1)
    useful = made.estimate.flops_per_token * chosen.train.batch_size * chosen.data.max_seq_len / made.place.devices
    assert 0.9 * useful < made.walk.flops < 1.5 * useful
