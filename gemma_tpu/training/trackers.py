"""The figures of a run for people who watch it elsewhere: TensorBoard files, W&B, Trackio.

TensorBoard's file format is a length, a checksum and a small protobuf for each record. The few fields that scalars
and texts need are written here: the packages that could do it bring a dependency larger than this file's job.
"""

import importlib
import importlib.util
import json
import math
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gemma_tpu.errors import RunError, UserError
from gemma_tpu.run.metrics import Appender, say
from gemma_tpu.run.runs import write_text


class Tracker(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


def require(names: Sequence[str]) -> None:
    """Said before anything is loaded: the trackers themselves open when the run begins."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        are = "is" if len(absent) == 1 else "are"
        raise UserError(f"log.trackers names {' and '.join(absent)}, which {are} not installed: "
                        f"pip install 'gemma_tpu[{','.join(absent)}]'")  # fmt: skip


def open_trackers(
    folder: Path, tensorboard: bool, names: Sequence[str], project: str, config: Mapping[str, Any], continued: bool
) -> list[Tracker]:
    found: list[Tracker] = [TensorBoard(folder / "tensorboard")] if tensorboard else []
    return found + [_OnlineTracker(name, project, folder, config, continued) for name in names]


class TensorBoard:
    """An event file that grows with each step; a continued run begins another, as TensorBoard expects."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = Appender(folder / name)
        self._write(_text(3, "brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        found = (_bytes(1, _text(1, name) + _float(2, value)) for name, value in values.items())
        self._write(_varint(2, step) + _bytes(5, b"".join(found)))

    def text(self, step: int, name: str, text: str) -> None:
        plugin = _bytes(9, _bytes(1, _text(1, "text")))  # metadata: which of TensorBoard's plugins shows it
        tensor = _bytes(8, _varint(1, 7) + _bytes(2, _bytes(2, _varint(1, 1))) + _text(8, text))  # one string
        self._write(_varint(2, step) + _bytes(5, _bytes(1, _text(1, name) + plugin + tensor)))

    def close(self) -> None:
        self._file.close()

    def _write(self, fields: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))


def _varint(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _base128(value)


def _base128(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _bytes(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _base128(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())


def _float(number: int, value: float) -> bytes:
    return struct.pack("<Bf", number << 3 | 5, value)


def _table() -> list[int]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return found


_CRC32C = _table()


def _masked(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as the format wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


class _OnlineTracker:
    """W&B or Trackio: they share these four calls. A service that fails later costs its own curve, not the run.

    A continued run goes on in its own curve. Trackio finds that by its name, W&B by an id alone, which the run folder
    keeps; a new run never goes on in the curve of an older one whose folder had the same name.
    """

    def __init__(self, name: str, project: str, folder: Path, config: Mapping[str, Any], continued: bool):
        require([name])
        more: dict[str, Any] = {"resume": "allow" if continued else "never"}
        if name == "wandb":
            more = {"id": _id(folder / "wandb.json", continued), "resume": "allow"}
        try:
            self._module = importlib.import_module(name)
            self._run = self._module.init(project=project, name=folder.name, config=dict(config), **more)
        except Exception as error:
            raise RunError(f"log.trackers: {name} could not start: {' '.join(str(error).split())[:300]}") from error

        self._name, self._works = name, True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._module.log(dict(values), step=step))

    def text(self, step: int, name: str, text: str) -> None:
        self._try(lambda: self._module.log({name: text}, step=step))

    def close(self) -> None:
        self._try(self._module.finish)

    def _try(self, call: Callable[[], Any]) -> None:
        if self._works:
            try:
                call()
            except Exception as error:  # each service's client has exceptions of its own
                self._works = False
                say(f"warning: {self._name} is left out from here on: {' '.join(str(error).split())[:300]}")


def _id(file: Path, continued: bool) -> str:
    if continued and file.exists():
        return str(json.loads(file.read_text())["id"])
    made = secrets.token_hex(6)
    write_text(file, json.dumps({"id": made}) + "\n")
    return made


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl, under the names that the trackers show."""
    return {
        f"train/{key}": float(value)
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
