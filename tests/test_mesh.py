"""The mesh: product, heads, rows and every spec are checked before anything is allocated."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gemma_tpu.errors import UserError
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.mesh import Tensor, choose, fix_specs, head_table, sizes, spec_for, tp_choices
from gemma_tpu.gemma.variants import gemma4_31b
from gemma_tpu.schema import MeshConfig

BIG = gemma4_31b()


def ask(devices: int, rows: int = 16, **section) -> dict[str, int]:
    return sizes(MeshConfig(**section), BIG, devices, rows)


def refusal(devices: int, rows: int = 16, **section) -> str:
    with pytest.raises(UserError) as error:
        ask(devices, rows, **section)
    return str(error.value)


def test_1_by_8_on_4_devices_fails_on_the_product_and_names_the_valid_meshes():
    said = refusal(4, fsdp=1, tp=8)
    assert "fsdp=1 x tp=8 = 8, but there are 4 devices" in said
    assert "(4, 1), (2, 2), (1, 4)" in said


def test_4_by_4_on_16_devices_passes():
    assert ask(16, fsdp=4, tp=4) == {"data": 1, "fsdp": 4, "expert": 1, "tp": 4}


def test_2_by_8_on_16_devices_fails_on_the_4_global_kv_heads_with_the_table_and_the_choices():
    said = refusal(16, fsdp=2, tp=8)
    assert "mesh.tp=8 does not divide the 4 global KV heads\n" in said
    assert "valid tp: 1, 2, 4; or mesh.replicate_kv=true" in said
    rows = {line[:16].strip(): line[16:].split() for line in said.splitlines()[1:-1]}
    assert rows["query heads"] == ["32", "60", "4", "per", "device"]
    assert rows["local KV heads"] == ["16", "50", "2", "per", "device"]
    assert rows["global KV heads"] == ["4", "10", "0.5", "per", "device:", "does", "not", "divide"]


def test_replicate_kv_permits_tp_beyond_the_kv_heads_and_the_table_says_so():
    assert ask(16, fsdp=2, tp=8, replicate_kv=True)["tp"] == 8
    table = meshes.check_heads(BIG, 8, replicate_kv=True)
    assert [line for line in table.splitlines() if "replicated (mesh.replicate_kv)" in line][0].startswith(
        "global KV"
    )
    assert tp_choices(BIG, True, 64) == [1, 2, 4, 8, 16, 32]


def test_replicate_kv_does_not_excuse_query_heads():
    said = refusal(64, fsdp=1, tp=64, replicate_kv=True)
    assert "does not divide the 32 query heads" in said
    assert "or mesh.replicate_kv" not in said  # it would not help
    assert "replicate_kv" not in refusal(64, fsdp=1, tp=64)


def test_all_head_counts_that_do_not_divide_are_named_at_once():
    said = refusal(3, rows=3, fsdp=1, tp=3)
    assert "32 query heads, 16 local KV heads, 4 global KV heads" in said


def test_the_head_table_has_one_row_for_each_count():
    assert [(row.name, row.heads, row.layers) for row in head_table(BIG, 1)] == [
        ("query heads", 32, 60), ("local KV heads", 16, 50), ("global KV heads", 4, 10),
    ]  # fmt: skip


def test_rows_of_a_micro_batch_must_divide_over_data_and_fsdp():
    said = refusal(8, rows=6, data=2, fsdp=2, tp=2)
    assert "6 rows per micro-batch, which data x fsdp = 4 does not divide" in said
    assert ask(8, rows=8, data=2, fsdp=2, tp=2)["data"] == 2


def test_an_expert_axis_is_refused_for_a_dense_model():
    assert "mesh.expert is 2" in refusal(4, fsdp=2, expert=2)


@pytest.mark.parametrize(
    ("devices", "rows", "replicate_kv", "fsdp", "tp"),
    [
        (16, 16, False, 16, 1),
        (16, 8, False, 8, 2),
        (16, 4, False, 4, 4),
        (16, 2, True, 2, 8),
        (1, 1, False, 1, 1),
    ],
)
def test_auto_takes_as_much_fsdp_as_the_rows_can_feed(devices, rows, replicate_kv, fsdp, tp):
    assert choose(BIG, devices, rows, replicate_kv) == {"data": 1, "fsdp": fsdp, "expert": 1, "tp": tp}
    assert ask(devices, rows, auto=True, replicate_kv=replicate_kv)["fsdp"] == fsdp


def test_auto_says_when_nothing_fits():
    said = refusal(16, rows=2, auto=True)
    assert "16 devices" in said and "2 rows" in said and "[1, 2, 4]" in said


def test_an_axis_that_is_not_named_has_one_part():
    mixture = SimpleNamespace(layers=[SimpleNamespace(experts=SimpleNamespace(count=128))])
    meshes.check_experts(mixture, {"fsdp": 2})
    meshes.check_rows(3, {"tp": 2})
    with pytest.raises(UserError, match=r"mesh\.fsdp=3 does not divide the 128 experts"):
        meshes.check_experts(mixture, {"fsdp": 3})
    with pytest.raises(UserError, match="data x fsdp = 2 does not divide"):
        meshes.check_rows(3, {"data": 2})


def test_a_built_mesh_has_all_four_axes_and_every_device():
    mesh = meshes.build({"fsdp": 2, "tp": 2}, jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 1, "tp": 2}
    assert len(set(np.array(mesh.devices).ravel())) == 4
    with pytest.raises(UserError, match="there are 2 devices"):
        meshes.build({"fsdp": 4}, jax.devices()[:2])


def test_a_mesh_is_not_built_across_slices_by_another_axis_than_data(monkeypatch):
    monkeypatch.setattr(meshes.torus, "slices", lambda devices: 2)
    with pytest.raises(UserError, match="mesh.data=1 on 2 slices"):
        meshes.build({"fsdp": 4}, jax.devices()[:4])
    assert meshes.build({"data": 2, "fsdp": 2}, jax.devices()[:4]).shape["data"] == 2


def test_heads_are_not_copied_unless_that_is_asked_for():
    with pytest.raises(UserError, match="mesh.tp=8 does not divide the 4 global KV heads"):
        meshes.check_heads(BIG, 8)
    assert meshes.check_heads(BIG, 8, replicate_kv=True)


def test_specs_come_from_the_one_table_and_leave_out_axes_of_size_1():
    mesh = meshes.build({"fsdp": 2, "tp": 2}, jax.devices()[:4])
    assert spec_for(("layers", "heads", None, "embed"), mesh) == P(None, "tp", None, "fsdp")
    assert spec_for(("batch", "seq", None), mesh) == P("fsdp", "tp", None)
    assert spec_for(("heads", "embed"), meshes.build({"fsdp": 4}, jax.devices()[:4])) == P(None, "fsdp")
    assert spec_for(("batch", "seq"), meshes.build({"data": 2, "fsdp": 2}, jax.devices()[:4])) == P(
        ("data", "fsdp"), None
    )
    assert spec_for(("batch", "seq"), mesh, (1, 6)) == P(None, "tp")  # one prompt is no mistake


# --- fix_specs ---------------------------------------------------------------------------------------------


MESH = meshes.build({"fsdp": 1, "tp": 4}, jax.devices()[:4])


def fix(*tensors: Tensor, specs=None, **kwargs):
    specs = {t.name: spec_for(t.axes, MESH) for t in tensors} if specs is None else specs
    return fix_specs(tensors, specs, MESH, **kwargs)


def test_a_good_spec_stays_and_costs_no_row():
    fixed, rows = fix(Tensor("q", (2, 8, 6), ("layers", "heads", None), 4))
    assert fixed == {"q": P(None, "tp", None)} and rows == []


def test_a_spec_of_the_wrong_rank_is_derived_again_from_the_tensors_own_axes():
    tensor = Tensor("q.lora_a", (2, 4, 16), ("layers", None, "mlp"), 4)
    fixed, rows = fix(tensor, specs={"q.lora_a": P(None, "tp", None, None)})
    assert fixed == {"q.lora_a": P(None, None, "tp")}
    assert len(rows) == 1 and rows[0].after == P(None, None, "tp")
    assert rows[0].reason == "rank 4, the tensor has rank 3"


def test_a_spec_that_is_derived_again_is_still_held_against_the_mesh():
    fixed, rows = fix(Tensor("a", (2, 6), (None, "mlp"), 4), specs={"a": P("tp")})
    assert fixed == {"a": P(None, None)} and [row.name for row in rows] == ["a", "a"]


def test_a_small_indivisible_tensor_is_replicated_with_a_row():
    fixed, rows = fix(Tensor("k", (2, 2, 6), ("layers", "kv_heads", None), 4))
    assert fixed == {"k": P(None, None, None)}
    assert "dim 1 = 2 does not divide by tp = 4: replicated" in rows[0].reason


def test_large_indivisible_tensors_are_one_error_that_lists_all():
    tensors = [
        Tensor(name, (2, 2, 4096, 1024), ("layers", "kv_heads", None, "embed"), 2) for name in ("k1", "k2")
    ]
    small = Tensor("fine", (2, 2), ("layers", "kv_heads"), 2)
    with pytest.raises(UserError) as error:
        fix(*tensors, small)
    assert "k1 (2, 2, 4096, 1024), 32 MiB: dim 1 = 2 does not divide by tp = 4" in str(error.value)
    assert "k2 " in str(error.value) and "fine" not in str(error.value)


def test_a_large_tensor_is_replicated_only_where_the_user_asked_for_it():
    tensor = Tensor("k", (2, 2, 4096, 1024), ("layers", "kv_heads", None, "embed"), 2)
    fixed, rows = fix(tensor, whole=frozenset({"kv_heads"}))
    assert fixed == {"k": P(None, None, None, None)}
    assert "replicated, 32.00 MiB" in rows[0].reason
