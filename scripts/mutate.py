"""Breaks the core of the package in seeded places, one at a time, and counts which breaks the tests notice.

`make mutants ARGS="--seed 0 --count 50"`. Each break (mutations.py) is made in a copy of the tree, never in place, and
the test files that concern its module run on it until the first failure. What no test notices is listed with its
line: either a test is missing, or the change cannot be seen (equivalent_mutants.toml says of each why).
Results go to build/mutants/ after every break, and the same command goes on where it stopped; what survived runs
again once the tests have changed.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest
from mutations import Mutation, mutations, spread

from gemma_tpu.cli import run_script
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.pages import columns

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "mutants"
# The fewest tests that are about a module, its own file first: the first failure ends a run.
TESTS = {
    "data/packing.py": "packing",
    "data/encoding.py": "tokens",
    "data/tokenizer.py": "tokenizer template",
    "data/template.py": "template",
    "adapter/lora.py": "lora adapters_peft",
    "adapter/lowrank.py": "lowrank adapters_peft",
    "gemma/projection.py": "lora model quantise",
    "gemma/attention.py": "attention",
    "gemma/mesh.py": "mesh loss",
    "gemma/weights.py": "weights",
    "step/loss.py": "loss",
    "step/step.py": "step faults",
    "step/optim.py": "optim",
    "handoff/patch.py": "patch destination",
    "handoff/merging.py": "handoff merging",
    "handoff/difference.py": "difference",
}
# Imported once, before the tests of each break fork off: they are half of what a short test file takes.
PRELOADED = ("jax", "flax.nnx", "optax.contrib", "orbax.checkpoint", "safetensors.numpy", "scipy.stats", "jinja2",
             "tokenizers")
SPARE_S = 60  # on top of three times what the tests take unbroken: then a break counts as an endless loop


def files(module: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in TESTS[module].split()]


class Copy:
    """A copy of the tree, in which files are broken and mended."""

    def __init__(self, folder: Path):
        self.root = folder / "tree"
        shutil.rmtree(self.root, ignore_errors=True)
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True,
                                capture_output=True, text=True).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        self._said = folder / "said.txt"
        # Read when JAX is first imported. Programs that a break does not touch compile once for all breaks.
        os.environ |= {"PYTHONPATH": str(self.root), "JAX_PLATFORMS": "cpu",
                       "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
                       "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}  # fmt: skip
        for name in PRELOADED:
            importlib.import_module(name)

    def test(self, module: str, limit: float = 3600.0) -> tuple[int | None, str, float]:
        """(exit code, None past the limit; the test that failed; seconds) of the tests of a module."""
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            self._run(module)
        code = None
        try:
            while code is None and time.monotonic() - began < limit:
                time.sleep(0.05)
                ended, status = os.waitpid(child, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if ended else None
        finally:  # at the limit, and at Ctrl-C
            with contextlib.suppress(ProcessLookupError):  # what the tests have started goes too
                os.killpg(child, signal.SIGKILL)
        seconds = time.monotonic() - began
        if code is None:
            os.waitpid(child, 0)
            return None, "time limit", seconds
        said = self._said.read_text(errors="replace")
        first = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", said, re.MULTILINE)
        return code, first[1] if first else said[-2000:], seconds

    def _run(self, module: str) -> NoReturn:
        """In the child: the tests, on the package of the copy, with what PRELOADED names already there."""
        code = 3
        try:
            os.setsid()
            out = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(self.root)
            for name in [name for name in sys.modules if name.partition(".")[0] == "gemma_tpu"]:
                del sys.modules[name]
            ours = (str(ROOT), str(ROOT / "scripts"))
            sys.path[:] = [str(self.root), *(path for path in sys.path if path not in ours)]
            code = int(pytest.main(["-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", *files(module)]))
        finally:
            sys.stdout.flush()
            os._exit(code)

    def broken(self, module: str, one: Mutation, limit: float) -> tuple[int | None, str, float]:
        path = self.root / "gemma_tpu" / module
        whole = path.read_bytes()
        try:
            self._write(path, one.of(whole))
            return self.test(module, limit)
        finally:
            self._write(path, whole)

    def _write(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        # Python trusts a compiled file by size and second: one break of the same length must not hide the next.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


def main(args: argparse.Namespace) -> None:
    chosen = [name for name in TESTS if not args.module or name.endswith(tuple(args.module))]
    if not chosen:
        raise UserError(f"--module {' '.join(args.module)}: the core is {', '.join(TESTS)}")
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    offered = {name: mutations(ROOT / "gemma_tpu" / name) for name in TESTS}
    drawn = [one for one, _ in zip(spread(offered, random.Random(args.seed)), range(args.count), strict=False)]
    print(f"{len(drawn)} of {sum(map(len, offered.values())):,} possible breaks of {len(TESTS)} modules, "
          f"seed {args.seed}", flush=True)  # fmt: skip
    file = OUT / f"seed_{args.seed}.jsonl"
    number, parts = args.part
    mine = chosen[number - 1 :: parts]
    state, breaks = {name: digest(name) for name in mine}, read(file)
    left = [(name, one) for name, one in drawn if name in mine and not settled(breaks.get(key(name, one)), state[name])]
    if left and not args.show:
        run(left[: args.most], file, state, Copy(OUT / f"part_{number}"))
    breaks = read(file)
    tell([(name, one, breaks.get(key(name, one))) for name, one in drawn])


def part(text: str) -> tuple[int, int]:
    number, parts = map(int, text.split("/"))
    if not 1 <= number <= parts:
        raise ValueError
    return number, parts


def key(module: str, one: Mutation) -> str:
    return f"{module}:{one.line}: {one.change}"


def read(file: Path) -> dict[str, Any]:
    """{key: result}; of two lines with one key the later."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {one["key"]: one for one in map(json.loads, lines)}


