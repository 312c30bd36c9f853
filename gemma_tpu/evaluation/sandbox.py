"""Runs a command on untrusted files in a box: no network, nothing of the user's readable or writable, limits.

The box is bubblewrap, or user namespaces made with `unshare` where bubblewrap is missing. Inside stand the
system's tools, read-only, and one scratch folder in memory that vanishes with the box: files go in through
descriptors, results come out through stdout, so nothing is ever written on the host. Without a box, `run`
refuses, unless the caller says unsafe.
"""

import functools
import io
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from gemma_tpu.errors import UserError

SCRATCH = "/scratch"
TOOLS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": SCRATCH, "TMPDIR": SCRATCH, "LANG": "C.UTF-8"}
# Root drops to this user first: the kernel exempts root from the limit on processes, and what root owns on
# the host must not be ours to touch even if a box leaked.
NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    wall_seconds: float = 20.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 << 20  # address space of each process
    processes: int = 16
    file_bytes: int = 16 << 20
    scratch_bytes: int = 32 << 20
    output_bytes: int = 1 << 20  # stdout and stderr together; the command is killed at the first byte beyond

    def prlimit(self) -> list[str]:
        return [
            "prlimit", f"--cpu={self.cpu_seconds}", f"--as={self.memory_bytes}", f"--nproc={self.processes}",
            f"--fsize={self.file_bytes}", "--nofile=64", "--core=0", "--",
        ]  # fmt: skip


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: bytes
    stderr: bytes
    truncated: bool
    timed_out: bool
    seconds: float

    @property
    def output(self) -> str:
        return (self.stdout + self.stderr).decode(errors="replace")


def available() -> str | None:
    """The name of the box that works here, or None."""
    return next((name for name in BOXES if _works(name)), None)


def require() -> str:
    """The name of the box that works here; without one generated code is not run."""
    box = available()
    if box is None:
        raise UserError(
            "no sandbox works here, and generated code is not run without one: install bubblewrap "
            "(apt-get install bubblewrap) or allow unprivileged user namespaces; "
            "--unsafe-no-sandbox runs it all the same, with limits but without isolation"
        )
    return box


def run(
    command: Sequence[str],
    *,
    files: Mapping[str, bytes] | None = None,
    stdin: bytes = b"",
    limits: Limits | None = None,
    unsafe: bool = False,
    box: str | None = None,
) -> Result:
    """Runs `command` in a fresh scratch folder with `files`; refuses where no box works, unless unsafe."""
    files, limits = files or {}, limits or Limits()
    if bad := [name for name in files if not name or "/" in name or name.startswith(".")]:
        raise ValueError(f"scratch files need plain names, not {', '.join(map(repr, bad))}")
    box = box or (available() if unsafe else require())
    if box is None:
        return _run_bare(command, files, stdin, limits)
    return _run_boxed(box, command, files, stdin, limits)


def _run_boxed(
    box: str, command: Sequence[str], files: Mapping[str, bytes], stdin: bytes, limits: Limits
) -> Result:
    with ExitStack() as stack:
        descriptors = {}
        for name, data in files.items():
            memory = stack.enter_context(os.fdopen(os.memfd_create(name), "w+b", buffering=0))
            memory.write(data)
            memory.seek(0)
            descriptors[name] = memory.fileno()
        _, enter = BOXES[box]
        argv = enter(descriptors, limits) + limits.prlimit() + list(command)
        popen: BoxOptions = {"pass_fds": tuple(descriptors.values()), "env": ENVIRONMENT, "cwd": "/"}
        if os.geteuid() == 0:
            popen |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        return _communicate(argv, stdin, limits, popen)


