# ruff: noqa: E501 (HLO has one instruction to a line)
"""The walk over a scheduled program, against arithmetic by hand and against a real compile for TPU.

The hand-written chip does 100 TFLOP/s, 1000 GB/s in HBM and 10 GB/s on one link, so that figures are round.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hlo_helper import place, text

from gemma_tpu.compiled import buffers, hlo
from gemma_tpu.compiled.walk import physical, schedule, walk
from gemma_tpu.hardware import chips

# 2 * 1000 * 5000 * 10000 = 0.1 TFLOP: a millisecond. Everything is in VMEM, S(1), where a case is not about HBM.
DOT = """
%product (a: bf16[1000,5000], b: bf16[5000,10000]) -> bf16[1000,10000] {
  %a = bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %d = bf16[1000,10000]{1,0:T(8,128)(2,1)S(1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/jvp()/while/body/closed_call/BD,DF->BF/dot_general"}
}
"""
LEFT = "%x = bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)} parameter(0)"
RIGHT = "%w = bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)} parameter(1)"
MILLISECOND = "bf16[1000,10000]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w), kind=kOutput, calls=%product"
ADD = """
%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}
"""


@pytest.fixture
def run(tmp_path):
    def of(*computations, topology="1x1", clock=None, **chip):
        many = 1
        for part in topology.split("x"):
            many *= int(part)
        file = tmp_path / "m.after_optimizations_after_buffer_assignment.txt"
        file.write_text(text(*computations, partitions=many))
        return walk(file, place(topology, **chip), clock)

    return of


def entry(*lines: str, parameters=(LEFT, RIGHT)) -> str:
    body = "\n".join(f"  {line}" for line in (*parameters, *lines))
    return f"%main (x: f32[], w: f32[]) -> f32[] {{\n{body}\n}}"


def test_a_product_takes_its_operations_over_the_peak(run):
    found = run(DOT, entry(f"ROOT %f = {MILLISECOND}"))
    assert found.seconds == pytest.approx(1e-3) and found.flops == 1e11 and found.by_kind == {"matmul": found.seconds}
    assert [(one.name, one.count) for one in found.costs] == [("forward BD,DF->BF/dot_general", 1)]
    assert not found.unknown and found.cycles_seconds is None


def test_an_operation_in_hbm_takes_the_larger_of_operations_and_bytes(run):
    # b is 5000 x 10000 -> 10112 padded, 2 bytes: 101.12 MB, 0.10112 ms; the product's 1 ms is more
    hbm = [one.replace("S(1)", "") for one in (DOT, entry(f"ROOT %f = {MILLISECOND}"))]
    found = run(*hbm)
    a, b, out = 1000 * 5120 * 2, 5000 * 10112 * 2, 1000 * 10112 * 2
    assert found.hbm_bytes == a + b + out and found.seconds == pytest.approx(1e-3)
    copied = run(entry("ROOT %c = bf16[5000,10000]{1,0:T(8,128)(2,1)} copy(%w)", parameters=(LEFT, RIGHT.replace("S(1)", ""))))
    assert copied.seconds == pytest.approx(2 * b / 1e12) and copied.by_kind == {"copy": copied.seconds}


def test_int8_has_its_own_peak(run):
    eight = [one.replace("bf16[", "s8[") for one in (DOT, entry(f"ROOT %f = {MILLISECOND}"))]
    assert run(*eight).seconds == pytest.approx(0.5e-3)
    assert run(*eight, int8_tflops=None).seconds == pytest.approx(1e-3)


LOOPS = (
    DOT,
    """
%less (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %five = s32[] constant(5)
  ROOT %c = pred[] compare(%i, %five), direction=LT
}
""",
    """
%inside (p.1: (s32[], bf16[1000,5000], bf16[5000,10000])) -> (s32[], bf16[1000,5000], bf16[5000,10000]) {
  %p.1 = (s32[], bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)}, bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x = bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %w = bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %f = bf16[1000,10000]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w), kind=kOutput, calls=%product
  ROOT %t = (s32[], bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)}, bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %x, %w)
}
""",
    """
