"""verilog-eval v2: what is read from a clone, what a model is asked, and the two verdicts."""

import json
import re
import shutil

import pytest
from verilog_helper import BENCH, GATES, INTERFACE, REAL, answer, design, needs_clone, needs_simulator, write_clone

from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import scoring, verilog, verilog_code, verilog_eval, verilog_prompts

SPEC, COMPLETE = verilog_eval.TASKS


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return write_clone(tmp_path_factory.mktemp("clone") / "verilog-eval")


@pytest.fixture(scope="module")
def ready(clone):
    return verilog_eval.measured(verilog_eval.load(clone))


# --- reading ---


@pytest.mark.parametrize("task", verilog_eval.TASKS)
def test_a_clone_is_read_in_order_and_strays_are_left_alone(clone, task):
    problems = verilog_eval.load(clone, task)
    assert [one.id for one in problems] == list(GATES)
    assert problems[1].reference == design("  assign z = x | y;")
    assert problems[1].ref_file.startswith("module RefModule")
    assert problems[0].header == (INTERFACE if task == COMPLETE else "")
    assert [one.id for one in verilog_eval.choose(problems, ["Prob003"])] == ["Prob003_xor"]


def test_the_bench_keeps_its_ports_and_loses_every_fixed_name_of_a_scope():
    bench = verilog_eval.template(BENCH)
    for name in ("tb", "stimulus_gen", "stim1", "good1", "top_module1", "RefModule", "wavedrom_stop"):
        assert not re.search(rf"\b{name}\b", bench), name
    assert "{{TB}}" in bench and "{{REF}} {{GOOD1}} ( .x, .y, .z(z_ref) );" in bench
    assert "TopModule {{TOP_MODULE1}}" in bench and "$dump" not in bench and "Mismatches" not in bench
    assert '$display("{{SECRET}} %0d %0d", stats1.clocks, stats1.errors)' in bench


def test_what_a_clone_lacks_is_named_all_at_once(clone, tmp_path):
    with pytest.raises(UserError, match=r"no dataset_spec-to-rtl/ here; fetch the benchmark by: git clone"):
        verilog_eval.load(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(clone, broken)
    folder = broken / f"dataset_{COMPLETE}"
    (folder / "Prob001_and_test.sv").unlink()
    (folder / "Prob003_xor_ifc.txt").unlink()
    with pytest.raises(UserError, match=r"lacks Prob001_and_test.sv, Prob003_xor_ifc.txt"):
        verilog_eval.load(broken, COMPLETE)
    (broken / f"dataset_{SPEC}" / "Prob002_or_test.sv").write_text("module tb(); endmodule")
    with pytest.raises(UserError, match=r"Prob002_or_test.sv prints its verdict 0 times and its timeout 0 times"):
        verilog_eval.load(broken)
    with pytest.raises(UserError, match="no problem begins with Prob9"):
        verilog_eval.choose(verilog_eval.load(clone), ["Prob9", "Prob001"])


# --- asking ---


def test_the_official_prompts_are_those_of_the_scripts(clone):
    [first, *_] = verilog_prompts.questions(verilog_eval.load(clone), shots=2, clone=clone)
    system, user = first.messages
    assert system["role"] == "system" and "You are a Verilog RTL designer" in system["content"]
    assert user["content"] == (
        "2 examples of spec-to-rtl\n\nQuestion:\nThe module TopModule should give z as x & y.\n\n"
        "Enclose your code with [BEGIN] and [DONE]. Only output the code snippet\nand do NOT output anything else.\n"
        "\nAnswer:\n"
    )
    [first, *_] = verilog_prompts.questions(verilog_eval.load(clone, COMPLETE))
    system, user = first.messages
    assert "End the Verilog module code completion with 'endmodule'" in system["content"]
    lines = user["content"].splitlines()
    assert lines[1].startswith("// Implement the Verilog module based on the following description.")
    # The official rule turns into code at the first line that says "module TopModule", wherever that is.
    assert lines[2:5] == ["// ", "", "The module TopModule should give z as x & y."] or lines[2] == "// "


def test_the_papers_prompt_is_one_turn_and_takes_no_shots(clone, tmp_path):
    problems = verilog_eval.load(clone)
    [message] = verilog_prompts.questions(problems, "paper")[0].messages
    assert message["role"] == "user" and message["content"].startswith("The module TopModule should give z as x & y.")
    assert "```verilog" in message["content"]
    with pytest.raises(UserError, match="--shots 1 belongs to the official prompt"):
        verilog_prompts.questions(problems, "paper", shots=1)


def test_a_prompt_of_ones_own_is_a_file_with_a_place_for_the_problem(clone, tmp_path):
    problems = verilog_eval.load(clone)
    form = tmp_path / "form.txt"
    form.write_text("Please: {prompt} Thanks {x}.")
    [message] = verilog_prompts.questions(problems, str(form))[0].messages
    assert message["content"] == "Please: The module TopModule should give z as x & y. Thanks {x}."
    form.write_text("Please.")
    with pytest.raises(UserError, match=r"holds no \{prompt\}"):
        verilog_prompts.questions(problems, str(form))
    with pytest.raises(UserError, match="neither official nor paper, and cannot be read"):
        verilog_prompts.questions(problems, "offcial")
    with pytest.raises(UserError, match="0 to 4 examples"):
        verilog_prompts.questions(problems, shots=5, clone=clone)


@needs_clone
def test_the_real_examples_are_found():
    problems = verilog_eval.load(REAL)
    for shots in range(1, 5):
        text = verilog_prompts.questions(problems, shots=shots, clone=REAL)[0].messages[1]["content"]
        assert text.count("Question:\n") == shots + 1 and text.count("[BEGIN]\n") >= shots


def test_the_named_settings_are_the_official_ones_and_the_papers():
    found = {name: (one.n, one.temperature, one.top_p) for name, one in verilog_prompts.SETTINGS.items()}
    assert found == {"official-low": (1, 0.0, 0.01), "official-high": (20, 0.85, 0.95), "paper": (5, 0.8, 0.95)}


# --- taking the code out ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[BEGIN]\nmodule a; endmodule\n[DONE]\nmodule b; endmodule", "\nmodule a; endmodule\n"),
        ("[BEGIN]\n```verilog\nmodule a; endmodule\n```\n[DONE]", "module a; endmodule\n"),
        ("Between [BEGIN] and [DONE]:\n```v\nmodule a; endmodule\n```", "module a; endmodule\n"),
        ("[BEGIN]\nmodule a;\nendmodule", "\nmodule a;\nendmodule"),
    ],
)
def test_code_is_found_between_the_official_markers(text, expected):
    assert verilog_code.extract_code(text) == expected


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("  assign z = x;\nendmodule\n", "  assign z = x;\nendmodule"),
        ("```verilog\nassign z = x;\nendmodule\n```", "assign z = x;\nendmodule"),
        ("assign z = x;\nendmodule\nmore words", "assign z = x;\nendmodule"),
    ],
)
def test_a_completion_without_a_module_goes_on_from_the_interface(text, body):
    assert verilog_code.extract_code(text, INTERFACE) == f"{INTERFACE.rstrip()}\n{body}\n"
    assert verilog_code.extract_code(f"```\n{design('assign z = x;')}```", INTERFACE) == design("assign z = x;")
    assert verilog_code.extract_code("no code at all", INTERFACE) is None


