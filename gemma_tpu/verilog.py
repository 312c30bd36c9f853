"""Scores generated Verilog: takes the code out of a completion, simulates it beside a reference, judges.

A design is untrusted twice over: it runs in the sandbox, and it must not be able to claim a pass. The bench
prints its verdict beside a secret of that run, bench and instance names are random, the compiled simulation
reaches the simulator through a pipe (no file to read the secret from), and a design that reaches out of
itself (hierarchical names, force, file and system tasks, include) is refused before it is compiled. Benches
must hold no tasks, functions or named blocks: those can be called from below without a hierarchical name.
"""

import json
import math
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

from gemma_tpu import sandbox
from gemma_tpu.errors import UserError

KINDS = ("passed", "no_code", "syntax_error", "wrong_module", "mismatch", "timeout", "attack")
SYSTEM_CALLS = frozenset(
    "$signed $unsigned $clog2 $bits $size $high $low $countones $onehot $onehot0 $isunknown $pow $floor "
    "$ceil $rtoi $itor $display $write $strobe $monitor $time $stime $realtime $random $urandom "
    "$urandom_range".split()
)
REACHING_KEYWORDS = frozenset("force release bind defparam".split())
TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
    | (?P<string>"(?:\\[^\n]|[^"\\\n])*")
    | (?P<name>\\\S+|[A-Za-z_][\w$]*)
    | (?P<system>\$[\w$]*)
    | (?P<directive>`\w*)
    | (?P<number>\d[\d_]*\.\d[\d_]*(?:[eE][+-]?\d+)?|[\d']\w*)
    | (?P<other>\S)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
# Directives that do no harm and that nothing here needs: their lines are dropped, so that what has been
# checked is what the compiler reads.
HARMLESS = re.compile(
    r"^[ \t]*`(?:timescale|default_nettype|resetall|celldefine|endcelldefine)\b.*$", re.MULTILINE
)
FENCE = re.compile(r"```[ \t]*(?:verilog|systemverilog|sv|v)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
MODULES = re.compile(r"^[ \t]*module\b.*\bendmodule\b", re.DOTALL | re.MULTILINE)
COMPILE_LIMITS = {"file_bytes": 8 << 20, "output_bytes": 8 << 20}
LOG_CHARACTERS = 4000
_EXPAND = ["sh", "-c", "iverilog -g2012 -E -o expanded.v design.v >&2 && exec cat expanded.v"]
_COMPILE = ["sh", "-c", 'iverilog -g2012 -s "$0" -o sim bench.v reference.v design.v >&2 && exec cat sim']


@dataclass(frozen=True)
class Problem:
    id: str
    family: str
    prompt: str
    reference: str
    testbench: str  # a template: {{TB}} {{REF}} {{REF_INST}} {{DUT_INST}} {{SECRET}} are filled for each run
    top: str
    samples: int  # comparisons that the bench makes
    exact_ports: bool = False  # whether a port of another width is a failure


@dataclass(frozen=True)
class Verdict:
    passed: bool
    kind: str  # one of KINDS; timeout stands for every limit of time and output
    log: str


def require_iverilog(unsafe: bool = False) -> str:
    """The version line of Icarus Verilog, where the sandbox can see it."""
    missing = [tool for tool in ("iverilog", "vvp") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"{missing[0]} is not installed, and generated Verilog is scored by simulating it: "
            "apt-get install iverilog (Debian/Ubuntu), brew install icarus-verilog (macOS)"
        )
    path = os.path.realpath(shutil.which("iverilog"))
    if not unsafe and not path.startswith(tuple(tool + "/" for tool in sandbox.TOOLS)):
        raise UserError(
            f"iverilog is {path}, and the sandbox shows generated code only {', '.join(sandbox.TOOLS)}: "
            "install the system's package (apt-get install iverilog)"
        )
    lines = subprocess.run([path, "-V"], capture_output=True, text=True, timeout=60).stdout.splitlines()
    return lines[0] if lines else "iverilog of unknown version"


def load_problems(path: str | os.PathLike) -> list[Problem]:
    """One problem a line; every faulty line is named at once."""
    known = {field.name: field.type for field in fields(Problem)}
    required = set(known) - {"exact_ports"}
    problems, faults = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: not JSON ({error.msg})")
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


def extract_code(text: str) -> str | None:
    """The Verilog of a completion: its first fenced block with a whole module, else the bare modules."""
    for block in FENCE.findall(text):
        if MODULES.search(block):
            return block
    found = MODULES.search(text)
    return found.group(0) if found else None


def tokens(code: str) -> list[tuple[str, str]]:
    """(kind, text); the kinds are TOKEN's group names."""
    return [(match.lastgroup, match.group()) for match in TOKEN.finditer(code)]


def bare(code: str) -> str:
    """The code without comments, harmless directives and control characters: what we check, and compile."""
    code = CONTROL.sub(" ", code.replace("\r\n", "\n"))
    code = TOKEN.sub(lambda found: " " if found.lastgroup == "comment" else found.group(), code)
    return HARMLESS.sub("", code)


def attack_in(code: str) -> str | None:
    """Why a bare design is refused, or None."""
    stream = [("other", ";"), *tokens(code), ("other", ";")]
    for (_, before), (kind, text), (after_kind, after) in zip(stream, stream[1:], stream[2:], strict=False):
        if kind == "system" and text not in SYSTEM_CALLS:
            return f"system task or function {text}"
        if kind == "directive":
            return f"compiler directive {text}"
        if text == '"' or (text == "/" and after == "*"):
            return "a string or comment without an end"
        if kind == "name" and text in REACHING_KEYWORDS:
            return f"keyword {text}"
        if text == "." and not (before in ("(", ",") and (after_kind == "name" or after == "*")):
            return f"hierarchical name: {before}.{after}"
    return None


def score(problem: Problem, completion: str, *, unsafe: bool = False, timeout: float = 10.0) -> Verdict:
    """Judges one completion: each stage runs in a box and a scratch folder of its own."""
    code = extract_code(completion)
    if code is None:
        return Verdict(False, "no_code", "the completion holds no module ... endmodule")
    code = bare(code)
    limits = sandbox.Limits(wall_seconds=timeout, cpu_seconds=math.ceil(timeout), **COMPILE_LIMITS)
    if "`include" in code:
        return Verdict(False, "attack", "compiler directive `include")
    if "`" in code:  # macros: judged by what they expand to
        expanded = sandbox.run(_EXPAND, files={"design.v": code.encode()}, limits=limits, unsafe=unsafe)
        if expanded.timed_out or expanded.truncated:
            return Verdict(False, "timeout", "macro expansion ran past its limits")
        if expanded.returncode != 0:
            return Verdict(False, "syntax_error", _log(expanded))
        code = bare(expanded.stdout.decode(errors="replace"))
    if reason := attack_in(code):
        return Verdict(False, "attack", reason)
    stream = [text for _, text in tokens(code)]
    if not any(pair == ("module", problem.top) for pair in zip(stream, stream[1:], strict=False)):
        return Verdict(False, "wrong_module", f"the completion defines no module {problem.top}")
    return simulate(problem, code, limits, unsafe=unsafe)


def simulate(problem: Problem, code: str, limits: sandbox.Limits, *, unsafe: bool = False) -> Verdict:
    """Compiles bench, reference and design, runs them, and believes nothing but the line with the secret."""
    blanks = ("TB", "REF", "REF_INST", "DUT_INST", "SECRET")
    names = {blank: f"n{secrets.token_hex(16)}" for blank in blanks}
    bench = re.sub(r"\{\{(\w+)\}\}", lambda found: names[found.group(1)], problem.testbench)
    reference = re.sub(rf"\bmodule\s+{re.escape(problem.top)}\b", f"module {names['REF']}", problem.reference)
    sources = {"bench.v": bench, "reference.v": reference, "design.v": code + "\n"}
    files = {name: text.encode() for name, text in sources.items()}
    compiled = sandbox.run([*_COMPILE, names["TB"]], files=files, limits=limits, unsafe=unsafe)
    if fault := _compile_fault(problem, compiled):
        return Verdict(False, fault, _log(compiled))
    ran = sandbox.run(["vvp", "-n", "/dev/stdin"], stdin=compiled.stdout, limits=limits, unsafe=unsafe)
    return _verdict(problem, ran, names["SECRET"])


def _compile_fault(problem: Problem, compiled: sandbox.Result) -> str | None:
    log = compiled.stderr.decode(errors="replace")
    if compiled.timed_out or compiled.truncated:
        return "timeout"
    if compiled.returncode != 0:
        return "wrong_module" if re.search(r"is not a port of|Wrong number of ports", log) else "syntax_error"
    other_width = rf"warning: Port \d+ \([^)]*\) of {re.escape(problem.top)} expects"
    return "wrong_module" if problem.exact_ports and re.search(other_width, log) else None


def _verdict(problem: Problem, ran: sandbox.Result, secret: str) -> Verdict:
    if ran.timed_out or ran.truncated:
        what = "time" if ran.timed_out else "output"
        return Verdict(False, "timeout", f"the simulation ran past its limit of {what}")
    lines = re.findall(rf"{secret} (\d+) (\d+)\s*$", ran.stdout.decode(errors="replace"), re.MULTILINE)
    log = _log(ran).replace(secret, "verdict:")
    if len(lines) != 1:
        return Verdict(False, "mismatch", f"the simulation ended without its one verdict\n{log}")
    samples, different = map(int, lines[0])
    if samples != problem.samples or samples == 0:
        return Verdict(False, "mismatch", f"{samples} comparisons instead of {problem.samples}\n{log}")
    if different:
        return Verdict(False, "mismatch", f"{different} of {samples} comparisons differ\n{log}")
    return Verdict(True, "passed", log)


def _log(result: sandbox.Result) -> str:
    text = (result.stderr or result.stdout).decode(errors="replace")
    return text if len(text) <= LOG_CHARACTERS else text[:LOG_CHARACTERS] + f"... ({len(text)} characters)"


def score_all(
    problems: Sequence[Problem],
    completions: Sequence[str],
    *,
    workers: int | None = None,
    unsafe: bool = False,
    timeout: float = 10.0,
) -> list[Verdict]:
    """One verdict for each pair, in order; threads suffice, since the work is done in other processes."""
    require_iverilog(unsafe)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        jobs = [
            pool.submit(score, problem, completion, unsafe=unsafe, timeout=timeout)
            for problem, completion in zip(problems, completions, strict=True)
        ]
        return [job.result() for job in jobs]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate from n samples of which c passed: 1 - C(n-c, k) / C(n, k)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= passed ({c}) <= samples ({n}) and 1 <= k ({k}) <= samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
