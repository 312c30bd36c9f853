#!/usr/bin/env python3
"""Makes docs/accelerators.md and its pictures from the data files: chips, memories, the paper's measurements, our rows.

    python scripts/accelerators.py             write the page and the pictures again
    python scripts/accelerators.py --measure   lay out the bundled rows anew, too (docs/accelerators/measured.json)
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from gemma_tpu.assets import resolve
from gemma_tpu.costs import paper
from gemma_tpu.estimate import inference, roofline
from gemma_tpu.estimate.inference import Load, Server
from gemma_tpu.gemma import sizes
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import chips
from gemma_tpu.hardware.chips import Chip
from gemma_tpu.pages import page
from gemma_tpu.pages.page import Axis, Bar, Curve, Dot

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURES = ROOT / "docs" / "accelerators.md", ROOT / "docs" / "accelerators"
MEASURED_FILE = PICTURES / "measured.json"
# Never one colour for two of these.
STATED, PREDICTED, MEASURED = 7, (0, 3, 2, 6), (1, 4)
MODEL = "gemma4-31b"
CACHES = {"Gemma 4 31B": "gemma4-31b", "Gemma 4 12B": "gemma4-12b", "Gemma 3 27B": "gemma3-27b",
          "Gemma 4 E4B": "gemma4-e4b"}  # fmt: skip
LENGTHS = (256, 320, 512, 1024, 2048)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LABELS = {"norm": "", "MLP, decoding 1": "norm; MLP, decoding 1"}  # dots that lie on one another
PAIR = (("v6e-8", "tpu"), ("h100x2", "gpu"))  # what the paper measured


# --- pictures ---


def ladder() -> tuple[str, list[tuple[str, str, str, str]]]:
    """Capacity against bandwidth of the memories around one chip; the same as rows."""
    told = yaml.safe_load(resolve("bundled:memory.yaml").read_text(encoding="utf-8"))
    chip, levels = chips.chips()[told["chip"]], told["levels"]
    vmem, host, network = levels["vmem"], levels["host"], levels["network"]
    slice_gib = chip.hbm_gib * 255  # the other chips of the largest slice
    found = [
        (vmem["name"], vmem["mib"] / 1024, chip.hbm_gbs * vmem["times_hbm"], f"{vmem['from']}, {vmem['date']}"),
        ("HBM, beside it", chip.hbm_gib, chip.hbm_gbs, str(chip.sources["speeds"])),
        ("other chips of the slice, over its links", slice_gib, chip.links * chip.link_gbs,
         str(chip.sources["speeds"])),
        (host["name"], None, host["gbs"], f"{host['from']}, {host['date']}"),
        (network["name"], None, network["gbs"], f"{network['from']}, {network['date']}"),
    ]  # fmt: skip
    drawn = []
    for at, (name, _, gbs, _) in enumerate(found):
        drawn.append(Dot(gbs, len(found) - at, f"{name}: {gbs:,.0f} GB/s", name, STATED, 6.0))
    axes = Axis(f"10^9 bytes a second for one {chip.name}", 1.0, 1e5, True), Axis("", 0.4, len(found) + 0.6)
    picture = page.plot(*axes, [], drawn, "Memories of a TPU v5e by bandwidth", 260)
    picture = re.sub(r'<text [^>]*"end" class="soft">[\d.]+</text>', "", picture)  # levels have no unit
    rows = [(name, "-" if gib is None else f"{gib:,.1f} GiB", f"{gbs:,.0f}",
             f"{chip.bf16_tflops * 1e12 / gbs / 1e9:,.0f}") for name, gib, gbs, _ in found]  # fmt: skip
    return picture, rows


def server(name: str, kv_bytes: int = 2) -> Server:
    place = chips.find(name)
    return Server(sizes.architecture(MODEL), place, place.devices, kv_bytes)


def batch(what: str) -> str:
    """Throughput, or time between tokens, against requests at once: the bound, and what the paper's servers did."""
    load = Load(512, 256)
    curves, dots, measured, most = [], [], [], 0.0
    point = next(one for one in paper.data()["measured"]["serving"]["points"] if one["prompt"] == load.prompt)
    prompts = paper.data()["measured"]["serving"]["prompts"]
    for number, (name, kind) in enumerate(PAIR):
        one = server(name)
        rows = [n for n in ROWS if n <= one.most_rows(load)]
        if what == "rate":
            points = [(float(n), one.output_tokens_per_s(load, n)) for n in rows]
            seen = float(point[kind])
        else:
            points = [(float(n), one.tpot_s(load, n) * 1e3) for n in rows]
            seen = prompts / point[kind] * 1e3
        curves.append(Curve(points, PREDICTED[number], f"{name}, at most" if what == "rate" else ""))
        if what != "rate":  # its lines end where the measured dots are: named at their beginning
            curves.append(Curve(points[:5], PREDICTED[number], f"{name}, at least"))
        measured.append((seen, name, MEASURED[number]))
        most = max(most, seen, *(y for _, y in points))
    label = ", ".join(f"{name} {seen:,.4g}" for seen, name, _ in sorted(measured, reverse=True))
    for seen, name, colour in measured:  # they lie close: one label for both
        words = f"measured: {label}" if seen == max(measured)[0] else ""
        dots.append(Dot(prompts, seen, words, f"{name}: {seen:,.4g}, measured", colour, 5.5, True))
    unit = "output tokens/s" if what == "rate" else "ms between two tokens of a request"
    return page.plot(Axis("requests at once", 1.0, 300.0, True), Axis(unit, 0.0, most * 1.12), curves, dots,
                     f"{unit} against requests at once")  # fmt: skip


