"""The one merge: a run's checkpoint into its base's safetensors, shard by shard; and its adapter as a PEFT folder.

The command, the recipe, scripts/orbax_to_hf.py and make only parse arguments and call `merge`. Rank and alpha come
from the checkpoint. The base's own shards, names and index are kept; tensors that nothing changes are copied byte
for byte; K and V, which train as one kv_einsum tensor, go back to the two tensors that they are in the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemma_tpu.adapter import adapters, peft_folder, tunix
from gemma_tpu.adapter.adapters import Trained
from gemma_tpu.adapter.updates import LowRank, Replace, Update
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading, weights
from gemma_tpu.gemma.quantise import block_of
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.handoff import card
from gemma_tpu.handoff.patch import PatchReport, write_patched
from gemma_tpu.run.metrics import say
from gemma_tpu.run.runs import RunFolder
from gemma_tpu.storage import layout
from gemma_tpu.storage.remote import restore_url
from gemma_tpu.storage.shards import Checkpoint, open_checkpoint
from gemma_tpu.storage.transfer import Transfer

LAYOUTS = ("tunix", "peft")
READERS = ("vllm",)  # that want an adapter folder of their own
Onto = Literal["original", "dequantised"]


def merge(
    run_dir: str | Path | None = None, *, base: str | Path | None = None, out: str | Path | None = None,
    step: int | None = None, overwrite: bool | None = None, onto: Onto = "original",
    max_shard_size: str | None = None, checkpoint: str | Path | None = None, layout: str | None = None,
    rank: int | None = None, alpha: float | None = None, push: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Merge a run's latest checkpoint (or that of `step`) into its base; returns the figures of what was written.

    `base` is only needed where the folder that the run was trained on has moved: its fingerprint must agree. The
    default `out` is the run's own merged/, which a later merge of the same run may replace; any other folder or bucket
    must be new unless `overwrite`. An interrupted merge goes on where it stopped when it is asked for again. A run on a
    quantised base merges onto the original weights, or `onto` the "dequantised" ones, which it was trained with.

    In place of a run, `checkpoint` with a `layout` takes what others have trained: "tunix" an Orbax checkpoint of
    Tunix, whose rank and alpha must be given, "peft" a PEFT adapter folder. `push` uploads the result to the hub.
    """
    if push is not None:
        _check_push(push, out)
    if checkpoint is not None or layout is not None:
        if run_dir is not None or step is not None:
            raise UserError("give a run, or a checkpoint with its layout, not both")
        if onto != "original":
            raise UserError(f"--onto {onto} is about runs on a quantised base; leave it out")
        work = _foreign(checkpoint, layout, base, out, rank, alpha)
    else:
        if run_dir is None:
            raise UserError("give a run folder, or a checkpoint with its layout")
        if rank is not None or alpha is not None:
            raise UserError("rank and alpha of a run stand in its checkpoint: leave them out")
        work = _of_run(run_dir, base, out, step, onto)
    report = _write(work, work.replaces if overwrite is None else overwrite, max_shard_size)
    _say(report, work.what)
    if push is not None:
        _push(push, work.out)
    figures = {
        "out": report.out, "tensors_changed": report.tensors_changed, "tensors_copied": report.tensors_copied,
        "bytes": report.bytes, "peak_rss_mib": round(report.peak_rss_mib, 1), "seconds": round(report.seconds, 3),
        "left_out": report.left_out, "resumed": report.resumed,
    }  # fmt: skip
    return figures | ({} if work.step is None else {"step": work.step}) | ({"pushed": push} if push else {})


@dataclass(frozen=True)
class _Work:
    """One merge: what goes into which base, and where the result goes."""

    base: Checkpoint
    updates: Mapping[str, Update]
    about: dict[str, Any]  # for the card
    out: str | Path
    what: str  # in words
    replaces: bool = False  # an earlier merge of the same run
    step: int | None = None


