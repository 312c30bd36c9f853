"""benchmarks/claims.yaml read, checked, held against results, and written into the tables of README.md."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "claims.yaml"
README = ROOT / "README.md"
BEGIN = "<!-- Made of benchmarks/claims.yaml by `make bench ARGS=--readme`. -->"
END = "<!-- The end of what is made. -->"
NEEDS = ("module", "env", "program", "folder", "client", "memory", "disk")
OF_THE_RUN = ("seconds", "cpu_seconds")
RUN_KEYS = {"command", "minutes", "needs"}
CLAIM_KEYS = {"id", "what", "run", "by", "key", "at_least", "at_most", "wanted", "form", "unit", "times", "measured",
              "said"}  # fmt: skip


class Wrong(Exception):
    """The claims file cannot be used; every reason is in the message."""


@dataclass(frozen=True)
class Run:
    name: str
    command: str
    minutes: float
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    id: str
    what: str
    run: str
    key: str
    form: str
    figure: float | None = None  # None: not measured yet
    date: str = ""
    machine: str = ""
    at_least: float | None = None
    at_most: float | None = None
    wanted: float | None = None
    unit: str = ""
    times: float = 1.0
    by: str = ""
    said: tuple[str, ...] = ()

    def keeps(self, figure: float) -> bool:
        """Whether a figure keeps the bound; what is no number keeps none."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= figure <= high  # false for NaN

    def reaches(self, figure: float) -> bool:
        """Whether it is as good as was wanted, in the direction of the bound."""
        if self.wanted is None:
            return True
        return figure >= self.wanted if self.at_least is not None else figure <= self.wanted

    def told(self, figure: float | None) -> str:
        return "-" if figure is None else _short(format(figure, self.form)) + self.unit

    @property
    def bound(self) -> str:
        """As the terminal has it, with the direction."""
        told = [f"{sign} {_plain(value)}" for sign, value in ((">=", self.at_least), ("<=", self.at_most))
                if value is not None]  # fmt: skip
        return ", ".join(told)

    @property
    def goal(self) -> str:
        """As README has it: what was wanted, or else the bound."""
        both = [value for value in (self.at_least, self.at_most) if value is not None]
        shown = " to ".join(_plain(value) for value in both) if self.wanted is None else _plain(self.wanted)
        missed = self.figure is not None and not self.reaches(self.figure)
        return shown + self.unit.removesuffix(" apart") + " (missed)" * missed


@dataclass(frozen=True)
class Claims:
    machines: Mapping[str, str]
    runs: Mapping[str, Run]
    claims: Mapping[str, Claim]
    tables: tuple[Mapping[str, Any], ...]

    def of(self, run: str) -> list[Claim]:
        return [claim for claim in self.claims.values() if claim.run == run]


def _short(text: str) -> str:
    """2.2e-05 is 2.2e-5, and there is no minus zero."""
    text = re.sub(r"e([-+])0+(\d)", r"e\1\2", text)
    return text.removeprefix("-") if not re.search("[1-9]", text) else text


def _plain(value: float) -> str:
    if value and abs(value) < 1e-2:
        return _short(f"{value:.3g}" if "e" in f"{value:.3g}" else f"{value:.1e}").replace(".0e", "e")
    return f"{value:,g}" if abs(value) < 1e6 else f"{value:g}"


# --- reading ---


def load(file: Path = FILE) -> Claims:
    try:
        text = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise Wrong(f"{file} is no YAML: {error}") from None
    wrong = list(faults(text))
    if wrong:
        raise Wrong("\n  ".join([f"{file}:", *wrong]))
    runs = {name: Run(name, one["command"], one["minutes"], tuple(one.get("needs", ())))
            for name, one in text["runs"].items()}  # fmt: skip
    claims = {}
    for one in text["claims"]:
        rest = {key: value for key, value in one.items() if key not in ("measured", "said")}
        measured = {key: str(value) if key == "date" else value for key, value in (one["measured"] or {}).items()}
        rest.setdefault("by", f"make bench ONLY={one['run']}")
        claims[one["id"]] = Claim(**rest, **measured, said=tuple(one.get("said", ())))
    return Claims(text["machines"], runs, claims, tuple(text["readme"]))


def faults(text: Any) -> Iterator[str]:
    """All that is wrong with the file's tree; nothing of it is guessed."""
    if not isinstance(text, dict) or set(text) != {"machines", "runs", "claims", "readme"}:
        yield "must have machines, runs, claims and readme, and nothing else"
        return
    for name, run in text["runs"].items():
        if not RUN_KEYS - {"needs"} <= set(run) <= RUN_KEYS:
            yield f"runs.{name}: has {sorted(run)}, of {sorted(RUN_KEYS)}; needs may be left out"
            continue
        if not re.match(r"benchmarks/\w+\.py\b|gemma-tpu ", run["command"]):
            yield f"runs.{name}: the command must begin with benchmarks/….py or gemma-tpu, and is {run['command']}"
        for need in run.get("needs", ()):
            if need.partition(":")[0] not in NEEDS or not need.partition(":")[2]:
                yield f"runs.{name}: needs {need}; known are {', '.join(f'{kind}:…' for kind in NEEDS)}"
    seen: set[str] = set()
    for claim in text["claims"]:
        name = claim.get("id", "a claim without id")
        if name in seen:
            yield f"{name}: stands twice"
        seen.add(name)
        yield from (f"{name}: {fault}" for fault in _faults_of(claim, text))
    for name in sorted(set(text["runs"]) - {claim.get("run") for claim in text["claims"]}):
        yield f"runs.{name}: no claim is measured by it"
    for cell in (cell for table in text["readme"] for row in table["rows"] for cell in row):
        for wanted, _, what in (found.partition(":") for found in re.findall(r"\{(.*?)\}", cell)):
            if wanted not in seen or what not in ("", "bound", "by"):
                yield f"readme: {{{wanted}{':' if what else ''}{what}}} is no claim, nor its bound or its command (by)"


