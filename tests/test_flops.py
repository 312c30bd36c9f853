"""Operations of products as TPU writes them: dots, convolutions that stand for batched dots, attention kernels."""

import pytest
from hlo_helper import module

from gemma_tpu.compiled.flops import kernel, products


def product(left: str, right: str, out: str, call: str):
    found = module(
        f"""
%main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %r = {out} {call}
}}
"""
    )
    (one,) = products(found, found.entry.root, found.entry)
    return one


def test_a_dot_is_two_operations_for_each_element_and_contracted_place():
    one = product("bf16[4,8,16]", "bf16[4,16,32]", "bf16[4,8,32]",
                  "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}")  # fmt: skip
    assert one.flops == 2 * 4 * 8 * 16 * 32 and one.unit == "bf16" and one.passes == 1


@pytest.mark.parametrize(
    "left, right, out, attributes, expected",
    [
        ("bf16[4096,5376]", "bf16[64,5376]", "bf16[4096,64]", "dim_labels=bf_oi->bf", 2 * 4096 * 5376 * 64),
        # a window over the heads contracts them
        ("bf16[64,5376,32]", "bf16[5376,128,32]", "bf16[1,64,128]",
         "window={size=32}, dim_labels=bf0_io0->0bf", 2 * 64 * 5376 * 128 * 32),
        # XLA's batched dot: 16 x 16 batch dims as a window that meets one element at each place
        ("bf16[16,16,512,256]", "bf16[16,16,1280,256]", "bf16[16,16,512,1280]",
         "window={size=16x16 stride=15x15 lhs_dilate=16x16}, dim_labels=01bf_01oi->01bf", 2 * 256 * 512 * 1280 * 256),
        # heads made by a padded window over a dim of one
        ("bf16[4096,5376,1]", "bf16[5376,256,32]", "bf16[4096,256,32]",
         "window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_io0->bf0", 2 * 4096 * 5376 * 256 * 32),
        ("bf16[8,12,32]", "bf16[3,3,64]", "bf16[8,10,64]",
         "window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=1", 2 * 8 * 64 * 3 * 3 * 10),
    ],
)  # fmt: skip
def test_a_convolution_counts_the_places_where_elements_meet(left, right, out, attributes, expected):
    assert product(left, right, out, f"convolution(%a, %b), {attributes}").flops == expected


@pytest.mark.parametrize(
    "dtype, precision, unit, passes",
    [
        ("bf16", "", "bf16", 1),
        ("f32", "", "bf16", 1),
        ("f32", ", operand_precision={high,high}", "bf16", 3),
        ("f32", ", operand_precision={highest,highest}", "bf16", 6),
        ("bf16", ", operand_precision={highest,highest}", "bf16", 1),
        ("s8", "", "int8", 1),
        ("f8e4m3fn", "", "int8", 1),
    ],
)
def test_the_dtype_decides_the_peak_and_the_passes(dtype, precision, unit, passes):
    one = product(f"{dtype}[8,16]", f"{dtype}[16,4]", f"{dtype}[8,4]",
                  f"dot(%a, %b), lhs_contracting_dims={{1}}{precision}")  # fmt: skip
    assert (one.unit, one.passes) == (unit, passes)


def test_products_inside_of_nested_fusions_are_found():
    found = module(
        """
%inner (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16] parameter(0)
  %b = bf16[16,4] parameter(1)
  ROOT %d = bf16[8,4] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""",
        """
%outer (c: bf16[8,16], d: bf16[16,4]) -> bf16[8,4] {
  %c = bf16[8,16] parameter(0)
  %d.1 = bf16[16,4] parameter(1)
  %f = bf16[8,4] fusion(%c, %d.1), kind=kOutput, calls=%inner
  ROOT %e = bf16[8,4] exponential(%f)
}
""",
        """
%main (x: bf16[8,16], y: bf16[16,4]) -> bf16[8,4] {
  %x = bf16[8,16] parameter(0)
  %y = bf16[16,4] parameter(1)
  ROOT %r = bf16[8,4] fusion(%x, %y), kind=kOutput, calls=%outer
}
""",
    )
    assert sum(one.flops for one in products(found, found.entry.root, found.entry)) == 2 * 8 * 16 * 4


def splash(which: str, told: str, grid: str, results: str):
    """2 rows of 8 heads on 2 KV heads, 2048 tokens, head dim 256."""
    found = module(
        f"""
%main (m: s8[1], q: bf16[1]) -> bf16[1] {{
  %m = {grid} parameter(0)
  %n = {grid} parameter(1)
  %q = bf16[2,8,2048,256] parameter(2)
  %k = bf16[2,2,2048,256] parameter(3)
  %v = bf16[2,2,2048,256] parameter(4)
  %s = s32[2,2048,128] parameter(5)
  %do = bf16[2,8,2048,256] parameter(6)
  ROOT %r = ({results}) custom-call(%m, %n, %q, %k, %v, %s, %do), custom_call_target="tpu_custom_call", """
        f"""frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{told}"
}}}}, metadata={{op_name="jit(f)/splash_mha_{which}_segmented/pallas_call"}}
}}
"""
    )
    return kernel(found.entry.root, found.entry)


