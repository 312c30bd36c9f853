"""Measures the claims of benchmarks/claims.yaml on this machine: `make bench`.

    python benchmarks/run.py [--only ID …] [--envs .bench-envs] [--install] [--accept]
    python benchmarks/run.py --from-results      # what was measured, against the claims, without running
    python benchmarks/run.py --readme            # README's tables made anew of the claims
    python benchmarks/run.py --list

Each run is one process, one after another; its figures go to benchmarks/results/DATE-ID.json with the command, the
machine, the versions and the time. ID is a run or one of its claims. What cannot run here is left out by name, with
what is missing, and counts as not measured. A claim is broken when its bound is, when the run failed and when the run
does not write its figure; then the exit code is 1. `--accept` takes the figures that hold over into claims.yaml and
README. The pictures of benchmarks/pictures/ are drawn of the newest results.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pictures
from claims import FILE, README, ROOT, Claim, Claims, Run, Wrong, figure_of, load, with_figures, with_tables
from peers import environments

RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "pictures"
PACKAGES = ("gemma_tpu", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors",
            "tokenizers", "transformers", "torch", "peft")  # fmt: skip
BUSY = 0.5  # load for each core, above which times are not those of a quiet machine
HOLDS, BROKEN, NOT = "holds", "BROKEN", "not measured"
Result = dict[str, Any]


class Verdict(NamedTuple):
    claim: Claim
    state: str
    figure: float | None
    why: str = ""


# --- what can run here ---


def missing(need: str, envs: Path) -> str | None:
    """What of it is not here, and how to get it; None where it is."""
    kind, _, name = need.partition(":")
    clients = Path(os.environ.get("GEMMA_TPU_CLIENTS", ROOT / ".client-envs"))
    if kind == "module":
        return None if importlib.util.find_spec(name) else f"no module {name}: pip install -e '.[dev]'"
    if kind == "env":
        told = f"no environment {name} in {envs}: make bench ARGS=--install makes it (2 GB)"
        return None if environments.ready(name, envs) else told
    if kind == "program":
        return None if shutil.which(name) else f"no program {name}"
    if kind == "folder":
        return None if (ROOT / name).is_dir() else f"no folder {name} in the checkout"
    if kind == "client":
        return None if (clients / name).is_dir() else f"no {name} in {clients}: make test-baseline puts it there"
    free = shutil.disk_usage(tempfile.gettempdir()).free if kind == "disk" else _meminfo("MemAvailable")
    return None if free >= float(name) * 2**30 else f"{free / 2**30:.0f} GiB of {kind} are free, and it needs {name}"


def _meminfo(field: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def machine() -> str:
    accelerators = [name for name in ("accel0", "vfio/0", "nvidia0") if Path("/dev", name).exists()]
    cores, gib = len(os.sched_getaffinity(0)), round(_meminfo("MemTotal") / 2**30)
    return f"{cores} CPU cores, {gib} GiB, {', '.join(accelerators) or 'no accelerator'}"


def versions(run: Run, envs: Path) -> dict[str, Any]:
    """Of this environment, of the checkout, and of the peers that the run needs."""
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    found["commit"] = commit.stdout.strip() or "not a checkout"
    for env in (need.partition(":")[2] for need in run.needs if need.startswith("env:")):
        site = [str(path) for path in (envs / env).glob("lib/python*/site-packages")]
        there = {one.name: one.version for one in importlib.metadata.distributions(path=site)}
        names = [wanted.partition("==")[0] for wanted in environments.PACKAGES[env]]
        found[f"peer {env}"] = {name: there.get(name, "not found") for name in names}
    return found


# --- running ---


def words(run: Run, figures: Path, envs: Path) -> list[str]:
    """The process of a run, which writes its figures to that file or, as `gemma-tpu` does, to stdout."""
    program, *rest = shlex.split(run.command)
    if program == "gemma-tpu":
        return [sys.executable, "-m", "gemma_tpu", *rest, "--json"]
    more = ["--envs", str(envs.resolve())] if any(need.startswith("env:") for need in run.needs) else []
    return [sys.executable, str(ROOT / program), *rest, *more, "--json", str(figures)]


def measure(run: Run, envs: Path) -> Result:
    """Runs it; a run that fails or writes no JSON has no figures."""
    began, load_before = datetime.datetime.now(datetime.UTC), os.getloadavg()[0]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        on_stdout = run.command.startswith("gemma-tpu")
        cpu, clock = _children(), time.perf_counter()
        with file.open("w") as out:  # all that a script prints is for the reader, and the table has stdout
            done = subprocess.run(words(run, file, envs), cwd=ROOT, env=os.environ | {"PYTHONPATH": paths},
                                  stdout=out if on_stdout else sys.stderr)  # fmt: skip
        seconds, cpu = time.perf_counter() - clock, _children() - cpu
        try:
            figures = json.loads(file.read_text()) if done.returncode == 0 else None
        except json.JSONDecodeError:
            figures = None
    return {
        "run": run.name, "command": run.command, "began": began.isoformat(timespec="seconds"), "machine": machine(),
        "load_before": round(load_before, 2), "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
        "exit": done.returncode, "versions": versions(run, envs), "figures": figures,
    }  # fmt: skip


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def keep(result: Result, folder: Path) -> Path:
    """The result under its date and name; one that is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = f"{result['began'][:10]}-{result['run']}", 1
    while (path := folder / f"{stem}{f'.{number}' if number > 1 else ''}.json").exists():
        number += 1
    with path.open("x") as file:
        file.write(json.dumps(result, indent=1) + "\n")
    return path