def _faults_of(claim: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[str]:
    missing = {"id", "what", "run", "key", "form", "measured"} - set(claim)
    if missing or set(claim) - CLAIM_KEYS:
        yield f"lacks {sorted(missing)}; unknown: {sorted(set(claim) - CLAIM_KEYS)}"
        return
    if claim["run"] not in text["runs"]:
        yield f"its run {claim['run']} is not among runs"
    if not {"at_least", "at_most"} & set(claim):
        yield "has no bound: at_least, at_most or both"
    words = [name for name in ("at_least", "at_most", "wanted", "times") if not _number(claim.get(name, 0))]
    yield from (f"{name} = {claim[name]!r} is no number (YAML wants 1.0e-4, not 1e-4)" for name in words)
    measured = claim["measured"]
    if measured is None:
        if any(f"{{{claim['id']}}}" in cell for table in text["readme"] for row in table["rows"] for cell in row):
            yield "README names it, and it was never measured"
    elif set(measured) != {"figure", "date", "machine"} or not _number(measured["figure"]):
        yield f"measured must have figure (a number), date and machine, and is {measured}"
    elif measured["machine"] not in text["machines"] or not re.fullmatch(r"\d{4}-\d\d-\d\d", str(measured["date"])):
        yield f"measured on {measured['machine']}, {measured['date']}: a name of machines, and YYYY-MM-DD"
    elif not words and not claim.get("at_least", -math.inf) <= measured["figure"] <= claim.get("at_most", math.inf):
        yield f"the figure that it states, {measured['figure']:g}, is outside its own bound"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- a claim against a result ---


def figure_of(claim: Claim, result: Mapping[str, Any]) -> float:
    """The figure at the claim's key, times its factor; KeyError says which part of the path is not there."""
    if claim.key in OF_THE_RUN:
        return float(result[claim.key]) * claim.times
    return _at(result["figures"], claim.key, claim.key) * claim.times


def _at(tree: Any, path: str, whole: str) -> float:
    """`a.b.0`: names, which may have dots themselves, and numbers in lists."""
    if isinstance(tree, bool | int | float) and not path:
        return float(tree)
    if isinstance(tree, list):
        head, _, rest = path.partition(".")
        if head.isdigit() and int(head) < len(tree):
            return _at(tree[int(head)], rest, whole)
    if isinstance(tree, dict):
        for name in sorted((name for name in tree if path == name or path.startswith(f"{name}.")), key=len):
            return _at(tree[name], path[len(name) + 1 :], whole)
    has = ", ".join(list(tree)[:8]) if isinstance(tree, dict) else repr(tree)[:60]
    raise KeyError(f"no figure at {whole}: {path or 'its end'} is not a number or not in {has}")


# --- README ---


def tables(claims: Claims) -> str:
    """README's tables, with what stands between them."""

    def filled(cell: str) -> str:
        def one(found: re.Match[str]) -> str:
            claim = claims.claims[found[1]]
            return {None: claim.told(claim.figure), "bound": claim.goal, "by": f"`{claim.by}`"}[found[2]]

        return re.sub(r"\{([^{}:]+)(?::(\w+))?\}", one, cell)

    parts = []
    for table in claims.tables:
        rows = [table["head"], *([filled(cell) for cell in row] for row in table["rows"])]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append("\n".join([lines[0], f"|{'---|' * len(table['head'])}", *lines[1:]]))
    return "\n\n".join(parts)


def in_readme(claims: Claims) -> set[str]:
    """The claims that README's tables name."""
    cells = (cell for table in claims.tables for row in table["rows"] for cell in row)
    return {found for cell in cells for found in re.findall(r"\{([^{}:]+)", cell)}


def with_tables(readme: str, claims: Claims) -> str:
    """README's text with the tables made anew."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise Wrong(f"README.md must have the lines {BEGIN} and {END} once each, around its tables")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(claims)}\n\n{END}{rest.partition(END)[2]}"


# --- new figures ---


def with_figures(text: str, found: Mapping[str, tuple[float, str, str]]) -> str:
    """The claims file's text with new (figure, date, machine) of some claims; each `measured` stands on one line."""
    lines, current = [], ""
    for line in text.splitlines(keepends=True):
        if start := re.match(r"  - id: (\S+)", line):
            current = start[1]
        if line.startswith("    measured: ") and current in found:
            figure, date, machine = found[current]
            line = f"    measured: {{figure: {_yaml(figure)}, date: {date}, machine: {machine}}}\n"
        lines.append(line)
    return "".join(lines)


def _yaml(value: float) -> str:
    """Four digits, and a dot in the mantissa: without it YAML reads 1e-05 as a word."""
    text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return re.sub(r"^(-?\d+)e", r"\1.0e", text)
