"""How far the model is from transformers, LoRA gradients from PEFT, and a mesh from one device.

    python benchmarks/parity.py [--json FILE]

Needs torch, transformers and peft (the dev extra); about two minutes on two cores. All on tiny random float32
checkpoints, CPU, with the functions that the tests use; the limits are those that the tests hold.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np  # noqa: E402  (jax reads the variables above when it is first imported)
from helpers import (  # noqa: E402  (jax reads the variables above when it is first imported)
    DIMS,
    EVEN,
    SMALL,
    compare_with_peft,
    compare_with_transformers,
    largest_difference,
    load,
    loss_and_grads,
    micro_batches,
    random_rows,
    reference,
    run_on_mesh,
    sheet,
    write,
)

GEOMETRIES = {
    "12 layers 5:1, heads 8/4/2, multimodal layout": DIMS,
    "the same, text-only layout": DIMS | {"text_only": True},
    "4 layers 1:1, heads 8/4/2": SMALL,
    "heads 4/4/4 (no grouping)": SMALL | {"heads": 4, "global_kv_heads": 4},
    "heads 2/1/2": SMALL | {"heads": 2, "kv_heads": 1},
    "heads 8/2/1, local head larger": SMALL
    | {"kv_heads": 2, "global_kv_heads": 1, "head_dim": 16, "global_head_dim": 8},
    "window 7, which does not divide the rows": SMALL | {"window": 7},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the largest differences there")
    args = parser.parse_args()
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, begun = Path(folder), time.monotonic()
        print(
            "logits vs transformers, 3 rows of 64, 49 and 32 tokens, window 8: max |difference|  (limit 1e-4)"
        )
        for number, (name, dims) in enumerate(GEOMETRIES.items()):
            base = write(root / f"base-{number}", **dims)
            kind, found = "logits" if number < 2 else "logits_4_layers", [compare_with_transformers(base)]
            row(name, found[0])
            if number < 2:
                reference(base).save_pretrained(root / f"saved-{number}")
                found.append(compare_with_transformers(root / f"saved-{number}"))
                row("  as transformers saved it", found[1])
            worst[kind] = largest(worst.get(kind, 0.0), *found)
        worst |= peft(write(root / "peft", **DIMS, text_only=True)) | meshes(root)
        worst |= packing(write(root / "packing", **SMALL))
        print(f"{time.monotonic() - begun:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({name: float(value) for name, value in worst.items()}, indent=1) + "\n")


def peft(base: Path) -> dict[str, float]:
    errors, loss, logits = compare_with_peft(base)
    print(f"\nLoRA vs PEFT, rank 3, alpha 4.5, A and B random, {len(errors)} projections")
    print("relative error of the gradients, worst layer  (limit 1e-4)")
    for name in dict.fromkeys(hf.split(".")[-2] for hf in errors):
        found = [pair for hf, pair in errors.items() if f".{name}." in hf]
        worst_a, worst_b = (max(errors) for errors in zip(*found, strict=True))
        print(f"  {name:<10} {len(found):>3} layers   A {worst_a:.1e}   B {worst_b:.1e}")
    row("loss, absolute", loss)
    row("logits with the adapter, max |difference|", logits)
    gradient = largest(*(one for pair in errors.values() for one in pair))
    return {"peft_gradient": gradient, "peft_loss": loss, "peft_logits": logits}


def meshes(root: Path) -> dict[str, float]:
    print("\nfake meshes vs one device: max |difference| of logits, loss, adapter gradients  (limit 1e-5)")
    worst = dict.fromkeys(("mesh_logits", "mesh_loss", "mesh_gradients"), 0.0)
    for kv in (2, 4):
        base = write(root / f"even-{kv}", **EVEN | {"global_kv_heads": kv})
        wanted = run_on_mesh(base, 1, 1)
        for fsdp, tp in ((2, 2), (4, 1), (1, 4)):
            found = run_on_mesh(base, fsdp, tp, replicate_kv=tp > kv)
            logits, loss, grads = (largest_difference(a, b) for a, b in zip(found, wanted, strict=True))
            name = f"fsdp={fsdp} tp={tp}, {kv} global KV heads{', replicated' if tp > kv else ''}"
            print(f"  {name:<50} {logits:.1e}  {loss:.1e}  {grads:.1e}")
            worst = {key: largest(worst[key], more) for key, more in zip(worst, (logits, loss, grads), strict=True)}
    return worst


def packing(base: Path) -> dict[str, float]:
    model = load(base, rank=3)
    rows = random_rows([30, 9, 21, 40, 24], model.arch.vocab)
    packed, _ = loss_and_grads(model, micro_batches(sheet([rows[:3], rows[3:]], 64)))
    alone, _ = loss_and_grads(model, micro_batches(sheet([[row] for row in rows], 48)))
    print("\npacking, five rows in two against one a row  (limit 1e-5)")
    row("loss, absolute", abs(packed - alone))
    return {"packed_loss": abs(packed - alone)}


def largest(*values: float) -> float:
    """NaN where one is NaN; `max` would pass over it."""
    return float(np.max(values))


def row(name: str, value: float) -> None:
    print(f"  {name:<50} {value:.1e}")


if __name__ == "__main__":
    main()
