"""The sandbox: what a command inside can not do, and that nothing is left of it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import sandbox

WORKING = [name for name in sandbox.BOXES if sandbox._works(name)]
boxed = pytest.mark.skipif(not WORKING, reason="neither bubblewrap nor user namespaces work here")


@pytest.fixture(params=WORKING)
def box(request):
    return request.param


def shell(script, box, **options):
    return sandbox.run(["sh", "-c", script], box=box, **options)


@boxed
def test_available_names_the_first_box_that_works():
    assert sandbox.available() == WORKING[0]


@boxed
def test_files_and_input_go_in_and_both_outputs_come_out(box):
    big = os.urandom(300_000)
    script = "cmp big copy; cat small; cat /dev/stdin >&2; exit 3"
    result = shell(script, box, files={"big": big, "copy": big, "small": b"s"}, stdin=b"i" * 200_000)
    assert (result.returncode, result.stdout, result.stderr) == (3, b"s", b"i" * 200_000)
    assert not result.truncated and not result.timed_out


@boxed
def test_output_that_is_not_text_is_decoded_with_replacement(box):
    assert shell(r"printf 'a\377b'", box).output == "a�b"


@boxed
def test_nothing_of_the_users_is_readable(box, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    secret.chmod(0o644)
    for path in (secret, Path.home(), Path(__file__), Path("/etc/passwd"), Path("/root"), Path("/var")):
        result = shell(f"ls {path} || cat {path}", box)
        assert result.returncode != 0 and b"secret" not in result.stdout, path
    assert shell("ls -A .", box).stdout == b""


@boxed
def test_nothing_outside_the_scratch_is_writable(box, tmp_path):
    tmp_path.chmod(0o777)
    for folder in ("/", "/usr", "/usr/bin", "/dev", "/dev/shm", "/etc", "/tmp", "/var/tmp", str(tmp_path)):
        result = shell(f"echo x >{folder}/written_by_box", box)
        assert result.returncode != 0, folder
        assert not Path(folder, "written_by_box").exists()
    assert shell("echo x >here && cat here", box).stdout == b"x\n"


@boxed
def test_there_is_no_network_not_even_the_hosts_loopback(box):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass  # reachable from here
        perl = f'use IO::Socket::INET; exit(IO::Socket::INET->new("127.0.0.1:{port}") ? 0 : 7)'
        if shutil.which("perl", path="/usr/bin"):
            assert sandbox.run(["perl", "-e", perl], box=box).returncode == 7
    interfaces = shell("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '", box).stdout.split()
    assert interfaces == [b"lo"]


@boxed
def test_the_command_has_no_capabilities_and_no_other_processes_in_sight(box):
    status = shell("grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status", box).output.split()
    assert status == ["CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]
    assert len(shell("ls -d /proc/[0-9]*", box).stdout.split()) <= 4


@boxed
def test_wall_time_ends_the_whole_tree(box):
    marker = f"47{os.getpid()}"
    limits = sandbox.Limits(wall_seconds=1)
    result = shell(f"setsid sleep {marker} & sleep {marker}", box, limits=limits)
    assert result.timed_out and 0.9 < result.seconds < 5
    wait_until(lambda: not alive(f"sleep {marker}"))


@boxed
def test_what_a_command_leaves_running_ends_with_it(box):
    marker = f"48{os.getpid()}"
    result = shell(f"setsid sleep {marker} >/dev/null 2>&1 & exit 0", box)
    assert result.returncode == 0 and result.seconds < 5
    wait_until(lambda: not alive(f"sleep {marker}"))


@boxed
def test_the_box_dies_with_the_process_that_made_it(box):
    marker = f"49{os.getpid()}"
    code = f"from gemma_tpu.evaluation import sandbox; sandbox.run(['sleep', '{marker}'], box={box!r})"
    maker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    wait_until(lambda: alive(f"sleep {marker}"))
    maker.kill()
    maker.wait()
    wait_until(lambda: not alive(f"sleep {marker}"))


@boxed
def test_cpu_time_is_limited(box):
    limits = sandbox.Limits(wall_seconds=20, cpu_seconds=1)
    result = shell("while :; do :; done", box, limits=limits)
    assert result.returncode != 0 and not result.timed_out and result.seconds < 15


@boxed
def test_memory_is_limited(box):
    limits = sandbox.Limits(memory_bytes=256 << 20)
    result = sandbox.run(["dd", "if=/dev/zero", "of=/dev/null", "bs=1G", "count=1"], box=box, limits=limits)
    assert result.returncode != 0 and "exhausted" in result.output


@boxed
def test_the_number_of_processes_is_limited(box):
    result = shell("for i in 1 2 3 4 5 6 7 8; do sleep 5 & done", box, limits=sandbox.Limits(processes=5))
    assert result.returncode != 0 and "fork" in result.output


@boxed
def test_files_and_the_scratch_are_limited(box):
    limits = sandbox.Limits(file_bytes=1 << 20, scratch_bytes=4 << 20)
    script = "for i in 1 2 3 4 5 6; do head -c 2000000 /dev/zero >f$i; done; cat f* | wc -c"
    assert int(shell(script, box, limits=limits).stdout) <= 4 << 20
    assert int(shell("head -c 2000000 /dev/zero >f; wc -c <f", box, limits=limits).stdout) == 1 << 20


@boxed
def test_endless_output_is_cut_and_the_command_killed(box):
    result = shell("yes", box, limits=sandbox.Limits(output_bytes=100_000))
    assert result.truncated and len(result.stdout) == 100_000 and result.seconds < 10


@boxed
def test_a_command_that_never_reads_its_input_does_not_block(box):
    assert shell("echo done", box, stdin=b"x" * 5_000_000).stdout == b"done\n"


@boxed
def test_nothing_is_left_on_the_host(box, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(os.listdir("/tmp"))
    shell("echo x >left; sleep 5", box, files={"a": b"x"}, limits=sandbox.Limits(wall_seconds=0.5))
    assert os.listdir(tmp_path) == []
    assert not [name for name in set(os.listdir("/tmp")) - before if name == "left"]


def test_without_a_box_it_refuses_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sandbox, "available", lambda: None)
    with pytest.raises(UserError, match=r"apt-get install bubblewrap.*--unsafe-no-sandbox"):
        sandbox.run(["true"])


def test_unsafe_runs_without_a_box_and_keeps_the_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "available", lambda: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = sandbox.run(
        ["sh", "-c", "cat a /dev/stdin; pwd >&2"], files={"a": b"1"}, stdin=b"2", unsafe=True
    )
    assert (result.returncode, result.stdout) == (0, b"12")
    assert result.stderr.decode().startswith(str(tmp_path)) and os.listdir(tmp_path) == []
    marker = f"46{os.getpid()}"
    limits = sandbox.Limits(wall_seconds=0.5)
    result = sandbox.run(["sh", "-c", f"sleep {marker} & sleep {marker}"], unsafe=True, limits=limits)
    assert result.timed_out
    wait_until(lambda: not alive(f"sleep {marker}"))


def test_file_names_with_paths_are_refused():
    with pytest.raises(ValueError, match="'../x', 'a/b'"):
        sandbox.run(["true"], files={"../x": b"", "a/b": b"", "fine": b""})


def alive(command: str) -> bool:
    """Whether a process with exactly this command line runs on the host."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().replace(b"\0", b" ").strip() == command.encode():
                return True
        except OSError:  # it ended while we looked
            continue
    return False


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
