"""Scores generated Verilog: simulates it beside a reference in the sandbox, and judges.

A design is untrusted twice over: it runs in the sandbox, and it must not be able to claim a pass. The bench
prints its verdict beside a secret of that run, every name of bench, instances and tasks is random, the compiled
simulation reaches the simulator through a pipe (no file to read the secret from), and a design that reaches out of
itself (hierarchical names, force, file and system tasks, include) is refused before it is compiled.
"""

import math
import os
import re
import secrets
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import sandbox, verilog_code

# timeout stands for every limit of time and output; unscorable: the bench cannot pass anybody with this simulator.
KINDS = (
    "passed", "no_code", "syntax_error", "wrong_module", "wrong_ports", "mismatch", "timeout", "attack", "unscorable"
)  # fmt: skip
COMPILE_LIMITS = {"file_bytes": 8 << 20, "output_bytes": 8 << 20}
LOG_CHARACTERS = 4000
ANY = -1  # as a problem's number of comparisons: however many, if any
BLANK = re.compile(r"\{\{([A-Z]\w*)\}\}")
_EXPAND = ["sh", "-c", "iverilog -g2012 -E -o expanded.v design.v >&2 && exec cat expanded.v"]
_COMPILE = ["sh", "-c", 'iverilog -g2012 -s "$0" -o sim bench.v reference.v design.v >&2 && exec cat sim']
_SIMULATE = ["vvp", "-n", "/dev/stdin"]


@dataclass(frozen=True)
class Problem:
    id: str
    family: str
    prompt: str
    reference: str
    testbench: str  # a template: every {{NAME}} in it is filled anew for each run; {{SECRET}} marks the verdict
    top: str
    samples: int  # comparisons that the bench makes, or ANY
    exact_ports: bool = False  # whether a port of another width is a failure
    header: str = ""  # what a completion without a module goes on from
    unscorable: str = ""  # why nobody can pass with this simulator


@dataclass(frozen=True)
class Verdict:
    passed: bool
    kind: str  # one of KINDS
    log: str
    official: str = ""  # the verdict of the benchmark's own scorer, where it has one


def require_iverilog(unsafe: bool = False) -> str:
    """The version line of Icarus Verilog, where the sandbox can see it."""
    compiler = shutil.which("iverilog")
    if compiler is None or shutil.which("vvp") is None:
        raise UserError(
            f"{'vvp' if compiler else 'iverilog'} is not installed, and generated Verilog is scored by simulating it: "
            "apt-get install iverilog (Debian/Ubuntu), brew install icarus-verilog (macOS)"
        )
    path = os.path.realpath(compiler)
    if not unsafe and not path.startswith(tuple(tool + "/" for tool in sandbox.TOOLS)):
        raise UserError(
            f"iverilog is {path}, and the sandbox shows generated code only {', '.join(sandbox.TOOLS)}: "
            "install the system's package (apt-get install iverilog)"
        )
    lines = subprocess.run([path, "-V"], capture_output=True, text=True, timeout=60).stdout.splitlines()
    return lines[0] if lines else "iverilog of unknown version"


def require(unsafe: bool = False) -> str:
    """The simulator's version line, after a check that a sandbox works (or that the user said unsafe)."""
    version = require_iverilog(unsafe)
    if not unsafe:
        sandbox.require()
    return version


