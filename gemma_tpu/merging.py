"""The one merge: a run's checkpoint into its base's safetensors, shard by shard.

The command, the recipe, scripts/orbax_to_hf.py and make only parse arguments and call `merge`. Rank and alpha come
from the checkpoint. The base's own shards, names and index are kept; tensors that nothing changes are copied byte
for byte; K and V, which train as one kv_einsum tensor, go back to the two tensors that they are in the file.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemma_tpu import adapters, loading, weights
from gemma_tpu.adapters import Trained
from gemma_tpu.errors import UserError
from gemma_tpu.metrics import say
from gemma_tpu.patch import LowRank, PatchReport, Replace, Update, write_patched
from gemma_tpu.quantise import block_of
from gemma_tpu.runs import RunFolder
from gemma_tpu.shards import Checkpoint, open_checkpoint
from gemma_tpu.variants import Architecture

Onto = Literal["original", "dequantised"]


def merge(
    run_dir: str | Path, *, base: str | Path | None = None, out: str | Path | None = None, step: int | None = None,
    overwrite: bool | None = None, onto: Onto = "original",
) -> dict[str, Any]:  # fmt: skip
    """Merge a run's latest checkpoint (or that of `step`) into its base; returns the figures of what was written.

    `base` is only needed where the folder that the run was trained on has moved: its fingerprint must agree. The
    default `out` is the run's own merged/, which a later merge of the same run may replace; any other folder
    must be new unless `overwrite`. A run on a quantised base merges onto the original weights, or `onto` the
    "dequantised" ones, which are those that it was trained with.
    """
    trained = adapters.read(run_dir, step)
    checkpoint = open_checkpoint(Path(base) if base is not None else trained.base_folder)
    trained.check_base(checkpoint)
    target = RunFolder(Path(run_dir)).merged if out is None else Path(out)
    overwrite = out is None if overwrite is None else overwrite
    updates = updates_of(trained, loading.architecture(checkpoint), onto)
    report = write_patched(checkpoint, target, updates, overwrite=overwrite)
    _say(report, checkpoint, trained)
    if trained.quantised:
        say(f"merged onto the {onto} weights; training computed with them in {trained.quantised}")
    return {
        "out": str(target), "step": trained.step, "tensors_changed": report.tensors_changed,
        "tensors_copied": report.tensors_copied, "bytes": report.bytes,
        "peak_rss_mib": round(report.peak_rss_mib, 1), "seconds": round(report.seconds, 3),
        "left_out": report.left_out,
    }  # fmt: skip


def updates_of(trained: Trained, arch: Architecture, onto: Onto = "original") -> dict[str, Update]:
    """What happens to which tensor of the checkpoint; raises if anything that was trained finds no place."""
    if trained.is_lora:
        wide = {hf: (one, *one.wide) for hf, one in trained.by_tensor(arch).items()}
        low = {hf: LowRank(b=b, a=a, scale=one.scale, magnitude=one.magnitude) for hf, (one, a, b) in wide.items()}
        return low if onto == "original" else _onto_dequantised(trained, arch, low)
    values, table = trained.numpy(), weights.by_path(arch)
    if unused := sorted(set(values) - set(table)):
        raise UserError("these trained tensors belong to no weight of the base:\n  " + "\n  ".join(unused))
    return {
        entry.hf: Replace(np.ascontiguousarray(values[path][entry.index]).reshape(entry.hf_shape))
        for path in values
        for entry in table[path]
    }


def _onto_dequantised(trained: Trained, arch: Architecture, low: dict[str, LowRank]) -> dict[str, Update]:
    """The same updates of the weights that the run saw, and those weights too where it has no adapter."""
    if trained.quantised is None:
        raise UserError(f"{trained.run} was trained on the base as it is: there is nothing to dequantise")
    found: dict[str, Update] = {}
    for hf, entry in weights.lora_entries(arch).items():
        *experts, out, inside = entry.hf_shape
        nothing = LowRank(np.zeros((*experts, out, 0), np.float32), np.zeros((*experts, 0, inside), np.float32), 0.0)
        found[hf] = replace(low.get(hf, nothing), quantised=(trained.quantised, block_of(entry.shape[-1])))
    return found


def _say(report: PatchReport, checkpoint: Checkpoint, trained: Trained) -> None:
    still = [name for name, change in report.changes.items() if change.moved == 0]
    say(f"merged step {trained.step} of {trained.run} into {report.out}: {report.tensors_changed} tensors changed, "
        f"{report.tensors_copied} copied byte for byte, {report.bytes / 2**20:,.1f} MiB in {report.seconds:.1f} s, "
        f"peak memory {report.peak_rss_mib:,.0f} MiB")  # fmt: skip
    if still:
        say(f"note: {len(still)} tensors took an update too small to move any of their elements: {', '.join(still)}")
    if report.left_out:
        say(f"note: left out of {report.out} (weights of the base in other formats): {', '.join(report.left_out)}")