%outside (p.2: (s32[], bf16[1000,5000], bf16[5000,10000])) -> (s32[], bf16[1000,5000], bf16[5000,10000]) {
  %p.2 = (s32[], bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)}, bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %x.2 = bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.2), index=1
  %w.2 = bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.2), index=2
  %zero = s32[] constant(0)
  %init = (s32[], bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)}, bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)}) tuple(%zero, %x.2, %w.2)
  %loop = (s32[], bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)}, bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)}) while(%init), condition=%less, body=%inside
  %one.2 = s32[] constant(1)
  %next.2 = s32[] add(%i.2, %one.2)
  ROOT %t.2 = (s32[], bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)}, bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)}) tuple(%next.2, %x.2, %w.2)
}
""",
)
NEST = (
    "%zero.3 = s32[] constant(2)",
    "%init.3 = (s32[], bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)}, bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)}) tuple(%zero.3, %x, %w)",
    "ROOT %nest = (s32[], bf16[1000,5000]{1,0:T(8,128)(2,1)S(1)}, bf16[5000,10000]{1,0:T(8,128)(2,1)S(1)}) while(%init.3), "
    "condition=%less, body=%outside",
)


def test_the_trips_of_nested_loops_multiply(run):
    found = run(*LOOPS, entry(*NEST))  # 3 turns (2, 3, 4) of 5 turns; the counters cost their few bytes
    assert found.flops == 15e11 and found.by_kind["matmul"] == pytest.approx(15e-3)
    assert found.seconds == pytest.approx(15e-3, rel=1e-3)
    assert found.seconds == pytest.approx(sum(found.by_kind.values()), rel=1e-9)
    assert next(one for one in found.costs if one.kind == "matmul").count == 15


def test_a_loop_that_cannot_be_counted_is_said(run):
    strange = LOOPS[2].replace("add(%i.1", "multiply(%i.1")
    found = run(*LOOPS[:2], strange, LOOPS[3], entry(*NEST))
    assert any("trips of the loop loop, taken as 1" in one for one in found.unknown)


STACK = "f32[10,1000,1024]{2,1,0:T(8,128)}"
LAYER = 1000 * 1024 * 4


@pytest.mark.parametrize("inner", ["", "in a nested fusion"])
def test_a_fusion_that_slices_a_stack_reads_the_slice(run, inner):
    slicing = f"""
%slicing (s: f32[10,1000,1024], i: s32[]) -> f32[1000,1024] {{
  %s = {STACK} parameter(0)
  %i = s32[]{{:T(128)S(6)}} parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,1000,1024]{{2,1,0:T(8,128)}} dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={{1,1000,1024}}
  ROOT %flat = f32[1000,1024]{{1,0:T(8,128)S(1)}} bitcast(%cut)
}}
"""
    outer = f"""
%outer (s.1: f32[10,1000,1024], i.1: s32[]) -> f32[1000,1024] {{
  %s.1 = {STACK} parameter(0)
  %i.1 = s32[]{{:T(128)S(6)}} parameter(1)
  %f = f32[1000,1024]{{1,0:T(8,128)S(1)}} fusion(%s.1, %i.1), kind=kLoop, calls=%slicing
  ROOT %n = f32[1000,1024]{{1,0:T(8,128)S(1)}} negate(%f)
}}
"""
    computations = (slicing, outer) if inner else (slicing,)
    found = run(*computations, entry(
        f"ROOT %f.1 = f32[1000,1024]{{1,0:T(8,128)S(1)}} fusion(%x, %w), kind=kLoop, calls={'%outer' if inner else '%slicing'}",
        parameters=(f"%x = {STACK} parameter(0)", "%w = s32[]{:T(128)S(6)} parameter(1)"),
    ))  # fmt: skip
    assert found.hbm_bytes == LAYER and found.seconds == pytest.approx(LAYER / 1e12)


def test_an_update_in_place_reads_and_writes_what_it_changes(run):
    update = f"""
