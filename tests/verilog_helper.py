"""A folder in verilog-eval v2's form with three problems of our own, and where the real one may lie."""

import shutil
from pathlib import Path

import pytest

from gemma_tpu.evaluation import sandbox

REAL = Path(__file__).parents[1] / "../shared/data/verilog-eval"
needs_clone = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/verilog-eval")
needs_simulator = pytest.mark.skipif(
    shutil.which("iverilog") is None or sandbox.available() is None,
    reason="needs iverilog and a sandbox (apt-get install iverilog bubblewrap)",
)
INTERFACE = "module TopModule (\n  input x,\n  input y,\n  output z\n);\n"
GATES = {"Prob001_and": "x & y", "Prob002_or": "x | y", "Prob003_xor": "x ^ y"}
BENCH = """`timescale 1 ps/1 ps

module stimulus_gen (
  input clk,
  output logic x,
  output logic y
);
  task wavedrom_stop;
    #1;
  endtask
  always @(posedge clk, negedge clk) {x, y} <= $random % 4;
  initial begin
    repeat(50) @(negedge clk);
    wavedrom_stop();
    #1 $finish;
  end
endmodule

module tb();
  typedef struct packed { int errors; int errortime; int clocks; } stats;
  stats stats1;
  reg clk = 0;
  initial forever #5 clk = ~clk;
  logic x, y, z_ref, z_dut;
  initial begin
    $dumpfile("wave.vcd");
    $dumpvars(1, stim1.clk, tb_mismatch ,x,y,z_ref,z_dut );
  end
  wire tb_match;
  wire tb_mismatch = ~tb_match;
  stimulus_gen stim1 ( .clk, .* , .x, .y );
  RefModule good1 ( .x, .y, .z(z_ref) );
  TopModule top_module1 ( .x, .y, .z(z_dut) );
  final begin
    $display("Hint: Total mismatched samples is %1d out of %1d samples\\n", stats1.errors, stats1.clocks);
    $display("Mismatches: %1d in %1d samples", stats1.errors, stats1.clocks);
  end
  assign tb_match = ( z_ref === ( z_ref ^ z_dut ^ z_ref ) );
  always @(posedge clk, negedge clk) begin
    stats1.clocks++;
    if (!tb_match) begin
      if (stats1.errors == 0) stats1.errortime = $time;
      stats1.errors++;
    end
  end
  initial begin
    #1000000
    $display("TIMEOUT");
    $finish();
  end
endmodule
"""


def write_clone(folder: Path) -> Path:
    for task in ("spec-to-rtl", "code-complete-iccad2023"):
        place = folder / f"dataset_{task}"
        place.mkdir(parents=True)
        for name, gate in GATES.items():
            said = f"\nThe module TopModule should give z as {gate}.\n"
            said += "\n" + INTERFACE if task != "spec-to-rtl" else ""
            (place / f"{name}_prompt.txt").write_text(said)
            (place / f"{name}_test.sv").write_text(BENCH)
            (place / f"{name}_ref.sv").write_text(
                INTERFACE.replace("TopModule", "RefModule") + f"  assign z = {gate};\nendmodule\n"
            )
            if task != "spec-to-rtl":
                (place / f"{name}_ifc.txt").write_text(INTERFACE)
        (place / "Prob002_stray.sv").write_text("module tb(); endmodule\n")
    (folder / "scripts").mkdir()
    for shots in range(1, 5):
        for task in ("spec-to-rtl", "code-complete-iccad2023"):
            name = f"verilog-example-prefix_{task}_{shots}-shot.txt"
            (folder / "scripts" / name).write_text(f"{shots} examples of {task}\n")
    return folder


def design(body: str) -> str:
    return f"{INTERFACE}{body}\nendmodule\n"


def answer(name: str, right: bool = True) -> str:
    return f"```verilog\n{design(f'assign z = {GATES[name] if right else 1};')}```"
