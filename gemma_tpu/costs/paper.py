"""The paper's tables of cost, made again by our own arithmetic, and every figure of it that cannot stand.

What it printed is data (bundled/paper.yaml); here is how each figure follows from its measurements.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gemma_tpu import plain
from gemma_tpu.assets import resolve
from gemma_tpu.costs import cost
from gemma_tpu.costs.cost import Serving, Side, Training
from gemma_tpu.estimate import inference
from gemma_tpu.estimate.inference import Load, Server
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips, prices

SET = "paper-2026-05"
KINDS = ("tpu", "gpu")
PLOTTED_STEPS = 625  # of the GPU run, in the script that draws the paper's pictures
SWEEP = 1024  # tokens in, of the table that says where a server saturates
ABOUT = "the paper, arXiv:2605.25645"


@dataclass(frozen=True)
class Discrepancy:
    id: str
    place: str
    printed: float
    computed: float  # pinned in the data
    value: float  # computed now
    digits: int
    why: str
    says: str = ""  # what is printed, where it is no single figure
    unit: str = ""  # of what is computed

    @property
    def printed_text(self) -> str:
        return self.says or shown(self.printed, self.digits)

    @property
    def computed_text(self) -> str:
        return f"{shown(self.value, self.digits)} {self.unit}".strip()


@dataclass(frozen=True)
class Cell:
    printed: float
    value: float
    digits: int

    @property
    def agrees(self) -> bool:
        return shown(self.value, self.digits) == shown(self.printed, self.digits)


@cache
def data() -> Mapping[str, Any]:
    tree: dict[str, Any] = plain.yaml_file(resolve("bundled:paper.yaml"))
    return tree


def shown(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def sides() -> dict[str, Side]:
    """Training and short-context serving at the paper's prices, each with what it measured."""
    found = prices.load(SET)
    return {kind: cost.side(kind.upper(), training(kind), serving(kind, 512), found, "on-demand") for kind in KINDS}


def training(kind: str) -> Training:
    one = data()["measured"]["training"][kind]
    tokens = one["tokens_per_s"] * one["hours"] * 3600
    return Training(chips.find(one["slice"]), one["hours"], tokens, True, ABOUT)


def serving(kind: str, prompt: int) -> Serving:
    measured = data()["measured"]["serving"]
    point = next(one for one in measured["points"] if one["prompt"] == prompt)
    load, requests = Load(prompt, point["output"]), point[kind] / point["output"]
    place = chips.find(measured[kind])
    used = inference.flops_of_request(sizes.architecture(data()["measured"]["model"]), load) * requests
    return Serving(
        place, point[kind], True, f"{ABOUT}: {load}, 30 prompts at once", requests * prompt,
        {"ttft": {"p50": float(point[f"ttft_{kind}"])}}, used / (place.chips * place.chip.bf16_tflops * 1e12),
        _bound(kind, point),
    )  # fmt: skip


@cache
def values() -> dict[str, float]:
    """Every figure that a table or a discrepancy names."""
    found = _costs() | _training() | _evaluation() | _serving()
    for name in [name for name in found if name.endswith(".tpu")]:
        stem = name.removesuffix(".tpu")
        if found.get(f"{stem}.gpu") and found[name]:
            found[f"{stem}.ratio"] = found[f"{stem}.gpu"] / found[name]
    return found


def _costs() -> dict[str, float]:
    found: dict[str, float] = {}
    listed = prices.load(SET)
    for kind, one in sides().items():
        run, short = training(kind), serving(kind, 512)
        per_million = run.usd_per_million(one.once["training"])
        assert per_million is not None  # its tokens are known
        found[f"hour.train.{kind}"] = listed.hour(run.place).usd
        found[f"hour.serve.{kind}"] = listed.hour(short.place).usd
        found[f"hours.{kind}"] = run.hours
        found[f"train.{kind}"] = one.once["training"]
        found[f"train_million.{kind}"] = per_million
        for prompt in (512, 4096):
            served = serving(kind, prompt)
            found[f"tokens_hour.{prompt}.{kind}"] = served.tokens_per_hour / 1e6
            found[f"serve_million.{prompt}.{kind}"] = served.usd_per_million(one.per_hour)
        for hours in (1, 8, 24):
            found[f"total.{hours}.{kind}"] = one.after_hours(hours)
    found["speed"] = found["hours.gpu"] / found["hours.tpu"]
    return found