%update (s: f32[10,1000,1024], u: f32[1,1000,1024], i: s32[]) -> f32[10,1000,1024] {{
  %s = {STACK} parameter(0)
  %u = f32[1,1000,1024]{{2,1,0:T(8,128)}} parameter(1)
  %i = s32[]{{:T(128)S(6)}} parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,1000,1024]{{2,1,0:T(8,128)}} dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={{1,1000,1024}}
  %new = f32[1,1000,1024]{{2,1,0:T(8,128)}} add(%old, %u)
  ROOT %put = {STACK} dynamic-update-slice(%s, %new, %i, %zero, %zero)
}}
"""
    lines = (
        "%u.1 = f32[1,1000,1024]{2,1,0:T(8,128)} parameter(2)",
        f"ROOT %f = {STACK} fusion(%x, %u.1, %w), kind=kLoop, calls=%update",
    )
    parameters = (f"%x = {STACK} parameter(0)", "%w = s32[]{:T(128)S(6)} parameter(1)")
    assert run(update, entry(*lines, parameters=parameters)).hbm_bytes == 3 * LAYER  # old, update, new


# 25,000,000 float32 of 4 chips: 100 MB come from the three others
GATHER_OUT = "f32[4,8388608]{1,0:T(1,128)S(1)}"
PART = "%p = f32[1,8388608]{1,0:T(1,128)S(1)} parameter(2)"
GATHERED = 3 * 8388608 * 4  # bytes that each chip receives
GROUPS = "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true"
ALONE = GATHERED / 20e9  # over two links of 10 GB/s: 5.03 ms


def test_a_synchronous_collective_is_waited_for(run):
    found = run(entry(PART, f"ROOT %g = {GATHER_OUT} all-gather(%p), {GROUPS}"), topology="2x2")
    assert found.by_kind == {"collective_sync": pytest.approx(ALONE)} and found.collective_bytes == GATHERED
    assert found.hidden_seconds == 0


@pytest.mark.parametrize("products", [3, 8])
def test_of_a_collective_beside_compute_only_the_rest_is_exposed(run, products):
    start = f"%s = (f32[1,8388608]{{1,0:T(1,128)S(1)}}, {GATHER_OUT}) all-gather-start(%p), {GROUPS}"
    beside = [f"%f.{at} = {MILLISECOND}" for at in range(products)]
    found = run(DOT, entry(PART, start, *beside, f"ROOT %g = {GATHER_OUT} all-gather-done(%s)"), topology="2x2")
    compute = products * 1e-3
    assert found.seconds == pytest.approx(max(compute, ALONE))
    assert found.by_kind.get("collective_exposed", 0.0) == pytest.approx(max(0.0, ALONE - compute))
    assert found.hidden_seconds == pytest.approx(min(compute, ALONE))


PERMUTED = "f32[1,8388608]{1,0:T(1,128)S(1)}"
HOP = 8388608 * 4 / 10e9  # one link: 3.36 ms


def permutes(back: str) -> str:
    ahead = "{{0,1},{1,3},{3,2},{2,0}}"
    return entry(
        PART,
        f"%a = ({PERMUTED}, {PERMUTED}, u32[]{{:S(2)}}) collective-permute-start(%p), channel_id=1, source_target_pairs={ahead}",
        f"%b = ({PERMUTED}, {PERMUTED}, u32[]{{:S(2)}}) collective-permute-start(%p), channel_id=2, source_target_pairs={back}",
        f"%c = {PERMUTED} collective-permute-done(%a)",
        f"ROOT %d = {PERMUTED} collective-permute-done(%b)",
    )


def test_two_collectives_share_the_links_that_both_use_and_no_others(run):
    assert run(permutes("{{1,0},{3,1},{2,3},{0,2}}"), topology="2x2").seconds == pytest.approx(HOP)
    assert run(permutes("{{0,1},{1,3},{3,2},{2,0}}"), topology="2x2").seconds == pytest.approx(2 * HOP)


def test_an_asynchronous_collective_inside_of_fusions_is_counted_once(run):
    """The start, the compute that moves it on, and the end each hold the collective."""
    state = f"({PERMUTED}, {GATHER_OUT}, u32[]{{:S(2)}})"
    begin = f"""
%begin (p.1: f32[1,8388608]) -> f32[] {{
  %p.1 = {PERMUTED} parameter(0)
  %g.1 = {GATHER_OUT} all-gather(%p.1), {GROUPS}
  ROOT %s.1 = {state} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}}
"""
    beside = f"""
