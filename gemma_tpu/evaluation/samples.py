"""Stored completions: one JSON object a line, written as they come, never rewritten.

An evaluation that is run again goes on with what is missing. What is there is never drawn again: to draw failures
anew and keep successes would turn pass@1 into something else.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_tpu import plain
from gemma_tpu.errors import RunError, UserError

Key = tuple[str, int]
SHOWN = 5  # faulty lines that an error names


@dataclass(frozen=True)
class Sample:
    problem: str
    sample: int
    completion: str
    finish_reason: str = ""
    tokens: int = 0

    @property
    def key(self) -> Key:
        return self.problem, self.sample


class Store:
    """The samples of one model under one set of settings. Without a path they stay in memory."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self.path, self.dropped = path, 0
        self.found: dict[Key, Sample] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._settings(path.with_suffix(".settings.json"), json.loads(json.dumps(settings)))
            if path.exists():
                self._cut_torn_line(path)
                self.found = {one.key: one for one in read(path)}
        except OSError as error:
            raise UserError(f"{path.parent}: samples cannot be written there: {error.strerror}") from None

    def add(self, sample: Sample) -> None:
        self.found[sample.key] = sample
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}; run again to go on") from None

    def missing(self, wanted: Iterable[Key]) -> set[Key]:
        return set(wanted) - set(self.found)

    def _settings(self, file: Path, settings: dict[str, Any]) -> None:
        if file.exists():
            stored = plain.require(plain.json_file(file), {str: object}, str(file))
            changed = [
                f"{plain.below('', key)}: {plain.shown(stored.get(key))} there, {plain.shown(settings.get(key))} now"
                for key in sorted({*stored, *settings}) if stored.get(key) != settings.get(key)
            ]  # fmt: skip
            if changed:
                raise UserError(
                    f"{file.parent} holds samples of another evaluation:\n  " + plain.first(changed, between="\n  ")
                    + "\ngive another --out, or the same settings to go on with that one"
                )  # fmt: skip
            return
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)

    def _cut_torn_line(self, path: Path) -> None:
        """A line that a crash left half written is drawn again; everything before it stands."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self.dropped = 1
            with path.open("r+b") as stream:
                stream.truncate(whole)


def read(path: Path, problems: Iterable[str] | None = None) -> list[Sample]:
    """Every sample of a file, ours or anyone's: {problem, sample, completion} a line; all faults in one error."""
    known = None if problems is None else set(problems)
    found: dict[Key, Sample] = {}
    faults: list[str] = []
    for number, line in enumerate(plain.text(path).split("\n"), 1):
        if not line.strip():
            continue
        fault, sample = _parse(line)
        if sample is None:
            pass
        elif known is not None and sample.problem not in known:
            fault = f"no problem is called {plain.shown(sample.problem)}"
        elif sample.key in found:
            fault = f"sample {sample.sample} of {plain.cut(sample.problem)} is there twice"
        else:
            found[sample.key] = sample
        if fault:
            faults.append(f"line {number}: {fault}")
    if faults or not found:
        shown = "; ".join(faults[:SHOWN]) + (f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else "")
        raise UserError(f"{path}: {shown or 'holds no sample'}")
    return list(found.values())


def _parse(line: str) -> tuple[str, Sample | None]:
    try:
        entry = plain.json_value(line)
    except ValueError as error:
        return f"not JSON ({error})", None
    types = {"problem": str, "sample": int, "completion": str}
    wrong = [
        f"{key} must be {kind.__name__}"
        for key, kind in types.items()
        if not isinstance(entry, dict) or type(entry.get(key)) is not kind
    ]
    if wrong:
        return f"not {{problem, sample, completion}}: {', '.join(wrong)}", None
    reason, tokens = entry.get("finish_reason", ""), entry.get("tokens", 0)
    tokens = tokens if type(tokens) is int else 0
    return "", Sample(entry["problem"], entry["sample"], entry["completion"], str(reason), tokens)
