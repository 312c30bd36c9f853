"""Generated Verilog as text: taken out of a completion, cut down to what is used, and searched for attacks.

A design may name only itself. System tasks beyond arithmetic and printing, include, force, and hierarchical names
whose first part the design does not itself declare are attacks. Names of the bench are random in each run, so that
a design that declares `tb` reaches its own `tb` and nobody else's.
"""

import re
from collections.abc import Mapping

LONGEST_INDEX = 500  # tokens of one index in a hierarchical name
SYSTEM_CALLS = frozenset(
    "$signed $unsigned $clog2 $bits $size $high $low $countones $onehot $onehot0 $isunknown $pow $floor "
    "$ceil $rtoi $itor $display $write $strobe $monitor $time $stime $realtime $random $urandom "
    "$urandom_range".split()
)
REACHING_KEYWORDS = frozenset("force release bind defparam".split())
TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
    | (?P<open>/\*.*)
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
TIMESCALE = re.compile(
    r"^[ \t]*`timescale[ \t]+(10{0,2})[ \t]*([munpf]?s)[ \t]*/[ \t]*(10{0,2})[ \t]*([munpf]?s)\b", re.MULTILINE
)
NO_TIMESCALE = "`timescale 1s/1s"  # what the simulator takes where nothing is said
FENCE = re.compile(r"```[ \t]*(?:verilog|systemverilog|sv|v)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
MARKED = re.compile(r"\[BEGIN\](.*?)(?:\[DONE\]|\Z)", re.DOTALL)  # as verilog-eval's own prompt asks for it
MODULE, MODULE_END = re.compile(r"^[ \t]*module\b", re.MULTILINE), re.compile(r"\bendmodule\b")
BODY_END = re.compile(r"^.*?\bendmodule\b", re.DOTALL)


def extract_code(text: str, header: str = "") -> str | None:
    """The Verilog of a completion: between [BEGIN] and [DONE], else the first fence with a module, else bare modules.

    Where the prompt already gave the module's `header`, a completion without a module goes on from there.
    """
    marked: list[str] = [block for block in MARKED.findall(text) if header or _modules(block)]
    fences: list[str] = FENCE.findall(marked[0] if marked else text)
    for block in [*fences, *marked]:
        if _modules(block):
            return block
    if found := _modules(text):
        return found
    if not header:
        return None
    body = BODY_END.search([*fences, *marked, text][0])
    return f"{header.rstrip()}\n{body.group(0)}\n" if body else None


def _modules(text: str) -> str | None:
    """From the first line that begins a module to the last end of one. As one pattern this would begin anew at every
    line that says `module`: a model that repeats the word would take minutes to read."""
    start = MODULE.search(text)
    ends = [found.end() for found in MODULE_END.finditer(text, start.end())] if start else []
    return text[start.start() : ends[-1]] if start and ends else None


def tokens(code: str) -> list[tuple[str, str]]:
    """(kind, text); the kinds are TOKEN's group names."""
    return [(str(match.lastgroup), match.group()) for match in TOKEN.finditer(code)]


def bare(code: str) -> str:
    """The code without comments, harmless directives and control characters: what we check, and compile."""
    code = CONTROL.sub(" ", code.replace("\r\n", "\n"))
    code = TOKEN.sub(lambda found: " " if found.lastgroup == "comment" else found.group(), code)
    return HARMLESS.sub("", code)


def timescale(code: str) -> str:
    """The first well-formed timescale of a completion, in our own spelling: a design's delays keep their meaning."""
    found = TIMESCALE.search(code)
    return "`timescale {}{}/{}{}".format(*found.groups()) if found else NO_TIMESCALE


def used(code: str, top: str) -> str:
    """A bare design without the modules that `top` does not use: models often add a bench of their own."""
    spans, start = {}, None
    matches = [match for match in TOKEN.finditer(code) if match.lastgroup == "name"]
    for match, following in zip(matches, [*matches[1:], None], strict=False):  # may be none at all
        if match.group() in ("module", "macromodule") and start is None and following:
            start, name = match.start(), following.group()
        elif match.group() == "endmodule" and start is not None:
            if name in spans:  # two of one name: left for the compiler to refuse
                return code
            spans[name], start = (start, match.end()), None
    if top not in spans or start is not None:
        return code
    reached, queue = set(), [top]
    while queue:
        name = queue.pop()
        reached.add(name)
        inside = {text for kind, text in tokens(code[slice(*spans[name])]) if kind == "name"}
        queue += (inside & set(spans)) - reached
    for name in sorted(set(spans) - reached, key=lambda name: -spans[name][0]):
        code = code[: spans[name][0]] + code[spans[name][1] :]
    return code


def attack_in(code: str) -> str | None:
    """Why a bare design is refused, or None."""
    stream = [("other", ";"), *tokens(code), ("other", ";")]
    own = _declared(stream)
    roots: dict[int, str | None] = {}
    for at, (kind, text) in enumerate(stream[1:-1], 1):
        before, (after_kind, after) = stream[at - 1][1], stream[at + 1]
        if kind == "system" and text not in SYSTEM_CALLS:
            return f"system task or function {text}"
        if kind == "directive":
            return f"compiler directive {text}"
        if text == '"' or kind == "open":
            return "a string or comment without an end"
        if kind == "name" and text in REACHING_KEYWORDS:
            return f"keyword {text}"
        if text == "." and not (before in ("(", ",") and (after_kind == "name" or after == "*")):
            root = roots[at] = _root(stream, at, roots)
            if after_kind != "name" or root not in own:
                return f"hierarchical name: {root or before}.{after}"
    return None


def _declared(stream: list[tuple[str, str]]) -> set[str]:
    """Names that stand where a declaration or an instance puts them: after a type, a range, `}`, `:` or a comma."""
    found = set()
    for (before_kind, before), (kind, text), (_, after) in zip(stream, stream[1:], stream[2:], strict=False):
        placed = before_kind == "name" or before in ("]", "}", ")", ":", ",")
        if kind == "name" and placed and after != ".":
            found.add(text)
    return found


def _root(stream: list[tuple[str, str]], at: int, roots: Mapping[int, str | None]) -> str | None:
    """The first part of the name whose dot stands at `at`: `a` in a[3].b.c. `roots`: of the dots before this one."""
    end = max(0, at - LONGEST_INDEX)
    while True:
        at -= 1
        depth = 0
        while at > end and (stream[at][1] == "]" or depth):  # an index
            depth += {"]": 1, "[": -1}.get(stream[at][1], 0)
            at -= 1
        if depth or stream[at][0] != "name":
            return None
        if stream[at - 1][1] != ".":
            return stream[at][1]
        at -= 1
        if at in roots:
            return roots[at]
