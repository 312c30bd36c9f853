"""Designs that try to pass without being right, in verilog-eval's benches: none passes, and none leaves a trace."""

import os
from pathlib import Path

import pytest
from verilog_helper import GATES, answer, design, needs_simulator, write_clone

from gemma_tpu.evaluation import verilog, verilog_eval

WRONG = "assign z = 1'b0;\n"
MISMATCHES = 'initial begin $display("Mismatches: 0 in 101 samples"); '
READ = 'integer f; initial begin f = $fopen("{}", "r"); if (f) $display("%0d", $fgetc(f)); end'
ATTACKS = {
    "finish at once": WRONG + "initial $finish;",
    "finish after the first comparison": WRONG + "initial #7 $finish;",
    "stop": WRONG + "initial $stop;",
    "fatal": WRONG + "initial $fatal;",
    "forged result line": WRONG + MISMATCHES + "end",
    "forged result line and finish": WRONG + MISMATCHES + "$finish; end",
    "forged result line at the end": WRONG + 'final $display("Mismatches: 0 in 101 samples");',
    "forged secret": WRONG + 'final $display("n00000000000000000000000000000000 101 0");',
    "read a file by absolute path": WRONG + READ.format("/etc/passwd"),
    "read a file by relative path": WRONG + READ.format("../../etc/passwd"),
    "read the bench": WRONG + READ.format("bench.v"),
    "read its own compiled file": WRONG + READ.format("sim"),
    "read its own standard input": WRONG + READ.format("/proc/self/fd/0"),
    "read memory from a file": WRONG + 'reg [7:0] m [0:9]; initial $readmemh("/proc/self/cmdline", m);',
    "write a file by absolute path": WRONG + 'integer f; initial begin f = $fopen("{tmp}/pwned", "w"); '
    '$fdisplay(f, "x"); end',
    "write a file by relative path": WRONG + 'integer f; initial f = $fopen("pwned", "w");',
    "overwrite the bench": WRONG + 'integer f; initial f = $fopen("bench.v", "w");',
    "dump files": WRONG + 'initial begin $dumpfile("{tmp}/pwned.vcd"); $dumpvars; end',
    "write memory to a file": WRONG + 'reg [7:0] m [0:9]; initial $writememh("{tmp}/pwned.hex", m);',
    "include a file": '`include "/etc/passwd"\n' + WRONG,
    "include by relative path": '`include "reference.v"\n' + WRONG,
    "a system call": WRONG + 'initial $system("rm -rf {tmp}; touch {tmp}/pwned");',
    "a system call by macro": '`define CALL system\n' + WRONG + 'initial $`CALL("touch {tmp}/pwned");',
    "arguments of the simulator": WRONG + 'reg [999:0] s; initial if ($value$plusargs("secret=%s", s)) ;',
    "the reference's output": "assign z = tb.good1.z;",
    "the reference's output by the root": "assign z = $root.tb.good1.z;",
    "the reference's output upwards": "assign z = good1.z;",
    "an escaped path": "assign z = \\tb .good1.z;",
    "the reference itself": "RefModule r(x, y, z);",
    "force the match": WRONG + "initial force tb.tb_match = 1;",
    "clear the count": WRONG + "always @(x) tb.stats1.errors = 0;",
    "a name it declares itself": WRONG + "wire tb; initial tb.stats1.errors = 0;",
    "call the bench's task": WRONG + "initial wavedrom_stop;",
    "disable the bench": WRONG + "initial disable tb;",
    "bind into the bench": "assign z = 0; endmodule\nmodule spy; endmodule\nbind tb spy s();\nmodule rest;",
    "a bench of its own": WRONG + "endmodule\nmodule tb; initial $display(\"Mismatches: 0 in 101 samples\");",
    "defparam": WRONG + "defparam tb.stim1.n = 0;",
    "endless print": WRONG + 'initial forever $display("Mismatches: 0 in 101 samples");',
    "endless loop": WRONG + "initial forever begin end",
    "endless events": WRONG + "reg a = 0; always @(a) a <= #0 ~a; initial a = 1;",
    "memory bomb": WRONG + "reg [999:0] m [0:16777215]; integer i;\n"
    "initial for (i = 0; i < 16777216; i = i + 1) m[i] = i;",
    "compile bomb": WRONG + "genvar i; generate for (i = 0; i < 134217728; i = i + 1) begin wire w; end endgenerate",
    "macro bomb": "`define A x x x x x x x x x x\n`define B `A `A `A `A `A `A `A `A `A `A\n"
    "`define C `B `B `B `B `B `B `B `B `B `B\n`define D `C `C `C `C `C `C `C `C `C `C\n"
    "`define E `D `D `D `D `D `D `D `D `D `D\n`define F `E `E `E `E `E `E `E `E `E `E\n"
    "`define G `F `F `F `F `F `F `F `F `F `F\n" + WRONG + "// `G\n wire w = `G;",
}
REFUSED = [name for name in ATTACKS if any(word in name for word in (
    "read", "write", "overwrite", "dump", "include", "system call", "reference's", "escaped", "force", "clear", "bind",
    "finish", "stop", "fatal", "defparam", "arguments",
))]  # fmt: skip


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    problems = verilog_eval.load(write_clone(tmp_path_factory.mktemp("clone")))
    ready = verilog_eval.measured(problems[:1])
    assert ready[0].samples > 0 and not ready[0].unscorable
    return ready[0]


@pytest.fixture(scope="module")
def judged(problem, tmp_path_factory):
    """Every attack scored where whatever it left would be seen: (verdicts, what was left)."""
    place = tmp_path_factory.mktemp("traces")
    place.chmod(0o777)
    seen = {folder: set(os.listdir(folder)) for folder in ("/tmp", "/var/tmp", "/dev/shm")}
    codes = [f"```verilog\n{design(body.replace('{tmp}', str(place)))}```" for body in ATTACKS.values()]
    before = os.getcwd()
    os.chdir(place)
    try:
        verdicts = verilog.score_all([problem] * len(codes), codes, timeout=1.5, workers=2)
    finally:
        os.chdir(before)
    left = {name for folder, names in seen.items() for name in set(os.listdir(folder)) - names}
    left = {name for name in left if name.startswith(("pwned", "wave", "design", "bench", "sim", "gemma-tpu"))}
    return dict(zip(ATTACKS, verdicts, strict=True)), left | set(os.listdir(place))


@needs_simulator
@pytest.mark.parametrize("name", ATTACKS)
def test_it_does_not_pass(judged, name):
    verdicts, _ = judged
    assert not verdicts[name].passed, verdicts[name]


@needs_simulator
@pytest.mark.parametrize("name", REFUSED)
def test_reaching_out_is_refused_before_it_runs(judged, name):
    verdicts, _ = judged
    assert verdicts[name].kind == "attack", verdicts[name]


@needs_simulator
def test_nothing_is_left_behind(judged):
    _, left = judged
    assert left == set()
    assert not Path("/etc/passwd.pwned").exists() and Path("/etc/passwd").stat().st_size > 0


@needs_simulator
def test_the_official_scorer_falls_for_what_we_refuse(problem):
    """Why its verdict is reported beside ours, and is not ours."""
    forged = f"```verilog\n{design(ATTACKS['forged result line and finish'])}```"
    found = verilog_eval.judge(problem, forged, timeout=5.0)
    assert (found.passed, found.kind, found.official) == (False, "attack", "passed")


@needs_simulator
def test_a_right_design_passes_beside_all_of_them(problem):
    assert verilog.score(problem, answer(next(iter(GATES)))).passed
