"""The run that hand_over.py prepared, by TRL's SFTTrainer, PEFT and (under `accelerate launch`) FSDP2.

    accelerate launch --config_file recipes/gpu_baseline/h100x2.yaml recipes/gpu_baseline/train.py RUN_DIR

Rows, masks, first adapter and learning rates are given; model, loss, optimizer and parallelism are TRL's, PEFT's and
torch's own. It leaves config.yaml, metrics.jsonl, summary.json, report.html and adapter/, a PEFT folder. No JAX.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from batches import Sheets, loader_of, split
from hand_over import RECORD, START

from gemma_tpu import __version__
from gemma_tpu.cli import run_script
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import chips
from gemma_tpu.pages import report
from gemma_tpu.run import metrics, runs
from gemma_tpu.run.metrics import say
from gemma_tpu.schema import Config

try:
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
except ImportError as error:
    print(f"error: {error.name} is not installed: pip install 'gemma_tpu[baseline]'", file=sys.stderr)
    sys.exit(2)

GIB = 2**30
UNCLIPPED = 1e30  # for optim.clip: null; without any bound the trainer would not report the norm


class Baseline(trl.SFTTrainer):
    """TRL's trainer on a table of learning rates: its own cosine starts at rate zero, a step behind ours."""

    rates: list[float] = []

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            rates = self.rates
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda update: rates[min(update, len(rates) - 1)] / max(rates)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler


class Journal(TrainerCallback):
    """metrics.jsonl, with the keys of a run of ours."""

    def __init__(self, run: runs.RunFolder, config: Config, sheets: Sheets, record: dict[str, Any], updates: int,
                 devices: int, rows: int):  # fmt: skip
        self.run, self.config, self.sheets, self.record = run, config, sheets, record
        self.devices, self.rows = devices, rows
        self.begun = self.last = time.monotonic()
        self._file, self._lines, self._updates = None, None, updates
        kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        place = chips.of_devices(kind, devices)
        self.kind, self.usd = kind, config.log.usd_per_hour or (place.usd if place else None)
        self.peak = place.chip.device_bf16_tflops * 1e12 * devices if place else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._file = metrics.Journal(self.run.metrics, 0)
            self._lines = metrics.Progress(self._updates, 0, self.config.log.every, self.config.log.progress)
        self.begun = self.last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if self._file is None or "grad_norm" not in logs:
            return
        now, update = time.monotonic(), state.global_step - 1
        seconds, self.last = now - self.last, now
        counts = self.sheets.counts(update)
        row = {"step": update + 1, "loss": logs["loss"], "lr": self.record["rates"][update],
               "grad_norm": logs["grad_norm"], "skipped": 0, **counts}  # fmt: skip
        row |= {"tokens_per_s": round(counts["tokens"] / seconds, 1), "step_s": round(seconds, 5),
                "padding": round(1 - counts["tokens"] / self.sheets.positions(update, self.rows), 4)}  # fmt: skip
        if self.peak:
            row["mfu"] = round(counts["tokens"] * self.record["flops_per_token"] / seconds / self.peak, 4)
        if torch.cuda.is_available():
            row["memory_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
        row["host_gib"] = round(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / GIB, 4)
        if self.usd:
            row["usd"] = round((now - self.begun) / 3600 * self.usd, 4)
        self._file.write(row)
        self._lines.update(row)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._file is not None:
            self._file.close()
            self._lines.close()


def model_of(config: Config, start: Path) -> peft.PeftModel:
    """The published class as transformers loads it, with our first A and B on it. PEFT's adapter_config.json names the
    text tower's projections alone, so nothing of a vision tower trains; adapters are float32 beside any base."""
    base = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=getattr(torch, config.model.dtype), attn_implementation="sdpa", trust_remote_code=False
    )
    settings = peft.PeftConfig.from_pretrained(start)
    settings.lora_dropout, settings.inference_mode = config.lora.dropout, False
    return peft.PeftModel.from_pretrained(base, start, config=settings, is_trainable=True)


def arguments_of(
    config: Config, run: runs.RunFolder, rates: list[float], updates: int, rows: int, accumulation: int
) -> trl.SFTConfig:
    optim, cuda = config.optim, torch.cuda.is_available()
    return trl.SFTConfig(
        output_dir=str(run.path / "trainer"), max_steps=updates,
        per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
        optim="adamw_torch", learning_rate=max(rates), weight_decay=optim.weight_decay,
        adam_beta1=0.9 if optim.b1 is None else optim.b1, adam_beta2=0.999 if optim.b2 is None else optim.b2,
        adam_epsilon=1e-8 if optim.eps is None else optim.eps, max_grad_norm=optim.clip or UNCLIPPED,
        # A bfloat16 base computes in it, adapters included, and keeps them in float32: so does the other side.
        bf16=config.model.dtype == "bfloat16", use_cpu=not cuda,
        gradient_checkpointing=config.train.remat != "none", router_aux_loss_coef=0.0,
        # Rows come ready and in order; one line a step, nothing saved on the way, no account anywhere.
        dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential", packing=False,
        max_length=None, remove_unused_columns=False, dataloader_pin_memory=cuda, logging_steps=1,
        logging_nan_inf_filter=False, save_strategy="no", report_to=[], disable_tqdm=True, seed=config.train.seed,
    )  # fmt: skip


