"""Proof that a merge is right, before anybody serves it.

The tensors (every changed one against the float64 sum, every other byte for byte); our model on the merged weights
against base + adapter, layer by layer, so that memory is that of one layer; transformers on the merged folder and PEFT
on the exported adapter, where they are installed and fit. A bound that is broken fails the command and says where.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu.adapter import adapters, updates
from gemma_tpu.adapter.adapters import Trained
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading
from gemma_tpu.handoff import clients, difference, merging
from gemma_tpu.handoff.layerwise import Change, Side
from gemma_tpu.handoff.merging import Onto
from gemma_tpu.run.metrics import say
from gemma_tpu.run.runs import RunFolder
from gemma_tpu.sampling import sampler
from gemma_tpu.storage.shards import Checkpoint, open_checkpoint

LOGIT_BOUND = 1e-5  # x max|logit|: merged against base + adapter, float32 arithmetic
ROUNDINGS = 3  # and so many times what another rounding of the merged weights to their dtype would move
CLIENT_BOUND = 1e-4  # x max|logit|: against transformers and PEFT, float32
IDENTICAL_BOUND = 0.999  # share of the elements of a changed tensor that equal the rounded float64 sum
SAMPLED = 24  # tokens
MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}
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
    run_dir: str | Path, *, merged: str | Path | None = None, base: str | Path | None = None, step: int | None = None,
    onto: Onto = "original",
) -> dict[str, Any]:  # fmt: skip
    """`base` is only needed where the folder that the run was trained on has moved; `onto`: what `merge` was told."""
    trained = adapters.read(run_dir, step)
    checkpoint = merging.open_base(trained, base)
    folder = RunFolder(Path(run_dir)).merged if merged is None else Path(merged)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; run `gemma-tpu merge {run_dir}` first")
    target = open_checkpoint(folder)
    report = Report({"merged": str(folder), "step": trained.step, "clients": {}})
    edits = _compare_tensors(report, trained, checkpoint, target, onto)
    if not report.failures:  # logits of a folder with missing or reshaped tensors mean nothing
        probe = _probe(checkpoint.where)
        beside = Side(checkpoint, trained, quantised=trained.quantised if onto == "dequantised" else None)
        together, alone = _compare_logits(report, beside, target, edits, probe)
        _compare_clients(report, beside, target, together, alone, probe)
        _sample(report, checkpoint, target)
    report.figures |= {"ok": not report.failures, "failures": report.failures}
    say(_table(report))
    return report.figures


def _compare_tensors(
    report: Report, trained: Trained, base: Checkpoint, merged: Checkpoint, onto: Onto
) -> dict[str, updates.Edit]:
    """Key sets, byte identity, and each changed tensor against round(float64(W) + scale * B A)."""
    found = difference.compare(base, merged)
    edits = updates.check(base, merging.updates_of(trained, loading.architecture(base), onto))
    for what in ("missing", "extra", "reshaped"):
        names = found[what]
        report.check(not names, f"{len(names)} tensors {what} in the merged folder: {', '.join(names[:5])}")
    strays = sorted(set(found["changed"]) - set(edits))
    report.check(not strays, f"{len(strays)} tensors changed that the adapter does not touch: {', '.join(strays[:5])}")
    worst_ulp, worst, least, where = 0, "", 1.0, ""
    for name, edit in edits.items():
        if name not in merged or name in found["reshaped"]:
            continue
        tensor, same = updates.Tensor(base, base.info(name), edit), 0
        for index in updates.blocks(base.info(name).shape):
            got = merged.read_slice(name, index)
            exact = tensor.exact(index)
            exact = exact.astype(np.float32) if got.dtype.name == "bfloat16" else exact
            distance = difference.ulp_distance(got, exact.astype(got.dtype))
            same += int((distance == 0).sum())
            if int(distance.max()) > worst_ulp:
                worst_ulp, worst = int(distance.max()), name
        share = same / base.info(name).size
        if share < least:
            least, where = share, name
    report.figures |= {
        "changed": len(found["changed"]), "identical": len(found["identical"]), "updated": len(edits),
        "max_ulp": worst_ulp, "max_ulp_tensor": worst,
        "least_identical_share": round(least, 6), "least_identical_tensor": where,
    }  # fmt: skip
    report.check(worst_ulp <= 1, f"{worst}: an element is {worst_ulp} representable numbers off the sum (bound 1)")
    report.check(least >= IDENTICAL_BOUND, f"{where}: only {least:.4%} of its elements equal the sum rounded once")
    return edits


Probe = tuple[np.ndarray, np.ndarray]  # tokens and segments, [B, T]


def _compare_logits(
    report: Report, beside: Side, merged: Checkpoint, edits: dict[str, updates.Edit], probe: Probe
) -> tuple[np.ndarray, np.ndarray]:
    """Merged against base + adapter, in float32 arithmetic, all three sides a layer at a time; gives the logits of two.

    The only thing that may set them apart is the rounding of merged weights to the dtype of the file. How much that is
    the third side tells: the same weights rounded otherwise, up or down by chance.
    """
    tokens_BT, segments_BT = probe
    seen, base = segments_BT > 0, beside.checkpoint
    sides = [beside, Side(merged), Side(base, change=_rounded_otherwise(base, edits))]
    deepest, where, apart = 0.0, "", 0.0
    for number, xs in enumerate(zip(*(side.layers(tokens_BT, segments_BT) for side in sides), strict=True)):
        one, other = (np.asarray(x)[seen] for x in xs[:2])
        apart = float(np.abs(one - other).max() / max(float(np.abs(one).max()), 1e-30))
        if apart > deepest:
            deepest, where = apart, f"layer {number - 1}" if number else "the embedding"
        final = xs
    together, alone, otherwise = (side.logits(x[seen]) for side, x in zip(sides, final, strict=True))
    apart_N = np.abs(together - alone).max(-1)
    largest, scale = float(apart_N.max()), float(np.abs(together).max())
    rounding = float(np.abs(together - otherwise).max())
    bound = LOGIT_BOUND * scale + ROUNDINGS * rounding
    row, place = np.argwhere(seen)[int(apart_N.argmax())]
    report.figures |= {
        "max_logit_difference": largest, "max_logit": scale, "logit_bound": bound, "rounding": rounding,
        "dtype": merged.info(next(iter(edits))).dtype.name, "max_hidden_difference": deepest,
        "max_hidden_difference_at": where or "nowhere", "at": f"probe {row}, token {place}",
    }  # fmt: skip
    report.check(
        largest <= bound,
        f"merged and base + adapter differ by {largest:.3g} at probe {row}, token {place}; bound {bound:.3g}; the "
        f"residual stream is furthest apart after {where}",
    )
    return together, alone


def _rounded_otherwise(base: Checkpoint, edits: dict[str, updates.Edit]) -> Change:
    """The exact sums, each element rounded up or down by chance, the nearer the likelier."""
    draw = np.random.default_rng(0)

    def change(name: str, values: np.ndarray) -> np.ndarray:
        if name not in edits:
            return values
        info = base.info(name)
        tensor, out = updates.Tensor(base, info, edits[name]), np.empty(info.shape, np.float32)
        for index in updates.blocks(info.shape):
            exact = tensor.exact(index)
            step = np.ldexp(1.0, np.frexp(exact)[1] - 1 - MANTISSA[info.dtype.name])
            out[index] = (exact + draw.uniform(-0.5, 0.5, exact.shape) * step).astype(info.dtype)
        return out

    return change


def _compare_clients(
    report: Report, beside: Side, merged: Checkpoint, together: np.ndarray, alone: np.ndarray, probe: Probe
) -> None:
    trained, base = beside.trained, beside.checkpoint
    asked: dict[str, tuple[Checkpoint, np.ndarray, Callable[[], np.ndarray]]] = {
        "transformers": (merged, alone, partial(clients.transformers_logits, Path(merged.where), *probe))
    }
    if trained is not None and trained.is_lora:
        asked["peft"] = (base, together, partial(clients.peft_logits, trained, base, *probe))
    for name, (checkpoint, ours, compute) in asked.items():
        why = clients.unavailable(checkpoint, peft=name == "peft")
        if name == "peft" and beside.quantised:
            why = "not compared: PEFT would compute with the original weights"
        if why is not None:
            report.figures["clients"][name] = why
            continue
        theirs = compute()
        largest = float(np.abs(ours - theirs).max())
        bound = CLIENT_BOUND * max(1.0, float(np.abs(theirs).max()))
        report.figures["clients"][name] = {"max_logit_difference": largest, "bound": bound}
        report.check(largest <= bound, f"{name}'s logits differ by {largest:.3g}; the bound is {bound:.3g}")


def _sample(report: Report, base: Checkpoint, merged: Checkpoint) -> None:
    """A text before and after, for people to read."""
    why = clients.too_large(base)
    if why is not None:
        report.figures["samples"] = why.replace("compared", "sampled")
        return
    settings = sampler.Settings(max_new_tokens=SAMPLED, temperature=0.0)
    report.figures["samples"] = found = {"prompt": PROBE[0]}
    for name, checkpoint in (("before", base), ("after", merged)):
        tokenizer = Tokenizer(checkpoint.where)
        prompt = tokenizer.prompt([{"role": "user", "content": PROBE[0]}])
        model = adapters.load(checkpoint.where)
        done = sampler.generate(model, [prompt], tokenizer.stop_ids, settings, rows=1)
        found[name] = tokenizer.decode(done[0].tokens)


def _probe(base: str) -> Probe:
    """Two short chats by the checkpoint's own template, padded on the right: [B, T] tokens and segments."""
    tokenizer = Tokenizer(base)
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
        ("furthest element from the exact sum", f"{f['max_ulp']} representable number(s)  {f['max_ulp_tensor']}"),
        ("least share of equal elements", f"{f['least_identical_share']:.4%}  {f['least_identical_tensor']}"),
    ]
    if "max_logit_difference" in f:
        bounds = f"bound {f['logit_bound']:.3g}, max |logit| {f['max_logit']:.3g}, at {f['at']}"
        rows.append(("merged vs base + adapter, max |logit difference|", f"{f['max_logit_difference']:.3g} ({bounds})"))
        rows.append(("what another rounding of the weights would move", f"{f['rounding']:.3g} ({f['dtype']})"))
        rows.append(("residual stream furthest apart, relative",
                     f"{f['max_hidden_difference']:.3g}, after {f['max_hidden_difference_at']}"))  # fmt: skip
    for name, found in f["clients"].items():
        text = found if isinstance(found, str) else f"{found['max_logit_difference']:.3g} (bound {found['bound']:.3g})"
        what = "adapter" if name == "peft" else "merged"
        rows.append((f"{what} in {name}, max |logit difference|", text))
    samples = f.get("samples")
    if isinstance(samples, str):
        rows.append(("text before and after", samples))
    elif samples:
        rows += [(f"text {name}", repr(samples[name][:100])) for name in ("before", "after")]
    lines = [f"{name:<50}{value}" for name, value in rows]
    lines += [f"FAILED: {failure}" for failure in report.failures] or [f"{f['merged']} is right"]
    return "\n".join(lines)
