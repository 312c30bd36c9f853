"""Reading scheduled HLO text: instructions, shapes as they lie in memory, sources, and how often loops run."""

import pytest
from hlo_helper import module

from gemma_tpu.compiled.hlo import HOST, Shape, parse, shapes
from gemma_tpu.compiled.trips import trip_count

LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %step)
  %kept = s32[]{:T(128)} copy(%next)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%kept, %x)
}
"""
CONDITION = """
%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(LIMIT)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=DIRECTION
}
"""
FUSED_CONDITION = """
%fused_compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %less = pred[]{:T(512)} compare(%a, %b), direction=DIRECTION
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(LIMIT)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %f = pred[]{:T(512)} fusion(%i.1, %limit), kind=kLoop, calls=%fused_compare
}
"""
ENTRY = """
%main (x.2: f32[8], s: s32[]) -> f32[8] {
  %x.2 = f32[8]{0:T(128)} parameter(0)
  %s = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(START)
  %first = s32[]{:T(128)} copy(FIRST)
  %init = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%first, %x.2)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%init), condition=%condition, body=%bodyKNOWN
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def trips(condition=CONDITION, start=0, step=1, limit=10, direction="LT", first="%zero", known=""):
    words = dict(START=start, STEP=step, LIMIT=limit, DIRECTION=direction, FIRST=first, KNOWN=known)
    texts = [LOOP, condition, ENTRY]
    for word, value in words.items():
        texts = [text.replace(word, str(value)) for text in texts]
    found = module(*texts)
    return trip_count(found, found.entry.by_name["loop"], found.entry)


@pytest.mark.parametrize("condition", [CONDITION, FUSED_CONDITION])
@pytest.mark.parametrize(
    "start, step, limit, direction, expected",
    [(0, 1, 10, "LT", 10), (2, 3, 10, "LT", 3), (0, 1, 10, "LE", 11), (9, -1, 0, "GT", 9), (9, -3, 0, "GE", 4),
     (0, 2, 10, "NE", 5), (10, 1, 10, "LT", 0)],
)  # fmt: skip
def test_trips_follow_from_start_step_and_limit(condition, start, step, limit, direction, expected):
    assert trips(condition, start, step, limit, direction) == (expected, "")


def test_the_compilers_own_trip_count_wins():
    known = ', backend_config={"known_trip_count":{"n":"7"}}'
    assert trips(known=known) == (7, "")


def test_a_start_that_is_no_constant_is_taken_as_zero_and_said():
    count, assumed = trips(first="%s")
    assert count == 10 and "starts at 0" in assumed


def test_a_limit_may_be_carried_through_the_loop_unchanged():
    carried = "(s32[]{:T(128)}, s32[]{:T(128)})"
    found = module(
        f"""
%body (p: (s32[], s32[])) -> (s32[], s32[]) {{
  %p = {carried} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %limit = s32[]{{:T(128)}} get-tuple-element(%p), index=1
  %step = s32[]{{:T(128)}} constant(1)
  %next = s32[]{{:T(128)}} add(%i, %step)
  ROOT %t = {carried} tuple(%next, %limit)
}}
""",
        f"""
%condition (p.1: (s32[], s32[])) -> pred[] {{
  %p.1 = {carried} parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  %limit.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=1
  ROOT %less = pred[]{{:T(512)}} compare(%limit.1, %i.1), direction=GT
}}
""",
        f"""
%main () -> (s32[], s32[]) {{
  %zero = s32[]{{:T(128)}} constant(0)
  %six = s32[]{{:T(128)}} constant(6)
  %init = {carried} tuple(%zero, %six)
  ROOT %loop = {carried} while(%init), condition=%condition, body=%body
}}
""",
    )
    assert trip_count(found, found.entry.root, found.entry) == (6, "")


def test_a_counter_that_is_no_sum_gives_no_count():
    found = module(LOOP.replace("add(%i", "multiply(%i").replace("STEP", "2"),
                   CONDITION.replace("LIMIT", "10").replace("DIRECTION", "LT"),
                   ENTRY.replace("START", "1").replace("FIRST", "%zero").replace("KNOWN", ""))  # fmt: skip
    assert trip_count(found, found.entry.by_name["loop"], found.entry) == (None, "")