%async_collective_fusion.1 (a.1: bf16[1], b.1: bf16[1], p.2: f32[1], o.2: f32[1]) -> f32[] {{
  %a.1 = bf16[1000,5000]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %b.1 = bf16[5000,10000]{{1,0:T(8,128)(2,1)S(1)}} parameter(1)
  %p.2 = {PERMUTED} parameter(2)
  %o.2 = {GATHER_OUT} parameter(3)
  %g.2 = {GATHER_OUT} all-gather(%p.2), {GROUPS}
  %d.1 = bf16[1000,10000]{{1,0:T(8,128)(2,1)S(1)}} dot(%a.1, %b.1), lhs_contracting_dims={{1}}
  ROOT %t.1 = (bf16[1000,10000]{{1,0:T(8,128)(2,1)S(1)}}, {GATHER_OUT}) tuple(%d.1, %g.2)
}}
"""
    end = f"""
%end (p.3: f32[1], o.3: f32[1]) -> f32[] {{
  %p.3 = {PERMUTED} parameter(0)
  %o.3 = {GATHER_OUT} parameter(1)
  %g.3 = {GATHER_OUT} all-gather(%p.3), {GROUPS}
  ROOT %e.1 = {GATHER_OUT} custom-call(%p.3, %o.3, %g.3), custom_call_target="AsyncCollectiveDone"
}}
"""
    found = run(DOT, begin, beside, end, entry(
        PART,
        f"%s = {state} fusion(%p), kind=kCustom, calls=%begin",
        f"%o = {GATHER_OUT} get-tuple-element(%s), index=1",
        f"%m = (bf16[1000,10000]{{1,0:T(8,128)(2,1)S(1)}}, {GATHER_OUT}) fusion(%x, %w, %p, %o), kind=kOutput, "
        "calls=%async_collective_fusion.1",
        f"ROOT %g = {GATHER_OUT} fusion(%p, %o), kind=kCustom, calls=%end",
    ), topology="2x2")  # fmt: skip
    assert found.seconds == pytest.approx(ALONE) and found.collective_bytes == GATHERED
    assert found.by_kind == {"collective_exposed": pytest.approx(ALONE - 1e-3), "matmul": pytest.approx(1e-3)}


def test_a_reduce_scatter_kept_as_an_all_reduce_and_a_slice_costs_half(run):
    whole, part = "f32[4,8388608]{1,0:T(1,128)S(1)}", "f32[1,8388608]{1,0:T(1,128)S(1)}"
    scatter = f"""
%NAME (i: f32[4,8388608]) -> f32[1,8388608] {{
  %i = {whole} parameter(0)
  %r = {whole} all-reduce(%i), channel_id=1, replica_groups={{{{0,1,2,3}}}}, use_global_device_ids=true, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %s = {part} dynamic-slice(%r, %id, %zero), dynamic_slice_sizes={{1,8388608}}
}}
"""
    lines = (f"%in = {whole} parameter(2)", f"ROOT %f = {part} fusion(%in), kind=kCustom, calls=%NAME")
    both = [
        run(*(one.replace("NAME", name) for one in (ADD, scatter, entry(*lines))), topology="2x2").seconds
        for name in ("all-reduce-scatter.1", "fused_computation.1")
    ]
    assert both == [pytest.approx(ALONE), pytest.approx(2 * ALONE)]


def test_an_offloaded_collective_begins_when_its_operand_comes(run):
    """On the SparseCore: started empty, given its operand by an update, wrapped in calls."""
    called = f"""
%called (p.1: f32[1]) -> f32[4] {{
  %p.1 = {PERMUTED} parameter(0)
  ROOT %g.1 = {GATHER_OUT} all-gather(%p.1), {GROUPS}
}}
"""
    wrapped = f"""