def _run_bare(command: Sequence[str], files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> Result:
    """Limits and a folder of its own, no isolation: only ever on the user's explicit word."""
    with tempfile.TemporaryDirectory(prefix="gemma-tpu-unsafe-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        if shutil.which("prlimit"):
            prefix = limits.prlimit()
            prefix.remove(f"--nproc={limits.processes}")  # outside a namespace it counts all the user runs
        else:
            prefix = ["sh", "-c", f'ulimit -t {limits.cpu_seconds}; ulimit -c 0; exec "$@"', "sh"]
        env = ENVIRONMENT | {"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "TMPDIR": folder}
        return _communicate(prefix + list(command), stdin, limits, {"env": env, "cwd": folder})


class BoxOptions(TypedDict):
    """What `subprocess.Popen` is told of a box."""

    env: dict[str, str]
    cwd: str
    pass_fds: NotRequired[tuple[int, ...]]
    user: NotRequired[int]
    group: NotRequired[int]
    extra_groups: NotRequired[list[int]]


def _communicate(argv: list[str], stdin: bytes, limits: Limits, popen: BoxOptions) -> Result:
    """Feeds stdin, reads both outputs, never holding more than the limit; kills the tree whatever happens."""
    start = time.monotonic()
    deadline = start + limits.wall_seconds
    reader, write_end = os.pipe()
    writer = os.fdopen(write_end, "wb", buffering=0)
    if "user" in popen:
        os.fchown(reader, NOBODY, NOBODY)  # so that the command can open /dev/stdin by name
    try:
        process = subprocess.Popen(
            argv,
            stdin=reader,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **popen,
        )
    except BaseException:
        writer.close()
        raise
    finally:
        os.close(reader)
    assert process.stdout is not None and process.stderr is not None  # both are pipes
    outputs = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    try:
        end = _pump(outputs, writer, stdin, deadline, limits.output_bytes)
        if end == "closed":
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                end = "timeout"
    finally:
        _kill_group(process)
        process.stdout.close()
        process.stderr.close()
    stdout, stderr = (bytes(data) for data in outputs.values())
    seconds = time.monotonic() - start
    return Result(process.returncode, stdout, stderr, end == "full", end == "timeout", seconds)


def _pump(outputs: dict[int, bytearray], writer: io.RawIOBase, stdin: bytes, deadline: float, room: int) -> str:
    """Moves bytes until both outputs are "closed", more than `room` came ("full"), or the "timeout"."""
    pending = memoryview(stdin)
    os.set_blocking(writer.fileno(), False)
    with writer, selectors.DefaultSelector() as selector:
        for stream in outputs:
            selector.register(stream, selectors.EVENT_READ)
        selector.register(writer, selectors.EVENT_WRITE)
        while any(stream in selector.get_map() for stream in outputs):
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            for key, _ in selector.select(left):
                if key.fileobj is writer:
                    pending = _feed(writer, pending)
                    if not pending:
                        selector.unregister(writer)
                        writer.close()  # the command sees the end of its input
                    continue
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                outputs[key.fd] += data[:room]
                if len(data) > room:
                    return "full"
                room -= len(data)
    return "closed"


def _feed(writer: io.RawIOBase, pending: memoryview) -> memoryview:
    """Writes what the pipe takes; a reader that has gone away wants no more."""
    try:
        return pending[writer.write(pending[:65536]) or 0 :]
    except BrokenPipeError:
        return pending[:0]


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The box dies with its first process and takes everything inside along; killing the group is that."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # the whole group has already ended
        return
    finally:
        process.wait()


def _bubblewrap(descriptors: Mapping[str, int], limits: Limits) -> list[str]:
    argv = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session"]
    argv += ["--proc", "/proc", "--dev", "/dev"]
    for tool in TOOLS:
        if os.path.islink(tool):
            argv += ["--symlink", os.readlink(tool), tool]
        elif os.path.isdir(tool):
            argv += ["--ro-bind", tool, tool]
    argv += ["--size", str(limits.scratch_bytes), "--tmpfs", SCRATCH]
    for name, descriptor in descriptors.items():
        argv += ["--file", str(descriptor), f"{SCRATCH}/{name}"]
    return [*argv, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", SCRATCH, "--"]


# The same box by hand: a root in memory, the tools bound read-only, everything else of the host detached, and
# then no capability left. $1 = bytes of scratch, $2 = "fd:name ..." of the files, the rest = the command.
_UNSHARE_SCRIPT = r"""
set -e
scratch_bytes=$1; entries=$2; shift 2
mount -t tmpfs -o mode=755,size=1m box /tmp
cd /tmp
mkdir proc dev scratch old
for tool in TOOLS; do
  mkdir -p ".${tool%/*}"
  if [ -L "$tool" ]; then cp -P "$tool" ".$tool"
  elif [ -d "$tool" ]; then
    mkdir ".$tool"; mount --bind "$tool" ".$tool"; mount -o remount,bind,ro,nosuid,nodev ".$tool"
  fi
done
for device in null zero full random urandom; do
  touch dev/$device; mount --bind /dev/$device dev/$device
done
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin; ln -s /proc/self/fd/1 dev/stdout; ln -s /proc/self/fd/2 dev/stderr
mount -t proc proc proc
mount -t tmpfs -o "mode=755,size=$scratch_bytes" scratch scratch
for entry in $entries; do cat "proc/self/fd/${entry%%:*}" >"scratch/${entry#*:}"; done
PATH=$PATH:/usr/sbin:/sbin pivot_root . old
umount -l /old
rmdir /old
mount -o remount,bind,ro /
cd /scratch
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
""".replace("TOOLS", " ".join(TOOLS))


def _unshare(descriptors: Mapping[str, int], limits: Limits) -> list[str]:
    namespaces = "--user --map-root-user --mount --pid --fork --net --ipc --uts --cgroup --kill-child=SIGKILL"
    entries = " ".join(f"{descriptor}:{name}" for name, descriptor in descriptors.items())
    return [
        *("setpriv", "--pdeathsig", "KILL", "unshare", *namespaces.split()),
        *("sh", "-c", _UNSHARE_SCRIPT, "sh", str(limits.scratch_bytes), entries),
    ]


BOXES = {"bubblewrap": ("bwrap", _bubblewrap), "unshare": ("unshare", _unshare)}  # name: (program, its argv)


@functools.cache
def _works(box: str) -> bool:
    """Tries the box on a harmless command that needs all of it: tools, a file, scratch, standard input."""
    program, _ = BOXES[box]
    if not sys.platform.startswith("linux") or not all(map(shutil.which, (program, "prlimit"))):
        return False
    probe = ["sh", "-c", "cat in.txt >copy && cat copy /dev/stdin"]
    try:
        result = _run_boxed(box, probe, {"in.txt": b"fine, "}, b"too", Limits())
    except (OSError, subprocess.SubprocessError):  # not even startable: no box
        return False
    return result.returncode == 0 and result.stdout == b"fine, too"


def cores() -> int:
    """How many processor cores are ours: what a scheduler or a container leaves us, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