ONE = 2 * 2 * 8 * 512 * 512 * 256  # one product of one block, all rows and heads
Q, KV = "bf16[2,8,2048,256]", "bf16[2,2,2048,256]"


@pytest.mark.parametrize(
    "which, told, grid, results, expected",
    [
        # 4 x 4 blocks: causal 1 + 2 + 3 + 4
        ("fwd", '{\\"block_q\\": 512, \\"block_kv\\": 512}', "s8[1,4,4]", Q, 2 * 10),
        ("dq", '{\\"block_q_dq\\": 512, \\"block_kv_dq\\": 512}', "s8[1,4,4]", Q, 3 * 10),
        ("dkv", '{\\"block_q_dkv\\": 512, \\"block_kv_dkv\\": 512}', "s8[1,4,4]", f"{KV}, {KV}", 4 * 10),
        ("dkv", '{\\"block_q_dkv\\": 512, \\"block_kv_dkv\\": 512}', "s8[1,4,4]",
         f"f32[4,2,8,2048,256], {KV}, {KV}", 5 * 10),
        # a window whose grid is shrunk to two blocks: 1 + 2 + 2 + 2
        ("fwd", '{\\"block_q\\": 512, \\"block_kv\\": 512}', "s8[1,4,2]", Q, 2 * 7),
        ("dkv", '{\\"block_q_dkv\\": 512, \\"block_kv_dkv\\": 512}', "s8[1,2,4]", f"{KV}, {KV}", 4 * 7),
    ],
)  # fmt: skip
def test_splash_attention_counts_its_live_blocks(which, told, grid, results, expected):
    assert splash(which, told, grid, results).flops == expected * ONE


def test_splash_attention_streams_keys_and_values_for_every_block():
    found = splash("fwd", '{\\"block_q\\": 512, \\"block_kv\\": 512}', "s8[1,4,4]", Q)
    assert found.streamed == {3: 16 * 10 * 512 * 256 * 2, 4: 16 * 10 * 512 * 256 * 2}
    back = splash("dkv", '{\\"block_q_dkv\\": 512, \\"block_kv_dkv\\": 512}', "s8[1,4,4]", f"{KV}, {KV}")
    assert set(back.streamed) == {2, 6}  # queries and the gradient of the output


@pytest.mark.parametrize("name, products, blocks", [
    ("flash_forward_128x64", 2, 2 * 16 * 17 // 2),  # 16 blocks of queries: 2, 4, … 32 blocks of keys
    ("flash_dq_64x64", 3, 32 * 33 // 2 / 2),  # blocks of half the size
    ("flash_dkv_64x64_512", 4, (36 + 24 * 9) / 2),  # 1 to 8, and then the window's 8 and the block's own
    ("flash_dq_64x64_513", 3, (36 + 24 * 9) / 2),  # the first query sees 512 before it: whole blocks
    ("flash_dq_64x64_514", 3, (36 + 9 + 23 * 10) / 2),  # and now one key of the block before them
])  # fmt: skip
def test_our_kernel_for_gpus_counts_the_blocks_its_name_tells(name, products, blocks):
    found = module(
        f"""
%main (q: bf16[1]) -> bf16[1] {{
  %q = {Q.replace("8,2048", "2048,8")} parameter(0)
  %k = bf16[2,2048,2,256] parameter(1)
  ROOT %pallas_call.3 = {Q} custom-call(%q, %k, %k), custom_call_target="__gpu$xla.gpu.triton", """
        f"""metadata={{op_name="jit(f)/transpose(jvp({name}))/pallas_call"}}
}}
"""
    )
    one = kernel(found.entry.root, found.entry)
    assert one.flops == products * blocks * ONE / 32 and not one.streamed and name in one.note


@pytest.mark.parametrize(
    "estimate, flops", [('"cost_estimate":{"flops":"4096","bytes_accessed":"1"}', 4096.0), ("", None)]
)
def test_an_unknown_kernel_has_its_authors_estimate_or_none(estimate, flops):
    found = module(
        f"""
%main (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
  ROOT %mine.3 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={{{estimate}}}
}}
"""
    )
    one = kernel(found.entry.root, found.entry)
    assert one.name == "mine" and one.flops == flops and one.name in one.note