%wrapped (p.2: f32[1]) -> f32[4] {{
  %p.2 = {PERMUTED} parameter(0)
  ROOT %c.1 = {GATHER_OUT} custom-call(%p.2), custom_call_target="Offload", called_computations={{%called}}
}}
"""
    found = run(DOT, called, wrapped, entry(
        PART,
        '%s = ((), (), s32[8]{0}) async-start(), async_execution_thread="sparsecore", calls=%wrapped',
        f"%before = {MILLISECOND}",
        f"%u = (({PERMUTED}), {GATHER_OUT}, s32[8]{{0}}) async-update(%s, %p)",
        f"%beside = {MILLISECOND}",
        f"ROOT %g = {GATHER_OUT} async-done(%u)",
    ), topology="2x2")  # fmt: skip
    assert found.seconds == pytest.approx(1e-3 + ALONE) and found.hidden_seconds == pytest.approx(1e-3)
    assert not found.unknown


@pytest.mark.parametrize("products", [3, 8])
def test_a_sum_with_the_other_slices_is_waited_for_at_its_end(products, tmp_path):
    """As the compiler writes it: the program of one slice, and a send and a recv through the hosts."""
    across = ('is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
              '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}')  # fmt: skip
    state = f"({PERMUTED}, u32[], token[])"
    file = tmp_path / "m.after_optimizations_after_buffer_assignment.txt"
    file.write_text(text(DOT, entry(
        PART,
        "%after-all = token[] after-all()",
        f"%send = {state} send(%p, %after-all), channel_id=2, {across}",
        f"%recv = {state} recv(%after-all), channel_id=1, {across}",
        *(f"%f.{at} = {MILLISECOND}" for at in range(products)),
        "%sent = token[] send-done(%send), channel_id=2, is_host_transfer=true",
        f"ROOT %done = ({PERMUTED}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true",
    ), partitions=4))  # fmt: skip
    one = place("2x2")
    chip = replace(one.chip, network_gbs=6.0, sources={"network": "a test"})
    found = walk(file, replace(one, chip=chip).times(3))
    alone = 2 * 2 / 3 * 8388608 * 4 / 6e9  # 7.5 ms: round a ring of three slices
    assert found.seconds == pytest.approx(max(products * 1e-3, alone))
    assert found.by_kind.get("network", 0.0) == pytest.approx(max(0.0, alone - products * 1e-3))
    assert found.hidden_seconds == pytest.approx(min(alone, products * 1e-3)) and not found.unknown
    assert any("network between slices: 6 GB/s a chip" in one for one in found.assumptions)


# 125,000,000 x 4 bytes from HBM to VMEM: 0.5 ms
SOURCE = "%h = f32[125000,1000]{1,0:T(1,1000)} parameter(2)"
COPY = "f32[125000,1000]{1,0:T(1,1000)S(1)}"


@pytest.mark.parametrize("products, exposed", [(0, 0.5e-3), (1, 0.0)])
def test_a_copy_to_vmem_runs_beside_compute(run, products, exposed):
    found = run(DOT, entry(
        SOURCE,
        f"%s = ({COPY}, f32[125000,1000]{{1,0:T(1,1000)}}, u32[]{{:S(2)}}) copy-start(%h)",
        *(f"%f.{at} = {MILLISECOND}" for at in range(products)),
        f"ROOT %d = {COPY} copy-done(%s)",
    ))  # fmt: skip
    assert found.by_kind.get("prefetch_exposed", 0.0) == pytest.approx(exposed)
    assert found.seconds == pytest.approx(max(0.5e-3, products * 1e-3)) and found.hbm_bytes == 5e8


def test_a_copy_has_only_the_bandwidth_that_the_core_leaves(run):
    # the core copies 0.25 GB in HBM to and fro, 0.5 ms, with no bandwidth to spare: the prefetch waits until after
    found = run(entry(
        SOURCE,
        "%y = f32[62500,1000]{1,0:T(1,1000)} parameter(3)",
        f"%s = ({COPY}, f32[125000,1000]{{1,0:T(1,1000)}}, u32[]{{:S(2)}}) copy-start(%h)",
        "%c = f32[62500,1000]{1,0:T(1,1000)} copy(%y)",
        f"ROOT %d = {COPY} copy-done(%s)",
    ))  # fmt: skip
    assert found.by_kind == {"copy": pytest.approx(0.5e-3), "prefetch_exposed": pytest.approx(0.5e-3)}


def test_a_slice_started_in_the_background_moves_the_slice(run):
    slicing = """