def newest(folder: Path) -> dict[str, Result]:
    """The last result of each run."""
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            one = json.loads(path.read_text())
            if one["run"] not in found or found[one["run"]]["began"] <= one["began"]:
                found[one["run"]] = one
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Wrong(f"{path} is no result file ({error!r}): remove it") from None
    return found


# --- checking ---


def check(claims: Iterable[Claim], run: Run, result: Result | None, why: str = "") -> list[Verdict]:
    """Every claim of a run; without a result, `why` there is none."""
    if result is not None and result["command"] != run.command:
        result, why = None, "its last result is of another command"
    if result is None:
        return [Verdict(claim, NOT, None, why) for claim in claims]
    return [_verdict(claim, result) for claim in claims]


def _verdict(claim: Claim, result: Result) -> Verdict:
    if result["exit"]:
        return Verdict(claim, BROKEN, None, f"the run ended with {result['exit']}")
    try:
        figure = figure_of(claim, result)
    except KeyError as error:
        return Verdict(claim, BROKEN, None, error.args[0])
    kept = claim.keeps(figure)
    return Verdict(claim, HOLDS if kept else BROKEN, figure, "" if kept else f"outside its bound, {claim.bound}")


def table(verdicts: Sequence[Verdict]) -> str:
    head = ("claim", "stated", "found", "bound", "state", "what")
    rows = [head]
    for one in verdicts:
        figure = "-" if one.figure is None else one.claim.told(one.figure)
        rows.append((one.claim.id, one.claim.told(one.claim.figure), figure, one.claim.bound, one.state,
                     one.claim.what))  # fmt: skip
    widths = [max(len(row[at]) for row in rows) for at in range(len(head) - 1)]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row[:-1], "<>><<", widths, strict=True)]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many hold; every broken and every left out one by name, with its reason."""
    lines = []
    for state in (NOT, BROKEN):
        reasons: dict[str, list[str]] = {}
        for one in verdicts:
            if one.state == state:
                reasons.setdefault(one.why, []).append(one.claim.id)
        lines += [f"{state}: {', '.join(names)}: {why}" for why, names in reasons.items()]
    count = {state: sum(one.state == state for one in verdicts) for state in (HOLDS, BROKEN, NOT)}
    return "\n".join([*lines, ", ".join(f"{number} {state}" for state, number in count.items())])


def take_over(verdicts: Sequence[Verdict], results: Mapping[str, Result], claims: Claims) -> None:
    """The figures that hold, into claims.yaml and README."""
    names = {words: name for name, words in claims.machines.items()}
    found = {}
    for one in verdicts:
        if one.state == HOLDS and one.figure is not None:
            result = results[one.claim.run]
            if result["machine"] not in names:
                raise Wrong(f"claims.yaml has no name for this machine: add `name: {result['machine']}` to machines")
            found[one.claim.id] = one.figure, result["began"][:10], names[result["machine"]]
    _replace(FILE, with_figures(FILE.read_text(), found))
    _replace(README, with_tables(README.read_text(), load()))
    print(f"{len(found)} figures taken over into {FILE.name} and README.md", file=sys.stderr)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


# --- the command ---


def chosen(claims: Claims, only: Sequence[str]) -> dict[str, list[Claim]]:
    """The runs to make, each with the claims that are asked for."""
    unknown = [name for name in only if name not in claims.runs and name not in claims.claims]
    if unknown:
        raise Wrong(f"no run and no claim: {', '.join(unknown)}; runs are {', '.join(claims.runs)}")
    picked = {name: [one for one in claims.of(name) if not only or name in only or one.id in only]
              for name in claims.runs}  # fmt: skip
    return {name: found for name, found in picked.items() if found}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", metavar="ID", default=[], help="runs or claims; all if left out")
    made.add_argument("--envs", type=Path, default=environments.DEFAULT, help="where the peers' environments lie")
    made.add_argument("--install", action="store_true", help="first make those that are missing (4 GB)")
    made.add_argument("--accept", action="store_true", help="take the figures that hold into claims.yaml and README")
    made.add_argument("--from-results", action="store_true", help="run nothing: check the newest results")
    made.add_argument("--readme", action="store_true", help="run nothing: make README's tables of the claims")
    made.add_argument("--list", action="store_true", help="run nothing: the runs, their minutes and what they lack")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        claims = load()
        picked = chosen(claims, args.only)
        if args.readme:
            _replace(README, with_tables(README.read_text(), claims))
            return 0
        return _bench(args, claims, picked)
    except Wrong as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of stdout has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was finished is in benchmarks/results", file=sys.stderr)
        return 1


def _bench(args: argparse.Namespace, claims: Claims, picked: Mapping[str, list[Claim]]) -> int:
    runs = [claims.runs[name] for name in picked]
    if args.install:
        for env in sorted({need.partition(":")[2] for run in runs for need in run.needs if need.startswith("env:")}):
            environments.python(env, args.envs)
    lacks = {run.name: [why for need in run.needs if (why := missing(need, args.envs))] for run in runs}
    if args.list:
        for run in runs:
            print(f"{run.name:<16}{run.minutes:>4g} min  {'; '.join(lacks[run.name]) or run.command}")
        return 0
    results, verdicts = newest(RESULTS) if args.from_results else {}, []
    if not args.from_results:
        here = [run.minutes for run in runs if not lacks[run.name]]
        print(f"{len(here)} of {len(runs)} runs can be made here: about {sum(here):g} min", file=sys.stderr)
        if (load := os.getloadavg()[0]) > BUSY * len(os.sched_getaffinity(0)):
            print(f"note: other work runs here (load {load:.1f}): times and their claims suffer", file=sys.stderr)
    for run in runs:
        why = "no result yet" if args.from_results else "; ".join(lacks[run.name])
        if not args.from_results and not why:
            print(f"== {run.name}: {run.command}, about {run.minutes:g} min", file=sys.stderr, flush=True)
            results[run.name] = measure(run, args.envs)
            kept = keep(results[run.name], RESULTS)
            print(f"   {results[run.name]['seconds']:.0f} s: benchmarks/results/{kept.name}", file=sys.stderr)
        verdicts += check(picked[run.name], run, results.get(run.name), why)
    print(f"{table(verdicts)}\n\n{summary(verdicts)}", flush=True)
    for path in pictures.draw(newest(RESULTS), claims, PICTURES):
        print(f"drawn: {path.relative_to(ROOT)}", file=sys.stderr)
    if args.accept:
        take_over(verdicts, results, claims)
    # What was asked for by name and could not be measured is no success.
    failed = [one for one in verdicts if one.state == BROKEN or (one.state == NOT and args.only)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