def collator(sheets: Sheets) -> Any:
    def collate(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        batch = sheets.take([item["sheet"] for item in items])
        return {name: torch.from_numpy(leaf.copy()) for name, leaf in batch.items()}

    return collate


def set_sharding(trainer: Baseline) -> None:
    """Each layer that is there is a unit: the class also names layers of towers that this size has not, and accelerate
    would look for those. Gradients are summed in float32, as ours; accelerate would do it as it computes."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    there = {type(module).__name__ for module in trainer.model.modules()}
    plugin.transformer_cls_names_to_wrap = sorted(there & set(trainer.model._no_split_modules))
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def save_adapter(model: torch.nn.Module, folder: Path, first: bool) -> None:
    """Only what trains is gathered: a whole state dict of 31B would be made in the host's memory for nothing."""
    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            if first:
                whole[name] = value.cpu()
    if first:
        model.save_pretrained(str(folder), state_dict=whole)


def main(run_dir: Path, updates: int | None) -> dict[str, Any]:
    transformers.logging.set_verbosity_error()
    config, run = runs.read_config(run_dir), runs.RunFolder(run_dir)
    if not (run_dir / RECORD).exists():
        raise UserError(f"{run_dir}: not prepared; first run hand_over.py CONFIG run_dir={run_dir}")
    if run.metrics.exists():
        raise UserError(f"{run.metrics} exists: the baseline does not resume; prepare another run_dir")
    record, loader = json.loads((run_dir / RECORD).read_text()), loader_of(config)
    if loader.plan != record["plan"]:
        raise UserError(f"the rows here give another plan than was handed over:\n  {loader.plan}\n  {record['plan']}")
    updates = min(updates or record["steps"], record["steps"])
    devices = int(os.environ.get("WORLD_SIZE", 1))
    rows, accumulation = split(config, devices)
    sheets = Sheets(loader)
    journal = Journal(run, config, sheets, record, updates, devices, rows)
    arguments = arguments_of(config, run, record["rates"], updates, rows, accumulation)
    Baseline.rates = record["rates"]
    trainer = Baseline(
        model_of(config, run_dir / START), args=arguments, data_collator=collator(sheets), callbacks=[journal],
        train_dataset=Dataset.from_dict({"sheet": list(range(updates * loader.batch_size))}),
        processing_class=AutoTokenizer.from_pretrained(config.model.path),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    # Gemma's class says that its own loss takes no count of targets. TRL's does: without it each device, and each
    # micro-batch, would weigh the same however few targets it has.
    trainer.model_accepts_loss_kwargs = True
    set_sharding(trainer)
    first = trainer.is_world_process_zero()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if first:
        say(f"{journal.kind} x {devices}: {rows} rows at once on each, {accumulation} micro-batches an update, "
            f"{trainable:,} parameters train")  # fmt: skip
    trainer.train()
    save_adapter(trainer.model, run_dir / "adapter", first)
    return finish(run, journal, trainable) if first else {}


def finish(run: runs.RunFolder, journal: Journal, trainable: int) -> dict[str, Any]:
    rows = metrics.read(run.metrics)
    names = {"trl": trl, "peft": peft, "transformers": transformers, "torch": torch}
    summary = {
        "steps": len(rows), "device_kind": journal.kind, "devices": journal.devices, "hosts": 1,
        "mesh": {"fsdp": journal.devices}, "loss": rows[-1]["loss"], "held_out_loss": {},
        "tokens": sum(row["tokens"] for row in rows), "target_tokens": sum(row["target_tokens"] for row in rows),
        "seconds": round(sum(row["step_s"] for row in rows), 2), "trainable_params": trainable,
        "usd": rows[-1].get("usd"), "notes": journal.record["notes"], "plan": journal.record["plan"],
        "version": __version__, "framework": ", ".join(f"{name} {one.__version__}" for name, one in names.items()),
    }  # fmt: skip
    runs.write_text(run.summary, json.dumps(summary, indent=1) + "\n")
    report.write(run)
    say(f"done: {len(rows)} updates; {run.path}/ holds metrics.jsonl, report.html and adapter/")
    return summary


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run_dir that hand_over.py has filled")
    parser.add_argument("--updates", metavar="N", type=int, help="stop after so many; the rates are those of all")
    given = parser.parse_args()
    sys.exit(run_script(main, given.run_dir, given.updates))
