"""The core tests with other versions: the lowest and the newest that pyproject.toml admits, and other Pythons.

    python scripts/try_versions.py lowest newest      make test-bounds
    python scripts/try_versions.py 3.12 3.13          make test-pythons; also paths of interpreters

Each gets a fresh environment of its own in .client-envs/versions, made by uv from the dependencies without any extra;
comparisons with torch are skipped. Other Pythons get the newest versions. Warnings are errors there too.
"""

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from gemma_tpu.cli import run_script
from gemma_tpu.errors import RunError, UserError

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".client-envs" / "versions"
BOUNDS = {"lowest": "lowest-direct", "newest": "highest"}  # of direct dependencies, as uv calls it
TOOLS = {"pytest", "hypothesis", "jsonschema", "pyarrow"}  # what the core tests need, with the bounds of `dev`

# What touches other packages' code: config files, templates and tokenizers, rows, the model, LoRA, the loss, the
# optimizer, safetensors, checkpoints, the merge, pages and pictures; then whole runs by the command line.
CORE = (
    "config schema template tokenizer formats records tokens packing segments mesh model lora loss optim step updates "
    "weights shards layout patch merging metrics page remote tiny sampler find checkpoint train"
).split()


def main(names: list[str]) -> None:
    if not names:
        raise UserError("say which: lowest, newest, or Pythons like 3.12")
    wrong = [name for name in names if name not in BOUNDS and not re.fullmatch(r"3\.\d+", name) and "/" not in name]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: must be lowest, newest, a Python like 3.12 or an interpreter's path")
    failed = [name for name in names if not passes(name)]
    if failed:
        raise RunError(f"the core tests fail with: {', '.join(failed)}")


def passes(name: str) -> bool:
    python = environment(name)
    print(f"== {name}: {versions(python)}", flush=True)
    tests = [f"tests/test_{one}.py" for one in CORE]
    begun = time.monotonic()
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--durations", "0", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr]
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
    print(f"== {name}: {last[0]} (with {time.monotonic() - begun:.0f} s in all)", flush=True)
    return done.returncode == 0


def environment(name: str) -> Path:
    """Its Python. What was there is made anew: an upgrade of an older one would keep what is no longer wanted."""
    folder = PLACE / re.sub(r"[^\w.]+", "-", name).strip("-")
    uv("venv", "--clear", "--python", sys.executable if name in BOUNDS else name, folder)
    python = folder / "bin" / "python"
    uv("pip", "install", "--python", python, "--resolution", BOUNDS.get(name, "highest"), *wanted())
    return python


def wanted() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = [line for line in project["optional-dependencies"]["dev"] if distribution(line) in TOOLS]
    return [*project["dependencies"], *tools]


def distribution(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def versions(python: Path) -> str:
    """Of the Python and of what this package names itself."""
    code = "import sys, importlib.metadata as m; print(sys.version.split()[0], *(m.version(n) for n in sys.argv[1:]))"
    names = [distribution(line) for line in wanted()]
    found = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True).stdout.split()
    return ", ".join(f"{name} {version}" for name, version in zip(["python", *names], found, strict=True))


def uv(*argv: object) -> None:
    done = subprocess.run([sys.executable, "-m", "uv", "--quiet", *map(str, argv)], capture_output=True, text=True,
                          env=os.environ)  # fmt: skip
    if done.returncode:
        raise RunError(f"uv {' '.join(map(str, argv[:2]))}: {done.stderr.strip() or 'failed without a word'}")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
