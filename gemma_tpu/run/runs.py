"""The run folder: one config, one run. What lies in it, and the refusal to mix two runs."""

import errno
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tpu import config as configs
from gemma_tpu import plain
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.schema import Config

# May change between a run and its continuation: what is logged and how often it is saved.
FREE = ("log.", "checkpoint.", "eval.", "faults.", "profile.", "distributed.", "run_dir", "mesh.", "model.path",
        "recipe", "data.cache", "data.workers")  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    path: Path
    opened: float = field(default_factory=time.monotonic, compare=False)  # since when its machine is paid for

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def held_out(self) -> Path:
        return self.path / "held_out.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def warnings(self) -> Path:
        return self.path / "warnings.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    def write_config(self, config: Config) -> None:
        """Makes the folder a run's; called when everything that can be refused has been checked."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, configs.to_yaml(config))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            failure = RunError if full else UserError
            raise failure(f"run_dir {self.path} cannot be written: {error.strerror}") from error


def open_run(config: Config) -> RunFolder:
    """The folder of this config's run, new or to be continued; another run's is refused with the differences."""
    folder = RunFolder(Path(config.run_dir).expanduser())
    if folder.config.exists():
        changed = [line for line in configs.differences(read_config(folder.path), config) if not line.startswith(FREE)]
        if changed:
            raise UserError(
                f"{folder.path} holds a run with another config:\n  " + "\n  ".join(changed)
                + "\ngive another run_dir, or put the values back to continue that run"
            )  # fmt: skip
    elif folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise UserError(f"run_dir {folder.path} exists, is not empty and holds no run; give another run_dir")
    return folder


def read_config(run_dir: Path) -> Config:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: no config.yaml here; is it a run folder?")
    return configs.load(path)


_SUMMARY = {
    "steps?": int, "device_kind?": str, "devices?": int, "hosts?": int, "notes?": [str], "version?": (str, None),
    "saving_share?": (float, None), "held_out_loss?": dict, "trainable_params?": (int, None),
    "framework?": (str, None),
}  # fmt: skip


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """Its totals; empty while the run goes on."""
    if not folder.summary.exists():
        return {}
    summary: dict[str, Any] = plain.require(plain.json_file(folder.summary), _SUMMARY, str(folder.summary))
    return summary


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and not (path / "config.json").exists()


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
