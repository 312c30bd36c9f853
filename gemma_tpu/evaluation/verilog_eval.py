"""NVIDIA's verilog-eval v2, from a local clone: both tasks, its own scorer, and its benches made safe.

    git clone https://github.com/NVlabs/verilog-eval

The benches are used as they stand but for five things: every scope in them gets a random name in each run, the
verdict and the bench's own timeout are printed beside a secret, and no wave files are written. The official scorer
runs on the untouched files (in the sandbox too) and is reported beside our verdict: it believes what a design prints.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import sandbox, verilog
from gemma_tpu.evaluation.verilog_code import TOKEN, tokens

TASKS = ("spec-to-rtl", "code-complete-iccad2023")
TOP = "TopModule"
TIMEOUT = 30.0  # the official scorer's, in seconds
FETCH = "git clone https://github.com/NVlabs/verilog-eval"
_OFFICIAL = [
    "sh", "-c",
    "{ iverilog -Wall -Winfloop -Wno-timescale -g2012 -s tb -o sim sample.sv test.sv ref.sv; "
    'timeout "$0" vvp sim; [ $? != 124 ] || echo TIMEOUT; } 2>&1',
]  # fmt: skip
# What the official scorer looks for in the log, first match in a line wins, and its letter for it.
_OFFICIAL_SIGNS = (
    ("syntax error", "S"),
    ("error: This assignment requires an explicit cast", "e"),
    ("error: Sized numeric constant must have a size greater than zero", "0"),
    ("warning: always_comb process has no sensitivities", "n"),
    ("found no sensitivities so it will never trigger", "n"),
    ("is declared here as wire", "w"),
    ("Unknown module type", "m"),
    ("Unable to bind wire/reg/memory `clk'", "c"),
    ("TIMEOUT", "T"),
)
OFFICIAL = {
    ".": "passed", "S": "syntax error", "e": "cast needed", "0": "zero-sized number", "n": "no sensitivities",
    "w": "wire assigned", "m": "unknown module", "c": "no clk", "T": "timeout", "p": "unbound name",
    "C": "compile error", "r": "reset kind", "R": "mismatch",
}  # fmt: skip


@dataclass(frozen=True)
class EvalProblem(verilog.Problem):
    task: str = TASKS[0]
    test_file: str = ""  # as in the clone
    ref_file: str = ""


def load(clone: str | Path, task: str = TASKS[0]) -> list[EvalProblem]:
    """The problems of one task, in the clone's order; everything that is missing is named at once."""
    clone = Path(clone)
    folder = clone if clone.name == f"dataset_{task}" else clone / f"dataset_{task}"
    if not folder.is_dir():
        raise UserError(f"{clone}: no dataset_{task}/ here; fetch the benchmark by: {FETCH}")
    names = sorted(path.name.removesuffix("_prompt.txt") for path in folder.glob("Prob*_prompt.txt"))
    needed = ["_test.sv", "_ref.sv"] + (["_ifc.txt"] if task == TASKS[1] else [])
    missing = [name + end for name in names for end in needed if not (folder / (name + end)).is_file()]
    if missing or not names:
        raise UserError(f"{folder}: {'lacks ' + ', '.join(missing) if missing else 'holds no Prob*_prompt.txt'}")
    problems, faults = [], []
    for name in names:
        text = {end: plain.text(folder / (name + end)) for end in ("_prompt.txt", *needed)}
        try:
            bench = template(text["_test.sv"])
        except ValueError as error:
            faults.append(f"{name}_test.sv {error}")
            continue
        problems.append(EvalProblem(
            id=name, family=task, prompt=text["_prompt.txt"], testbench=bench, top=TOP, samples=0, task=task,
            reference=re.sub(r"\bRefModule\b", TOP, text["_ref.sv"]), header=text.get("_ifc.txt", ""),
            test_file=text["_test.sv"], ref_file=text["_ref.sv"],
        ))  # fmt: skip
    if faults:
        raise UserError(f"{folder}: benches in another form than verilog-eval v2's: {'; '.join(faults)}")
    return problems


