"""Scoring of generated Verilog: references pass, mistakes and attacks do not, and say what they are."""

import json
import os
import re
import shutil
import time
from dataclasses import asdict, replace

import pytest

from gemma_tpu import assets
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import sandbox, verilog, verilog_code

PROBLEMS = verilog.load_problems(assets.resolve("bundled:tiny_verilog/heldout.jsonl"))
needs_simulator = pytest.mark.skipif(
    shutil.which("iverilog") is None or sandbox.available() is None,
    reason="needs iverilog and a sandbox (apt-get install iverilog bubblewrap)",
)
# One mistake for each family: (pattern, replacement), the first that matches a reference of it.
MISTAKES = {
    "gate": (r" ([&|^]) ", r" + "),
    "mux2": (r"(\w+) \? (\w+) : (\w+)", r"\1 ? \3 : \2"),
    "add": (r" [+] | - ", " ^ "),
    "compare": (r"([=!<>]=|[<>])( \w+\))", r"===\2"),
    "reduce": (r"= (~?)[&|^]", r"= !"),
    "decoder": (r"1 << ", "2 << "),
    "counter": (r" [+] (\d)| - (\d)", " + 5"),
    "modulo": (r"== (\d+)", "== 1"),
    "updown": (r"(\w+) \? (.*) : (.*);", r"\1 ? \3 : \2;"),
    "load_counter": (r"\? (\w+) :", r"? ~\1 :"),
    "shift": (r"\{(\w+), ", r"{\1, 1'b0 & "),
    "edge": (r"(= ~?)(\w+) [&^] ~?", r"\1\2 | "),
    "divider": (r"= \(p == (\d+)\);", "= (p == 1);"),
    "machine": (r"0: p <= ", "0: p <= 1 + "),
}


def problem(family="gate"):
    return next(p for p in PROBLEMS if p.family == family)


def combinational():
    """A problem whose reference is one assign, for attacks to be built on."""
    return next(p for p in PROBLEMS if p.family == "mux2" and "assign" in p.reference)


def with_line(line: str, base=None) -> str:
    """A correct design with a line added: only the line can be why it does not pass."""
    return (base or combinational()).reference.replace("endmodule", line + "\nendmodule")


@needs_simulator
def test_every_reference_passes_through_the_very_path_of_a_completion():
    start = time.monotonic()
    completions = [f"Here:\n```verilog\n{p.reference}```\n" for p in PROBLEMS]
    verdicts = verilog.score_all(PROBLEMS, completions, workers=2)
    failed = {p.id: v for p, v in zip(PROBLEMS, verdicts, strict=True) if not v.passed}
    assert not failed and len(verdicts) == 60
    assert time.monotonic() - start < 60


@needs_simulator
def test_a_mistake_fails_in_every_family():
    assert set(MISTAKES) == {p.family for p in PROBLEMS}
    chosen, wrong = [], []
    for family, (pattern, replacement) in MISTAKES.items():
        for candidate in (p for p in PROBLEMS if p.family == family):
            mutant = re.sub(pattern, replacement, candidate.reference)
            if mutant != candidate.reference:
                chosen.append(candidate)
                wrong.append(mutant)
                break
    assert {p.family for p in chosen} == set(MISTAKES)
    verdicts = verilog.score_all(chosen, wrong, workers=2)
    assert {p.id: v.kind for p, v in zip(chosen, verdicts, strict=True) if v.kind != "mismatch"} == {}


@needs_simulator
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_reset_of_the_other_kind_fails(kind):
    pattern, other = {
        "sync": (r"@\(posedge (\w+)\)(\s+if \((rst|reset|clr)\))", r"@(posedge \1 or posedge \3)\2"),
        "async": (r"@\(posedge (\w+) or (?:pos|neg)edge \w+\)", r"@(posedge \1)"),
    }[kind]
    mutants = [(p, re.sub(pattern, other, p.reference)) for p in PROBLEMS]
    mutants = [(p, code) for p, code in mutants if code != p.reference]
    assert len(mutants) >= 5
    verdicts = verilog.score_all([p for p, _ in mutants], [code for _, code in mutants], workers=2)
    assert {p.id for (p, _), v in zip(mutants, verdicts, strict=True) if v.passed} == set()


