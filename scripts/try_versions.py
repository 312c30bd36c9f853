"""The core tests with other versions: the lowest and the newest that pyproject.toml admits, and other Pythons.

    python scripts/try_versions.py lowest newest      make test-bounds
    python scripts/try_versions.py 3.12 3.13          make test-pythons; also paths of interpreters

Each gets a fresh environment of its own in .client-envs/versions, made by uv from the dependencies without any extra;
comparisons with torch are skipped. Other Pythons get the newest versions. Warnings are errors, but for the lowest.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from gemma_tpu.cli import run_script
from gemma_tpu.errors import RunError, UserError

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".client-envs" / "versions"
BOUNDS = {"lowest": "lowest-direct", "newest": "highest"}  # of direct dependencies, as uv calls it
TOOLS = {"pytest", "hypothesis", "jsonschema", "pyarrow"}  # what the core tests need, with the bounds of `dev`

# What touches other packages' code: config files, templates and tokenizers, rows, meshes, LoRA, the loss, the
# optimizer, safetensors, pages and pictures, buckets.
CORE = (
    "config schema template tokenizer formats records tokens packing segments mesh lora loss optim step updates "
    "weights shards layout patch metrics page remote tiny find"
).split()
# Then the tiny path by the command line: Orbax, Grain and the merge in earnest.
PATH = [line.split() for line in (
    "tiny base --dtype float32",
    "train configs/tiny_cpu.yaml model.path=base run_dir=run train.steps=3 optim.warmup_steps=1 train.batch_size=2 "
    "data.limit=40 data.validation=null",
    "merge run --out merged",
    "verify run --merged merged",
    "sample merged --prompt module --max-new-tokens 4",
)]  # fmt: skip


def main(names: list[str]) -> None:
    if not names:
        raise UserError("say which: lowest, newest, or Pythons like 3.12")
    wrong = [name for name in names if name not in BOUNDS and not re.fullmatch(r"3\.\d+", name) and "/" not in name]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: must be lowest, newest, a Python like 3.12 or an interpreter's path")
    failed = [name for name in names if not passes(name)]
    if failed:
        raise RunError(f"does not hold with: {', '.join(failed)}")


def passes(name: str) -> bool:
    python = environment(name)
    print(f"== {name}: {versions(python)}", flush=True)
    return core_passes(name, python) and path_passes(name, python)


def core_passes(name: str, python: Path) -> bool:
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/test_{one}.py" for one in CORE)]
    if name == "lowest":  # an old package beside newer ones calls what those have deprecated since
        command += ["-W", "ignore::DeprecationWarning"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or ["pytest said nothing"]
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
    print(f"== {name}: {last[0]}", flush=True)
    return done.returncode == 0


def path_passes(name: str, python: Path) -> bool:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for words in PATH:
            done = subprocess.run([python, "-m", "gemma_tpu", *words], cwd=folder, env=env, capture_output=True,
                                  text=True)  # fmt: skip
            if done.returncode:
                print(f"== {name}: gemma-tpu {' '.join(words)}: exit {done.returncode}\n{done.stderr}", flush=True)
                return False
    print(f"== {name}: {', '.join(words[0] for words in PATH)}: fine", flush=True)
    return True


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
