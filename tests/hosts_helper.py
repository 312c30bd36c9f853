"""Runs of several hosts: processes with fake CPU devices of their own, on this machine, one run folder for all."""

import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runs_helper import command, environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Hosts:
    """`count` processes with `devices` each; `with` makes sure that none is left."""

    file: Path
    count: int
    devices: int
    overrides: Sequence[str] = ()
    running: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> "Hosts":
        address = f"127.0.0.1:{free_port()}"
        for process in range(self.count):
            args = command(
                "train", self.file, f"mesh.cpu_devices={self.devices}", f"distributed.coordinator={address}",
                f"distributed.processes={self.count}", f"distributed.process={process}", *self.overrides,
            )  # fmt: skip
            self.running.append(subprocess.Popen(
                args, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ))  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.kill()
            process.wait()
            process.stdout.close()  # of one that a test killed, nobody has read them
            process.stderr.close()

    def wait(self, timeout: float = 600) -> list[tuple[int, str]]:
        """(exit code, stderr) of each."""
        said = [process.communicate(timeout=timeout)[1] for process in self.running]
        return [(process.returncode, text) for process, text in zip(self.running, said, strict=True)]
