"""Proof that a merge is right, before anybody serves it.

Three comparisons, each with its bound: the tensors (every changed one against the float64 sum, every other byte for
byte), our model on the merged weights against base + adapter, and transformers on the merged folder where torch is
installed. A bound that is broken fails the command and says where.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_tpu import adapters, difference, loading, merging
from gemma_tpu.adapters import Trained
from gemma_tpu.errors import UserError
from gemma_tpu.lowrank import to_length
from gemma_tpu.merging import Onto
from gemma_tpu.metrics import say
from gemma_tpu.patch import Replace, Update, seen
from gemma_tpu.runs import RunFolder
from gemma_tpu.shards import Checkpoint, open_checkpoint
from gemma_tpu.tokenizer import Tokenizer

LOGIT_BOUND = 1e-5  # x max|logit|: merged against base + adapter, float32
CLIENT_BOUND = 1e-4  # x max|logit|: against transformers, float32
IDENTICAL_BOUND = 0.999  # share of the elements of a changed tensor that equal the rounded float64 sum
PROBE = (
    "Write a Verilog module for a 4-bit up counter with a synchronous reset.",
    "What is the capital of France? Answer in one word, then say why you are sure.",
)


@dataclass
class Report:
    """What was compared, and what broke a bound."""

    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def check(self, good: bool, failure: str) -> None:
        if not good:
            self.failures.append(failure)


def verify(
    run_dir: str | Path, *, merged: str | Path | None = None, step: int | None = None, onto: Onto = "original"
) -> dict[str, Any]:
    """`onto`: what `merge` was told of it."""
    trained = adapters.read(run_dir, step)
    base = open_checkpoint(trained.base_folder)
    trained.check_base(base)
    folder = RunFolder(Path(run_dir)).merged if merged is None else Path(merged)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; run `gemma-tpu merge {run_dir}` first")
    target = open_checkpoint(folder)
    report = Report({"merged": str(folder), "step": trained.step, "clients": {}})
    _compare_tensors(report, trained, base, target, onto)
    if not report.failures:  # logits of a folder with missing or reshaped tensors mean nothing
        tokens_BT, segments_BT = _probe(trained.base_folder)
        logits = _compare_logits(report, trained, folder, tokens_BT, segments_BT, onto)
        _compare_transformers(report, folder, tokens_BT, segments_BT, logits)
    report.figures |= {"ok": not report.failures, "failures": report.failures}
    say(_table(report))
    return report.figures


def _compare_tensors(report: Report, trained: Trained, base: Checkpoint, merged: Checkpoint, onto: Onto) -> None:
    """Key sets, byte identity, and each changed tensor against round(float64(W) + scale * B A)."""
    found = difference.compare(base, merged)
    updates = merging.updates_of(trained, loading.architecture(base), onto)
    for what in ("missing", "extra", "reshaped"):
        names = found[what]
        report.check(not names, f"{len(names)} tensors {what} in the merged folder: {', '.join(names[:5])}")
    strays = sorted(set(found["changed"]) - set(updates))
    report.check(not strays, f"{len(strays)} tensors changed that the adapter does not touch: {', '.join(strays[:5])}")
    worst_ulp, worst, least, where = 0, "", 1.0, ""
    for name, update in updates.items():
        if name not in merged or name in found["reshaped"]:
            continue
        same = 0
        for index in _pieces(base.info(name).shape):
            got = merged.read_slice(name, index)
            exact = _exact(base, name, update, index)
            exact = exact.astype(np.float32) if got.dtype.name == "bfloat16" else exact
            distance = difference.ulp_distance(got, exact.astype(got.dtype))
            same += int((distance == 0).sum())
            if int(distance.max()) > worst_ulp:
                worst_ulp, worst = int(distance.max()), name
        share = same / base.info(name).size
        if share < least:
            least, where = share, name
    report.figures |= {
        "changed": len(found["changed"]), "identical": len(found["identical"]), "updated": len(updates),
        "max_ulp": worst_ulp, "least_identical_share": round(least, 6), "least_identical_tensor": where,
    }  # fmt: skip
    report.check(worst_ulp <= 1, f"{worst}: an element is {worst_ulp} representable numbers off the sum (bound 1)")
    report.check(least >= IDENTICAL_BOUND, f"{where}: only {least:.4%} of its elements equal the sum rounded once")


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The whole tensor, but of a stack one expert at a time: all 128 in float64 are more than the rest of the model."""
    if len(shape) < 3:
        yield ()
        return
    yield from ((slice(expert, expert + 1),) for expert in range(shape[0]))