%async_slice (s: f32[250000,1000]) -> f32[125000,1000] {
  %s = f32[250000,1000]{1,0:T(1,1000)} parameter(0)
  ROOT %cut = f32[125000,1000]{1,0:T(1,1000)S(1)} slice(%s), slice={[0:125000], [0:1000]}
}
"""
    found = run(slicing, entry(
        "%h = f32[250000,1000]{1,0:T(1,1000)} parameter(2)",
        f"%s = ((f32[250000,1000]{{1,0:T(1,1000)}}), {COPY}, s32[]{{:S(2)}}) async-start(%h), calls=%async_slice",
        f"ROOT %d = {COPY} async-done(%s)",
    ))  # fmt: skip
    assert found.by_kind == {"prefetch_exposed": pytest.approx(0.5e-3)} and found.hbm_bytes == 5e8


def test_a_copy_started_in_one_turn_of_a_loop_is_finished_in_the_next(run):
    moved = f"({COPY}, f32[125000,1000]{{1,0:T(1,1000)}}, u32[]{{:S(2)}})"
    held = f"(s32[], {moved}, f32[125000,1000]{{1,0:T(1,1000)}}, bf16[1000,5000]{{1,0:T(8,128)(2,1)S(1)}}, bf16[5000,10000]{{1,0:T(8,128)(2,1)S(1)}})"
    body = f"""
%turn (p.1: (s32[])) -> (s32[]) {{
  %p.1 = {held} parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %before = {moved} get-tuple-element(%p.1), index=1
  %h.1 = f32[125000,1000]{{1,0:T(1,1000)}} get-tuple-element(%p.1), index=2
  %x = bf16[1000,5000]{{1,0:T(8,128)(2,1)S(1)}} get-tuple-element(%p.1), index=3
  %w = bf16[5000,10000]{{1,0:T(8,128)(2,1)S(1)}} get-tuple-element(%p.1), index=4
  %one = s32[] constant(1)
  %d.1 = {COPY} copy-done(%before)
  %again = {moved} copy-start(%h.1)
  %f = {MILLISECOND}
  %next = s32[]{{:S(6)}} add(%i.1, %one)
  ROOT %t = {held} tuple(%next, %again, %h.1, %x, %w)
}}
"""
    found = run(DOT, LOOPS[1], body, entry(
        SOURCE,
        "%zero = s32[] constant(0)",
        f"%s = {moved} copy-start(%h)",
        f"%init = {held} tuple(%zero, %s, %h, %x, %w)",
        f"%loop = {held} while(%init), condition=%less, body=%turn",
        f"%last = {moved} get-tuple-element(%loop), index=1",
        f"ROOT %end = {COPY} copy-done(%last)",
    ))  # fmt: skip
    assert not found.unknown and found.hbm_bytes == pytest.approx(6 * 5e8, rel=1e-3)
    assert found.by_kind["prefetch_exposed"] == pytest.approx(0.5e-3)  # the first only
    assert found.seconds == pytest.approx(5.5e-3, rel=1e-3)


def test_offloaded_activations_go_over_the_hosts_link(run):
    found = run(entry(
        SOURCE,
        "%s = (f32[125000,1000]{1,0:T(1,1000)S(5)}, f32[125000,1000]{1,0:T(1,1000)}, u32[]{:S(2)}) copy-start(%h)",
        "ROOT %d = f32[125000,1000]{1,0:T(1,1000)S(5)} copy-done(%s)",
    ))  # fmt: skip
    assert found.by_kind == {"host_exposed": pytest.approx(0.5 / 16)}
    assert any("host memory" in one for one in found.assumptions)


def test_kernels_and_calls_that_are_not_known_are_listed_and_counted_by_bytes(run):
    found = run(entry(
        SOURCE,
        '%k = f32[125000,1000]{1,0:T(1,1000)S(1)} custom-call(%h), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/my_kernel/pallas_call"}',
        'ROOT %q = f32[125000,1000]{1,0:T(1,1000)} custom-call(%k), custom_call_target="Mystery"',
    ))  # fmt: skip
    assert found.by_kind == {"kernel": pytest.approx(0.5e-3), "memory": pytest.approx(0.5e-3)}
    assert sorted(found.unknown) == [
        "custom call Mystery, counted by its bytes: 1", "kernel my_kernel: FLOPs unknown, counted by its bytes: 1"
    ]  # fmt: skip


def test_groups_that_are_not_understood_are_listed(run):
    groups = "replica_groups=@somewhere, dimensions={0}"
    found = run(entry(PART, f"ROOT %g = {GATHER_OUT} all-gather(%p), channel_id=1, {groups}"), topology="2x2")
    assert found.seconds == 0 and any("groups were not understood" in one for one in found.unknown)


def test_the_compilers_cycles_give_a_second_time(run):
    estimate = ', backend_config={"window_config":{"estimated_cycles":"3000000"}}'
    found = run(DOT, entry(f"%f = {MILLISECOND}{estimate}", f"ROOT %g = {MILLISECOND}"), clock=1.5)
    assert found.seconds == pytest.approx(2e-3)
    assert found.cycles_seconds == pytest.approx(2e-3 + 1e-3)  # 3,000,000 cycles at 1.5 GHz, and one without


def test_the_main_module_is_the_one_with_cycles_and_the_largest(tmp_path):
    names = {
        "m0.step.after_optimizations_after_buffer_assignment.txt": 90,
        "m1.extracted.after_optimizations_after_buffer_assignment.txt": 10,
    }
    for name, size in names.items():
        (tmp_path / name).write_text("x" * size)
    assert schedule(tmp_path).name.startswith("m0.step")
    (tmp_path / "m0.step.after_codegen.txt").write_text("x" * 50)
    assert schedule(tmp_path).name == "m0.step.after_codegen.txt"
    with pytest.raises(FileNotFoundError, match="xla_dump_to"):
        schedule(tmp_path / "nothing")


def test_the_dump_tells_wrap_around_links_and_the_order_of_devices(tmp_path):
    main = tmp_path / "m0.step.after_codegen.txt"
    assert physical(main) == (None, None)
    (tmp_path / "m0.step.target_arguments.txt").write_text("host_bounds {\n  x: 1\n}\nwrap {\n  x: true\n  y: false\n}\n")
    devices = "".join(f"computation_devices {{\n replica_device_ids: {at}\n}}\n" for at in (0, 1, 3, 2))
    (tmp_path / "m0.step.execution_options.txt").write_text(devices)
    assert physical(main) == ((True, False, False), (0, 1, 3, 2))


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1])
here = SingleDeviceSharding(chip.devices[0])

def step(state, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None
    loss = lambda state: jax.lax.scan(jax.checkpoint(layer), x, state)[0].astype(jnp.float32).sum()
    return jax.tree.map(lambda w, g: w - 0.1 * g, state, jax.grad(loss)(state))

shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=here)
options = {"xla_dump_to": sys.argv[1], "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": ".*step.*"}
compiled = jax.jit(step, donate_argnums=0).lower(shape(7, 1024, 1024), shape(16384, 1024)).compile(compiler_options=options)
stats = compiled.memory_analysis()
print("STATS", stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes, stats.temp_size_in_bytes)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A scanned step of 7 layers, compiled by the real compiler for one v5e chip."""
    pytest.importorskip("libtpu")
    folder = tmp_path_factory.mktemp("dump")
    known = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | known
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("STATS"))
    return folder, [int(word) for word in line.split()[1:]]


