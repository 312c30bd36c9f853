"""What this machine has of what a run may need: each thing with what it is for, and what to do where it is missing."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_tpu.assets import PACKAGE
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import devices

GIB = 2**30
NEEDED = (3, 11)
ROOM_GIB = 10  # below it a checkpoint of the smaller sizes does not fit
TEST_FILE = ".gemma-tpu-doctor"


@dataclass(frozen=True)
class Check:
    name: str
    state: str  # ok, missing (something optional), wrong
    found: str
    fix: str = ""


def examine(folder: Path, bucket: str | None) -> Iterator[Check]:
    """In the order in which a user meets them."""
    yield _python()
    yield from _packages()
    yield _devices()
    yield _memory()
    yield _disk(folder)
    yield from _tools()
    yield _token()
    if bucket:
        yield _bucket(bucket)


def _python() -> Check:
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}, {sys.executable}"
    good = sys.version_info >= NEEDED
    return Check("python", "ok" if good else "wrong", found, "" if good else "make setup PYTHON=python3.12")


def _packages() -> Iterator[Check]:
    """Those that this package needs, held against its bounds."""
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for line in _needed():
        one = Requirement(line)
        if one.marker is not None:  # an extra
            continue
        count += 1
        have = _version(one.name)
        if have is None or not one.specifier.contains(have, prereleases=True):
            wrong.append(f"{one.name} {have or 'is not there'} (wanted {one.specifier})")
    if wrong:
        yield Check("packages", "wrong", ", ".join(wrong), "pip install -U gemma_tpu, in an environment of its own")
    else:
        yield Check("packages", "ok", f"{count}, as declared")
    for name, what, fix in (
        ("libtpu", "training on TPU, and `plan` by the TPU compiler", "pip install 'gemma_tpu[tpu]'"),
        ("jax-cuda13-plugin", "training on GPUs, and `plan` by XLA's GPU compiler", "pip install 'gemma_tpu[cuda]'"),
        ("torch", "`verify` asks transformers and PEFT where it is there", "pip install torch peft"),
        ("pyarrow", "Parquet data", "pip install 'gemma_tpu[parquet]'"),
        ("gcsfs", "gs:// paths", "pip install 'gemma_tpu[gcs]'"),
        ("s3fs", "s3:// paths", "pip install 'gemma_tpu[s3]'"),
    ):
        have = _version(name)
        yield Check(name, "ok", have) if have else Check(name, "missing", f"not installed; for {what}", fix)


def _needed() -> list[str]:
    """As it was installed, or as the pyproject.toml of the checkout that it runs from has it."""
    try:
        return importlib.metadata.requires("gemma_tpu") or []
    except importlib.metadata.PackageNotFoundError:
        tree = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
        return list(tree["project"]["dependencies"])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Check:
    """JAX is asked in a process of its own: where another holds the chips, asking may never return."""
    ask = "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind, '|', d[0].platform)"
    try:
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Check("devices", "wrong", "JAX did not answer within two minutes",
                     "another process may hold the chips: end it, or `sudo lsof /dev/accel* /dev/vfio/*` to find it")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("devices", "wrong", f"JAX failed: {last}", "on a TPU VM: pip install 'gemma_tpu[tpu]'")
    found, _, platform = done.stdout.strip().splitlines()[-1].partition(" | ")
    if platform == "cpu" and (device := devices.accelerators()):
        return Check("devices", "wrong", f"{found}, though {device} is there",
                     "pip install 'gemma_tpu[tpu]' (or [cuda]); is JAX_PLATFORMS=cpu set?")
    if platform == "cpu":
        return Check("devices", "missing", f"{found}: enough for the demo and for planning",
                     "train on a TPU VM; `gemma-tpu plan CONFIG --on SLICE` needs none")
    return Check("devices", "ok", found)


def _memory() -> Check:
    lines = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", lines, re.MULTILINE)
    told = f"{int(found[1]) / 2**20:.1f} GiB free" if found else "not known on this system"
    return Check("memory", "ok", f"{told}, {os.cpu_count()} cores")


def _disk(folder: Path) -> Check:
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free / GIB
    told = f"{free:.1f} GiB free in {folder}"
    if free >= ROOM_GIB:
        return Check("disk", "ok", told)
    return Check("disk", "missing", f"{told}; Gemma 4 31B takes 62.5 GB, 12B 24 GB",
                 "mount a disk, or `gemma-tpu stage HUB_ID gs://...` and model.path: gs://...")


def _tools() -> Iterator[Check]:
    for tool, what, version in (("iverilog", "`eval tiny` and `eval verilog` simulate with it", "-V"),
                                ("bwrap", "generated Verilog runs in its sandbox", "--version")):  # fmt: skip
        fix = f"apt-get install {'bubblewrap' if tool == 'bwrap' else tool}"
        path = shutil.which(tool)
        if path is None:
            yield Check(tool, "missing", f"not installed; {what}", fix)
            continue
        said = subprocess.run([path, version], capture_output=True, text=True).stdout.splitlines()
        yield Check(tool, "ok", said[0] if said else path)
    if shutil.which("bwrap"):
        done = subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True)
        if done.returncode:
            yield Check("sandbox", "missing", f"bwrap cannot make one here: {done.stderr.strip().splitlines()[-1]}",
                        "in a container: allow user namespaces (--security-opt seccomp=unconfined); without one "
                        "`eval` says what it does instead")  # fmt: skip
        else:
            yield Check("sandbox", "ok", "bwrap makes one")


def _token() -> Check:
    """That there is one, and from where; never the token."""
    from huggingface_hub import constants, get_token

    if get_token() is None:
        return Check("hub token", "missing", "none: gated checkpoints cannot be downloaded",
                     "accept the licence on the model's page, then `hf auth login` or export HF_TOKEN")
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else constants.HF_TOKEN_PATH
    return Check("hub token", "ok", f"from {where}")


def _bucket(url: str) -> Check:
    """Listed, written to, read back, and left as it was."""
    from gemma_tpu.storage.remote import BucketSource
    from gemma_tpu.storage.retry import explain

    fix = ("gs://: `gcloud auth application-default login`, or roles/storage.objectAdmin for a service account; "
           "s3://: AWS_PROFILE, or AWS_ACCESS_KEY_ID with its secret")  # fmt: skip
    try:
        there = BucketSource(url)
    except UserError as error:
        return Check("bucket", "wrong", str(error), "" if "pip install" in str(error) else fix)
    probe = there.path(f"{TEST_FILE}-{os.getpid()}")
    try:
        there.fs.pipe_file(probe, b"gemma_tpu")
        try:
            same = there.fs.cat_file(probe) == b"gemma_tpu"
        finally:
            there.fs.rm_file(probe)
    except Exception as error:  # each store has errors of its own, and all of them mean no access
        return Check("bucket", "wrong", f"{url}: {explain(error)}", fix)
    if not same:
        return Check("bucket", "wrong", f"{url}: gives back other bytes than were written", fix)
    return Check("bucket", "ok", f"{url}: written, read back and removed")


def run(folder: Path, bucket: str | None, say: Callable[[str], None]) -> list[Check]:
    """Each line as soon as it is known: asking JAX takes seconds."""
    if bucket and "://" not in bucket:
        raise UserError(f"--bucket {bucket}: must be a URL like gs://bucket/folder")
    marks, found = {"ok": "ok     ", "missing": "-      ", "wrong": "WRONG  "}, []
    for one in examine(folder, bucket):
        found.append(one)
        say(f"{marks[one.state]}  {one.name:<10}  {one.found}" + (f"\n{'':>21}fix: {one.fix}" if one.fix else ""))
    return found


def verdict(found: list[Check]) -> str:
    wrong = [one.name for one in found if one.state == "wrong"]
    missing = [one.name for one in found if one.state == "missing"]
    if wrong:
        return f"{len(wrong)} thing(s) to repair: {', '.join(wrong)}"
    return "nothing to repair" + (f"; not here, needed for some things alone: {', '.join(missing)}" if missing else "")