def links() -> str:
    rows = [Bar(one.name, one.links * one.link_gbs, f"{one.links * one.link_gbs:,.0f} GB/s "
                f"({one.links} x {one.link_gbs:g}); HBM {one.hbm_gbs:,.0f}", STATED)
            for one in sorted(chips.chips().values(), key=lambda one: -one.links * one.link_gbs)]  # fmt: skip
    return page.bars(rows, "Bandwidth of a chip's links, one direction")


def roofline_picture() -> str:
    """The roofs of three spec sheets, and our operations under that of one of them."""
    shown = [chips.chips()[name] for name in ("v6e", "h100", "v5p")]
    low, high = 0.3, 3e4
    curves = []
    for one in shown:
        peak, slope = one.bf16_tflops * 1e12, one.hbm_gbs * 1e9
        curves.append(Curve([(low, low * slope), (peak / slope, peak), (high, peak)], None, ""))
    dots = [
        Dot(flops_a_byte, min(shown[0].bf16_tflops * 1e12, flops_a_byte * shown[0].hbm_gbs * 1e9),
            LABELS.get(name, name), name, PREDICTED[0], 5.0)
        for name, flops_a_byte in operations()
    ]  # fmt: skip
    for number, (name, kind) in enumerate(PAIR):
        x, y = achieved(name, kind)
        dots.append(Dot(x, y, f"{name} serving, measured", f"{y:.3g} FLOP/s a chip", MEASURED[number], 6.0, True))
    for one, x in zip(shown, (7e3, 2e4, 2e4), strict=True):
        dots.append(Dot(x, one.bf16_tflops * 1e12, one.name, f"{one.bf16_tflops:g} TFLOP/s", STATED, 3.0))
    return page.plot(Axis("FLOPs for each byte of HBM", low, high, True), Axis("FLOP/s of a chip", 3e11, 2.2e15, True),
                     curves, dots, "Roofline of three chips with our operations", 480)  # fmt: skip


def operations() -> list[tuple[str, float]]:
    """FLOPs for each byte that one chip reads or writes, in bfloat16, of what a step of 31B is made of."""
    arch = sizes.architecture(MODEL)
    D, F = arch.hidden, arch.layers[0].mlp

    def product(rows: float, inside: float, outside: float) -> float:
        return 2 * rows * inside * outside / (2 * (inside * outside + rows * (inside + outside)))

    group = arch.heads / arch.layers[0].kv_heads
    return [
        ("norm", 4 / 4), ("attention, decoding", 2 * group / 2),
        ("MLP, decoding 1", product(1, D, F)), ("MLP, decoding 32", product(32, D, F)),
        ("adapter of rank 64, training", product(4096, D, 64)), ("MLP, decoding 256", product(256, D, F)),
        ("MLP, training 4,096 tokens", product(4096, D, F)),
    ]  # fmt: skip


def achieved(name: str, kind: str) -> tuple[float, float]:
    """FLOPs a byte and FLOP/s a chip of the paper's serving: 512 in, 256 out, 30 prompts; every prompt read alone."""
    one, found, load = server(name), paper.serving(kind, 512), Load(512, 256)
    rows = paper.data()["measured"]["serving"]["prompts"]
    flops = inference.flops_of_request(one.arch, load)
    prompts = rows * inference.weights_read(one.arch, load.prompt) * 2
    step = inference.weights_read(one.arch, rows) * 2 + one.cache_bytes(640) * one.tp * rows
    return rows * flops / (prompts + load.output * step), flops * found.output_tokens_per_s / 256 / one.place.chips


