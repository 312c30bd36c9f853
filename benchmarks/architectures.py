"""How far every architecture is from transformers and PEFT, on tiny random float32 checkpoints.

    python benchmarks/architectures.py [gemma4-e2b ...] [--json FILE]

Needs torch, transformers and peft (the dev extra); some ten minutes on two cores. The functions and the
limits are those of tests/test_architectures.py and tests/test_architectures_slow.py.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import arch_helper  # noqa: E402  (jax reads the variables above when it is first imported)
import helpers  # noqa: E402
import numpy as np  # noqa: E402

MESHES = {
    "gemma4-e2b": ({"fsdp": 2, "tp": 2}, {"tp": 4}),
    "gemma4-26b-a4b": ({"fsdp": 2, "tp": 2}, {"tp": 4}, {"expert": 4}, {"fsdp": 2, "expert": 2}),
}
ABOUT = """Largest differences.
logits     to transformers, three rows of 64, 49 and 32 tokens, window 8
+ adapter  logits to PEFT, adapters on everything (26B: on the experts too), A and B random; then the loss
gradient   to PEFT's, relative, of the worst tensor
remat      gradients and loss with full rematerialisation, to those without
merged     logits of the merged folder in transformers to PEFT's with the adapter, over max |logit|
unchanged  tensors that a way through the model leaves byte-identical
greedy     tokens after prompts of 3, 21 and 70 that are those of transformers' generate
"""
COLUMNS = (
    ("logits", "1e-4"), ("+ adapter", "1e-4"), ("loss", "1e-5"), ("gradient", "1e-4"), ("remat", "1e-5"),
    ("merged", "1e-5"), ("unchanged", "all"), ("greedy", "all"),
)  # fmt: skip
FIGURES = ("logits", "adapter", "loss", "gradient", "remat", "merged")
COUNTS = ("unchanged", "greedy")
MESH_FIGURES = ("logits", "loss", "gradients", "gradients_relative")


def main() -> None:
    known = list(arch_helper.CASES | arch_helper.TEXT_ONLY)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help=f"of {', '.join(known)}; all if left out")
    parser.add_argument("--json", type=Path, help="write the largest differences there")
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"unknown architecture {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    names, rows, meshes = args.names or known, {}, {}
    print(ABOUT)
    print(f"{'':<20}" + "".join(f"{name:>11}" for name, _ in COLUMNS))
    print(f"{'limit':<20}" + "".join(f"{limit:>11}" for _, limit in COLUMNS), flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arch_helper.checkpoints(Path(folder))
        for name in names:
            rows[name] = row(checkpoint(name), name)
            print(f"{name:<20}" + "".join(f"{cell:>11}" for cell in cells(rows[name])), flush=True)
        print("\non fake meshes against one device: logits over max |logit|, loss, gradients (limit 1e-5 each) and\n"
              "gradients, relative (limit 1e-4)")  # fmt: skip
        for name in (name for name in names if name in MESHES):
            meshes[name] = on_meshes(checkpoint(name), name)
    print(f"{time.monotonic() - began:.0f} s")
    if args.json:
        worst = {key: largest([found[key] for found in rows.values()]) for key in FIGURES}
        short = {f"{what}_short": sum(found[what][1] - found[what][0] for found in rows.values()) for what in COUNTS}
        every = [found for shapes in meshes.values() for found in shapes.values()]
        on_mesh = {f"mesh_{key}": largest([one[at] for one in every]) for at, key in enumerate(MESH_FIGURES) if every}
        args.json.write_text(json.dumps({"rows": rows, "meshes": meshes, "worst": worst | short | on_mesh}) + "\n")


def row(folder: Path, name: str) -> dict[str, Any]:
    experts = "26b" in name
    found = arch_helper.compare_with_peft(folder, experts)
    merged, _ = arch_helper.compare_merge(folder, folder.parent / f"{name}-merged", experts)
    same = arch_helper.export_untrained(folder, folder.parent / f"{name}-out")
    ours, theirs = (sum(rows, []) for rows in arch_helper.greedy(folder))
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    figures = (
        helpers.compare_with_transformers(folder), found.logits, found.loss, found.worst,
        max(found.remat, found.remat_loss), merged,
    )  # fmt: skip
    total = sum(len(names) for names in same.values())
    counts = {"unchanged": (len(same["identical"]), total), "greedy": (equal, len(theirs))}
    return dict(zip(FIGURES, map(float, figures), strict=True)) | counts


def largest(values: list[float]) -> float:
    """NaN where one is NaN; `max` would pass over it."""
    return float(np.max(values))


def cells(found: dict[str, Any]) -> list[str]:
    return [f"{found[key]:.1e}" for key in FIGURES] + ["{}/{}".format(*found[key]) for key in COUNTS]


def on_meshes(folder: Path, name: str) -> dict[str, list[float]]:
    experts, rows = "26b" in name, {}
    wanted = arch_helper.run_on_mesh(folder, {}, experts)
    for shape in MESHES[name]:
        found = arch_helper.run_on_mesh(folder, shape, experts)
        differences = [float(x) for x in arch_helper.mesh_differences(found, wanted)]
        told = " ".join(f"{axis}={size}" for axis, size in shape.items())
        print(f"  {name:<16} {told:<18}" + "".join(f"{x:>10.1e}" for x in differences), flush=True)
        rows[told] = differences
    return rows


if __name__ == "__main__":
    main()