def load_problems(path: str | Path) -> list[Problem]:
    """One problem a line; every faulty line is named at once."""
    known: dict[str, type] = get_type_hints(Problem)
    required = set(known) - {"exact_ports", "header", "unscorable"}
    problems, faults = [], []
    for number, line in enumerate(plain.text(Path(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = plain.json_value(line)
        except ValueError as error:
            faults.append(f"line {number}: not JSON ({error})")
            continue
        if not isinstance(entry, dict):
            faults.append(f"line {number}: not an object")
            continue
        wrong = [f"lacks {key}" for key in sorted(required - set(entry))]
        wrong += [f"has unknown {key}" for key in sorted(set(entry) - set(known))]
        mistyped = [key for key in known if key in entry and type(entry[key]) is not known[key]]
        wrong += [f"has {key} that is not {known[key].__name__}" for key in mistyped]
        if wrong:
            faults.append(f"line {number}: {', '.join(wrong)}")
        else:
            problems.append(Problem(**entry))
    if faults or not problems:
        raise UserError(f"{path}: {'; '.join(faults) if faults else 'holds no problem'}")
    return problems


def score(problem: Problem, completion: str, *, unsafe: bool = False, timeout: float = 10.0) -> Verdict:
    """Judges one completion: each stage runs in a box and a scratch folder of its own."""
    code = verilog_code.extract_code(completion, problem.header)
    if code is None:
        return Verdict(False, "no_code", "the completion holds no module ... endmodule")
    delays = verilog_code.timescale(code)
    code = verilog_code.bare(code)
    limits = _limits(timeout)
    if "`include" in code:
        return Verdict(False, "attack", "compiler directive `include")
    if "`" in code:  # macros: judged by what they expand to
        expanded = sandbox.run(_EXPAND, files={"design.v": code.encode()}, limits=limits, unsafe=unsafe)
        if expanded.timed_out or expanded.truncated:
            return Verdict(False, "timeout", "macro expansion ran past its limits")
        if expanded.returncode != 0:
            return Verdict(False, "syntax_error", _log(expanded))
        code = verilog_code.bare(expanded.stdout.decode(errors="replace"))
    code = verilog_code.used(code, problem.top)
    if reason := verilog_code.attack_in(code):
        return Verdict(False, "attack", reason)
    stream = [text for _, text in verilog_code.tokens(code)]
    if not any(pair == ("module", problem.top) for pair in zip(stream, stream[1:], strict=False)):
        return Verdict(False, "wrong_module", f"the completion defines no module {problem.top}")
    if problem.unscorable:
        return Verdict(False, "unscorable", problem.unscorable)
    verdict, samples = simulate(problem, f"{delays}\n{code}", limits, unsafe=unsafe)
    if verdict.passed and problem.samples not in (ANY, samples):
        return Verdict(False, "mismatch", f"{samples} comparisons instead of {problem.samples}\n{verdict.log}")
    return verdict


def _limits(timeout: float) -> sandbox.Limits:
    return sandbox.Limits(wall_seconds=timeout, cpu_seconds=math.ceil(timeout), **COMPILE_LIMITS)


def reference_samples(problem: Problem, *, unsafe: bool = False, timeout: float = 10.0) -> tuple[Verdict, int]:
    """The verdict on a problem's own reference, and how many comparisons its bench makes of it."""
    code = f"{verilog_code.NO_TIMESCALE}\n{problem.reference}"
    return simulate(problem, code, _limits(timeout), unsafe=unsafe)


def simulate(problem: Problem, code: str, limits: sandbox.Limits, *, unsafe: bool = False) -> tuple[Verdict, int]:
    """Compiles bench, reference and design, runs them, and believes nothing but the line with the secret.

    Also returns the number of comparisons, 0 where the simulation did not come to its end.
    """
    names: defaultdict[str, str] = defaultdict(lambda: f"n{secrets.token_hex(16)}")
    bench = BLANK.sub(lambda found: names[found.group(1)], problem.testbench)
    reference = re.sub(rf"\bmodule\s+{re.escape(problem.top)}\b", f"module {names['REF']}", problem.reference)
    sources = {"bench.v": bench, "reference.v": reference, "design.v": code + "\n"}
    files = {name: text.encode() for name, text in sources.items()}
    compiled = sandbox.run([*_COMPILE, names["TB"]], files=files, limits=limits, unsafe=unsafe)
    if fault := _compile_fault(problem, compiled):
        return Verdict(False, fault, _plain(_log(compiled), names)), 0
    ran = sandbox.run(_SIMULATE, stdin=compiled.stdout, limits=limits, unsafe=unsafe)
    return _verdict(ran, names)


def _compile_fault(problem: Problem, compiled: sandbox.Result) -> str | None:
    log = compiled.stderr.decode(errors="replace")
    if compiled.timed_out or compiled.truncated:
        return "timeout"
    if compiled.returncode != 0:
        return "wrong_ports" if re.search(r"is not a port of|Wrong number of ports", log) else "syntax_error"
    other_width = rf"warning: Port \d+ \([^)]*\) of {re.escape(problem.top)} expects"
    return "wrong_ports" if problem.exact_ports and re.search(other_width, log) else None


def _verdict(ran: sandbox.Result, names: dict[str, str]) -> tuple[Verdict, int]:
    if ran.timed_out or ran.truncated:
        what = "time" if ran.timed_out else "output"
        return Verdict(False, "timeout", f"the simulation ran past its limit of {what}"), 0
    text, secret = ran.stdout.decode(errors="replace"), names["SECRET"]
    lines = re.findall(rf"{secret} (\d+) (\d+)\s*$", text, re.MULTILINE)
    log = _plain(_log(ran), names)
    if f"{secret} timeout" in text:
        return Verdict(False, "timeout", f"the bench stopped at its own limit of cycles\n{log}"), 0
    if len(lines) != 1:
        return Verdict(False, "mismatch", f"the simulation ended without its one verdict\n{log}"), 0
    samples, different = map(int, lines[0])
    if samples == 0:
        return Verdict(False, "mismatch", f"the simulation ended before its first comparison\n{log}"), 0
    if different:
        return Verdict(False, "mismatch", f"{different} of {samples} comparisons differ\n{log}"), samples
    return Verdict(True, "passed", log), samples


def _plain(log: str, names: dict[str, str]) -> str:
    """The log without the random names of its run, so that scoring again gives the same text."""
    plain = {drawn: "verdict:" if blank == "SECRET" else blank.lower() for blank, drawn in names.items()}
    return re.sub(r"n[0-9a-f]{32}", lambda found: plain.get(found.group(), found.group()), log)


def _log(result: sandbox.Result) -> str:
    text = (result.stderr or result.stdout).decode(errors="replace")
    return text if len(text) <= LOG_CHARACTERS else text[:LOG_CHARACTERS] + f"... ({len(text)} characters)"


def score_all(
    problems: Sequence[Problem], completions: Sequence[str], *, workers: int | None = None, unsafe: bool = False,
    timeout: float = 10.0, judge: Callable[..., Verdict] = score, each: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:  # fmt: skip
    """One verdict for each pair, in order; the same answer to the same problem is judged once.

    Threads suffice, since the work is done in other processes. `each` is called as verdicts come.
    """
    require(unsafe)
    pairs = list(zip(problems, completions, strict=True))
    distinct = {(problem.id, completion): problem for problem, completion in pairs}
    with ThreadPoolExecutor(workers or sandbox.cores()) as pool:
        jobs = {}
        for (name, completion), problem in distinct.items():
            jobs[name, completion] = pool.submit(judge, problem, completion, unsafe=unsafe, timeout=timeout)
        verdicts = []
        for problem, completion in pairs:
            verdicts.append(jobs[problem.id, completion].result())
            if each is not None:
                each(verdicts[-1])
    return verdicts