def test_modules_that_the_top_does_not_use_are_left_out():
    own_bench = 'module tb; initial begin $dumpfile("x"); $finish; end endmodule\n'
    used = "module half(input a, output b); assign b = a; endmodule\n"
    top = design("half h(x, z);")
    assert verilog_code.used(used + top + own_bench, "TopModule") == used + top + "\n"
    assert verilog_code.attack_in(verilog_code.used(own_bench + top, "TopModule")) is None
    twice = own_bench + own_bench + top
    assert verilog_code.used(twice, "TopModule") == twice, "left for the compiler to refuse"
    assert verilog_code.used(" 1 + [2]", "TopModule") == " 1 + [2]", "not one name in it"


@pytest.mark.parametrize(
    "line",
    ["typedef struct packed { logic a; } s_t; s_t s; assign z = s.a;", "half h[1:0](x, y); assign z = h[0].w;",
     "genvar i; generate for (i = 0; i < 2; i = i + 1) begin : g wire w; end endgenerate assign z = g[1].w;"],
)  # fmt: skip
def test_dotted_names_of_what_the_design_itself_declares_are_no_attack(line):
    assert verilog_code.attack_in(line) is None


@needs_simulator
def test_a_designs_delays_mean_what_they_mean_to_the_official_scorer(ready):
    late = design("reg r; always @(x or y) r = #2 x & y; assign z = r;")
    for code in (late, "`timescale 1ps/1ps\n" + late, "`timescale 1ns / 1ps\n" + late):
        found = verilog_eval.judge(ready[0], f"```verilog\n{code}```")
        assert found.passed == (found.official == "passed"), (code, found)


# --- both verdicts ---


@needs_simulator
def test_the_two_verdicts_on_honest_answers(ready):
    wrong_port = design("assign z = x & y;").replace("output z", "output w").replace("z =", "w =")
    cases = {
        answer("Prob001_and"): ("passed", "passed"),
        answer("Prob001_and", right=False): ("mismatch", "mismatch"),
        f"[BEGIN]\n{design('assign z = x & y;')}[DONE]": ("passed", "passed"),
        "I cannot.": ("no_code", "syntax error"),
        f"```\n{design('asign z = x;')}```": ("syntax_error", "syntax error"),
        f"```\n{wrong_port}```": ("wrong_ports", "compile error"),
        f"```\n{design('half h(x, z);')}```": ("syntax_error", "unknown module"),
        f"```\n{design('wire c; assign c = q; assign z = c;')}```": ("syntax_error", "unbound name"),
        f"```\n{design('reg z; always @(posedge clk) z <= x;')}```": ("syntax_error", None),
    }
    for completion, (kind, official) in cases.items():
        found = verilog_eval.judge(ready[0], completion)
        assert found.kind == kind, (completion, found)
        assert official is None or found.official == official, (completion, found)
    other = verilog_eval.judge(ready[0], answer("Prob001_and").replace("TopModule", "Other"))
    assert (other.kind, other.passed) == ("wrong_module", False)