def add(file: Path, result: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(result) + "\n")


def digest(module: str) -> str:
    """Of a module and of its tests, as they stand."""
    paths = [ROOT / "gemma_tpu" / module, *(ROOT / name for name in files(module))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def settled(result: dict[str, Any] | None, state: str) -> bool:
    return result is not None and (result["caught"] or result["state"] == state)


def run(left: list[tuple[str, Mutation]], file: Path, state: dict[str, str], copy: Copy) -> None:
    for module, one in left:
        limit = 3 * unbroken(copy, module, state[module]) + SPARE_S
        code, test, seconds = copy.broken(module, one, limit)
        if code not in (None, 0, 1, 2) and code >= 0:
            raise RunError(f"pytest ended with {code} on {key(module, one)}: {test}")
        result = {
            "key": key(module, one), "module": module, "line": one.line, "kind": one.kind, "change": one.change,
            "caught": code != 0, "by": test if code != 0 else "", "seconds": round(seconds, 1), "state": state[module],
        }  # fmt: skip
        add(file, result)
        print(f"{'survived' if code == 0 else 'caught':<9} {seconds:5.0f} s  {key(module, one)}", flush=True)


def unbroken(copy: Copy, module: str, state: str) -> float:
    """Seconds that the tests of a module take when nothing is broken; they must pass."""
    file = OUT / "unbroken.jsonl"
    if state not in read(file):
        code, test, seconds = copy.test(module)
        if code:
            raise RunError(f"the tests of {module} fail unbroken: {test}")
        add(file, {"key": state, "module": module, "seconds": round(seconds, 1)})
    return read(file)[state]["seconds"]


def tell(drawn: list[tuple[str, Mutation, dict[str, Any] | None]]) -> None:
    """The table by module, and every survivor."""
    known = tomllib.loads((ROOT / "scripts" / "equivalent_mutants.toml").read_text())["mutant"]
    why = {(one["module"], one["text"], one["change"]): one["why"] for one in known}
    verdicts, lines = {name: Counter() for name in TESTS}, []
    for name, one, result in drawn:
        reason = why.get((name, one.text, one.change))
        verdict = ("not run" if result is None else "caught" if result["caught"] else "equivalent" if reason
                   else "survived")  # fmt: skip
        verdicts[name][verdict] += 1
        if verdict in ("survived", "equivalent"):
            lines += [f"{verdict}: {name}:{one.line}: {one.text}", f"  {one.kind}: {one.change}"]
            lines += [f"  {reason}"] if reason else []
    names, total = ("caught", "survived", "equivalent", "not run"), sum(verdicts.values(), Counter())
    rows = [[name, *(counts[verdict] for verdict in names)] for name, counts in (*verdicts.items(), ("all", total))]
    print("\n".join([*columns.table([["module", *names], *rows], right=(1, 2, 3, 4)), *lines]))
    seen = total["caught"] + total["survived"]
    share = f": {total['caught'] / seen:.0%}" if seen else ""
    print(f"{total['caught']} of {seen} breaks that can be seen are caught{share}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=50, help="how many breaks (50)")
    parser.add_argument("--most", type=int, help="run at most so many of those that are left, then stop")
    parser.add_argument("--module", nargs="*", default=[], help="run those of these files alone, e.g. step/loss.py")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="K/N",
                        help="every N-th module from the K-th on: N such commands work side by side")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="run none: print what is known")
    sys.exit(run_script(main, parser.parse_args()))