def cache() -> str:
    contexts = [1024 * 2**n for n in range(8)]
    curves, dots = [], []
    for number, (label, size) in enumerate(CACHES.items()):
        arch = sizes.architecture(size)
        points = [(float(n), inference.cache_of_token(arch, n) * n / 2**30) for n in contexts]
        curves.append(Curve(points, PREDICTED[number], ""))
        x, y = points[-2 - number]
        dots.append(Dot(x, y, label, f"{y:.2f} GiB at {x:,.0f}", PREDICTED[number], 3.5))
    return page.plot(Axis("tokens of one sequence", 1000.0, 140000.0, True), Axis("GiB of cache", 0.03, 60.0, True),
                     curves, dots, "Cache of one sequence against its length")  # fmt: skip


def reading() -> str:
    """What a decoding step of 16 requests waits for, by context."""
    one = server("v6e-8")
    rows = []
    for context in (1024, 4096, 16384, 65536):
        parts = one.step_parts(16, context)
        whole = one.step_s(16, context)
        for name, colour in (("weights", PREDICTED[0]), ("cache", PREDICTED[1]), ("arithmetic", PREDICTED[2])):
            label = f"{context:,} tokens: {name}"
            rows.append(Bar(label, parts[name] * 1e3, f"{parts[name] * 1e3:.2f} ms, {parts[name] / whole:.0%}", colour))
    return page.bars(rows, "Parts of a decoding step by context, v6e-8, 16 requests")


def padding(measured: Mapping[str, Any]) -> str:
    rows = []
    for length, waste in measured["waste"].items():
        for name in ("pad", "bucket", "pack"):
            rows.append(Bar(f"{int(length):,}, {name}", waste[name], f"{waste[name]:.1%}", MEASURED[0], True))
    return page.bars(rows, "Share of the positions that is padding, measured")


# --- measuring ---


def measure() -> dict[str, Any]:
    """The bundled training rows under every layout, by the tools that `gemma-tpu data` uses."""
    from gemma_tpu import config
    from gemma_tpu.data.corpus import prepare
    from gemma_tpu.data.packing import padding_waste
    from gemma_tpu.data.tokenizer import Tokenizer
    from gemma_tpu.tiny.checkpoint import write_tiny

    data = replace(config.load("tiny_cpu.yaml").data, cache=None, validation=None)
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(data, Tokenizer(str(write_tiny(Path(folder) / "tiny"))))
    return {
        "rows": len(rows), "dropped": rows.dropped.total(), "mean": round(rows.tokens / len(rows), 1),
        "longest": rows.percentiles["max"],
        "waste": {str(n): {k: round(v, 4) for k, v in padding_waste(rows.lengths, n).items()} for n in LENGTHS},
    }  # fmt: skip


# --- the page ---


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def chip_rows() -> list[tuple[str, ...]]:
    def ridge(one: Chip) -> str:
        return f"{one.bf16_tflops * 1e12 / one.hbm_gbs / 1e9:,.0f}"

    return [
        (one.name, f"{one.bf16_tflops:,.0f}", f"{one.hbm_gib:,.1f}", f"{one.hbm_gbs:,.0f}", ridge(one),
         f"{one.links * one.link_gbs:,.0f}", "-" if one.usd is None else f"{one.usd:.2f}",
         "-" if one.usd is None else f"{one.bf16_tflops / one.usd:,.0f}",
         "-" if one.usd is None else f"{one.hbm_gbs / one.usd:,.0f}", str(one.sources["speeds"]))
        for one in chips.chips().values()
    ]  # fmt: skip


def fit_rows() -> list[tuple[str, ...]]:
    found = []
    for context in (2048, 8192, 32768, 131072):
        cells = [f"{server(name, kv).rows_that_fit(context):,}" for name, _ in PAIR for kv in (2, 1)]
        found.append((f"{context:,}", *cells))
    return found


def link_rows() -> list[tuple[str, ...]]:
    """The share of a decoding step that goes over the links, by tensor parallelism."""
    found = []
    for name in ("v5e-8", "v6e-8", "v5p-8", "h100x2", "h100x8"):
        one = server(name)
        cells = [f"{one.step_parts(rows, 2048)['links'] / one.step_s(rows, 2048):.1%}" for rows in (1, 32, 128)]
        found.append((name, str(one.tp), *cells))
    return found