def choose(problems: Sequence[EvalProblem], wanted: Sequence[str]) -> list[EvalProblem]:
    """Those whose names begin with one of `wanted`; all where nothing is wanted."""
    unknown = [word for word in wanted if not any(one.id.startswith(word) for one in problems)]
    if unknown:
        raise UserError(f"no problem begins with {', '.join(unknown)}; the first is {problems[0].id}")
    return [one for one in problems if not wanted or one.id.startswith(tuple(wanted))]


def template(bench: str) -> str:
    """A bench whose scopes have blanks for names, and whose verdict stands beside the secret."""
    if verilog.BLANK.search(bench):
        raise ValueError("holds {{...}} of its own")
    bench, verdicts = re.subn(
        r'"Mismatches: %1d in %1d samples"\s*,\s*stats1\.errors\s*,\s*stats1\.clocks',
        '"{{SECRET}} %0d %0d", stats1.clocks, stats1.errors', bench,
    )  # fmt: skip
    bench, timeouts = re.subn(r'\$display\(\s*"TIMEOUT"\s*\)', '$display("{{SECRET}} timeout")', bench)
    if (verdicts, timeouts) != (1, 1):
        raise ValueError(f"prints its verdict {verdicts} times and its timeout {timeouts} times, not once each")
    bench = re.sub(r"\$dump(?:file|vars)\s*\([^;]*\)\s*;", ";", bench)
    blanks = {name: f"{{{{{name.upper()}}}}}" for name in _scopes(bench)} | {"RefModule": "{{REF}}", "tb": "{{TB}}"}
    pieces, at, before = [], 0, ""
    for found in TOKEN.finditer(bench):
        if found.lastgroup == "name" and found.group() in blanks and before != ".":
            pieces += [bench[at : found.start()], blanks[found.group()]]
            at = found.end()
        before = found.group() if found.lastgroup != "comment" else before
    return "".join([*pieces, bench[at:]])


def _scopes(bench: str) -> set[str]:
    """What could be reached or called by name from below: modules, instances, tasks, functions, named blocks."""
    stream = [(kind, text) for kind, text in tokens(bench) if kind != "comment"]
    modules = {text for (_, before), (_, text) in zip(stream, stream[1:], strict=False) if before == "module"}
    found = set(modules) - {TOP}
    for number, (kind, text) in enumerate(stream[1:], 1):
        before = stream[number - 1][1]
        if kind == "name" and before in (*modules, "RefModule", TOP):
            found.add(text)
        elif text in ("task", "function") and before != "end" + text:
            end = next((at for at, (_, word) in enumerate(stream[number:]) if word in (";", "(")), 8)
            names = [word for word_kind, word in stream[number + 1 : number + end] if word_kind == "name"]
            found |= set(names[-1:])
        elif kind == "name" and before == ":" and stream[number - 2][1] in ("begin", "fork"):
            found.add(text)
    return found


# --- scoring ---


def measured(
    problems: Sequence[EvalProblem], *, workers: int | None = None, unsafe: bool = False, timeout: float = TIMEOUT,
) -> list[EvalProblem]:  # fmt: skip
    """The problems with the number of comparisons that each reference gives, or why it cannot be had."""
    verilog.require(unsafe)

    def measure(problem: EvalProblem) -> EvalProblem:
        verdict, samples = verilog.reference_samples(problem, unsafe=unsafe, timeout=timeout)
        if samples:
            return replace(problem, samples=samples)
        return replace(problem, unscorable=f"its own reference ends in {verdict.kind}: {verdict.log}")

    with ThreadPoolExecutor(workers or sandbox.cores()) as pool:
        return list(pool.map(measure, problems))


def judge(problem: EvalProblem, completion: str, *, unsafe: bool = False, timeout: float = TIMEOUT) -> verilog.Verdict:
    """Our verdict, and the official scorer's beside it."""
    mine = verilog.score(problem, completion, unsafe=unsafe, timeout=timeout)
    if mine.kind == "timeout":  # the official scorer has the same limit, and would only wait for it again
        return replace(mine, official=OFFICIAL["T"])
    return replace(mine, official=official(problem, completion, unsafe=unsafe, timeout=timeout))