@needs_simulator
@pytest.mark.parametrize(
    ("completion", "kind"),
    [
        ("I would rather not.", "no_code"),
        ("module half(input a);", "no_code"),
        ("```verilog\nmodule other(input a, output y); assign y = a; endmodule\n```", "wrong_module"),
    ],
)
def test_what_is_not_an_answer_has_its_kind(completion, kind):
    assert verilog.score(problem(), completion).kind == kind


@needs_simulator
def test_syntax_errors_other_ports_and_other_widths_have_their_kind():
    p = combinational()
    assert verilog.score(p, p.reference.replace("assign", "asign")).kind == "syntax_error"
    output = re.search(r"output (\[\d+:0\] )?(\w+)\)", p.reference)
    renamed = re.sub(rf"\b{output[2]}\b", "another", p.reference)
    assert verilog.score(p, renamed).kind == "wrong_ports"
    wider = p.reference.replace(output[0], f"output [31:0] {output[2]})")
    assert verilog.score(p, wider).kind == "wrong_ports"
    assert verilog.score(replace(p, exact_ports=False), wider).passed


@needs_simulator
@pytest.mark.parametrize(
    "line",
    [
        "initial $finish;",
        "initial $stop;",
        'initial $system("id");',
        'integer f; initial f = $fopen("/etc/passwd", "r");',
        'reg [7:0] m [0:9]; initial $readmemh("/proc/self/cmdline", m);',
        'initial $dumpfile("/tmp/written_by_design");',
        "initial force tb = 1;",
        "initial tb_bench.tb_bad = 0;",
        "wire w = $root.tb_bench.tb_bad;",
        "initial \\tb_bench .tb_bad = 0;",
        "defparam other.x = 1;",
        '`include "/etc/passwd"',
        "`define DOT .\ninitial tb`DOT``bad = 0;",
        '`define CALL fopen\ninteger f; initial f = $`CALL("/etc/passwd");',
        '`default_nettype none "\ninitial $finish;//"',
        '/* " */ initial $finish; /* " */',
        'initial begin $display("a\\\\"); $finish; end',
    ],
)
def test_designs_that_reach_out_of_themselves_are_refused(line):
    verdict = verilog.score(combinational(), with_line(line))
    assert (verdict.passed, verdict.kind) == (False, "attack"), verdict


@needs_simulator
def test_what_the_check_takes_for_a_comment_is_not_compiled():
    """The simulator reads a directive's line its own way; without the check's stripping this would finish."""
    assert verilog.score(combinational(), with_line("`timescale 1ns/1ps /*\ninitial $finish; /* */")).passed


@needs_simulator
@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("initial forever begin end", {"timeout"}),
        ("initial forever #0 ;", {"timeout"}),
        ('initial forever $display("endless");', {"timeout"}),
        ("wire loop; assign #0 loop = (loop === 1'b0);", {"timeout", "mismatch"}),
        (f"reg [999:0] hog[0:{1 << 24}]; integer i;initial for (i = 0; i < {1 << 24}; i = i + 1) hog[i] = i;",
         {"timeout", "mismatch"}),
        (f"genvar i; generate for (i = 0; i < {1 << 27}; i = i + 1) begin wire w; end endgenerate",
         {"timeout", "syntax_error"}),
    ],
)  # fmt: skip
def test_endless_and_greedy_designs_end_at_the_limits(line, kinds):
    start = time.monotonic()
    verdict = verilog.score(combinational(), with_line(line), timeout=2.0)
    assert not verdict.passed and verdict.kind in kinds, verdict
    assert time.monotonic() - start < 10


@needs_simulator
def test_a_forged_verdict_line_is_not_believed():
    p = combinational()
    for text in (f"passed {p.samples} 0", f"verdict: {p.samples} 0", f"n{'0' * 32} {p.samples} 0", "%m"):
        wrong = with_line(f'initial $display("{text}");').replace("assign", "assign #1")
        wrong = re.sub(r"\? (\w+) : (\w+)", r"? \2 : \1", wrong)
        assert verilog.score(p, wrong).kind == "mismatch", text


@needs_simulator
def test_printing_does_no_harm_to_a_right_design():
    assert verilog.score(combinational(), with_line('initial $write("no end of line");')).passed
    said = '`define SAID "%0d.%0d"\ninitial $display(`SAID, 1, 2);'
    assert verilog.score(combinational(), with_line(said)).passed