def text(measured: Mapping[str, Any]) -> str:
    arch = sizes.architecture(MODEL)
    memories, load = ladder()[1], Load(512, 256)
    points = paper.data()["measured"]["serving"]["points"]
    tpu, gpu = (server(name) for name, _ in PAIR)
    window = next(layer.window for layer in arch.layers if layer.window)
    long, short = (inference.cache_of_token(arch, n) * n / 2**30 for n in (131072, 4096))
    all_global = sum(2 * layer.kv_heads * layer.head_dim * 2 for layer in arch.layers) * 131072 / 2**30
    lone = {name: server(name).step_s(1, 640) * 1e3 for name, _ in PAIR}
    waste, at = measured["waste"], "1024"
    one_row = 1 - waste[at]["pad"]
    template = (Path(__file__).parent / "accelerators_template.md").read_text(encoding="utf-8")
    return template.format(
        chips=table(("chip", "bf16 TFLOP/s", "HBM GiB", "HBM GB/s", "FLOPs a byte at the ridge", "links GB/s",
                     "$/h", "TFLOP/s for $1/h", "GB/s for $1/h", "source of the speeds"), chip_rows()),
        memories=table(("memory", "size", "GB/s", "FLOPs of the chip while one byte comes"), memories),
        lone_tpu=f"{lone['v6e-8']:.1f}", lone_gpu=f"{lone['h100x2']:.1f}",
        one_tpu=f"{tpu.output_tokens_per_s(load, 1):,.0f}", many_tpu=f"{tpu.output_tokens_per_s(load, 128):,.0f}",
        tpot_one=f"{tpu.tpot_s(load, 1) * 1e3:.1f}", tpot_many=f"{tpu.tpot_s(load, 128) * 1e3:.1f}",
        reached=table(("tokens in / out", "v6e-8 measured", "of the bound", "h100x2 measured", "of the bound"), [
            (f"{one['prompt']:,} / {one['output']}", *(cell for kind in paper.KINDS for cell in (
                f"{one[kind]:,}", f"{paper.serving(kind, one['prompt']).of_bound:.0%}"))) for one in points]),
        links=table(("slice", "tp", "1 request", "32 requests", "128 requests"), link_rows()),
        operations=table(("operation", "FLOPs a byte", "of v6e's peak at most", "of H100's peak at most"), [
            (name, f"{x:,.1f}", *(f"{min(1, x * one.hbm_gbs / one.bf16_tflops / 1e3):.1%}" for one in
                                 (chips.chips()["v6e"], chips.chips()["h100"]))) for name, x in operations()]),
        window=f"{window:,}", long=f"{long:.1f}", short=f"{short:.2f}", all_global=f"{all_global:.0f}",
        fit=table(("tokens", "v6e-8, bf16", "v6e-8, fp8", "h100x2, bf16", "h100x2, fp8"), fit_rows()),
        rows=f"{measured['rows']:,}", mean=f"{measured['mean']:g}", longest=measured["longest"],
        waste=table(("max_seq_len", "one row a sheet", "next bucket", "packed"), [
            (f"{int(n):,}", *(f"{each[key]:.1%}" for key in ("pad", "bucket", "pack")))
            for n, each in waste.items()]),
        at=f"{int(at):,}", times=f"{(1 - waste[at]['pack']) / one_row:.1f}",
        attention=f"{attention_share(arch, 4096):.0%}", attention_long=f"{attention_share(arch, 131072):.0%}",
    )  # fmt: skip


def attention_share(arch: Architecture, tokens: int) -> float:
    """Of the useful forward FLOPs of a row."""
    scores = sum(roofline.attention_flops(arch, layer, tokens) for layer in arch.layers)
    weights = sum(sum(roofline.layer_matmuls(arch, layer).values()) for layer in arch.layers)
    return scores / (scores + 2 * weights + 2 * arch.vocab * arch.hidden)


def files(measured: Mapping[str, Any]) -> dict[Path, str]:
    """Everything that the page is made of."""
    drawn = {"memory": ladder()[0], "batch": batch("rate"), "latency": batch("latency"), "links": links(),
             "roofline": roofline_picture(), "cache": cache(), "reading": reading(),
             "padding": padding(measured)}  # fmt: skip
    return {PAGE: text(measured), **{PICTURES / f"{name}.svg": page.standalone(svg) for name, svg in drawn.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="lay out the bundled rows anew (about 20 s)")
    if parser.parse_args().measure:
        MEASURED_FILE.write_text(json.dumps(measure(), indent=1) + "\n")
    for path, content in files(json.loads(MEASURED_FILE.read_text())).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