def official(problem: EvalProblem, completion: str, *, unsafe: bool = False, timeout: float = TIMEOUT) -> str:
    """What the benchmark's own scorer says: its extraction, its compiler options, its reading of the log."""
    code = official_code(completion, problem)
    sources = {"sample.sv": code, "test.sv": problem.test_file, "ref.sv": problem.ref_file}
    limits = sandbox.Limits(
        wall_seconds=timeout + 5, cpu_seconds=int(timeout) + 5, file_bytes=64 << 20, scratch_bytes=96 << 20,
        output_bytes=8 << 20,
    )  # fmt: skip
    files = {name: text.encode() for name, text in sources.items()}
    ran = sandbox.run([*_OFFICIAL, f"{timeout:g}"], files=files, limits=limits, unsafe=unsafe)
    log = ran.stdout.decode(errors="replace") + ("\nTIMEOUT\n" if ran.timed_out or ran.truncated else "")
    return OFFICIAL[_official_letter(log, code)]


def _official_letter(log: str, code: str) -> str:
    unbound = compile_error = clean = False
    for line in log.split("\n"):
        compile_error |= "error" in line and "syntax error" not in line
        sign = next((letter for text, letter in _OFFICIAL_SIGNS if text in line), None)
        if sign:
            return sign
        unbound |= "Unable to bind wire/reg" in line
        clean |= bool(re.fullmatch(r"Mismatches: 0+ in \d+ samples", line))
    if unbound or compile_error or clean:
        return "p" if unbound else "C" if compile_error else "."
    return "r" if re.search(r"(?:pos|neg)edge reset|posedge r\)", code) else "R"


def official_code(completion: str, problem: EvalProblem) -> str:
    """The code that the official scripts take out of a completion, line by line as they do."""
    lines = completion.splitlines()
    if problem.task == TASKS[0]:
        starts = [at for at, line in enumerate(lines) if line.lstrip().startswith("[BEGIN]")]
        if starts:
            ends = [at for at in range(starts[0] + 1, len(lines)) if lines[at].rstrip().endswith("[DONE]")]
            if not ends:
                return "\n"
            block = [lines[starts[0]].lstrip(), *lines[starts[0] + 1 : ends[0] + 1]]
            return "\n".join(line.replace("[BEGIN]", "").replace("[DONE]", "") for line in block) + "\n"
    ticks = [at for at, line in enumerate(lines) if line.startswith("```")]
    modules = [at for at, line in enumerate(lines) if line.startswith(f"module {TOP}")]
    ends = [at for at, line in enumerate(lines) if line.startswith("endmodule")]
    has_module = bool(modules) and not (ends and ends[0] < modules[0])
    if len(ticks) >= 2:
        kept = lines[ticks[0] + 1 : ticks[1]]
    else:
        start = 0
        if has_module:
            start = next(at for at, line in enumerate(lines) if line.strip().startswith(f"module {TOP}"))
        stops = [at for at, line in enumerate(lines) if line.strip().startswith("endmodule")]
        kept = [line for line in lines[start : stops[0] + 1 if stops else None] if not line.startswith("```")]
    if problem.task == TASKS[1] and not has_module:
        kept = [problem.header, *kept]
    return "\n".join(["", *kept, ""])


def self_check(
    problems: Sequence[EvalProblem], *, workers: int | None = None, unsafe: bool = False, timeout: float = TIMEOUT,
    each: Callable[[verilog.Verdict], None] | None = None,
) -> list[verilog.Verdict]:  # fmt: skip
    """Every reference as if a model had written it, through the very path of a completion."""
    completions = [f"```verilog\n{problem.reference}\n```\n" for problem in problems]
    open_ended = [replace(problem, samples=verilog.ANY) for problem in problems]
    return verilog.score_all(
        open_ended, completions, workers=workers, unsafe=unsafe, timeout=timeout, judge=judge, each=each
    )