def test_shapes_carry_layout_tiles_and_memory_space():
    (one,) = shapes("bf16[10,1344,64]{2,0,1:T(8,128)(2,1)S(1)}")
    assert one == Shape("bf16", (10, 1344, 64), (2, 0, 1), (8, 128), 1)
    assert shapes("(s32[], (f32[8]{0:T(128)}, u32[]{:S(2)}), /*index=2*/pred[4,4]{1,0})") == (
        Shape("s32", ()),
        Shape("f32", (8,), (0,), (128,)),
        Shape("u32", (), (), (), 2),
        Shape("pred", (4, 4), (1, 0)),
    )
    assert shapes("f32[4]{0:S(5)}")[0].space == HOST


@pytest.mark.parametrize(
    "text, size",
    [
        ("bf16[10,1344,64]{2,0,1:T(8,128)(2,1)}", 1344 * 16 * 128 * 2),  # 64 -> 128 and, next to it, 10 -> 16
        ("f32[4096]{0:T(1024)}", 4096 * 4),
        ("f32[100]{0:T(1024)}", 1024 * 4),
        ("bf16[8,256]{1,0}", 8 * 256 * 2),
        ("s4[128,128]{1,0:T(8,128)}", 128 * 128 // 2),
        ("f8e4m3fn[128,128]{1,0:T(8,128)}", 128 * 128),
        ("pred[8,128]{1,0:T(8,128)(4,1)}", 8 * 128),
        ("s32[]{:T(128)}", 4),
    ],
)
def test_bytes_are_padded_to_whole_tiles(text, size):
    assert shapes(text)[0].bytes == size


def test_an_instruction_gives_its_operands_calls_and_attributes():
    found = module(
        """
%inner (a: f32[8], b: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %b = f32[8]{0:T(128)} parameter(1)
  ROOT %sum = f32[8]{0:T(128)} add(%a, %b)
}
""",
        """
%main (x: f32[8], y: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0), metadata={op_name="batch[\\'tokens\\']"}
  %y = f32[8]{0:T(128)} parameter(1)
  ROOT %f.1 = f32[8]{0:T(128)S(1)} fusion(%x, /*index=1*/%y), kind=kLoop, calls=%inner, """
        """metadata={op_name="jit(f)/add" source_file="/a/model.py" source_line=12}, """
        """backend_config={"window_config":{"estimated_cycles":"1200"}}
}
""",
    )
    fusion = found.entry.root
    assert fusion.operands == ("x", "y") and fusion.called == ("inner",) and fusion.attribute("kind") == "kLoop"
    assert fusion.cycles == 1200 and fusion.op_name == "jit(f)/add" and found.source(fusion) == "model.py:12"
    assert found.entry.by_name["x"].op_name == "batch['tokens']"
    assert [each.opcode for each in found.inside(fusion)] == ["parameter", "parameter", "add"]
    assert found.computations["inner"].parameters[1].name == "b"


def test_the_largest_integer_is_no_estimate_of_cycles():
    text = """
%main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  ROOT %c = f32[8]{0:T(128)} copy(%x), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}
"""
    assert module(text).entry.root.cycles is None


def test_attributes_that_hold_newlines_belong_to_their_instruction():
    found = module(
        """
%main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %k = f32[8]{0:T(128)} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/my_kernel/pallas_call"}
  ROOT %c = f32[8]{0:T(128)} copy(%k)
}
"""
    )
    kernel = found.entry.by_name["k"]
    assert kernel.op_name == "jit(f)/my_kernel/pallas_call" and '"block_q' in kernel.attributes.replace("\\", "")
    assert found.entry.root.operands == ("k",)


def test_sources_come_from_the_stack_frame_tables():
    found = parse(
        """HloModule m, is_scheduled=true

FileNames
1 "/somewhere/loss.py"

FunctionNames
1 "f"

FileLocations
4 {file_name_id=1 function_name_id=1 line=53 end_line=53 column=1 end_column=2}

StackFrames
9 {file_location_id=4 parent_frame_id=1}


ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  ROOT %c = f32[8]{0:T(128)} copy(%x), metadata={op_name="copy" stack_frame_id=9}
}
"""
    )
    assert found.scheduled and found.source(found.entry.root) == "loss.py:53"
    assert found.source(found.entry.by_name["x"]) == ""


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule broken\n")


def test_a_text_that_is_cut_off_is_said_so_and_not_walked():
    cut = "HloModule jit_step\n\nENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    with pytest.raises(ValueError, match="the computation main has no ROOT: is its text cut off"):
        _ = parse(cut).entry.root
    with pytest.raises(ValueError, match="the get-tuple-element x of main has no index"):
        _ = module("%main (t: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} get-tuple-element(%t)\n}").entry.root.index