def _of_run(
    run_dir: str | Path, base: str | Path | None, out: str | Path | None, step: int | None, onto: Onto
) -> _Work:
    trained = adapters.read(run_dir, step)
    where = open_base(trained, base)
    updates = updates_of(trained, loading.architecture(where), onto)
    what = f"step {trained.step} of {trained.run}"
    if trained.quantised:
        what += f" onto the {onto} weights (in training they were {trained.quantised})"
    about = card.of_run(trained.run, trained.step, trained.record)
    if out is None:
        return _Work(where, updates, about, RunFolder(Path(run_dir)).merged, what, True, trained.step)
    return _Work(where, updates, about, out, what, False, trained.step)


def open_base(trained: Trained, base: str | Path | None) -> Checkpoint:
    """The base of a run, where it lies now; another one is refused."""
    checkpoint = open_checkpoint(trained.record["base"]["folder"] if base is None else base)
    trained.check_base(checkpoint)
    return checkpoint


def export_adapter(
    run_dir: str | Path, *, out: str | Path, base: str | Path | None = None, step: int | None = None,
    native: bool = False, reader: str | None = None, overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A run's adapter as a PEFT folder, in the portable form unless `native`, or in that for one `reader`: "vllm"."""
    if reader not in (None, *READERS):
        raise UserError(f"--for {reader}: must be {' or '.join(READERS)}")
    if native and reader:
        raise UserError(f"--native and --for {reader} are two forms: choose one")
    trained = adapters.read(run_dir, step)
    if not trained.is_lora:
        raise UserError(f"{run_dir} has trained every weight: there is no adapter to export; merge it")
    checkpoint = open_base(trained, base)
    arch = loading.architecture(checkpoint)
    updates = lora_updates(trained, arch)
    if reader and any(name.endswith(weights.EXPERTS) for name in updates):
        raise UserError(f"{run_dir} has adapters on experts, which {reader} does not take: merge them")
    both = peft_folder.without_v(updates, arch)
    named = card.name_of(trained.record["base"]["folder"])
    config = peft_folder.write(Path(out), updates, base=named, native=native, overwrite=overwrite,
                               depth=len(arch.layers), v_from=both if reader else ())  # fmt: skip
    say(f"wrote {out}: {len(updates)} modules of step {trained.step}, rank {config['r']}, alpha {config['lora_alpha']}")
    if config["target_parameters"]:
        say("note: adapters on experts are read by PEFT; vLLM and llama.cpp want the merged weights")
    elif both and not reader:
        say(f"note: V is K in {len(both)} of {len(arch.layers)} layers. PEFT and llama.cpp know that; vLLM would leave "
            "V there as it was: for vLLM export with --for vllm, or merge")  # fmt: skip
    return {"out": str(out), "step": trained.step, "modules": len(updates), "rank": config["r"],
            "alpha": config["lora_alpha"], "form": "native" if native else reader or "portable"}  # fmt: skip


def lora_updates(trained: Trained, arch: Architecture) -> dict[str, LowRank]:
    """A run's adapter by the tensors of the checkpoint that it is for."""
    wide = {hf: (one, *one.wide) for hf, one in trained.by_tensor(arch).items()}
    return {hf: LowRank(b=b, a=a, scale=one.scale, magnitude=one.magnitude) for hf, (one, a, b) in wide.items()}


def updates_of(trained: Trained, arch: Architecture, onto: Onto = "original") -> Mapping[str, Update]:
    """What happens to which tensor of the checkpoint; raises if anything that was trained finds no place."""
    if trained.is_lora:
        low = lora_updates(trained, arch)
        return low if onto == "original" else _onto_dequantised(trained, arch, low)
    values, table = trained.numpy(), weights.by_path(arch)
    if unused := sorted(set(values) - set(table)):
        raise UserError("these trained tensors belong to no weight of the base:\n  " + "\n  ".join(unused))
    return {
        entry.hf: Replace(np.ascontiguousarray(values[path][entry.index]).reshape(entry.hf_shape))
        for path in values
        for entry in table[path]
    }


def _onto_dequantised(trained: Trained, arch: Architecture, low: dict[str, LowRank]) -> dict[str, LowRank]:
    """The same updates of the weights that the run saw, and those weights too where it has no adapter."""
    if trained.quantised is None:
        raise UserError(f"{trained.run} was trained on the base as it is: there is nothing to dequantise")
    found = {}
    for hf, entry in weights.lora_entries(arch).items():
        *experts, out, inside = entry.hf_shape
        nothing = LowRank(np.zeros((*experts, out, 0), np.float32), np.zeros((*experts, 0, inside), np.float32), 0.0)
        found[hf] = replace(low.get(hf, nothing), quantised=(trained.quantised, block_of(entry.shape[-1])))
    return found


def _foreign(
    checkpoint: str | Path | None, kind: str | None, base: str | Path | None, out: str | Path | None,
    rank: int | None, alpha: float | None,
) -> _Work:  # fmt: skip
    """Of a checkpoint that is not ours."""
    missing = [name for name, value in (("checkpoint", checkpoint), ("layout", kind), ("base", base), ("out", out))
               if value is None]  # fmt: skip
    missing += [name for name, value in (("rank", rank), ("alpha", alpha)) if kind == "tunix" and value is None]
    if missing:
        raise UserError(f"a checkpoint of another tool needs --{', --'.join(missing)} too")
    assert checkpoint is not None and base is not None and out is not None
    if kind not in LAYOUTS:
        raise UserError(f"layout {kind!r} must be one of {', '.join(LAYOUTS)}")
    where = open_checkpoint(base)
    arch = loading.architecture(where)
    about: dict[str, Any] = {"base": restore_url(base), "method": "lora", "version": None}
    what = restore_url(checkpoint)
    if kind == "peft":
        if rank is not None or alpha is not None:
            raise UserError("rank and alpha of a PEFT adapter stand in its adapter_config.json: leave them out")
        return _Work(where, peft_folder.read(checkpoint, where, arch).parts, about, out, what)
    assert rank is not None and alpha is not None
    if rank < 1 or not alpha > 0:
        raise UserError(f"rank ({rank}) must be at least 1 and alpha ({alpha}) above 0")
    tensors, others = tunix.read(checkpoint)
    if others:
        say(f"note: {len(others)} tensors of {checkpoint} are no adapter and are not merged: {', '.join(others[:5])} …")
    about["figures"] = {"rank": rank, "alpha": alpha}
    return _Work(where, tunix.updates_of(tensors, where, arch, rank=rank, alpha=alpha), about, out, what)


def _write(work: _Work, overwrite: bool, max_shard_size: str | None) -> PatchReport:
    size = None if max_shard_size is None else layout.parse_size(max_shard_size)
    told = card.files(work.base, work.about, len(work.updates))
    with Transfer("merged", work.base.source) as transfer:
        return write_patched(work.base, work.out, work.updates, overwrite=overwrite, extra=told,
                             max_shard_bytes=size, progress=transfer.update)  # fmt: skip


def _check_push(repo: str, out: str | Path | None) -> None:
    if repo.count("/") != 1 or "://" in repo:
        raise UserError(f"--push {repo}: must be ORG/NAME, the model's place on the hub")
    if out is not None and "://" in restore_url(out):
        raise UserError("--push uploads a folder: give a folder as --out")


def _push(repo: str, folder: str | Path) -> None:
    """A private repository where there is none; an upload that was interrupted goes on when it is asked for again."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Merged by gemma_tpu")
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub refuses the upload to {repo}: {str(error).splitlines()[0]}; the merged model is "
                        f"whole in {folder}. Set HF_TOKEN to a token that may write there") from None  # fmt: skip
    say(f"pushed to {url}")


def _say(report: PatchReport, what: str) -> None:
    still = [name for name, change in report.changes.items() if change.moved == 0]
    say(f"merged {what} into {report.out}: {report.tensors_changed} tensors changed, "
        f"{report.tensors_copied} copied byte for byte, {report.bytes / 2**20:,.1f} MiB in {report.seconds:.1f} s, "
        f"peak memory {report.peak_rss_mib:,.0f} MiB")  # fmt: skip
    if report.resumed:
        say(f"note: {len(report.resumed)} shards were there, finished, from an attempt that was interrupted")
    if still:
        say(f"note: {len(still)} tensors took an update too small to move any of their elements: {', '.join(still)}")
    if report.left_out:
        say(f"note: left out of {report.out} (weights of the base in other formats): {', '.join(report.left_out)}")
