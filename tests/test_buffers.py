"""Peak memory from the compiler's buffer assignment."""

import pytest
from hlo_helper import module

from gemma_tpu.compiled.buffers import Buffer, memory
from gemma_tpu.errors import RunError

ASSIGNMENT = """BufferAssignment:
allocation 0: size 700, page 0, thread-local:
 value: <9 offloaded @0> (size=700,offset=0): f32[175]
allocation 1: size 400, page 0, parameter 0, shape |f32[100]| at ShapeIndex {}:
 value: <1 weights @0> (size=400,offset=0): f32[100]{0:T(100)}
allocation 2: size 100, page 0, output shape is |f32[25]|, maybe-live-out, parameter 1, shape |f32[25]|:
 value: <2 state @0> (size=100,offset=0): f32[25]{0:T(25)}
allocation 3: size 40, page 0, output shape is |f32[10]|, maybe-live-out:
 value: <3 loss @0> (size=40,offset=0): f32[10]{0:T(10)}
allocation 4: size 1000, page 0, preallocated-temp:
 value: <4 wide{0} @0> (size=600,offset=0): f32[150]{0:T(150)}
 value: <5 shares_its_place @0> (size=500,offset=100): f32[125]{0:T(125)}
 value: <6 narrow @0> (size=300,offset=700): f32[75]{0:T(75)}
allocation 5: size 8000, color 1, page 0, preallocated-temp:
 value: <7 in_vmem @1> (size=8000,offset=0): f32[2000]{0:T(1000)S(1)}
allocation 6: size 5000, color 5, page 0, preallocated-temp:
 value: <8 offloaded_activation @5> (size=5000,offset=0): f32[1250]{0:T(1250)S(5)}

Total bytes used: 15240 (15.2KiB)

Used values:
<1 weights @0>
 from instruction: %weights = f32[100]{0:T(100)} parameter(0)
"""


@pytest.fixture(params=["libtpu 0.0.51", "libtpu 0.0.42"])
def folder(tmp_path, request):
    text = ASSIGNMENT if request.param.endswith("51") else ASSIGNMENT.replace(", page 0", "")
    (tmp_path / "module_0000.step.after_optimizations-buffer-assignment.txt").write_text(text)
    (tmp_path / "module_0002.extracted.after_optimizations-buffer-assignment.txt").write_text("BufferAssignment:\n")
    return tmp_path


def test_the_peak_is_arguments_fresh_outputs_and_the_arena(folder):
    found = memory(folder)
    assert (found.arguments, found.outputs, found.temporaries, found.host) == (500, 40, 1000, 5000)
    assert found.peak == 1540


def test_of_the_values_that_share_a_place_the_largest_is_named(folder):
    assert [(one.name, one.kind, one.bytes) for one in memory(folder).largest] == [
        ("wide f32[150]", "temporary", 600),
        ("weights f32[100]", "argument", 400),
        ("narrow f32[75]", "temporary", 300),
        ("state f32[25]", "argument", 100),
        ("loss f32[10]", "output", 40),
    ]


def test_buffers_are_named_by_what_writes_them(folder):
    text = """
%main (weights: f32[100]) -> f32[150] {
  %weights = f32[100]{0:T(100)} parameter(0), metadata={op_name="frozen[\\'w\\']"}
  ROOT %wide = f32[150]{0:T(150)} copy(%weights), metadata={op_name="f/layer/dot" source_file="/a/b.py" source_line=7}
}
"""
    assert memory(folder, module(text), count=2).largest == [
        Buffer("layer/dot (b.py:7) f32[150]", "temporary", 600),
        Buffer("frozen['w'] f32[100]", "argument", 400),
    ]


def test_a_folder_without_a_buffer_assignment_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="xla_dump_to"):
        memory(tmp_path)


def test_a_text_that_cannot_be_read_is_said_and_is_not_a_step_without_memory(tmp_path):
    text = ASSIGNMENT.replace("allocation ", "piece ")
    (tmp_path / "module_0000.step.after_optimizations-buffer-assignment.txt").write_text(text)
    with pytest.raises(RunError, match="libtpu"):
        memory(tmp_path)