def _training() -> dict[str, float]:
    measured = data()["measured"]["training"]
    rows, tpu, gpu = measured["rows"], measured["tpu"], measured["gpu"]
    kept = {limit: rows["read"] - rows["empty"] - long for limit, long in rows["too_long"].items()}
    agreeing = [limit for limit, count in kept.items() if count // rows["batch"] == tpu["steps"]]
    found = {
        "steps.all_rows": rows["read"] // rows["batch"], "batch.at_625_steps": rows["read"] / PLOTTED_STEPS,
        "sequence_of_the_steps": max(agreeing), "loss.likelihood_ratio": math.exp(gpu["loss"] - tpu["loss"]),
    }  # fmt: skip
    for kind, one in (("tpu", tpu), ("gpu", gpu)):
        found[f"trained.{kind}"] = one["hours"] * 3600 * one["tokens_per_s"]
        found[f"seconds_per_sample.{kind}"] = one["hours"] * 3600 / kept[max(agreeing)]
    return found


def _evaluation() -> dict[str, float]:
    measured = data()["measured"]["evaluation"]
    found = {}
    for kind in KINDS:
        one, problems = measured[kind], measured["problems"]
        found[f"unsolved.{kind}"] = round(problems * (1 - one["pass5"]))
        found[f"pass5.{kind}"] = 1 - one["none"] / problems
        found[f"passed.{kind}"] = one["pass1"] * problems * measured["samples"]
    return found


def _serving() -> dict[str, float]:
    measured = data()["measured"]["serving"]
    found: dict[str, float] = {}
    for point in measured["points"]:
        if point["prompt"] == SWEEP:
            found |= {f"saturation_qps.{kind}": point[kind] / point["output"] for kind in KINDS}
        found[f"ttft_ratio.{point['prompt']}"] = point["ttft_gpu"] / point["ttft_tpu"]
        for kind in KINDS:
            found[f"ttft_floor.{point['prompt']}.{kind}"] = _server(kind).prefill_s(point["prompt"]) * 1e3
    return found


# --- what share of the arithmetic its servers reached ---


def _server(kind: str) -> Server:
    measured = data()["measured"]["serving"]
    place = chips.find(measured[kind])
    arch = sizes.architecture(data()["measured"]["model"])
    return Server(arch, place, place.devices, measured["kv_bytes"][kind])


def _bound(kind: str, point: Mapping[str, Any]) -> float:
    prompts = data()["measured"]["serving"]["prompts"]
    server, load = _server(kind), Load(point["prompt"], point["output"])
    return server.output_tokens_per_s(load, min(prompts, server.most_rows(load)))


def reached(kind: str) -> float:
    """Measured throughput over the bound of `inference`, the geometric mean over its points, for a kind of chip."""
    points = data()["measured"]["serving"]["points"]
    shares: list[float] = [point[kind] / _bound(kind, point) for point in points]
    return float(math.prod(shares) ** (1 / len(shares)))


# --- as rows ---


def discrepancies() -> list[Discrepancy]:
    return [
        Discrepancy(one["id"], one["place"], one["printed"], one["computed"], values()[one["by"]], one["digits"],
                    one["why"], one.get("says", ""), one.get("unit", ""))
        for one in data()["discrepancies"]
    ]  # fmt: skip


Row = tuple[str, str, list[Cell | None]]  # what, unit, cells of TPU, GPU and their ratio


def tables() -> list[tuple[str, list[Row]]]:
    """By name."""
    found = []
    for table in data()["tables"]:
        rows = []
        for row in table["rows"]:
            cells = [Cell(row[key][0], values()[row[key][1]], row["digits"]) if key in row else None
                     for key in (*KINDS, "ratio")]  # fmt: skip
            rows.append((row["what"], row["unit"], cells))
        found.append((table["name"], rows))
    return found