@needs_simulator
def test_an_endless_design_is_a_timeout_to_both(ready):
    found = verilog_eval.judge(ready[0], f"```\n{design('initial forever begin end')}```", timeout=1.0)
    assert (found.kind, found.official) == ("timeout", "timeout")


@needs_simulator
def test_a_completion_of_the_module_passes_in_the_completion_task(clone):
    problems = verilog_eval.measured(verilog_eval.load(clone, COMPLETE))
    for completion in ("  assign z = x & y;\nendmodule\n", f"```verilog\n{design('assign z = x & y;')}```"):
        found = verilog_eval.judge(problems[0], completion)
        assert (found.passed, found.official) == (True, "passed"), completion


@needs_simulator
def test_a_problem_whose_reference_fails_cannot_be_passed_and_says_why(clone, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(clone, broken)
    (broken / f"dataset_{SPEC}" / "Prob001_and_ref.sv").write_text("module RefModule(input x, input y, output z); oops")
    problems = verilog_eval.measured(verilog_eval.load(broken))
    assert [bool(one.unscorable) for one in problems] == [True, False, False]
    found = verilog.score(problems[0], answer("Prob001_and"))
    assert (found.kind, found.passed) == ("unscorable", False) and "syntax error" in found.log
    entry = scoring.self_check(broken)
    assert entry["passed"] == 2 and list(entry["unscorable"]) == ["Prob001_and"]


@needs_simulator
def test_scoring_again_gives_the_same_verdicts_and_logs(ready):
    for right in (True, False):
        first, second = (verilog_eval.judge(ready[0], answer("Prob001_and", right)) for _ in range(2))
        assert first == second, "no random name shows"


@pytest.mark.slow
@needs_clone
@needs_simulator
def test_ten_real_references_pass_both_verdicts_and_their_mutants_fail():
    problems = verilog_eval.measured(verilog_eval.load(REAL)[30:40])
    assert not [one.id for one in problems if one.unscorable]
    found = verilog_eval.self_check(problems)
    assert [(one.kind, one.official) for one in found] == [("passed", "passed")] * 10
    mutants = [re.sub(r"(<=|[^<>=!]=(?!=)) ", r"\1 ~", one.reference) for one in problems]
    assert all(mutant != one.reference for mutant, one in zip(mutants, problems, strict=True))
    found = verilog.score_all(problems, mutants, judge=verilog_eval.judge, timeout=5.0)
    assert not [one for one in found if one.passed or one.official == "passed"]


@needs_clone
@needs_simulator
@pytest.mark.slow
def test_151_of_the_156_references_pass_with_version_11():
    entry = scoring.self_check(REAL)
    if "version 11.0" not in entry["iverilog"]:
        pytest.skip(f"the count is that of version 11.0, not of {entry['iverilog']}")
    assert (entry["passed"], entry["total"], entry["official"]["passed"]) == (151, 156, 151)
    numbers = [name[4:7] for name in entry["unscorable"]]
    assert numbers == ["082", "099", "141", "151", "156"]


# --- stored samples ---


@needs_simulator
def test_stored_samples_give_the_contracts_keys_and_the_same_numbers_again(clone, tmp_path, capsys):
    file = tmp_path / "anyones.jsonl"
    rows = [(name, number, answer(name, right=number < passes))
            for name, passes in zip(GATES, (2, 1, 0), strict=True) for number in range(2)]  # fmt: skip
    keys = ("problem", "sample", "completion")
    file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    first, second = (scoring.stored(file, clone) for _ in range(2))
    assert first == second
    assert first.keys() >= {"passed", "total", "pass_at_k", "per_problem", "failures", "iverilog", "official"}
    assert (first["passed"], first["total"], first["failures"]) == (3, 6, {"mismatch": 3})
    assert first["pass_at_k"]["1"][0] == 0.5 and first["pass_at_k"]["2"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert [row["passed"] for row in first["per_problem"].values()] == [2, 1, 0]
    assert first["official"] == {"passed": 3, "total": 6, "pass_rate": 50.0, "differ": []}
    said = capsys.readouterr().err
    assert "official scorer: 3/6 pass" in said and "Icarus Verilog version" in said
    with pytest.raises(UserError, match="pass@3 needs 3 samples of each problem; 2 are there"):
        scoring.stored(file, clone, ks=(3,))
