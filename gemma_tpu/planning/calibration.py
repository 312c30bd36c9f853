"""What real runs say about the model of time: measured over predicted, kept for each chip and each basis.

A prediction is corrected by the ratio of a run on the same chip, and says so. Without one it says how the same
model of time does on the one program of which a measurement is published.
"""

import json
import os
import statistics
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import chips
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.run import metrics, runs

VARIABLE = "GEMMA_TPU_CALIBRATION"
WARM_UP = 3  # updates at the start that are not counted: the first ones fill queues and caches
LEAST = 5  # updates that must be left
# The walk of a schedule, on the program behind the only published time of this job on a TPU.
REFERENCE = (
    "not calibrated by a run; the same model of time (the walk of a schedule, to which the arithmetic is fitted) "
    "predicts 1,392 useful tokens/s for the paper's program (31B, v5p-8), where the paper measured 763 on average "
    "with start-up (benchmarks/tunix_walk.py): at most 1.82 times too fast there"
)


@dataclass(frozen=True)
class Calibration:
    """Speed of a real run over the speed that was predicted for it."""

    chip: str
    basis: str  # of the prediction: analytic, schedule or cycles
    ratio: float
    run: str
    slice: str
    measured_step_s: float
    predicted_step_s: float
    updates: int
    date: str

    def __str__(self) -> str:
        return (
            f"calibrated by {self.run} x{self.ratio:.2f} ({self.date}, {self.slice}: {self.measured_step_s:.4g} s an "
            f"update measured over {self.updates} updates, {self.predicted_step_s:.4g} s predicted)"
        )


_FORM = {"chip": str, "basis": str, "ratio": float, "run": str, "slice": str, "measured_step_s": float,
         "predicted_step_s": float, "updates": int, "date": str}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """The pace of a real run, once it was warm."""

    run: Path
    step_s: float  # the median
    tokens_per_s: float
    updates: int
    place: Slice | None  # as the run recorded its devices
    device: str | None


def file() -> Path:
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "gemma_tpu" / "calibration.json"


def of_chip(chip: str) -> dict[str, Calibration]:
    """What is known of a chip, by basis."""
    return {basis: found for (name, basis), found in _read().items() if name == chip}


def store(found: Calibration) -> Path:
    """Keep it in the place of what was known of this chip and basis."""
    known, path = _read(), file()
    known[found.chip, found.basis] = found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_text(path, json.dumps([asdict(one) for one in known.values()], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; set {VARIABLE} to another file") from None
    return path


def _read() -> dict[tuple[str, str], Calibration]:
    path = file()
    if not path.exists():
        return {}
    tree = plain.json_file(path)
    problems = list(plain.faults(tree, [_FORM]))
    known = {field.name for field in fields(Calibration)}
    for row in tree if not problems else ():
        problems += [f"{plain.below('', key)} is unknown" for key in row if key not in known]
        if not 0 < row["ratio"] < 100:
            problems.append(f"ratio {row['ratio']!r} of {row['chip']} is no number from 0 to 100")
    if problems:
        told = plain.first(problems, 5, "; ")
        raise UserError(f"{path}: not a file of calibrations ({told}); remove it and calibrate again")
    rows = [Calibration(**row) for row in tree]
    return {(one.chip, one.basis): one for one in rows}


def measure(run_dir: Path) -> Measured:
    """The median pace of a run after its warm-up, from metrics.jsonl; its devices from summary.json."""
    runs.read_config(run_dir)
    folder = runs.RunFolder(run_dir)
    rows = metrics.read(folder.metrics, metrics.PACE)[WARM_UP:]
    rows = [row for row in rows if row["tokens_per_s"] > 0 and row["tokens"] > 0]
    if len(rows) < LEAST:
        raise UserError(
            f"{run_dir}: {len(rows)} updates after the first {WARM_UP}, and {LEAST} are needed for a median; "
            "calibrate with a longer run"
        )
    summary = runs.read_summary(folder)
    device, count = summary.get("device_kind"), summary.get("devices")
    return Measured(
        run=run_dir,
        step_s=statistics.median(row["tokens"] / row["tokens_per_s"] for row in rows),
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in rows),
        updates=len(rows),
        place=chips.of_devices(device, count, summary.get("slices", 1)) if device and count else None,
        device=f"{count} x {device}" if device else None,
    )


def compare(measured: Measured, place: Slice, basis: str, predicted_step_s: float) -> Calibration:
    """`predicted_step_s` without any correction."""
    return Calibration(
        chip=place.chip.name, basis=basis, ratio=round(predicted_step_s / measured.step_s, 4), run=str(measured.run),
        slice=place.name, measured_step_s=round(measured.step_s, 6), predicted_step_s=round(predicted_step_s, 6),
        updates=measured.updates, date=date.today().isoformat(),
    )  # fmt: skip