def _exact(base: Checkpoint, name: str, update: Update, index: tuple[slice, ...]) -> np.ndarray:
    """What this piece of a changed tensor must be before it is rounded once: float64(W) + scale * B A."""
    if isinstance(update, Replace):
        return update.array[index].astype(np.float64)
    exact = seen(base.read_slice(name, index).astype(np.float64), update).astype(np.float64)
    exact += update.scale * (update.b[index].astype(np.float64) @ update.a[index].astype(np.float64))
    return to_length(exact, None if update.magnitude is None else update.magnitude[index].astype(np.float64))


def _compare_logits(
    report: Report, trained: Trained, folder: Path, tokens_BT: np.ndarray, segments_BT: np.ndarray, onto: Onto
) -> np.ndarray:
    """Merged against base + adapter in float32; for a bfloat16 base, beside the drift that bfloat16 itself brings."""

    def logits(*args: Any, dtype: str) -> np.ndarray:
        model = adapters.load(*args, dtype=dtype, quantise=onto == "dequantised")
        return np.asarray(model(jnp.asarray(tokens_BT), jnp.asarray(segments_BT)))

    seen = segments_BT > 0
    together = logits(trained.base_folder, trained, dtype="float32")
    merged = logits(folder, dtype="float32")
    apart = np.abs(together - merged).max(-1) * seen
    largest, scale = float(apart.max()), float(np.abs(together[seen]).max())
    own = adapters.own_dtype(open_checkpoint(folder))
    report.figures |= {"max_logit_difference": largest, "max_logit": scale, "dtype": own}
    row, place = np.unravel_index(apart.argmax(), apart.shape)
    where = f"at probe {row}, token {place}"
    if own == "float32":
        bound = LOGIT_BOUND * scale
    else:
        drift = float((np.abs(logits(trained.base_folder, trained, dtype=own) - together).max(-1) * seen).max())
        report.figures["bfloat16_drift"] = drift
        bound = drift
    report.figures["logit_bound"] = bound
    report.check(largest <= bound, f"merged and base + adapter differ by {largest:.3g} {where}; bound {bound:.3g}")
    return merged


def _compare_transformers(
    report: Report, folder: Path, tokens_BT: np.ndarray, segments_BT: np.ndarray, ours: np.ndarray
) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, logging
    except ImportError:
        report.figures["clients"]["transformers"] = "not compared: torch is not installed"
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens_BT), attention_mask=torch.tensor(segments_BT)).logits.float().numpy()
    seen = segments_BT > 0
    largest = float(np.abs(ours - theirs)[seen].max())
    bound = CLIENT_BOUND * max(1.0, float(np.abs(theirs[seen]).max()))
    report.figures["clients"]["transformers"] = {"max_logit_difference": largest, "bound": bound}
    report.check(largest <= bound, f"transformers' logits differ by {largest:.3g}; the bound is {bound:.3g}")


def _probe(base_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two short chats by the checkpoint's own template, padded on the right: [B, T] tokens and segments."""
    tokenizer = Tokenizer(base_folder)
    rows = [tokenizer.prompt([{"role": "user", "content": text}]) for text in PROBE]
    rows.append((rows[0] + rows[1]) * 2)  # longer than a tiny model's window
    longest = max(map(len, rows))
    tokens_BT, segments_BT = np.zeros((2, len(rows), longest), np.int32)
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row)], segments_BT[number, : len(row)] = row, 1
    return tokens_BT, segments_BT


def _table(report: Report) -> str:
    f = report.figures
    rows = [
        ("tensors changed / byte-identical", f"{f['changed']} / {f['identical']}"),
        ("furthest element from the exact sum", f"{f['max_ulp']} representable number(s)"),
        ("least share of equal elements", f"{f['least_identical_share']:.4%}  {f['least_identical_tensor']}"),
    ]
    if "max_logit_difference" in f:
        bounds = f"bound {f['logit_bound']:.3g}, max |logit| {f['max_logit']:.3g}"
        rows.append(("merged vs base + adapter, max |logit difference|", f"{f['max_logit_difference']:.3g} ({bounds})"))
    if "bfloat16_drift" in f:
        rows.append(("what bfloat16 arithmetic itself moves", f"{f['bfloat16_drift']:.3g}"))
    for name, found in f["clients"].items():
        text = found if isinstance(found, str) else f"{found['max_logit_difference']:.3g} (bound {found['bound']:.3g})"
        rows.append((f"merged in {name}, max |logit difference|", text))
    lines = [f"{name:<50}{value}" for name, value in rows]
    lines += [f"FAILED: {failure}" for failure in report.failures] or [f"{f['merged']} is right"]
    return "\n".join(lines)