def test_a_real_compile_has_the_operations_of_the_formula(compiled):
    folder, _ = compiled
    found = walk(folder, chips.find("v5e-1"))
    # of each of 7 layers: forward, that again in the backward pass, the gradients of weights and of activations
    assert found.flops == 7 * 4 * 2 * 16384 * 1024 * 1024 and not found.unknown
    assert found.by_kind["matmul"] >= found.flops / 197e12 and found.seconds == pytest.approx(sum(found.by_kind.values()))
    assert found.cycles_seconds > found.seconds


def test_a_real_compile_has_the_memory_that_the_compiler_states(compiled):
    folder, (arguments, outputs, temporaries) = compiled
    found = buffers.memory(folder)
    assert found.arguments == arguments
    assert temporaries > 100 * 2**20 and found.peak == pytest.approx(arguments + outputs + temporaries, rel=1e-3)


def test_a_real_compile_lays_arrays_out_in_the_bytes_that_are_computed(compiled):
    folder, _ = compiled
    assigned = next(Path(folder).glob(buffers.ASSIGNMENT)).read_text()
    checked = 0
    for line in assigned.splitlines():
        size, _, kind = line.partition(",offset=")
        shapes = hlo.shapes(kind.partition(": ")[2]) if " value: <" in line else ()
        if len(shapes) == 1 and shapes[0].dims:
            assert shapes[0].bytes == int(size.rpartition("size=")[2]), line
            checked += 1
    assert checked > 10