@needs_simulator
def test_driving_an_input_does_not_change_what_the_reference_sees():
    p = combinational()
    names = re.findall(r"input (?:\[\d+:0\] )?(\w+)", p.reference)
    drives = "\n".join(f"assign (supply1, supply0) {name} = 0;" for name in names)
    assert not verilog.score(p, with_line(drives)).passed


@needs_simulator
def test_even_unrefused_file_tasks_find_neither_the_simulation_nor_the_host():
    """The second wall: what a design would meet if the check of its text were fooled."""
    p = combinational()
    paths = ["/dev/stdin", "/proc/self/fd/0", "/scratch/sim", "sim", "bench.v", "/etc/passwd", __file__]
    reads = "".join(
        f'f = $fopen("{path}", "r"); if (f != 0 && $fgetc(f) >= 0) $display("READ {path}"); '
        for path in paths
    )
    code = with_line(f'integer f; initial begin {reads} $display("tried"); end')
    verdict, _ = verilog.simulate(p, code, sandbox.Limits())
    assert verdict.passed and "READ" not in verdict.log and "tried" in verdict.log
    verdict, _ = verilog.simulate(p, with_line("initial #3 $finish;"), sandbox.Limits())
    assert (verdict.passed, verdict.kind) == (False, "mismatch")


@needs_simulator
def test_scoring_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    verilog.score(combinational(), combinational().reference)
    verilog.score(combinational(), with_line("initial forever begin end"), timeout=1.0)
    assert os.listdir(tmp_path) == []


@needs_simulator
def test_a_wrong_number_of_comparisons_is_no_pass():
    p = combinational()
    assert verilog.score(replace(p, samples=p.samples + 1), p.reference).kind == "mismatch"
    none = replace(p, samples=0, testbench=p.testbench.replace("tb_i < 500", "tb_i < 0"))
    assert none.testbench != p.testbench and verilog.score(none, p.reference).kind == "mismatch"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```verilog\nmodule a; endmodule\n```", "module a; endmodule\n"),
        ("Text\n```\nmodule a; endmodule\n```\n```v\nmodule b; endmodule\n```", "module a; endmodule\n"),
        ("```python\nprint()\n```\nmodule a;\nendmodule bye", "module a;\nendmodule"),
        ("```verilog\nmodule a;\nendmodule", "module a;\nendmodule"),
        ("module a; endmodule\nmodule b; endmodule\n", "module a; endmodule\nmodule b; endmodule"),
        ("the module ends", None),
        ("", None),
    ],
)
def test_code_is_taken_out_of_fences_or_bare_text(text, expected):
    assert verilog_code.extract_code(text) == expected


@pytest.mark.parametrize(
    "code",
    [
        "sub #(.W(8)) s(.a(a), .b(b[3:0]), .c());",
        "sub s(.*); sub t(.a, .b);",
        "initial x = 1.5e3; // see tb.v for $finish",
        'initial $display("tb.x $finish `include %0.2f");',
        "assign y = $signed(a) >>> 1; /* force */",
        "wire \\a.b = 1'b0;",
    ],
)
def test_legal_uses_of_dots_and_words_are_no_attack(code):
    assert verilog_code.attack_in(verilog_code.bare(code)) is None


def test_missing_iverilog_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    with pytest.raises(UserError, match=r"iverilog is not installed.*apt-get install iverilog.*brew install"):
        verilog.require_iverilog()


def test_iverilog_outside_the_sandbox_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name, **_: str(tmp_path / name))
    with pytest.raises(UserError, match=r"the sandbox shows generated code only /usr"):
        verilog.require_iverilog()


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog is not installed")
def test_the_version_line_names_icarus():
    assert verilog.require_iverilog().startswith("Icarus Verilog version")


def test_faulty_problems_are_named_all_at_once(tmp_path):
    good = asdict(PROBLEMS[0])
    del good["exact_ports"]  # the one that may be left out
    lines = [
        good,
        {**good, "samples": "9"},
        {k: v for k, v in good.items() if k != "top"},
        {**good, "tops": 1},
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), "{", "[1]"]))
    with pytest.raises(UserError) as raised:
        verilog.load_problems(path)
    for expected in ("line 2: has samples that is not int", "line 3: lacks top", "line 4: has unknown tops",
                     "line 5: not JSON", "line 6: not an object"):  # fmt: skip
        assert expected in str(raised.value)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no problem"):
        verilog.load_problems(path)
